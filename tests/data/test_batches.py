"""Batches of whole sequences: what is planned, what is gathered, and what neither changes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from recbole.data.interaction import Interaction
from torch import Tensor

from recbole_holo.bridge import registry
from recbole_holo.bridge.config import Config
from recbole_holo.data.batches import SequenceBatch, SequenceTrainLoader, plan_batches
from recbole_holo.data.loader import create_dataset, data_preparation
from recbole_holo.errors import ConfigError
from recbole_holo.model.base import positions_of
from recbole_holo.training import distributed


def prepared(dataset: str, model: str = "RecMamba", **settings: Any) -> tuple[Config, Any, Any, Any]:
    config = Config(model, dataset, config_dict={"state": "ERROR", **settings})
    return config, *data_preparation(config, create_dataset(config))


def padded_positions(lengths: np.ndarray, rows: np.ndarray, bounds: np.ndarray) -> int:
    return sum((end - first) * lengths[rows[first:end]].max() for first, end in bounds)


def built(config: Config, train: Any) -> Any:
    torch.manual_seed(0)
    return registry.get_model_class(config["model"])(config, train.dataset)


# ---------------------------------------------------------------------- plans
@pytest.mark.parametrize("n_rows", [1, 15, 16, 17, 799, 2000])
def test_a_plan_has_every_row_once(n_rows: int) -> None:
    lengths = np.random.default_rng(0).integers(1, 200, size=n_rows)
    rows, bounds = plan_batches(lengths, lambda longest: 16, 800, torch.Generator().manual_seed(3))
    given = np.concatenate([rows[first:end] for first, end in bounds])
    assert sorted(given) == list(range(n_rows))
    sizes = bounds[:, 1] - bounds[:, 0]
    assert sorted(sizes)[1:] == [16] * (len(sizes) - 1)  # one may be short


def test_a_plan_follows_from_the_generator_and_mixes() -> None:
    lengths = np.random.default_rng(0).integers(1, 200, size=3000)
    generator = torch.Generator().manual_seed(3)
    first = plan_batches(lengths, lambda longest: 16, 800, generator)
    second = plan_batches(lengths, lambda longest: 16, 800, generator)
    again = plan_batches(lengths, lambda longest: 16, 800, torch.Generator().manual_seed(3))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    partners = [
        {int(r): set(plan.rows[a:b].tolist()) for a, b in plan.bounds for r in plan.rows[a:b]}
        for plan in (first, second)
    ]
    kept = np.mean([len(partners[0][row] & partners[1][row]) - 1 for row in range(3000)])
    assert kept < 3  # of 15; sorting all rows at once would keep half of them and more
    longest = [lengths[first.rows[a:b]].max() for a, b in first.bounds]
    assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.25  # batches come in any order


def test_a_plan_by_positions_fills_its_room() -> None:
    lengths = np.random.default_rng(0).integers(1, 200, size=3000)
    rows, bounds = plan_batches(lengths, lambda longest: 1000 // longest, 600, torch.Generator().manual_seed(0))
    sizes = bounds[:, 1] - bounds[:, 0]
    assert sorted(np.concatenate([rows[first:end] for first, end in bounds])) == list(range(3000))
    for (first, end), size in zip(bounds, sizes, strict=True):
        longest = lengths[rows[first:end]].max()
        assert size * longest <= 1000
        assert (size + 1) * longest > 1000 or end % 600 == 0  # only the last of a group has room left
    assert sizes.max() > 4 * sizes.min()


# ---------------------------------------------------------------------- batches
SETTINGS = {"load_col": {"inter": ["user_id", "item_id", "timestamp"]}, "hidden_size": 8}


@pytest.mark.parametrize("length", [50, 200])
@pytest.mark.parametrize("size", [{}, {"train_batch_size": 64}, {"train_batch_tokens": 3200}], ids=str)
def test_pads_are_few(length: int, size: dict[str, int]) -> None:
    _, train, _, _ = prepared("ml-100k", MAX_ITEM_LIST_LENGTH=length, **size, **SETTINGS)
    pads, positions, targets = 0, 0, 0
    for batch in train:
        pads += int((batch["item_id_list"] == 0).sum())
        positions += batch["item_id_list"].numel()
        targets += batch.n_targets
        assert batch["item_id_list"].numel() <= size.get("train_batch_tokens", np.inf)
    assert pads < 0.1 * positions
    assert (
        targets == len(train.dataset.events.items) - 3 * 943
    )  # every event but each user's first, validation and test


def test_a_batch_is_the_rows_of_the_data_set(cyclic_dataset: str, tiny: dict[str, Any]) -> None:
    _, train, valid, _ = prepared(cyclic_dataset, **tiny)
    assert isinstance(train, SequenceTrainLoader)
    by_row: dict[tuple[int, ...], tuple[int, ...]] = {}
    everything = train.dataset[slice(None)]
    for batch in train:
        assert isinstance(batch, SequenceBatch)
        assert set(batch.columns) == set(everything.columns)
        assert batch.n_targets == int((batch["item_id_target"] > 0).sum())
        for column in batch.columns:
            assert batch[column].dtype == everything[column].dtype, column
        for user, items, targets in zip(
            *(batch[c].tolist() for c in ("user_id", "item_id_list", "item_id_target")), strict=True
        ):
            by_row[(user, *filter(None, items))] = tuple(filter(None, targets))
    expected = {
        (user, *filter(None, items)): tuple(filter(None, targets))
        for user, items, targets in zip(
            *(everything[c].tolist() for c in ("user_id", "item_id_list", "item_id_target")), strict=True
        )
    }
    assert by_row == expected

    histories = [batch[0] for batch in valid]
    lengths = torch.cat([batch["item_length"] for batch in histories])
    assert (lengths.diff() <= 0).all()
    rows = valid.dataset[valid.order]
    assert torch.equal(torch.cat([batch["user_id"] for batch in histories]), rows["user_id"])
    assert all(b["item_id_list"].shape[1] == b["item_length"].max() for b in histories)


def test_epochs_follow_from_the_generator(cyclic_dataset: str, tiny: dict[str, Any]) -> None:
    def users(loader: Any) -> list[list[int]]:
        return [batch["user_id"].tolist() for batch in loader]

    loader, other = (prepared(cyclic_dataset, **tiny)[1] for _ in range(2))
    first = users(loader)
    state = loader.generator.get_state()
    second = users(loader)
    assert users(other) == first != second
    other.generator.set_state(state)
    assert users(other) == second
    unshuffled = prepared(cyclic_dataset, **tiny, shuffle=False)[1]
    assert users(unshuffled) == users(unshuffled)


def test_every_target_weighs_the_same(cyclic_dataset: str, tiny: dict[str, Any]) -> None:
    """Batches of one length differ in targets; their weighted means make the mean over all targets."""
    for size in ({}, {"train_batch_tokens": 30}):
        _, train, _, _ = prepared(cyclic_dataset, **tiny, **size)
        values = torch.rand(21, dtype=torch.double)  # a loss of each item
        weighted, every = [], []
        for batch in train:
            own = values[batch["item_id_target"][batch["item_id_target"] > 0]]
            weighted.append(batch.loss_weight * own.mean())
            every.append(own)
        assert len({len(own) for own in every}) > 1
        torch.testing.assert_close(torch.stack(weighted).mean(), torch.cat(every).mean())


def test_the_shares_of_processes_make_the_batch(
    cyclic_dataset: str, tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny["train_batch_size"] = 6  # 40 rows: the last batch has 4, one of five processes gets none of them
    values = torch.rand(21, dtype=torch.double)

    def losses(loader: Any) -> Tensor:
        means = []
        for batch in loader:
            own = values[batch["item_id_target"][batch["item_id_target"] > 0]]
            assert len(own) == batch.n_targets
            means.append(batch.loss_weight * (own.mean() if len(own) else torch.zeros((), dtype=torch.double)))
        return torch.stack(means)

    whole = losses(prepared(cyclic_dataset, **tiny)[1])
    shares = []
    for rank in range(5):
        loader = prepared(cyclic_dataset, **tiny)[1]
        with monkeypatch.context() as as_if:
            as_if.setattr(distributed, "world", lambda rank=rank: (rank, 5))
            shares.append(losses(loader))
    assert (shares[4] == 0).any()
    torch.testing.assert_close(torch.stack(shares).mean(0), whole)


# ---------------------------------------------------------------------- what the loss makes of them
@pytest.mark.parametrize("model", list(registry.MODELS))
def test_rounding_the_padded_length_changes_nothing(model: str, cyclic_dataset: str, tiny: dict[str, Any]) -> None:
    tiny.update(train_batch_size=4, item_attributes=["genre"], dropout_prob=0.0, MAX_ITEM_LIST_LENGTH=12)
    found = []
    for multiple in (1, 8):
        config, train, _, _ = prepared(cyclic_dataset, model, **tiny)
        net = built(config, train).eval()  # no dropout, whatever its name
        train.round_width_to = multiple
        widths, losses = [], []
        for batch in train:
            torch.manual_seed(1)  # the same negatives
            loss = net.calculate_loss(batch)
            loss.backward()
            widths.append(batch["item_id_list"].shape[1])
            losses.append(loss.detach())
        found.append(
            (widths, torch.stack(losses), {n: p.grad for n, p in net.named_parameters() if p.grad is not None})
        )
    (widths, losses, gradients), (rounded, same_losses, same_gradients) = found
    assert set(rounded) == {8, 12}
    assert rounded == [min(-(-width // 8) * 8, 12) for width in widths] != widths
    torch.testing.assert_close(same_losses, losses)
    for name, gradient in gradients.items():
        torch.testing.assert_close(same_gradients[name], gradient, rtol=1e-4, atol=1e-5)


def test_positions_of_equals_nonzero() -> None:
    mask = torch.rand(200) < 0.3
    expected = mask.nonzero()[:, 0]
    assert torch.equal(positions_of(mask, len(expected)), expected)
    assert torch.equal(positions_of(mask, None), expected)
    assert len(positions_of(torch.zeros(5, dtype=torch.bool), 0)) == 0


def test_the_loss_of_a_batch_is_that_of_a_plain_interaction(cyclic_dataset: str, tiny: dict[str, Any]) -> None:
    config, train, _, _ = prepared(cyclic_dataset, **tiny)
    net = built(config, train).eval()
    batch = next(iter(train))
    plain = Interaction(dict(batch.interaction))
    assert torch.equal(net.calculate_loss(batch), net.calculate_loss(plain))
    moved = batch.to(torch.device("cpu"))
    assert (moved.n_targets, moved.loss_weight) == (batch.n_targets, batch.loss_weight)


# ---------------------------------------------------------------------- bad settings
@pytest.mark.parametrize(
    ("field", "settings"),
    [
        ("train_batch_tokens", {"train_batch_tokens": 9}),
        ("train_batch_tokens", {"train_batch_tokens": 100.5}),
        ("train_batch_tokens", {"train_batch_tokens": 100, "train_on": "prefixes"}),
        ("train_neg_sample_args", {"train_neg_sample_args": {"distribution": "uniform", "sample_num": 1}}),
    ],
)
def test_bad_settings_name_the_field(
    field: str, settings: dict[str, Any], cyclic_dataset: str, tiny: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=f"^{field}: "):
        prepared(cyclic_dataset, **tiny, **settings)
