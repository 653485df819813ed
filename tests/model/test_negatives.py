"""Where negatives come from, how often, and what the models do with them."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from recbole_holo.bridge.config import Config
from recbole_holo.data.loader import create_dataset, data_preparation
from recbole_holo.errors import ConfigError
from recbole_holo.losses.negatives import NegativeSampler, target_counts
from recbole_holo.model.mamba4rec import Mamba4Rec

from .conftest import build_tiny

COUNTS = torch.tensor([0, 40, 0, 1, 9, 25, 0, 3, 2, 16])  # item 0 is the pad; items 2 and 6 are never a target
V = len(COUNTS)


@pytest.fixture(autouse=True)
def _same_draws() -> None:
    torch.manual_seed(0)


def draw_targets(*shape: int) -> Tensor:
    return torch.multinomial(COUNTS.double(), torch.Size(shape).numel(), replacement=True).view(shape)


# ---------------------------------------------------------------------- drawing
@pytest.mark.parametrize(("distribution", "exponent"), [("uniform", 1), ("popularity", 1), ("popularity", 0.5)])
def test_negatives_are_drawn_as_often_as_they_should(distribution, exponent):
    sampler = NegativeSampler(distribution, 200_000, V, COUNTS, exponent, logq_correction=True)
    drawn, log_counts = sampler(draw_targets(5))
    weights = torch.ones(V) if distribution == "uniform" else COUNTS.clamp(min=1).double() ** exponent
    weights[0] = 0
    expected = 200_000 * weights / weights.sum()
    found = torch.bincount(drawn, minlength=V)
    assert found[0] == 0
    assert ((found - expected).abs() <= 5 * expected.sqrt()).all()
    torch.testing.assert_close(log_counts.exp(), expected[drawn].float())


def test_the_batchs_own_targets_are_drawn_without_replacement():
    targets = torch.arange(1, 8)
    sampler = NegativeSampler("in_batch", 4, V)
    orders = set()
    for _ in range(20):
        drawn, log_counts = sampler(targets)
        assert log_counts is None
        assert len(drawn) == len(drawn.unique()) == 4
        assert set(drawn.tolist()) <= set(targets.tolist())
        orders.add(tuple(drawn.tolist()))
    assert len(orders) > 1
    assert torch.equal(NegativeSampler("in_batch", 40, V)(targets)[0], targets)


def test_mixed_negatives_are_half_the_batchs_own():
    targets = torch.full((30,), 3)
    drawn, _ = NegativeSampler("mixed", 21, V)(targets)
    assert len(drawn) == 21
    assert (drawn[:10] == 3).all()
    assert not (drawn[10:] == 3).all()
    assert len(NegativeSampler("mixed", 21, V)(targets[:4])[0]) == 4 + 11


@pytest.mark.parametrize("distribution", ["in_batch", "mixed"])
@pytest.mark.parametrize("n_targets", [3, 6, 40])
def test_expected_counts_are_those_of_the_other_rows_targets(distribution, n_targets):
    """Of a row's negatives, its own target left out, as the loss leaves it out; means over many batches."""
    sampler, rounds = NegativeSampler(distribution, 12, V, COUNTS, logq_correction=True), 8_000
    found, expected = torch.zeros(V), torch.full((V,), torch.nan)
    for targets in draw_targets(rounds, n_targets):
        drawn, log_counts = sampler(targets)
        expected[drawn] = log_counts.exp()
        found += torch.bincount(drawn, minlength=V)
    # The first row's own target is among the drawn with the chance of any, and says nothing on the other rows.
    share = min({"in_batch": 12, "mixed": 6}[distribution] / n_targets, 1.0)
    found = found / rounds - share * COUNTS / COUNTS.sum()
    seen = expected.isfinite()
    assert seen[1:].sum() == (7 if distribution == "in_batch" else 9)
    torch.testing.assert_close(found[seen], expected[seen], rtol=0.05, atol=0.01)


def test_a_single_target_leaves_no_negative_and_a_finite_loss():
    model = build_tiny("Hydra", negative_distribution="in_batch").train()
    model.criterion.sampler = NegativeSampler("in_batch", 8, 30, torch.ones(30, dtype=torch.long), logq_correction=True)
    loss = model.loss(torch.randn(1, 16), torch.tensor([7]))
    assert loss.item() == 0.0


def test_popularity_tells_the_items_of_a_large_catalogue_apart():
    counts = torch.ones(1_000_001, dtype=torch.long)
    counts[1] = 2**31  # beside it float32 cannot count single items
    drawn, _ = NegativeSampler("popularity", 2_000_000, len(counts), counts)(torch.tensor([1]))
    tail = drawn[drawn > 1]
    assert 700 < len(tail) < 1200  # 2e6 * 1e6 / (2^31 + 1e6) = 931
    assert len((tail % 64).unique()) == 64
    assert tail.max() > 900_000


@pytest.mark.parametrize(("point", "item"), [(0.0, 1), (1 - 2**-53, 9)])
def test_the_ends_of_the_distribution_are_items(monkeypatch, point, item):
    monkeypatch.setattr(torch, "rand", lambda size, **kwargs: torch.full((size,), point, **kwargs))
    assert NegativeSampler("popularity", 3, V, COUNTS)(torch.tensor([1]))[0].tolist() == [item] * 3


def test_buffers_of_the_sampler_stay_out_of_checkpoints():
    assert not NegativeSampler("popularity", 4, V, COUNTS).state_dict()


# ---------------------------------------------------------------------- what is counted
def splits(dataset: str, **settings: Any) -> tuple[Any, ...]:
    config = Config(
        "Mamba4Rec", dataset, config_dict={"state": "ERROR", "topk": [3], "valid_metric": "NDCG@3", **settings}
    )
    return (config, *data_preparation(config, create_dataset(config)))


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"MAX_ITEM_LIST_LENGTH": 4},
        {"MAX_ITEM_LIST_LENGTH": 4, "train_windows": "last"},
        {"MAX_ITEM_LIST_LENGTH": 4, "train_on": "prefixes"},
    ],
)
def test_target_counts_are_those_of_the_training_batches(cyclic_dataset, tiny, settings):
    _, train, _, _ = splits(cyclic_dataset, **{**tiny, "MAX_ITEM_LIST_LENGTH": 50, **settings})
    expected: Counter[int] = Counter()
    for batch in train:
        field = "item_id_target" if "item_id_target" in batch.columns else "item_id"
        expected.update(batch[field][batch[field] > 0].tolist())
    counts = target_counts(train.dataset, "item_id", rows=7)
    assert {item: count for item, count in enumerate(counts.tolist()) if count} == expected


def test_items_held_out_for_evaluation_are_not_counted(write_dataset, tiny):
    inter = [(f"u{user}", f"i{t}", 100 * user + t) for user in range(20) for t in range(6)]
    inter += [(f"u{user}", held_out, 100 * user + t) for user in range(20) for t, held_out in ((6, "v"), (7, "t"))]
    config, train, _, _ = splits(write_dataset(inter), **tiny)
    ids = train.dataset.field2token_id["item_id"]
    counts = target_counts(train.dataset, "item_id")
    assert counts[ids["v"]] == counts[ids["t"]] == counts[0] == 0
    assert all(counts[ids[f"i{t}"]] == 20 for t in range(1, 6))
    config["loss_type"], config["negative_distribution"], config["num_negatives"] = "SampledCE", "popularity", 10_000
    sampler = Mamba4Rec(config, train.dataset).criterion.sampler
    drawn = torch.bincount(sampler(torch.ones(1, dtype=torch.long))[0], minlength=len(counts))
    assert 0 < drawn[ids["v"]] < drawn[ids["i1"]] / 5


# ---------------------------------------------------------------------- the models
@pytest.mark.parametrize(
    ("loss_type", "setting", "corrected"),
    [("InfoNCE", None, False), ("InfoNCE", True, True), ("SampledCE", None, True), ("SampledCE", False, False)],
)
def test_sampled_ce_is_info_nce_with_the_correction(loss_type, setting, corrected):
    model = build_tiny("Mamba4Rec", loss_type=loss_type, logq_correction=setting, num_negatives=1000, n_items=6)
    assert model.criterion.sampler.logq_correction is corrected
    hidden, targets = torch.randn(50, 16), torch.randint(1, 6, (50,))
    full = build_tiny("Mamba4Rec", loss_type="CE", n_items=6).loss(hidden, targets)
    # A thousand uniform negatives are 200 of each item: without the correction they weigh 200 times as much.
    difference = (model.loss(hidden, targets) - full).item()
    assert abs(difference) < 0.02 if corrected else difference > 2


@pytest.mark.parametrize(
    ("field", "settings"),
    [
        ("negative_distribution", {"loss_type": "SampledCE", "negative_distribution": "unigram"}),
        ("popularity_exponent", {"loss_type": "SampledCE", "popularity_exponent": 1.5}),
        ("popularity_exponent", {"loss_type": "InfoNCE", "popularity_exponent": "high"}),
        ("num_negatives", {"loss_type": "SampledCE", "num_negatives": 0}),
        ("sparse_embedding", {"loss_type": "CE", "sparse_embedding": True}),
    ],
)
def test_a_bad_setting_of_negatives_is_named(field, settings):
    with pytest.raises(ConfigError, match=f"^{field}: "):
        build_tiny("Mamba4Rec", **settings)
