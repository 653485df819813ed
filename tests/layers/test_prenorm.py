"""What a pre-norm branch keeps for the backward pass, and that its gradients are those of the plain form."""

import pytest
import torch
from torch import nn

from recbole_holo.layers import Mamba, Mamba2
from recbole_holo.layers.feed_forward import FeedForward, SwiGLU
from recbole_holo.layers.prenorm import prenorm
from recbole_holo.tracing import CpuPeak

BRANCHES = {
    "Mamba": lambda: Mamba(64),
    "Mamba-2": lambda: Mamba2(64, d_state=16, headdim=32),
    "feed-forward": lambda: FeedForward(64, 128),
    "gated": lambda: SwiGLU(64, 128),
    "PyTorch's": lambda: nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)),
    "square": lambda: nn.Bilinear(64, 64, 64),
}


def both(kind, dtype=torch.float32):
    torch.manual_seed(0)
    branch, norm = BRANCHES[kind]().to(dtype), nn.LayerNorm(64, dtype=dtype)
    nn.init.normal_(norm.weight)
    h = torch.randn(3, 37, 64, dtype=dtype, requires_grad=True)
    call = (lambda x: branch(x, x)) if kind == "square" else branch
    return branch, norm, call, h


@pytest.mark.parametrize("kind", BRANCHES)
def test_gradients_are_those_of_the_plain_form(kind):
    branch, norm, call, h = both(kind)
    parameters = [h, *norm.parameters(), *branch.parameters()]
    plain, saving = call(norm(h)), prenorm(norm, call, h)
    assert torch.equal(plain, saving)
    gout = torch.randn_like(plain)
    wanted = torch.autograd.grad(plain, parameters, gout)
    for found, expected in zip(torch.autograd.grad(saving, parameters, gout), wanted, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["Mamba", "feed-forward", "gated"])
def test_the_norms_output_is_not_kept(kind):
    """Beside what the plain form holds between the passes, one tensor as large as ``h`` is missing."""
    _, norm, call, h = both(kind)
    held = []
    for form in (lambda: call(norm(h)), lambda: prenorm(norm, call, h)):
        form()  # lets what is made once be made
        out, balance = None, CpuPeak()
        balance.change(("forward", "all"))
        with balance:
            out = form()
            balance.change(("after", "all"))
            torch.empty(0)
        held.append(balance.peaks[("after", "all")])
        del out
    assert held[0] - held[1] >= 4 * h.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_gradients(dtype):
    _, norm, call, h = both("Mamba", dtype)
    with torch.no_grad():
        assert torch.equal(prenorm(norm, call, h), call(norm(h)))
