import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from recbole_holo.ops import native
from recbole_holo.ops.cross_entropy import cross_entropy
from recbole_holo.ops.seen_items import SeenItems


def inputs(rows: int, items: int, d: int) -> list[torch.Tensor]:
    return [torch.randn(rows, d), torch.randn(items, d), torch.randn(items)]


def by_hand(hidden, table, bias, targets, seen=None):
    scores = hidden @ table.T if bias is None else hidden @ table.T + bias
    if seen is not None:
        out = torch.zeros(scores.shape, dtype=torch.bool)
        for i, (start, end) in enumerate(zip(seen.start.tolist(), seen.end.tolist(), strict=True)):
            out[i, seen.items[start:end]] = True
        out[torch.arange(len(targets)), targets] = False
        scores = scores.masked_fill(out, -torch.inf)
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


class Sizes(TorchDispatchMode):
    """Number of values of the largest tensor that is made, and of all of them."""

    largest = total = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.largest, self.total = max(self.largest, result.numel()), self.total + result.numel()
        return result


def test_scores_are_never_held_at_once():
    """Work, not seconds: the largest tensor of a step is far below [rows, items]."""
    for d in (32, 7):
        hidden, table, _ = (t.requires_grad_() for t in inputs(20_000, 1000, d))
        with Sizes() as sizes:
            cross_entropy(hidden, torch.randint(1000, (20_000,)), table).backward()
        assert sizes.largest <= 20_000 * 1000 / 10


def histories(rows: int, items: int, order: str) -> tuple[SeenItems, torch.Tensor]:
    """Rows of four histories with repeats, from mid-history on; every third target was seen."""
    length = max(-(-rows // 3), 2) + 5
    events = torch.randint(items, (4 * length,))
    row = torch.arange(rows)
    history = row * 3 // rows + 1
    start = history * length
    end = start + 3 + row % (length - 5)
    if order == "any":
        mixed = torch.randperm(rows)
        start, end = start[mixed], end[mixed]
    elif order == "alone":  # each row its own part of the events, and some have none
        start = torch.randint(3 * length, (rows,))
        end = start + torch.randint(length, (rows,))
    targets = torch.randint(items, (rows,))
    targets[::3] = events[start[::3]]
    return SeenItems(events, start, end), targets


# Ids beyond the table counted for another row, or for none; tensors of another device, and targets that are no row of
# the table, were read where they are not.
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"items": torch.tensor([1, 9, 2])}, "seen: items: 9 is not from 0 to 8"),
        ({"items": torch.tensor([1, -1, 2])}, "seen: items: -1 is not"),
        ({"below": 10}, "seen: ids are below 10, and the table has 9 rows"),
        ({"items": torch.empty(3, dtype=torch.long, device="meta")}, "seen: it is on meta, and the targets are on cpu"),
        ({"end": torch.tensor([2])}, "seen: it is of 2 rows"),
        ({"end": torch.tensor([2, 4])}, "seen: rows have events 0 to 4 of 3"),
        ({"start": torch.tensor([0, -1])}, "seen: rows have events -1 to 3 of 3"),
    ],
)
@pytest.mark.parametrize("d", [32, 7])
def test_seen_items_that_cannot_be_are_an_error(change, message, d):
    seen = SeenItems(torch.tensor([1, 8, 2]), torch.tensor([0, 1]), torch.tensor([2, 3]))
    hidden, table, _ = inputs(2, 9, d)
    assert cross_entropy(hidden, torch.tensor([1, 3]), table, seen=seen).isfinite()
    with pytest.raises(ValueError, match=message):
        cross_entropy(hidden, torch.tensor([1, 3]), table, seen=seen._replace(**change))


@pytest.mark.parametrize(("target", "exclude_pad"), [(9, False), (-1, False), (0, True), (9, True)])
def test_a_target_that_is_no_row_of_the_table_is_an_error(target, exclude_pad):
    hidden, table, _ = inputs(2, 9, 32)
    with pytest.raises(ValueError, match=f"targets: {target} is not from"):
        cross_entropy(hidden, torch.tensor([target, 3]), table, exclude_pad=exclude_pad)


FORMS = ["native", "chunks", "PyTorch"]


@pytest.fixture(params=FORMS)
def width(request, monkeypatch) -> int:
    """A width, such that the loss of it runs as the parameter says."""
    if request.param == "PyTorch":
        monkeypatch.setattr(native, "problem", lambda: "none")
    return 32 if request.param == "native" else 7


@pytest.mark.parametrize("order", ["ascending", "any", "alone"])
@pytest.mark.parametrize(("rows", "items", "chunk_size"), [(1, 1, None), (1, 40, 1), (50, 2, 12), (131, 301, None)])
@pytest.mark.parametrize("biased", [True, False])
def test_seen_items_are_left_out(compare, width, rows, items, chunk_size, order, biased):
    seen, targets = histories(rows, items, order)
    hidden, table, bias = inputs(rows, items, width)

    def run(hidden, table, bias):
        return cross_entropy(hidden, targets, table, bias, chunk_size, seen=seen)

    given = [hidden, table, bias if biased else None]
    compare(run, lambda h, t, b: by_hand(h, t, b, targets, seen), given)
    double = [None if t is None else t.double() for t in given]
    torch.testing.assert_close(run(*double), by_hand(*double, targets, seen))


@pytest.mark.parametrize("threads", [2, 5])
def test_seen_items_in_threads(compare, width, threads):
    seen, targets = histories(200, 40, "ascending")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        compare(
            lambda h, t, b: cross_entropy(h, targets, t, b, chunk_size=12, seen=seen),
            lambda h, t, b: by_hand(h, t, b, targets, seen),
            inputs(200, 40, width),
        )
    finally:
        torch.set_num_threads(before)


def test_seen_items_are_numbered_with_the_pad(compare, width):
    seen, targets = histories(60, 20, "ascending")
    targets = targets.clamp(min=1)
    assert (seen.items == 0).any()

    def reference(hidden, table, bias):
        return by_hand(hidden, table, torch.cat([torch.full_like(bias[:1], -torch.inf), bias[1:]]), targets, seen)

    compare(
        lambda h, t, b: cross_entropy(h, targets, t, b, exclude_pad=True, seen=seen), reference, inputs(60, 20, width)
    )


@pytest.mark.parametrize("autocast", [False, True])
def test_seen_items_have_no_part(width, autocast):
    """Neither a probability nor a gradient, whatever their scores; nor is anything learned where no rival is left."""
    hidden, table, bias = inputs(2, 37, width)
    hidden.abs_()
    table[[5, 6]] = 1e4
    seen = SeenItems(torch.arange(37), torch.tensor([5, 0]), torch.tensor([8, 37]))
    targets = torch.tensor([4, 36])

    def run(rows):
        leaves = [t.clone().requires_grad_() for t in (hidden[rows], table, bias)]
        own = SeenItems(seen.items, seen.start[rows], seen.end[rows])
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = cross_entropy(leaves[0], targets[rows], leaves[1], leaves[2], seen=own)
        return loss, torch.autograd.grad(loss, leaves)

    loss, (g_hidden, g_table, g_bias) = run(slice(0, 1))
    assert 0 < loss < 100
    assert g_hidden.isfinite().all()
    assert g_table[5:8].eq(0).all()
    assert g_bias[5:8].eq(0).all()
    assert g_bias[8:].ne(0).all()
    loss, gradients = run(slice(1, 2))
    assert loss == 0
    assert all(gradient.eq(0).all() for gradient in gradients)


def test_seen_items_under_autocast(width):
    seen, targets = histories(64, 51, "ascending")
    hidden, table, bias = (t.requires_grad_() for t in inputs(64, 51, width))
    with torch.autocast("cpu", torch.bfloat16):
        loss = cross_entropy(hidden, targets, table, bias, seen=seen)
    expected = by_hand(hidden, table, bias, targets, seen)
    assert abs(loss - expected) < 0.03 * expected
    found, wanted = (torch.autograd.grad(x, (hidden, table, bias)) for x in (loss, expected))
    for a, b in zip(found, wanted, strict=True):
        assert (a - b).norm() < 0.05 * b.norm()


def test_long_histories_are_not_gone_through_for_every_row(monkeypatch):
    """Work, not seconds: of all values that are made, quadratic would be 10,000² / 2 for the items alone."""
    monkeypatch.setattr(native, "problem", lambda: "none")
    rows = 10_000
    events = torch.randint(40, (rows,))
    seen = SeenItems(events, torch.zeros(rows, dtype=torch.long), torch.arange(rows) + 1)
    with Sizes() as sizes:
        cross_entropy(torch.randn(rows, 8), events.flip(0), torch.randn(40, 8), chunk_size=1000, seen=seen)
    assert sizes.total <= 1e7
    assert sizes.largest <= 1000 * 100


def test_seen_items_of_other_rows():
    seen, targets = histories(60, 20, "ascending")
    with pytest.raises(ValueError, match=r"60 rows.*59 targets"):
        cross_entropy(torch.randn(59, 8), targets[1:], torch.randn(20, 8), seen=seen)


def test_no_positions():
    with pytest.raises(ValueError, match="empty"):
        cross_entropy(torch.randn(0, 4), torch.empty(0, dtype=torch.long), torch.randn(3, 4))
