"""The fused feed-forward layer: values and gradients against a float64 reference."""

import pytest
import torch
import torch.nn.functional as F

from recbole_holo.ops import backend, native
from recbole_holo.ops.feed_forward import FeedForwardWeights, feed_forward


def drawn(rows, d=64, inner=96, gated=False, bias=True):
    torch.manual_seed(sum(rows))
    height = 2 * inner if gated else inner
    x, up, down = torch.randn(*rows, d), torch.randn(height, d) * 0.3, torch.randn(d, inner) * 0.3
    biases = (torch.randn(height), torch.randn(d)) if bias else (None, None)
    return x, FeedForwardWeights(up, biases[0], down, biases[1])


def in_float64(x, weights, gated, keep=1.0):
    hidden = F.linear(x, weights.up, weights.up_bias)
    if gated:
        gate, value = hidden.chunk(2, -1)
        hidden = gate * torch.sigmoid(gate) * value
    else:
        hidden = hidden * 0.5 * (1 + torch.erf(hidden / 2**0.5))
    return F.linear(hidden * keep, weights.down, weights.down_bias)


def leaves(x, weights, dtype):
    made = [None if t is None else t.to(dtype).requires_grad_() for t in (x, *weights)]
    return made[0], FeedForwardWeights(*made[1:])


def gradients(out, x, weights, gout):
    wanted = [t for t in (x, *weights) if t is not None]
    return torch.autograd.grad((out * gout).sum(), wanted)


def assert_close(found, wanted, tolerance=1e-5):
    for got, expected in zip(found, wanted, strict=True):
        error = (got.double() - expected).norm() / expected.norm().clamp_min(1e-30)
        assert error < tolerance, error


@pytest.mark.parametrize("rows", [(1, 1), (3, 1), (97,), (2, 95), (7, 101)])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients(rows, gated, bias):
    given = drawn(rows, gated=gated, bias=bias)
    (x, weights), (x64, weights64) = leaves(*given, torch.float32), leaves(*given, torch.float64)
    out, out64 = feed_forward(x, weights, gated), in_float64(x64, weights64, gated)
    assert out.shape == x.shape
    gout = torch.randn(out.shape)
    assert_close([out, *gradients(out, x, weights, gout)], [out64, *gradients(out64, x64, weights64, gout.double())])


def test_gelu_far_from_zero():
    """Also where Φ is 0 or 1, and at 0: W_1 and W_2 are identities, so the output is the activation."""
    x = torch.cat([torch.linspace(-12, 12, 4001)[:, None], torch.zeros(4001, 63)], 1).requires_grad_()
    weights = FeedForwardWeights(torch.eye(64), None, torch.eye(64), None)
    out = feed_forward(x, weights)
    (slope,) = torch.autograd.grad(out.sum(), x)
    x64 = x.detach().double().requires_grad_()
    wanted = F.gelu(x64)
    (wanted_slope,) = torch.autograd.grad(wanted.sum(), x64)
    torch.testing.assert_close(out.double(), wanted, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(slope.double(), wanted_slope, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("gated", [False, True])
def test_dropout_inside_has_one_mask_in_both_passes(gated):
    """With W_2 the identity the output shows the mask, and the gradients must be those of that mask."""
    x, weights = drawn((50, 7), d=64, inner=64, gated=gated, bias=False)
    weights = weights._replace(down=torch.eye(64))
    x32, w32 = leaves(x, weights, torch.float32)
    out = feed_forward(x32, w32, gated, p=0.3)
    kept = out != 0
    assert abs(kept.double().mean() - 0.7) < 0.02
    x64, w64 = leaves(x, weights, torch.float64)
    out64 = in_float64(x64, w64, gated, kept / 0.7)
    gout = torch.randn(out.shape)
    assert_close([out, *gradients(out, x32, w32, gout)], [out64, *gradients(out64, x64, w64, gout.double())])


def test_masks_are_drawn_from_pytorchs_generator_and_differ_by_row():
    x, weights = drawn((1, 40), inner=64)
    x, weights = x[:, :1].expand(1, 40, 64), weights._replace(down=torch.eye(64))
    torch.manual_seed(1)
    first, second = feed_forward(x, weights, p=0.5), feed_forward(x, weights, p=0.5)
    torch.manual_seed(1)
    assert torch.equal(feed_forward(x, weights, p=0.5), first)
    assert not torch.equal(first, second)
    assert len({tuple(row.tolist()) for row in first[0]}) == 40


def test_threads_do_not_change_the_values():
    x, weights = drawn((5, 200))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            results.append(feed_forward(x, weights, p=0.2))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("sizes", [{}, {"d": 50, "inner": 70}])
def test_other_forms_agree(gated, sizes, monkeypatch):
    """PyTorch's form, which takes what the kernel does not: other widths, no compiler, float64."""
    x, weights = drawn((3, 11), gated=gated, **sizes)
    fused = feed_forward(x, weights, gated)
    monkeypatch.setattr(native, "problem", lambda: "switched off")
    torch.testing.assert_close(fused, feed_forward(x, weights, gated), atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("gated", [False, True])
def test_bfloat16_under_autocast(gated):
    given = drawn((4, 101), gated=gated)
    x, weights = leaves(*given, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out = feed_forward(x, weights, gated)
        assert backend.product_type(x) == out.dtype == torch.bfloat16
    x64, weights64 = leaves(*given, torch.float64)
    out64 = in_float64(x64, weights64, gated)
    gout = torch.randn(out.shape)
    found = [out, *gradients(out.float(), x, weights, gout)]
    assert_close(found, [out64, *gradients(out64, x64, weights64, gout.double())], 2e-2)


def test_only_the_input_is_kept():
    x, weights = leaves(*drawn((4, 50)), torch.float32)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        feed_forward(x, weights, p=0.5)
    rows = [t for t in kept if t.shape[0] == x.shape[0] * x.shape[1]]
    assert [row.shape[1] for row in rows] == [x.shape[-1]]
