from collections.abc import Iterator
from functools import partial

import pytest
import torch
from torch import Tensor

from recbole_holo.errors import ConfigError
from recbole_holo.ops import backend, state_space_dual, state_space_dual_with_state
from recbole_holo.ops.selective_scan import selective_scan_reference
from recbole_holo.ops.state_space_dual import state_space_dual_reference

NAMES = ("x", "dt", "A", "B", "C", "D", "dt_bias")


def ssd_inputs(batch: int, length: int, heads: int, width: int, groups: int, order: int) -> list[Tensor]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    step = torch.exp(torch.empty(heads, dtype=torch.float64).uniform_(-6.9, -2.3))
    return [
        draw(batch, length, heads, width),
        0.5 * draw(batch, length, heads),
        -torch.empty(heads, dtype=torch.float64).uniform_(1, 16),
        draw(batch, length, groups, order),
        draw(batch, length, groups, order),
        1 + 0.1 * draw(heads),
        step + torch.log(-torch.expm1(-step)),
    ]


@pytest.fixture(autouse=True, params=["native", "torch"])
def _form(request) -> Iterator[None]:
    """Each test runs on the C++ kernels, and on the products that run without a compiler."""
    with backend.excluding(*["native"] * (request.param == "torch")):
        yield
        used = {form for (op, _, dtype), form in backend._chosen.items() if dtype.itemsize < 8}
    assert used <= {request.param, "reference"}


@pytest.mark.parametrize("length", [1, 2, 3, 7, 16, 33, 64, 65, 200])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_lengths_and_groups(compare, length, groups):
    compare(state_space_dual, state_space_dual_reference, ssd_inputs(2, length, 4, 5, groups, 8))


@pytest.mark.parametrize(("heads", "width", "groups", "order"), [(8, 16, 4, 64), (2, 64, 1, 64), (3, 20, 3, 17)])
def test_widths(compare, heads, width, groups, order):
    compare(state_space_dual, state_space_dual_reference, ssd_inputs(2, 77, heads, width, groups, order))


def test_long_sequence(compare):
    compare(state_space_dual, state_space_dual_reference, ssd_inputs(1, 2048, 2, 4, 1, 8))


@pytest.mark.parametrize("chunk_size", [1, 5, 16, 1000])
def test_chunk_size_changes_nothing(compare, chunk_size):
    chunked = partial(state_space_dual, chunk_size=chunk_size)
    compare(chunked, state_space_dual_reference, ssd_inputs(2, 37, 2, 3, 1, 4))


@pytest.mark.parametrize("step", [30.0, 1e-4])
def test_extreme_step_sizes(compare, step):
    inputs = ssd_inputs(2, 100, 2, 4, 1, 8)
    inputs[6] = torch.full_like(inputs[6], step).expm1().clamp(max=1e12).log()
    compare(state_space_dual, state_space_dual_reference, inputs)


def test_small_decays_behind_a_large_step(compare):
    """Decays are differences of running sums: one step of 30 must not cost those behind it their precision."""
    inputs = ssd_inputs(2, 64, 2, 4, 1, 8)
    inputs[1][:, 3] = 30.0
    compare(state_space_dual, state_space_dual_reference, inputs)


@pytest.mark.parametrize("missing", [("D",), ("dt_bias",), ("D", "dt_bias")])
@pytest.mark.parametrize("softplus", [True, False])
def test_missing_arguments(compare, missing, softplus):
    inputs = ssd_inputs(2, 21, 2, 3, 1, 5)
    if not softplus:
        inputs[1], inputs[6] = inputs[1].abs(), inputs[6].abs()  # step sizes as they are
    inputs = [None if name in missing else t for name, t in zip(NAMES, inputs, strict=True)]
    options = {"dt_softplus": softplus}
    compare(partial(state_space_dual, **options), partial(state_space_dual_reference, **options), inputs)


def test_is_a_selective_scan_with_one_decay_a_head():
    x, dt, A, B, C, D, bias = ssd_inputs(2, 9, 3, 4, 1, 5)
    expected = selective_scan_reference(
        x.flatten(2),
        dt.repeat_interleave(4, -1),
        A.repeat_interleave(4).unsqueeze(-1).expand(-1, 5),
        B[:, :, 0],
        C[:, :, 0],
        D.repeat_interleave(4),
        delta_bias=bias.repeat_interleave(4),
        delta_softplus=True,
    )
    torch.testing.assert_close(state_space_dual_reference(x, dt, A, B, C, D, bias).flatten(2), expected)


@pytest.mark.parametrize(("threads", "groups"), [(1, 2), (3, 2), (3, 1), (9, 1)])
@pytest.mark.parametrize("length", [1, 37, 130])
def test_from_a_state_to_a_state(compare, threads, groups, length):
    """Values and gradients of both, also where the heads of a group have to be shared out to feed the threads."""
    inputs = ssd_inputs(1, length, 4, 5, groups, 6)
    initial = torch.randn(1, 4, 5, 6, dtype=torch.float64)

    def run(*arguments):
        *given, initial = arguments
        y, last = state_space_dual_with_state(*given, initial_state=initial)
        return torch.cat([y.flatten(), last.flatten().to(y.dtype)])

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        compare(run, run, [*inputs, initial])
    finally:
        torch.set_num_threads(before)


def test_parts_of_a_sequence_give_the_whole():
    x, dt, A, B, C, D, bias = (t.float() for t in ssd_inputs(2, 150, 4, 5, 2, 6))
    state, outputs = None, []
    for part in torch.arange(150).split([1, 3, 80, 66]):
        y, state = state_space_dual_with_state(
            x[:, part], dt[:, part], A, B[:, part], C[:, part], D, bias, initial_state=state
        )
        outputs.append(y)
    expected = state_space_dual_reference(*(t.double() for t in (x, dt, A, B, C, D, bias)))
    torch.testing.assert_close(torch.cat(outputs, 1).double(), expected, rtol=1e-5, atol=1e-5)


def test_slow_decays_do_not_drift():
    """A state that hardly decays is the same after 20,000 steps: rounding of the decay must not have a direction."""
    x, dt, B = torch.zeros(1, 20_000, 2, 4), torch.full((1, 20_000, 2), 1e-3), torch.ones(1, 20_000, 1, 4)
    initial = torch.ones(1, 2, 4, 4)
    _, last = state_space_dual_with_state(
        x, dt, torch.full((2,), -1e-7), B, B, dt_softplus=False, initial_state=initial
    )
    torch.testing.assert_close(last, initial, rtol=1e-5, atol=0)


def test_slices_of_one_projection(compare):
    """As the block passes them: rows further apart than they are wide."""

    def sliced(function):
        def call(xbc, dt, A):
            x, B, C = xbc.split([12, 8, 8], -1)
            return function(x.unflatten(-1, (4, 3)), dt[..., 1:], A, B.unflatten(-1, (2, 4)), C.unflatten(-1, (2, 4)))

        return call

    inputs = [torch.randn(2, 20, 28), torch.randn(2, 20, 5) - 2, -torch.rand(4)]
    compare(sliced(state_space_dual), sliced(state_space_dual_reference), inputs)


def test_gradients_do_not_depend_on_what_needs_one():
    inputs = [t.float() for t in ssd_inputs(3, 30, 4, 5, 2, 6)]
    every = [t.clone().requires_grad_() for t in inputs]
    one = [t.clone().requires_grad_(i == 2) for i, t in enumerate(inputs)]
    (expected,) = torch.autograd.grad(state_space_dual(*every).sum(), [every[2]])
    (found,) = torch.autograd.grad(state_space_dual(*one).sum(), [one[2]])
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        torch.testing.assert_close(state_space_dual(*every), state_space_dual(*inputs))


def test_right_pads_change_nothing():
    inputs = [t.float() for t in ssd_inputs(2, 50, 2, 4, 2, 4)]
    short = [t[:, :33] if i in (0, 1, 3, 4) else t for i, t in enumerate(inputs)]
    torch.testing.assert_close(state_space_dual(*inputs)[:, :33], state_space_dual(*short), rtol=1e-5, atol=1e-5)
    padded = [t.clone() for t in inputs]
    for i in (0, 1, 3, 4):
        padded[i][:, 33:] = 1e3
    torch.testing.assert_close(state_space_dual(*padded)[:, :33], state_space_dual(*inputs)[:, :33], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["auto", "reference"])
def test_half_precision_is_computed_in_float32(name):
    backend.set_backend(name)
    inputs = [t.bfloat16() for t in ssd_inputs(2, 40, 2, 4, 1, 4)]
    with torch.autocast("cpu", torch.bfloat16):
        y = state_space_dual(*inputs)
    assert y.dtype == torch.bfloat16
    expected = state_space_dual_reference(*(t.double() for t in inputs))
    torch.testing.assert_close(y.double(), expected, rtol=8e-3, atol=1e-3)


def test_groups_must_divide_the_heads():
    with pytest.raises(ConfigError, match=r"ngroups: 2 .*number of heads, 3"):
        state_space_dual(*ssd_inputs(1, 2, 3, 2, 2, 2))
