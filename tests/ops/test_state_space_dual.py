from functools import partial

import pytest
import torch
from torch import Tensor

from recbole_holo.errors import ConfigError
from recbole_holo.ops import backend, state_space_dual
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


@pytest.mark.parametrize("length", [1, 2, 3, 7, 33, 64, 65, 200])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_lengths_and_groups(compare, length, groups):
    compare(state_space_dual, state_space_dual_reference, ssd_inputs(2, length, 4, 5, groups, 8))


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
