import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from recbole_holo.ops import bce, bpr, cross_entropy, info_nce, losses, sample_negatives

ROWS, ITEMS, WIDTH = 23, 31, 6


@pytest.fixture
def inputs() -> list[Tensor]:
    hidden, table, bias = torch.randn(ROWS, WIDTH), torch.randn(ITEMS, WIDTH), torch.randn(ITEMS)
    return [t.double().requires_grad_() for t in (hidden, table, bias)]


@pytest.fixture
def targets() -> Tensor:
    return torch.randint(1, ITEMS, (ROWS,))


def same_gradients(found: Tensor, expected: Tensor, inputs: list[Tensor]) -> None:
    torch.testing.assert_close(found, expected)
    pairs = (
        torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True, materialize_grads=True)
        for loss in (found, expected)
    )
    for a, b in zip(*pairs, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("chunk_size", [None, 1, 5, 23, 100])
@pytest.mark.parametrize("exclude_pad", [False, True])
def test_cross_entropy_in_chunks(inputs, targets, chunk_size, exclude_pad):
    hidden, table, bias = inputs
    logits = hidden @ table.T + bias
    if exclude_pad:
        logits = logits.index_fill(1, torch.tensor([0]), -torch.inf)
    found = cross_entropy(hidden, targets, table, bias, chunk_size, exclude_pad)
    same_gradients(found, F.cross_entropy(logits, targets), inputs)


def test_cross_entropy_cuts_large_score_tables(inputs, targets, monkeypatch):
    hidden, table, bias = inputs
    rows = []
    summed = losses._summed_cross_entropy
    monkeypatch.setattr(losses, "_LOGITS_AT_ONCE", ROWS * ITEMS - 1)
    monkeypatch.setattr(losses, "_LOGITS_PER_CHUNK", 4 * ITEMS + 1)
    monkeypatch.setattr(losses, "_summed_cross_entropy", lambda h, *rest: rows.append(len(h)) or summed(h, *rest))
    found = cross_entropy(hidden, targets, table, bias)
    assert rows == [4, 4, 4, 4, 4, 3]
    same_gradients(found, F.cross_entropy(hidden @ table.T + bias, targets), inputs)


def test_cross_entropy_under_autocast(inputs, targets):
    hidden, table, _ = (t.detach().float().requires_grad_() for t in inputs)
    with torch.autocast("cpu", torch.bfloat16):
        whole, chunked = cross_entropy(hidden, targets, table), cross_entropy(hidden, targets, table, chunk_size=4)
    chunked.backward()
    torch.testing.assert_close(whole, chunked, rtol=1e-3, atol=1e-3)
    assert hidden.grad.isfinite().all()


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_info_nce_by_hand(inputs, targets, cosine, shared):
    hidden, table, bias = inputs
    negatives = torch.randint(1, ITEMS, (40,) if shared else (ROWS, 40))  # 40 of 31: accidental hits are certain
    query, items = (F.normalize(hidden, dim=-1), F.normalize(table, dim=-1)) if cosine else (hidden, table)
    scores = (query @ items.T + bias) / 0.2
    expected = []
    for row, target in enumerate(targets.tolist()):
        drawn = negatives if shared else negatives[row]
        kept = [scores[row, item] for item in drawn.tolist() if item != target]
        expected.append(torch.logsumexp(torch.stack([scores[row, target], *kept]), 0) - scores[row, target])
    found = info_nce(hidden, targets, table, negatives, bias, temperature=0.2, cosine=cosine)
    torch.testing.assert_close(found.double(), torch.stack(expected).mean(), rtol=1e-5, atol=1e-5)


def test_info_nce_masks_accidental_hits(inputs, targets):
    hidden, table, _ = inputs
    loss = info_nce(hidden, targets, table, targets.unsqueeze(-1).expand(-1, 7))
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, [hidden, table]))


def test_info_nce_learns_its_temperature(inputs, targets):
    hidden, table, _ = inputs
    temperature = torch.tensor(0.05, requires_grad=True)
    negatives = sample_negatives((16,), ITEMS, "cpu")
    info_nce(hidden, targets, table, negatives, temperature=temperature, cosine=True).backward()
    assert temperature.grad.isfinite()
    assert temperature.grad != 0


def test_pairwise_losses_by_hand(inputs, targets):
    hidden, table, bias = inputs
    negatives = sample_negatives(targets.shape, ITEMS, "cpu", exclude=targets)
    scores = hidden @ table.T + bias
    positive, negative = (scores.gather(1, t.unsqueeze(1)).squeeze(1) for t in (targets, negatives))
    same_gradients(
        bpr(hidden, targets, negatives, table, bias), -torch.sigmoid(positive - negative).log().mean(), inputs
    )
    expected = -(torch.sigmoid(positive).log() + (1 - torch.sigmoid(negative)).log()).mean()
    same_gradients(bce(hidden, targets, negatives, table, bias), expected, inputs)


def test_pairwise_losses_stay_finite():
    table = torch.tensor([[0.0], [-1e4], [1e4]])
    one = torch.ones(1, 1, requires_grad=True)
    for loss, largest in ((bpr, 2e4), (bce, 2e4)):
        value = loss(one, torch.tensor([1]), torch.tensor([2]), table)
        assert value.item() == pytest.approx(largest)
        assert torch.autograd.grad(value, one)[0].isfinite().all()


def test_negatives_cover_all_items_but_the_pad():
    drawn = sample_negatives((20_000,), 11, "cpu")
    share = torch.bincount(drawn, minlength=11) / 20_000
    assert share[0] == 0
    torch.testing.assert_close(share[1:], torch.full((10,), 0.1), rtol=0, atol=0.02)


def test_negatives_never_equal_what_is_excluded():
    exclude = torch.arange(1, 12).repeat(3000)
    drawn = sample_negatives(exclude.shape, 12, "cpu", exclude)
    assert (drawn != exclude).all()
    counts = torch.zeros(12, 12).index_put_((exclude, drawn), torch.ones(1), accumulate=True) / 3000
    expected = (1 - torch.eye(12)) / 10
    expected[0], expected[:, 0] = 0, 0
    torch.testing.assert_close(counts, expected, rtol=0, atol=0.04)


def test_no_negative_left():
    with pytest.raises(ValueError, match=r"n_items: 2 leaves no negative"):
        sample_negatives((3,), 2, "cpu", exclude=torch.ones(3, dtype=torch.long))
