import pytest
import torch
import torch.nn.functional as F

from recbole_holo.ops import native
from recbole_holo.ops.cross_entropy import cross_entropy


def inputs(rows: int, items: int, d: int) -> list[torch.Tensor]:
    return [torch.randn(rows, d), torch.randn(items, d), torch.randn(items)]


def by_hand(hidden, table, bias, targets):
    scores = hidden @ table.T if bias is None else hidden @ table.T + bias
    return (scores.logsumexp(-1) - scores.gather(-1, targets.unsqueeze(-1)).squeeze(-1)).mean()


@pytest.mark.parametrize("d", [32, 7])
@pytest.mark.parametrize("items", [2, 15, 16, 130])
@pytest.mark.parametrize("rows", [1, 6, 49, 131])
@pytest.mark.parametrize("biased", [True, False])
def test_values_and_gradients(compare, rows, items, d, biased):
    targets = torch.randint(items, (rows,))
    hidden, table, bias = inputs(rows, items, d)

    def run(hidden, table, bias):
        return cross_entropy(hidden, targets, table, bias)

    def reference(hidden, table, bias):
        return by_hand(hidden, table, bias, targets)

    compare(run, reference, [hidden, table, bias if biased else None])


@pytest.mark.parametrize("d", [32, 7])
@pytest.mark.parametrize("chunk_size", [1, 5, 12, 1000])
def test_chunks_change_nothing(compare, d, chunk_size):
    targets = torch.randint(40, (50,))
    hidden, table, _ = inputs(50, 40, d)

    def run(hidden, table):
        return cross_entropy(hidden, targets, table, chunk_size=chunk_size)

    compare(run, lambda h, t: by_hand(h, t, None, targets), [hidden, table])


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_nothing(compare, threads):
    targets = torch.randint(40, (200,))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        compare(
            lambda h, t, b: cross_entropy(h, targets, t, b, chunk_size=12),
            lambda h, t, b: by_hand(h, t, b, targets),
            inputs(200, 40, 16),
        )
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("d", [32, 7])
def test_pad_is_left_out(compare, d):
    targets = torch.randint(1, 20, (30,))
    hidden, table, bias = inputs(30, 20, d)

    def run(hidden, table, bias):
        return cross_entropy(hidden, targets, table, bias, exclude_pad=True)

    compare(run, lambda h, t, b: by_hand(h, t[1:], b[1:], targets - 1), [hidden, table, bias])
    table.requires_grad_()
    (gradient,) = torch.autograd.grad(run(hidden, table, bias), table)
    assert gradient[0].eq(0).all()


@pytest.mark.parametrize("d", [32, 7])
def test_large_scores_stay_finite(d):
    hidden, table = 100 * torch.randn(9, d), 100 * torch.randn(33, d)
    targets = torch.randint(33, (9,))
    loss = cross_entropy(hidden, targets, table)
    torch.testing.assert_close(loss, F.cross_entropy(hidden @ table.T, targets))


@pytest.mark.parametrize("d", [32, 7])
def test_not_a_number_is_not_hidden(d):
    hidden, table, _ = inputs(4, 20, d)
    hidden[2, 3] = torch.nan
    assert cross_entropy(hidden, torch.tensor([1, 2, 3, 4]), table).isnan()


def test_upstream_gradient_scales():
    hidden = torch.randn(5, 16, requires_grad=True)
    table, targets = torch.randn(30, 16), torch.randint(30, (5,))
    (once,) = torch.autograd.grad(cross_entropy(hidden, targets, table), hidden)
    (thrice,) = torch.autograd.grad(3 * cross_entropy(hidden, targets, table), hidden)
    torch.testing.assert_close(thrice, 3 * once)


@pytest.mark.parametrize("d", [32, 7])
@pytest.mark.parametrize("rows", [1, 7, 64])
def test_autocast_multiplies_in_its_type(rows, d):
    hidden, table, bias = inputs(rows, 51, d)
    targets = torch.randint(51, (rows,))
    hidden.requires_grad_()
    table.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = cross_entropy(hidden, targets, table, bias)
    expected = by_hand(hidden, table, bias, targets)
    assert loss.dtype == torch.float32
    assert abs(loss - expected) < 0.03 * expected
    found, wanted = (torch.autograd.grad(x, (hidden, table)) for x in (loss, expected))
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).norm() < 0.05 * b.norm()


def test_without_a_compiler(compare, monkeypatch):
    monkeypatch.setattr(native, "problem", lambda: "none")
    targets = torch.randint(40, (50,))
    compare(
        lambda h, t, b: cross_entropy(h, targets, t, b), lambda h, t, b: by_hand(h, t, b, targets), inputs(50, 40, 32)
    )


def test_scores_are_never_held_at_once():
    """Work, not seconds: the largest tensor of a step is far below [rows, items]."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.seen = max(self.seen, result.numel())
            return result

    for d in (32, 7):
        hidden, table, _ = (t.requires_grad_() for t in inputs(20_000, 1000, d))
        with Largest() as largest:
            cross_entropy(hidden, torch.randint(1000, (20_000,)), table).backward()
        assert largest.seen <= 20_000 * 1000 / 10


def test_no_positions():
    with pytest.raises(ValueError, match="empty"):
        cross_entropy(torch.randn(0, 4), torch.empty(0, dtype=torch.long), torch.randn(3, 4))
