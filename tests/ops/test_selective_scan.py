import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

import recbole_holo
from recbole_holo.ops import backend, native, selective_scan, selective_scan_with_state
from recbole_holo.ops.selective_scan import selective_scan_reference

LENGTHS = (1, 2, 3, 7, 33, 64, 65, 200)
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias")


def scan_inputs(batch: int, length: int, width: int, order: int) -> list[Tensor]:
    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64)

    rates = torch.arange(1, order + 1, dtype=torch.float64).expand(width, order)
    step = torch.exp(torch.empty(width, dtype=torch.float64).uniform_(-6.9, -2.3))
    return [
        draw(batch, length, width),
        0.5 * draw(batch, length, width),
        -rates * torch.exp(0.1 * draw(width, order)),
        draw(batch, length, order),
        draw(batch, length, order),
        1 + 0.1 * draw(width),
        draw(batch, length, width),
        step + torch.log(-torch.expm1(-step)),
    ]


@pytest.fixture(autouse=True, params=["native", "numba"])
def _form(request, monkeypatch):
    """Each test runs on both CPU forms."""
    monkeypatch.setattr(backend, "_chosen", {})
    if request.param == "numba":
        monkeypatch.setattr(native, "problem", lambda: "no compiler in this test")
    yield
    used = [form for (op, _, dtype), form in backend._chosen.items() if op == "selective_scan" and dtype.itemsize < 8]
    assert set(used) <= {request.param, "reference"}


softplus_scan = partial(selective_scan, delta_softplus=True)
softplus_reference = partial(selective_scan_reference, delta_softplus=True)


def by_hand(u, delta, A, B, C, D, z, delta_bias) -> Tensor:
    """The recurrence of the paper, one number at a time."""
    y = torch.zeros_like(u)
    for b in range(u.shape[0]):
        for d in range(u.shape[2]):
            h = torch.zeros(A.shape[1], dtype=u.dtype)
            for t in range(u.shape[1]):
                step = torch.log1p(torch.exp(delta[b, t, d] + delta_bias[d]))
                h = torch.exp(step * A[d]) * h + step * B[b, t] * u[b, t, d]
                gate = z[b, t, d]
                y[b, t, d] = ((C[b, t] * h).sum() + D[d] * u[b, t, d]) * gate / (1 + torch.exp(-gate))
    return y


def test_reference_is_the_recurrence_of_the_paper():
    inputs = scan_inputs(2, 5, 3, 4)
    torch.testing.assert_close(softplus_reference(*inputs), by_hand(*inputs))


def test_gradients_of_the_reference():
    inputs = [t.requires_grad_() for t in scan_inputs(2, 3, 3, 2)]
    assert torch.autograd.gradcheck(softplus_reference, inputs)


@pytest.mark.parametrize("length", LENGTHS)
def test_lengths(compare, length):
    compare(softplus_scan, softplus_reference, scan_inputs(3, length, 40, 16))


def test_long_sequence(compare):
    compare(softplus_scan, softplus_reference, scan_inputs(2, 2048, 8, 16))


@pytest.mark.parametrize("width", [1, 5, 127, 128, 129, 300])
def test_any_width(compare, width):
    compare(softplus_scan, softplus_reference, scan_inputs(2, 19, width, 4))


@pytest.mark.parametrize("order", [1, 3, 32, 256])
def test_any_state_size(compare, order):
    compare(softplus_scan, softplus_reference, scan_inputs(2, 18, 6, order))


@pytest.mark.parametrize("missing", [("D",), ("z",), ("delta_bias",), ("D", "z", "delta_bias")])
@pytest.mark.parametrize("softplus", [True, False])
def test_missing_arguments(compare, missing, softplus):
    inputs = scan_inputs(2, 21, 9, 5)
    if not softplus:
        inputs[1], inputs[7] = inputs[1].abs(), inputs[7].abs()  # step sizes as they are
    inputs = [None if name in missing else t for name, t in zip(NAMES, inputs, strict=True)]
    compare(
        partial(selective_scan, delta_softplus=softplus),
        partial(selective_scan_reference, delta_softplus=softplus),
        inputs,
    )


@pytest.mark.parametrize("step", [30.0, 1e-4])
def test_extreme_step_sizes(compare, step):
    inputs = scan_inputs(2, 40, 12, 8)
    inputs[7] = torch.full_like(inputs[7], step).expm1().clamp(max=1e12).log()
    compare(softplus_scan, softplus_reference, inputs)


def test_strided_inputs(compare):
    """Slices of one projection, as the block passes them, and a gate that shares no layout."""

    def sliced(function):
        def call(xz, dbc, A, D, bias):
            x, z = xz.chunk(2, -1)
            delta, B, C = dbc.split([10, 4, 4], -1)
            first = function(x, delta, A, B, C, D, z, bias)
            return function(first, delta, A, B, C, D, z.transpose(0, 1).contiguous().transpose(0, 1), bias)

        return call

    u, _, A, _, _, D, _, bias = scan_inputs(3, 20, 10, 4)
    inputs = [torch.cat([u, u.flip(1)], -1), torch.randn(3, 20, 18, dtype=torch.float64), A, D, bias]
    compare(sliced(softplus_scan), sliced(softplus_reference), inputs)


@pytest.mark.parametrize("threads", [1, 3])
def test_from_a_state_to_a_state(compare, threads):
    """Values and gradients of both, also where channels have to be shared out to feed the threads."""
    *inputs, D, z, bias = scan_inputs(2, 37, 40, 5)
    initial = torch.randn(2, 40, 5, dtype=torch.float64)

    def run(*arguments):
        *given, initial = arguments
        y, last = selective_scan_with_state(*given, delta_softplus=True, initial_state=initial)
        return torch.cat([y, last.transpose(1, 2).to(y.dtype)], 1)

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        compare(run, run, [*inputs, D, z, bias, initial])
    finally:
        torch.set_num_threads(before)


def test_parts_of_a_sequence_give_the_whole():
    u, delta, A, B, C, D, z, bias = (t.float() for t in scan_inputs(2, 150, 20, 6))
    state, outputs = None, []
    for part in torch.arange(150).split([1, 3, 80, 66]):
        timed = [t[:, part] for t in (u, delta)], [t[:, part] for t in (B, C)]
        y, state = selective_scan_with_state(
            *timed[0], A, *timed[1], D, z[:, part], bias, delta_softplus=True, initial_state=state
        )
        outputs.append(y)
    expected = softplus_reference(*(t.double() for t in (u, delta, A, B, C, D, z, bias)))
    torch.testing.assert_close(torch.cat(outputs, 1).double(), expected, rtol=1e-5, atol=1e-5)


def test_slow_decays_do_not_drift():
    """A state that hardly decays is the same after 20,000 steps: rounding of the decay must not have a direction."""
    length, A = 20_000, torch.full((16, 4), -1e-7)
    u, delta = torch.zeros(1, length, 16), torch.full((1, length, 16), 1e-3)
    B, C = torch.ones(1, length, 4), torch.ones(1, length, 4)
    _, last = selective_scan_with_state(u, delta, A, B, C, initial_state=torch.ones(1, 16, 4))
    torch.testing.assert_close(last, torch.ones(1, 16, 4), rtol=1e-5, atol=0)


def test_right_pads_change_nothing():
    inputs = [t.float() for t in scan_inputs(4, 30, 20, 8)]
    padded = [t.clone() for t in inputs]
    for i in (0, 1, 3, 4, 6):
        padded[i][:, 17:] = 1e3
    torch.testing.assert_close(softplus_scan(*padded)[:, :17], softplus_scan(*inputs)[:, :17], rtol=0, atol=0)


def test_gradients_do_not_depend_on_what_needs_one():
    inputs = [t.float() for t in scan_inputs(3, 10, 6, 4)]
    every = [t.clone().requires_grad_() for t in inputs]
    one = [t.clone().requires_grad_(i == 2) for i, t in enumerate(inputs)]
    (expected,) = torch.autograd.grad(softplus_scan(*every).sum(), [every[2]])
    (found,) = torch.autograd.grad(softplus_scan(*one).sum(), [one[2]])
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        torch.testing.assert_close(softplus_scan(*every), softplus_scan(*inputs))


def test_not_a_number_is_not_hidden():
    for i in (0, 1, 6):
        inputs = [t.float() for t in scan_inputs(1, 6, 4, 2)]
        inputs[i][0, 3, 2] = torch.nan
        assert softplus_scan(*inputs)[0, 3, 2].isnan()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["auto", "reference"])
def test_half_precision_is_computed_in_float32(dtype, name):
    backend.set_backend(name)
    inputs = [t.to(dtype) for t in scan_inputs(2, 40, 6, 4)]
    with torch.autocast("cpu", torch.bfloat16):
        y = softplus_scan(*inputs)
    expected = softplus_reference(*(t.double() for t in inputs))
    assert y.dtype == dtype
    torch.testing.assert_close(y.double(), expected, rtol=8e-3, atol=1e-3)


def test_double_precision_takes_the_reference():
    inputs = scan_inputs(2, 4, 3, 2)
    y = softplus_scan(*inputs)
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, softplus_reference(*inputs), rtol=0, atol=0)


def test_threads_are_those_of_torch():
    inputs = [t.float() for t in scan_inputs(3, 4, 3, 2)]
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            results.append(softplus_scan(*inputs))
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    torch.testing.assert_close(results[0], results[1])


def test_numba_is_imported_on_use_only():
    code = "import sys, recbole_holo.ops, recbole_holo.layers; print('numba' in sys.modules)"
    root = Path(recbole_holo.__file__).parents[1]
    run = subprocess.run([sys.executable, "-c", code], cwd=root, check=True, capture_output=True, text=True)
    assert run.stdout.strip() == "False"
