import pytest
import torch
import torch.nn.functional as F

from recbole_holo.ops import gated_rms_norm, mamba2_inner, mamba_inner


def mamba_arguments(length: int) -> list[torch.Tensor]:
    """d_model 5, d_inner 10, N 3, dt_rank 2."""
    return [
        torch.randn(2, length, 20),
        torch.randn(10, 4),
        torch.randn(10),
        torch.randn(8, 10),
        torch.randn(10, 2),
        torch.randn(10) - 3,
        torch.randn(5, 10),
        torch.randn(5),
        -torch.rand(10, 3) * 8,
        torch.randn(10),
    ]


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


@pytest.mark.parametrize("length", [1, 3, 33])
def test_mamba_inner(compare, length):
    compare(mamba_inner, mamba_inner, mamba_arguments(length), rtol=2e-5)


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
