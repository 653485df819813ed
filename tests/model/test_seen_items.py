"""What a user had seen is left out of the loss: against a calculation from the events themselves."""

from __future__ import annotations

import gc
import pickle
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from recbole_holo.bridge import registry
from recbole_holo.bridge.config import Config
from recbole_holo.data.catalogue import Catalogue
from recbole_holo.data.histories import Events, Histories, histories_of
from recbole_holo.data.loader import create_dataset, data_preparation
from recbole_holo.errors import ConfigError
from recbole_holo.losses.negatives import REDRAWS
from recbole_holo.ops import losses

MODELS = ("HoloMambaRec", "Hydra", "RecMamba", "Mamba4Rec", "LinRec", "SequenceSASRec")
N_ITEMS = 30


@pytest.fixture
def clicks(write_dataset: Callable[..., str]) -> str:
    """Twelve users of up to 26 events among 30 items, every third event one that the user had before."""
    rng, inter = np.random.default_rng(1), []
    for user in range(12):
        items: list[int] = []
        for t in range(5 + 2 * user if user else 3):
            again = items and t % 3 == 2
            items.append(int(rng.choice(items) if again else rng.integers(N_ITEMS)))
            inter.append((f"u{user}", f"i{items[-1]}", 1_700_000_000 + 1000 * t))
    return write_dataset(inter, "clicks")


def model_and_data(dataset: str, tiny: dict[str, Any], name: str = "RecMamba", **settings: Any) -> tuple[Any, Any]:
    quiet = {"dropout_prob": 0.0, "layer_dropout_prob": 0.0, "hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0}
    plain = {"loss_type": "CE", "similarity": "dot", "temperature": 1.0, "learn_temperature": False}
    given = {**tiny, **quiet, **plain, "seen_items": "excluded", "MAX_ITEM_LIST_LENGTH": 6, **settings}
    config = Config(name, dataset, config_dict=given)
    train, _, _ = data_preparation(config, create_dataset(config))
    torch.manual_seed(0)
    return registry.get_model_class(name)(config, train.dataset).train(), train


def target_events(batch: Any, model: Any) -> list[tuple[int, int, int]]:
    """Row, position and event number (of the last one read) of every target, in the loss' order."""
    wanted = batch[model.ITEM_TARGETS]
    begin = batch.histories.begin.tolist()
    return [(b, t, begin[b] + t) for b, t in (wanted > 0).nonzero().tolist()]


def seen_before(dataset: Any, event: int) -> set[int]:
    """Items of the user's events up to and with this one, from the columns of the data set."""
    users, items = dataset._events[dataset.uid_field].tolist(), dataset._events[dataset.iid_field].tolist()
    return {items[e] for e in range(event + 1) if users[e] == users[event]}


def expected(model: Any, hidden: Tensor, batch: Any, dataset: Any) -> Tensor:
    """Mean of the cross-entropies, a row at a time, in float64."""
    table, terms = model.item_vectors().double(), []
    for b, t, event in target_events(batch, model):
        target = int(batch[model.ITEM_TARGETS][b, t])
        rivals = [i for i in range(1, model.n_items) if i == target or i not in seen_before(dataset, event)]
        scores = table[rivals] @ hidden[b, t].double()
        terms.append(scores.logsumexp(0) - scores[rivals.index(target)])
    return torch.stack(terms).mean().float()


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_is_about_what_was_not_seen(clicks, tiny, name):
    model, train = model_and_data(clicks, tiny, name)
    longest = 0
    for batch in train:
        wanted = expected(model, model.hidden_states(batch[model.ITEM_SEQ]), batch, train.dataset)
        found = model.calculate_loss(batch)
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        model.excludes_seen = False
        assert not torch.allclose(model.calculate_loss(batch), wanted, rtol=1e-3)
        model.excludes_seen = True
        longest = max(longest, int((batch.histories.begin - batch.histories.first).max()))
    assert longest > 6  # some window began later in its history than a window is long


def test_gradients_are_those_of_what_was_not_seen(clicks, tiny):
    model, train = model_and_data(clicks, tiny)
    batch = next(iter(train))
    parameters = [model.item_embedding.weight, model.layers[0].mamba.out_proj.weight]
    found = torch.autograd.grad(model.calculate_loss(batch), parameters)
    hidden = model.hidden_states(batch[model.ITEM_SEQ])
    wanted = torch.autograd.grad(expected(model, hidden, batch, train.dataset), parameters)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_parts_of_a_history_know_what_came_before(clicks, tiny):
    model, train = model_and_data(clicks, tiny, MAX_ITEM_LIST_LENGTH=11, train_steps_at_once=4)
    for batch in train:
        whole = model.calculate_loss(batch)
        torch.testing.assert_close(sum(model.losses_in_parts(batch, 4)), whole, rtol=1e-5, atol=1e-6)


def test_prefixes_have_the_targets_of_sequences_with_what_was_seen(clicks, tiny):
    whole, sequences = model_and_data(clicks, tiny, window_stride=1)
    single, prefixes = model_and_data(clicks, tiny, train_on="prefixes")
    torch.manual_seed(0)
    found = sum(len(b) * single.calculate_loss(b) for b in prefixes)
    wanted = 0.0
    for batch in sequences:
        wanted += int((batch[whole.ITEM_TARGETS] > 0).sum()) * whole.calculate_loss(batch)
    # A window of stride 1 gives each target the history that its prefix has, but for the first window's.
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_bundles_leave_out_what_single_events_do(clicks, tiny):
    model, train = model_and_data(clicks, tiny, bundle_size=2, bundle_recent=3)
    batch = next(iter(train))
    wanted = expected(model, model.hidden_states(batch[model.ITEM_SEQ]), batch, train.dataset)
    torch.testing.assert_close(model.calculate_loss(batch), wanted, rtol=1e-5, atol=1e-6)


def test_items_that_are_never_trained_keep_their_numbers(clicks, tiny):
    rows = [f"i{i}\tg{i % 3}" for i in range(N_ITEMS)]
    Path("dataset", clicks, f"{clicks}.item").write_text("\n".join(["item_id:token\tgenre:token", *rows]) + "\n")
    settings = {
        "item_attributes": ["genre"],
        "binding": "role",
        "bind_output": True,
        "cold_items": "attributes",
        "load_col": {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "genre"]},
    }
    model, train = model_and_data(clicks, tiny, **settings)
    batch = next(iter(train))
    hidden, known = model.hidden_states(batch[model.ITEM_SEQ]), set(model.trained_items.tolist())
    table, terms = model.item_vectors().double(), []
    for b, t, event in target_events(batch, model):
        target, seen = int(batch[model.ITEM_TARGETS][b, t]), seen_before(train.dataset, event)
        rivals = [i for i in range(1, model.n_items) if i == target or (i in known and i not in seen)]
        scores = table[rivals] @ hidden[b, t].double()
        terms.append(scores.logsumexp(0) - scores[rivals.index(target)])
    torch.testing.assert_close(model.calculate_loss(batch), torch.stack(terms).mean().float(), rtol=1e-5, atol=1e-6)


def test_a_sample_of_everything_is_the_full_softmax(clicks, tiny, monkeypatch):
    model, train = model_and_data(clicks, tiny, loss_type="SampledCE")
    batch = next(iter(train))
    every = torch.arange(1, model.n_items)
    monkeypatch.setattr(model.criterion.sampler, "forward", lambda targets: (every, torch.zeros(len(every))))
    wanted = expected(model, model.hidden_states(batch[model.ITEM_SEQ]), batch, train.dataset)
    monkeypatch.setattr(type(model), "_vectors_for", lambda self, n: (self.item_vectors(), False))
    torch.testing.assert_close(model.calculate_loss(batch), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss_type", ["BPR", "BCE"])
def test_no_negative_was_seen(clicks, tiny, loss_type, monkeypatch):
    model, train = model_and_data(clicks, tiny, loss_type=loss_type)
    used: list[tuple[Tensor, Tensor]] = []
    name = loss_type.lower()
    real = getattr(losses, name)

    def spy(hidden: Tensor, targets: Tensor, negatives: Tensor, *others: Any) -> Tensor:
        used.append((negatives, others[-1]))
        return real(hidden, targets, negatives, *others)

    monkeypatch.setattr(losses, name, spy)
    drawn = 0
    for batch in train:
        model.calculate_loss(batch)
        negatives, left_out = used[-1]
        events = target_events(batch, model)
        for (_, _, event), negative, out in zip(events, negatives.tolist(), left_out.tolist(), strict=True):
            assert out == (negative in seen_before(train.dataset, event))
            drawn += not out
    assert drawn > 100


@pytest.mark.parametrize("loss", [losses.bpr, losses.bce])
def test_a_row_whose_negative_is_left_out_is_judged_by_its_target_alone(loss):
    hidden, table = torch.randn(3, 4), torch.randn(6, 4)
    targets, negatives = torch.tensor([1, 2, 3]), torch.tensor([4, 5, 4])
    some = loss(hidden, targets, negatives, table, None, False, False, torch.tensor([False, True, False]))
    scores = hidden @ table.T
    positive, negative = (scores.gather(1, of.unsqueeze(1)).squeeze(1) for of in (targets, negatives))
    if loss is losses.bpr:
        rows = F.softplus(negative - positive) * torch.tensor([1.0, 0.0, 1.0])
    else:
        rows = F.softplus(-positive) + F.softplus(negative) * torch.tensor([1.0, 0.0, 1.0])
    torch.testing.assert_close(some, rows.mean())
    assert REDRAWS > 0


def test_the_first_time_is_found_among_all_events():
    items = torch.tensor([3, 1, 3, 2, 3, 3, 1, 9])
    first = torch.tensor([0, 0, 0, 0, 4, 4, 4, 7])
    events = Events(items, first, 10)
    asked = torch.tensor([3, 1, 2, 9, 4])
    assert events.first_time(torch.tensor(0), asked).tolist() == [0, 1, 3, 8, 8]
    assert events.first_time(torch.tensor(4), asked).tolist() == [4, 6, 8, 8, 8]
    assert events.first_time(torch.tensor(7), torch.tensor([9, 10, 29])).tolist() == [7, 8, 8]
    seen = Histories(events, torch.tensor([1, 4])).at(torch.tensor([0, 0, 1]), torch.tensor([0, 1, 2]))
    assert seen.among(asked).tolist() == [
        [True, True, False, False, False],
        [True, True, False, False, False],
        [True, True, False, False, False],
    ]
    assert seen.contains(torch.tensor([1, 2, 1])).tolist() == [True, False, True]
    ranges = seen.ranges()
    assert [items[a:b].tolist() for a, b in zip(ranges.start, ranges.end, strict=True)] == [
        [3, 1],
        [3, 1, 3],
        [3, 3, 1],
    ]


def test_a_batch_without_a_loader_shows_its_own_items():
    seq = torch.tensor([[4, 5, 0], [6, 6, 7]])
    ranges = histories_of({}, seq, 8).at(torch.tensor([0, 1, 1]), torch.tensor([1, 0, 2])).ranges()
    shown = [ranges.items[a:b].tolist() for a, b in zip(ranges.start, ranges.end, strict=True)]
    assert shown == [[4, 5], [6], [6, 6, 7]]


def test_the_catalogue_knows_how_often_items_are_met_again(clicks, tiny):
    model, train = model_and_data(clicks, tiny)
    again = total = 0
    for batch in train:
        for b, t, event in target_events(batch, model):
            again += int(batch[model.ITEM_TARGETS][b, t]) in seen_before(train.dataset, event)
            total += 1
    assert again > 20
    catalogue = Catalogue.of(train.dataset)
    assert catalogue.repeats == pytest.approx(again / total)
    assert Catalogue.from_plain(catalogue.plain()).repeats == catalogue.repeats
    older = catalogue.plain()
    del older["repeats"]
    assert Catalogue.from_plain(older).repeats is None


def test_other_values_are_an_error(clicks, tiny):
    with pytest.raises(ConfigError, match="seen_items"):
        model_and_data(clicks, tiny, seen_items="skip")


def test_events_that_are_on_the_device_are_not_made_anew() -> None:
    """A configuration's device is cuda, a tensor's cuda:0; new events would be sorted again in every batch."""

    class OnGpu:
        device = torch.device("cuda", 0)

        def to(self, device: torch.device) -> OnGpu:
            return self

    events = Events(OnGpu(), OnGpu(), 3)  # type: ignore[arg-type]
    assert events.to(torch.device("cuda")) is events


# Every batch carried all events to a GPU, where they were sorted again.
def test_events_go_to_a_device_once() -> None:
    events = Events(torch.tensor([1, 2, 1]), torch.zeros(3, dtype=torch.long), 3)
    assert events.to(torch.device("meta")) is events.to(torch.device("meta"))
    assert events.to(torch.device("cpu")) is events


# A data worker sent all events with every batch, and the process that trains sorted them for each.
def test_a_data_workers_batches_name_the_events_that_are_there_already(clicks, tiny):
    _, train = model_and_data(clicks, tiny, train_on="prefixes", worker=1)
    batches = list(train)
    assert len(batches) > 1
    assert all(batch.histories.events is train._dataset.events for batch in batches)
    alone = model_and_data(clicks, tiny, train_on="prefixes")[1]
    for batch, other in zip(batches, alone, strict=True):
        assert torch.equal(batch.histories.begin, other.histories.begin)


def test_events_that_are_saved_and_loaded_are_the_same() -> None:
    events = Events(torch.tensor([1, 2, 1]), torch.zeros(3, dtype=torch.long), 3)
    saved, items = pickle.dumps(events), events.items
    assert pickle.loads(saved) is events
    assert deepcopy(events) is events
    del events
    gc.collect()
    assert torch.equal(pickle.loads(saved).items, items)
