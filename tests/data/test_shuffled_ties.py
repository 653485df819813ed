"""shuffle_ties: another order of equal times in every epoch, and of nothing else."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from recbole_holo.bridge import checkpoint
from recbole_holo.bridge.config import Config
from recbole_holo.data.batches import SequenceTrainLoader
from recbole_holo.data.loader import create_dataset, data_preparation
from recbole_holo.errors import ConfigError
from recbole_holo.quick_start import run
from recbole_holo.training import distributed

LEAVE_ONE_OUT = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"}
RATIO = {"split": {"RS": [0.6, 0.2, 0.2]}, "order": "TO", "group_by": "user", "mode": "full"}
AT_ONCE = {**RATIO, "group_by": "none"}
SHUFFLED = {"shuffle_ties": True, "hidden_size": 8, "window_stride": 4}


@pytest.fixture
def tied_dataset(write_dataset: Callable[..., str]) -> str:
    """Users with ties of one to nine events, some at the start, some across what is held out; items repeat."""
    draw = random.Random(0)
    rows = []
    for user in range(30):
        time = 1_760_000_000 + draw.randrange(100)
        for _ in range(draw.randrange(2, 6)):
            rows += [(f"u{user}", f"i{draw.randrange(25)}", time) for _ in range(draw.choice([1, 1, 2, 3, 9]))]
            time += draw.choice([1, 1, 1000])
    return write_dataset(rows, "tied")


def prepared(name: str, tiny: dict[str, Any], **settings: Any) -> tuple[Any, Any, Any]:
    config = Config("RecMamba", name, config_dict={**tiny, **SHUFFLED, **settings})
    return data_preparation(config, create_dataset(config))


def epoch(loader: Any) -> dict[int, tuple[int, int]]:
    """Of every event of the epoch that was an input, its item, and the target after it (0 = none); windows agree."""
    found: dict[int, tuple[int, int]] = {}
    for batch in loader:
        begin, length = batch.histories.begin.tolist(), batch["item_length"].tolist()
        assert batch.n_targets == int((batch["item_id_target"] > 0).sum())
        for b, n, items, targets in zip(
            begin, length, batch["item_id_list"].tolist(), batch["item_id_target"].tolist(), strict=True
        ):
            assert batch.histories.items[b : b + n].tolist() == items[:n]
            for t in range(n):
                item, target = found.get(b + t, (items[t], 0))
                assert item == items[t]
                assert not (target and targets[t]), "a target twice"
                found[b + t] = (item, target or targets[t])
    return found


def first_of(users: torch.Tensor) -> list[int]:
    return [e for e in range(len(users)) if e == 0 or users[e] != users[e - 1]]


@pytest.mark.parametrize("eval_args", [LEAVE_ONE_OUT, RATIO, AT_ONCE], ids=["leave-one-out", "ratio", "at once"])
def test_only_ties_of_training_targets_move(eval_args: dict[str, Any], tied_dataset: str, tiny: dict[str, Any]) -> None:
    train, valid, test = prepared(tied_dataset, tiny, eval_args=eval_args)
    plain = prepared(tied_dataset, tiny, eval_args=eval_args, shuffle_ties=False)
    base, data = epoch(plain[0]), train.dataset
    assert isinstance(train, SequenceTrainLoader)
    before = [[row.clone() for row in part.dataset[slice(None)].interaction.values()] for part in (train, valid, test)]
    epochs = [epoch(train) for _ in range(30)]

    # the group of an event that may move: events of one user and time, all of them training targets, found one by one
    users, times = data._events["user_id"], data._events["timestamp"].double()
    by_user: dict[str, list[float]] = {}
    for line in Path("dataset/tied/tied.inter").read_text().splitlines()[1:]:
        user, _, time = line.split("\t")
        by_user.setdefault(user, []).append(float(time))
    assert {t for own in by_user.values() for t in own} != set(
        times.tolist()
    )  # float32 does not tell all seconds apart
    tokens = data.id2token("user_id", users.tolist()).tolist()
    first = set(first_of(users))
    places = {e: e - max(f for f in first if f <= e) for e in range(len(users))}
    when = [sorted(by_user[tokens[e]])[places[e]] for e in range(len(users))]
    targets = {e + 1 for e, (_, target) in base.items() if target}
    group: dict[int, int] = {}
    for e in sorted(targets):
        joins = e - 1 in targets and users[e] == users[e - 1] and when[e] == when[e - 1]
        group[e] = group[e - 1] if joins else e
    movable = Counter(group.values())

    for seen in epochs:
        assert seen.keys() == base.keys()
        for e, (item, target) in seen.items():
            assert (target > 0) == (base[e][1] > 0)
            if target and e + 1 in seen:
                assert target == seen[e + 1][0]  # the target is what comes next in this epoch
            if movable[group.get(e, -1)] < 2:
                assert item == base[e][0]
        now, then = (
            {g: sorted(one[e - 1][1] for e in targets if group[e] == g) for g in movable} for one in (seen, base)
        )
        assert now == then  # each tie has its own items, so the targets are the same
    for g, size in movable.items():
        distinct = {base[e - 1][1] for e in targets if group[e] == g}
        orders = {tuple(one[e - 1][1] for e in sorted(targets) if group[e] == g) for one in epochs}
        assert (len(orders) > 1) == (len(distinct) > 1), (g, size)
    ends = [e for e in targets if e + 1 not in targets and e + 1 not in first and e + 1 < len(users)]
    if eval_args is not AT_ONCE:  # whose moment no tie goes across
        assert any(when[e] == when[e + 1] for e in ends)  # ties that go on into what is held out were among these

    after = [[row.clone() for row in part.dataset[slice(None)].interaction.values()] for part in (train, valid, test)]
    for one, other in zip(before, after, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    for (mine, *_), (others, *_) in zip([*valid, *test], [*plain[1], *plain[2]], strict=True):
        assert torch.equal(mine["item_id_list"], others["item_id_list"])
        assert torch.equal(mine.histories.items, others.histories.items)


def test_positions_of_a_tie_are_equally_likely(write_dataset: Callable[..., str], tiny: dict[str, Any]) -> None:
    rows = [(f"u{u}", f"i{i}", 0 if i == 0 else 5 if i < 4 else i) for u in range(300) for i in range(7)]
    train, _, _ = prepared(write_dataset(rows), tiny, train_batch_size=300)
    counts: Counter[tuple[int, ...]] = Counter()
    for _ in range(4):
        for batch in train:
            counts.update(map(tuple, batch["item_id_list"][:, 1:4].tolist()))
    assert len(counts) == 6
    assert all(140 < n < 260 for n in counts.values())  # 1200 draws, 200 each, sd 13


def test_epochs_follow_from_the_generator(tied_dataset: str, tiny: dict[str, Any]) -> None:
    loader, other = (prepared(tied_dataset, tiny)[0] for _ in range(2))
    first, state, second = epoch(loader), loader.generator.get_state(), epoch(loader)
    assert first == epoch(other) != second
    other.generator.set_state(state)
    assert epoch(other) == second
    plain = prepared(tied_dataset, tiny, shuffle_ties=False)[0]
    again = prepared(tied_dataset, tiny)[0]
    assert [b["user_id"].tolist() for b in plain] == [b["user_id"].tolist() for b in again]  # the same first plan
    fixed = prepared(tied_dataset, tiny, shuffle=False)[0]
    assert epoch(fixed) != epoch(fixed)


def test_two_epochs_at_once_do_not_mix(tied_dataset: str, tiny: dict[str, Any]) -> None:
    loader = prepared(tied_dataset, tiny)[0]
    expected = epoch(prepared(tied_dataset, tiny)[0])
    started, later = iter(loader), iter(loader)
    batches = [next(started)]
    list(later)
    assert epoch([*batches, *started]) == expected


def test_processes_plan_alike(tied_dataset: str, tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    whole = epoch(prepared(tied_dataset, tiny)[0])
    shares: dict[int, tuple[int, int]] = {}
    for rank in range(3):
        loader = prepared(tied_dataset, tiny)[0]
        with monkeypatch.context() as as_if:
            as_if.setattr(distributed, "world", lambda rank=rank: (rank, 3))
            for event, (item, target) in epoch(loader).items():
                known = shares.get(event, (item, 0))
                assert known[0] == item
                shares[event] = (item, known[1] or target)
    assert shares == whole


def test_a_resumed_run_is_the_whole_run(tied_dataset: str, tiny: dict[str, Any]) -> None:
    settings = {**tiny, **SHUFFLED, "eval_step": 0, "lr_scheduler": None}  # a schedule goes over all of a run's epochs
    whole = run("RecMamba", tied_dataset, config_dict={**settings, "epochs": 4})["report"]
    half = run("RecMamba", tied_dataset, config_dict={**settings, "epochs": 2})["report"]
    rest = run("RecMamba", tied_dataset, config_dict={**settings, "epochs": 4, "resume": half["checkpoint"]})["report"]
    one, other = (checkpoint.load(report["checkpoint"]) for report in (whole, rest))
    assert one["epoch"] == other["epoch"] == 3
    for name, value in one["state_dict"].items():
        assert torch.equal(value, other["state_dict"][name]), name
    assert torch.equal(one["random_state"]["batches"], other["random_state"]["batches"])


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("RecMamba", {"shuffle_ties": "yes"}),
        ("RecMamba", {"shuffle_ties": True, "train_on": "prefixes"}),
        ("RecMamba", {"shuffle_ties": True, "benchmark_filename": ["train", "valid", "test"]}),
        ("SASRec", {"shuffle_ties": True}),
    ],
)
def test_settings_without_ties_to_shuffle(model: str, settings: dict[str, Any], tiny: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"^shuffle_ties: "):
        Config(model, "any", config_dict={**tiny, **settings})
