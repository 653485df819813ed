import pytest
import torch

from recbole_holo.ops import native
from recbole_holo.ops.dropout import dropout


@pytest.mark.parametrize("shape", [(1,), (7, 3), (300, 501), (3, 65536)])
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_entries_are_dropped_or_scaled(shape, p):
    x = torch.rand(shape) + 1
    y = dropout(x, p)
    kept = y != 0
    torch.testing.assert_close(y[kept], x[kept] / (1 - p))
    count = x.numel()
    assert abs(kept.sum().item() - count * (1 - p)) <= 6 * (count * p * (1 - p)) ** 0.5 + 0.5


def test_gradient_has_the_same_mask():
    x = torch.randn(40, 70, requires_grad=True)
    y = dropout(x, 0.3)
    weights = torch.rand_like(y) + 1
    (gradient,) = torch.autograd.grad((y * weights).sum(), x)
    torch.testing.assert_close(gradient, (y != 0) * weights / 0.7)


def test_masks_differ_and_repeat():
    x = torch.ones(1000)
    torch.manual_seed(3)
    first, second = dropout(x, 0.5), dropout(x, 0.5)
    torch.manual_seed(3)
    assert torch.equal(dropout(x, 0.5), first)
    assert 400 < (first != second).sum() < 600


def test_positions_are_independent():
    """No pattern at any distance: neighbours, rows of a vector, rows of a layer, and beyond one counter."""
    kept = (dropout(torch.ones(2**20), 0.5) != 0).float() * 2 - 1
    for distance in (1, 2, 15, 16, 64, 128, 4096, 65536, 65537):
        correlation = (kept[distance:] * kept[:-distance]).mean().item()
        assert abs(correlation) < 6 / (2**20 - distance) ** 0.5


def test_threads_do_not_change_the_mask():
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            torch.manual_seed(0)
            results.append(dropout(torch.ones(200_000), 0.2))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*results)


def test_off():
    x = torch.randn(5)
    assert dropout(x, 0.5, training=False) is x
    assert dropout(x, 0.0) is x


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types(dtype):
    y = dropout(torch.ones(1000, dtype=dtype), 0.5)
    assert y.dtype == dtype
    assert set(y.tolist()) == {0.0, 2.0}


def test_without_a_compiler(monkeypatch):
    monkeypatch.setattr(native, "problem", lambda: "none")
    assert set(dropout(torch.ones(1000), 0.5).tolist()) == {0.0, 2.0}


def test_bfloat16_has_the_mask_of_float32():
    x = torch.rand(300, 70) + 1
    torch.manual_seed(5)
    wanted = dropout(x, 0.4)
    torch.manual_seed(5)
    found = dropout(x.bfloat16(), 0.4)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found != 0, wanted != 0)
