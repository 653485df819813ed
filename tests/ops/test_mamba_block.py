import pytest
import torch
import torch.nn.functional as F

from recbole_holo.ops import (
    MambaState,
    MambaWeights,
    gated_rms_norm,
    mamba2_inner,
    mamba_block,
    mamba_block_with_state,
)


def mamba_arguments(length: int, d_model=5, d_inner=10, order=3, rank=2, width=4, batch=3) -> list[torch.Tensor]:
    return [
        torch.randn(batch, length, d_model),
        torch.randn(2 * d_inner, d_model) / d_model**0.5,
        torch.randn(2 * d_inner),
        torch.randn(d_inner, width),
        torch.randn(d_inner),
        torch.randn(rank + 2 * order, d_inner) / d_inner**0.5,
        torch.randn(d_inner, rank),
        torch.randn(d_inner) - 3,
        -torch.rand(d_inner, order) * 8,
        torch.randn(d_inner),
        torch.randn(d_model, d_inner) / d_inner**0.5,
        torch.randn(d_model),
    ]


def mamba(hidden: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
    return mamba_block(hidden, MambaWeights(*weights))


def mamba2_arguments(length: int) -> list[torch.Tensor]:
    """d_inner 12, headdim 3, 4 heads, 2 groups, N 5."""
    channels = 12 + 2 * 2 * 5
    return [
        torch.randn(2, length, 12 + channels + 4),
        torch.randn(channels, 4),
        torch.randn(channels),
        torch.randn(4) - 3,
        -torch.rand(4) * 8,
        torch.randn(4),
        torch.randn(12),
    ]


def mamba2(*arguments: torch.Tensor, norm_before_gate: bool = False) -> torch.Tensor:
    return mamba2_inner(
        *arguments, 1e-5, headdim=3, ngroups=2, d_state=5, chunk_size=8, norm_before_gate=norm_before_gate
    )


SHAPES = {
    "nothing fills a vector": {"d_model": 5, "d_inner": 10, "order": 3},
    "everything does": {"d_model": 16, "d_inner": 32, "order": 16},
    "wider than a panel": {"d_model": 80, "d_inner": 160, "order": 20, "rank": 5},
    "short convolution": {"width": 2},
}


@pytest.mark.parametrize("length", [1, 3, 16, 33, 130])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_mamba_block(compare, length, shape):
    compare(mamba, mamba, mamba_arguments(length, **shape))


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_parts_of_a_sequence_give_the_whole(batch, shape):
    hidden, *weights = mamba_arguments(150, batch=batch, **shape)
    block, state, outputs = MambaWeights(*weights), None, []
    for part in hidden.split([1, 2, 70, 64, 13], 1):
        out, state = mamba_block_with_state(part, block, state)
        outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, 1), mamba_block(hidden, block), rtol=1e-4, atol=1e-5)


def test_gradients_of_a_part_are_those_with_its_state_held_fixed(compare):
    hidden, *weights = mamba_arguments(20, d_model=16, d_inner=32)
    _, state = mamba_block_with_state(hidden, MambaWeights(*weights), None)

    def run(hidden, *weights):
        held = MambaState(*(t.to(hidden.dtype) for t in state))
        return mamba_block_with_state(hidden, MambaWeights(*weights), held)[0]

    compare(run, run, [hidden, *weights])


@pytest.mark.parametrize("length", [1, 3, 33])
@pytest.mark.parametrize("norm_before_gate", [False, True])
def test_mamba2_inner(compare, length, norm_before_gate):
    def run(*arguments):
        return mamba2(*arguments, norm_before_gate=norm_before_gate)

    compare(run, run, mamba2_arguments(length), rtol=2e-5)


def test_norm_is_taken_group_by_group():
    y, z, weight = torch.randn(4, 7, 12), torch.randn(4, 7, 12), torch.randn(12)
    gated = y * F.silu(z)
    halves = [F.rms_norm(part, (6,), eps=1e-5) for part in gated.chunk(2, -1)]
    torch.testing.assert_close(gated_rms_norm(y, z, weight, 1e-5, ngroups=2), torch.cat(halves, -1) * weight)
    expected = F.rms_norm(y, (12,), weight, 1e-5) * F.silu(z)
    torch.testing.assert_close(gated_rms_norm(y, z, weight, 1e-5, norm_before_gate=True), expected)
