import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from recbole_holo.ops import bce, bpr, cross_entropy, info_nce, sample_negatives
from recbole_holo.tracing import CpuPeak

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


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("corrected", [False, True])
def test_info_nce_by_hand(inputs, targets, cosine, shared, corrected):
    hidden, table, bias = inputs
    negatives = torch.randint(1, ITEMS, (40,) if shared else (ROWS, 40))  # 40 of 31: accidental hits are certain
    log_counts = torch.randn(negatives.shape, dtype=torch.double) if corrected else None
    query, items = (F.normalize(hidden, dim=-1), F.normalize(table, dim=-1)) if cosine else (hidden, table)
    scores = (query @ items.T + bias) / 0.2
    expected = []
    for row, target in enumerate(targets.tolist()):
        terms = [scores[row, target]]
        for k, item in enumerate((negatives if shared else negatives[row]).tolist()):
            if item != target:
                correction = (log_counts if shared else log_counts[row])[k] if corrected else 0.0
                terms.append(scores[row, item] - correction)
        expected.append(torch.logsumexp(torch.stack(terms), 0) - scores[row, target])
    found = info_nce(hidden, targets, table, negatives, bias, 0.2, cosine, log_counts)
    same_gradients(found, torch.stack(expected).mean(), inputs)


@pytest.mark.parametrize("cosine", [False, True])
def test_info_nce_over_every_item_once_is_the_full_softmax(inputs, targets, cosine):
    hidden, table, bias = inputs
    query, items = (F.normalize(hidden, dim=-1), F.normalize(table, dim=-1)) if cosine else (hidden, table)
    every_item = torch.arange(1, ITEMS)
    found = info_nce(hidden, targets, table, every_item, bias, 0.3, cosine, log_counts=torch.zeros(ITEMS - 1))
    full = cross_entropy(query / 0.3, targets, items, bias / 0.3, exclude_pad=True)
    same_gradients(found, full, inputs)


def test_the_correction_makes_the_normaliser_unbiased(inputs, targets):
    """Over all outcomes of a single draw, weighted by their chances: no sampling error."""
    hidden, table, bias = inputs
    chances = torch.rand(ITEMS - 1, dtype=torch.double).softmax(0)
    for row in range(ROWS):
        one, target = hidden[row : row + 1], targets[row : row + 1]
        expected = (one @ table[1:].T + bias[1:]).exp().sum()
        positive = one @ table[target[0]] + bias[target]
        mean = sum(
            q * (info_nce(one, target, table, torch.tensor([item]), bias, log_counts=q.log()[None]) + positive).exp()
            for item, q in zip(range(1, ITEMS), chances, strict=True)
        )
        torch.testing.assert_close(mean.squeeze(), expected)


def test_the_corrected_gradient_tends_to_the_full_softmax(inputs, targets):
    hidden, table, _ = inputs
    chances = torch.arange(1, ITEMS).double().reciprocal()
    chances /= chances.sum()
    full = torch.autograd.grad(cross_entropy(hidden, targets, table, exclude_pad=True), [hidden, table])

    def error(count: int, corrected: bool) -> float:
        negatives = torch.multinomial(chances, count, replacement=True) + 1
        log_counts = (count * chances[negatives - 1]).log() if corrected else None
        found = torch.autograd.grad(info_nce(hidden, targets, table, negatives, log_counts=log_counts), [hidden, table])
        return max(((a - b).norm() / b.norm()).item() for a, b in zip(found, full, strict=True))

    few, more, many = error(100, True), error(3_000, True), error(90_000, True)
    assert few / 15 < more < few / 2  # 1/√30, on average
    assert more / 15 < many < more / 2
    assert error(90_000, False) > 10 * many


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_info_nce_masks_accidental_hits(inputs, targets):
    hidden, table, _ = inputs
    temperature = torch.tensor(0.1, dtype=torch.double, requires_grad=True)
    with torch.autograd.detect_anomaly(check_nan=True):
        for negatives in (targets.unsqueeze(-1).expand(-1, 7), targets[:1]):
            loss = info_nce(hidden[: len(negatives)], targets[: len(negatives)], table, negatives, None, temperature)
            assert loss.item() == 0.0
            for gradient in torch.autograd.grad(loss, [hidden, table, temperature]):
                assert (gradient == 0).all()


def test_info_nce_keeps_float32_under_autocast(inputs, targets):
    hidden, table, bias = (t.detach().float().requires_grad_() for t in inputs)
    negatives = sample_negatives((16,), ITEMS, "cpu")
    expected = info_nce(hidden, targets, table, negatives, bias, 0.05, cosine=True)
    with torch.autocast("cpu", torch.bfloat16):
        found = info_nce(hidden, targets, table, negatives, bias, 0.05, cosine=True)
        half = info_nce(hidden.bfloat16(), targets, table, negatives, bias, 0.05, cosine=True)
    assert torch.equal(found, expected)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, expected, rtol=0.05, atol=0.05)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in torch.autograd.grad(half, [hidden, table]))


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("loss", [info_nce, bpr, bce])
def test_sparse_gradients_are_the_dense_ones(inputs, targets, loss, cosine):
    hidden, table, bias = inputs
    negatives = sample_negatives(targets.shape, ITEMS, "cpu", exclude=targets)
    pairs = (table, negatives) if loss is info_nce else (negatives, table)
    dense, sparse = (
        torch.autograd.grad(loss(hidden, targets, *pairs, bias, cosine=cosine, sparse=sparse), inputs)
        for sparse in (False, True)
    )
    assert sparse[1].is_sparse
    assert not sparse[0].is_sparse
    assert set(sparse[1].coalesce().indices()[0].tolist()) == set(targets.tolist()) | set(negatives.tolist())
    for a, b in zip(sparse, dense, strict=True):
        torch.testing.assert_close(a.to_dense(), b)


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
    cosines = (negatives, F.normalize(table, dim=-1)), (negatives, table)
    for loss in (bpr, bce):
        whole, gathered = (loss(hidden, targets, *pair, bias, i == 1) for i, pair in enumerate(cosines))
        same_gradients(gathered, whole, inputs)


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


@pytest.mark.parametrize("loss", [bpr, bce])
@pytest.mark.parametrize("rows", [1, 4095, 4097, 9000])
def test_pairwise_losses_of_many_rows_equal_the_plain_form(loss, rows):
    hidden, table = (torch.randn(n, WIDTH, dtype=torch.double, requires_grad=True) for n in (rows, ITEMS))
    targets, negatives = torch.randint(1, ITEMS, (2, rows))
    positive, negative = (hidden * table[targets]).sum(-1), (hidden * table[negatives]).sum(-1)
    if loss is bpr:
        expected = -torch.sigmoid(positive - negative).log().mean()
    else:
        expected = -(torch.sigmoid(positive).log() + torch.sigmoid(-negative).log()).mean()
    same_gradients(loss(hidden, targets, negatives, table), expected, [hidden, table])


@pytest.mark.parametrize("loss", [bpr, bce])
def test_pairwise_losses_do_not_hold_what_they_gather(loss):
    """Between the passes nothing as large as the hidden states but these; at the peak, their gradient and a chunk."""
    rows, width = 40_000, 64
    hidden, table = (torch.randn(n, width, requires_grad=True) for n in (rows, ITEMS))
    targets, negatives = torch.randint(1, ITEMS, (2, rows))
    peak = CpuPeak()
    with peak:
        peak.change(("step", "all"))
        loss(hidden, targets, negatives, table).backward()
    assert peak.peaks[("step", "all")] < 2 * hidden.nbytes
