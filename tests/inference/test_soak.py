"""A service's day in a minute: whatever is called in whatever order, answers are those of the whole histories.

``RECBOLE_HOLO_SOAK=600 pytest tests/inference/test_soak.py`` runs ten minutes of it by hand.
"""

from __future__ import annotations

import io
import multiprocessing
import os
import random
import sqlite3
import time
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from recbole.data.interaction import Interaction

from recbole_holo.data import GAPS
from recbole_holo.data.event_time import GapBuckets
from recbole_holo.inference import Event, Recommender, SQLiteStore, StoreError
from recbole_holo.inference.records import event_key

from .conftest import N_ITEMS, Make, served

SECONDS = float(os.environ.get("RECBOLE_HOLO_SOAK", 60))
BUCKETS = GapBuckets(12, 0.5, 1.5)
KINDS: dict[str, dict[str, Any]] = {
    "Hydra": {},
    "HoloMambaRec": {"bundle_size": 3, "bundle_recent": 5},
    "RecMamba": {"event_time": "gap", "event_time_buckets": 12},
}
LONGEST = 300  # events of a user, who is forgotten then
REMEMBER = 20


def model_of(name: str) -> tuple[Any, Any]:
    model, items = served(name, **KINDS[name])
    if model.event_time is not None:
        torch.nn.init.normal_(model.event_time.vectors, std=0.5)
    return model, replace(items, gap_buckets=BUCKETS)


@dataclass
class User:
    """What the oracle knows: the events in the order in which they arrived, and what each reads of the time."""

    items: list[int] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    latest: float | None = None

    def outcome(self, event: Event, late: str) -> str:
        """What becomes of an event, by the words of the guide."""
        number = int(event.item[1:])
        if number >= N_ITEMS:
            return "skipped: unknown item"
        if event.id is not None and event.id in self.ids[-64:]:
            return "skipped: repeated"
        when: Any = event.timestamp
        is_late = when is not None and self.latest is not None and when < self.latest
        if is_late and late == "skip":
            return "skipped: late"
        known = when is not None and self.latest is not None
        self.gaps.append(when - self.latest if known else np.nan)
        self.items.append(number)
        if event.id is not None:
            self.ids.append(event.id)
        if when is not None and not is_late:
            self.latest = when
        return "late" if is_late else "applied"


def scores_of(model: Any, user: User) -> torch.Tensor:
    """The whole history again, as the offline evaluation reads it."""
    batch = {model.ITEM_SEQ: torch.tensor([user.items]), model.ITEM_SEQ_LEN: torch.tensor([len(user.items)])}
    batch[GAPS] = torch.from_numpy(BUCKETS(np.array(user.gaps, dtype=float)))[None]
    with torch.no_grad():
        return model.full_sort_predict(Interaction(batch))[0]


def assert_ranked(found: Any, model: Any, user: User, k: int, left_out: set[int], among: set[int] | None) -> None:
    if not user.items:
        assert found.basis == "popularity"
        return
    assert found.basis == "history"
    scores = scores_of(model, user)
    scores[[0, *left_out]] = -torch.inf
    if among is not None:
        scores[[n for n in range(N_ITEMS) if n not in among]] = -torch.inf
    best = scores.topk(min(k, N_ITEMS))
    wanted = [n for n, score in zip(best.indices.tolist(), best.values.tolist(), strict=True) if score > -torch.inf]
    given = [int(item[1:]) for item in found.items]
    assert len(given) == len(wanted)
    torch.testing.assert_close(torch.tensor([s.score for s in found.suggestions]), scores[wanted], rtol=1e-3, atol=1e-4)
    # Equal ranks, but of items whose scores are the same but for rounding.
    for one, other in zip(given, wanted, strict=True):
        assert one == other or abs(float(scores[one] - scores[other])) < 2e-4


class Day:
    """Random calls of a service, and the oracle's account of them."""

    def __init__(self, name: str, make: Make, seed: int, late: str) -> None:
        self.name, self.draw, self.make, self.late = name, random.Random(seed), make, late
        self.model, self.items = model_of(name)
        self.users: defaultdict[str, User] = defaultdict(User)
        self.clock, self.count = 1_717_000_000.0, 0
        self.begin()

    def begin(self) -> None:
        self.recommender = Recommender(self.model, self.items, self.make(), late=self.late, remember=REMEMBER)

    def user(self) -> str:
        return f"u{min(int(self.draw.expovariate(0.2)), 30)}"

    def event(self) -> Event:
        self.clock += self.draw.choice([0, 0.25, 1, 60, 3600])
        when = self.draw.choice([self.clock] * 6 + [self.clock - 5000, None])
        self.count += 1
        number = self.draw.choice([self.count, self.count, self.count - self.draw.randrange(1, 80)])
        return Event(
            self.user(), f"i{self.draw.randrange(1, N_ITEMS + 1)}", when, self.draw.choice([None, f"e{number}", number])
        )

    def seen(self, user: User) -> set[int]:
        latest = list(dict.fromkeys(reversed(user.items)))
        return set(latest[:REMEMBER])

    def update(self) -> None:
        one = self.event()
        wanted = self.users[one.user].outcome(one, self.late)
        assert self.recommender.update(one.user, one.item, one.timestamp, one.id) == wanted

    def update_many(self) -> None:
        events = [self.event() for _ in range(self.draw.randrange(60))]
        wanted = [self.users[one.user].outcome(one, self.late) for one in events]
        counts = self.recommender.update_many(iter(events), self.draw.choice([1, 7, 512]))
        assert counts == {outcome: wanted.count(outcome) for outcome in wanted}

    def recommend(self) -> None:
        name, k = self.user(), self.draw.choice([1, 5, 100])
        exclude, among = self.draw.choice([True, False]), None
        if self.draw.random() < 0.3:
            among = {self.draw.randrange(1, N_ITEMS) for _ in range(self.draw.randrange(1, 9))}
        user = self.users[name]
        candidates = None if among is None else [f"i{n}" for n in among] * 2
        found = self.recommender.recommend(name, k, exclude_seen=exclude, candidates=candidates)
        assert_ranked(found, self.model, user, k, self.seen(user) if exclude else set(), among)
        if user.items and self.draw.random() < 0.3:
            with torch.no_grad():
                again = self.recommender.recommend(history=[f"i{n}" for n in user.items], k=k, exclude_seen=False)
            if self.model.event_time is None:
                assert_ranked(again, self.model, user, k, set(), None)

    def recommend_many(self) -> None:
        names = [self.user() for _ in range(self.draw.randrange(6))]
        for name, found in zip(names, self.recommender.recommend_many(names, 5), strict=True):
            assert_ranked(found, self.model, self.users[name], 5, self.seen(self.users[name]), None)

    def forget(self) -> None:
        gone = {self.user(), *(name for name, user in self.users.items() if len(user.items) > LONGEST)}
        self.recommender.forget(gone)
        for name in gone:
            self.users.pop(name, None)

    def rebuild(self) -> None:
        """All, or some, from histories with their times: as if these had just arrived, without ids."""
        keep_others = self.draw.random() < 0.7
        names = [self.user()] if keep_others else [f"u{n}" for n in range(0, 30, 2)]
        histories = []
        if not keep_others:
            self.users.clear()
        for name in names:
            events = [replace(self.event(), user=name, id=None) for _ in range(self.draw.randrange(1, 20))]
            user = self.users[name] = User()
            for one in events:
                user.outcome(one, "append")
            histories.append((name, [e.item for e in events], [e.timestamp for e in events]))
        self.recommender.rebuild(iter(histories), show_progress=False, keep_others=keep_others)

    def reload(self) -> None:
        """The process ends, and another begins with the store and the model as they were saved."""
        file = io.BytesIO()
        torch.save(self.model.state_dict(), file)
        file.seek(0)
        self.recommender.store.close()
        self.model = model_of(self.name)[0]
        self.model.load_state_dict(torch.load(file))
        self.begin()

    CALLS = ("update", "update_many", "recommend", "recommend_many", "forget", "rebuild", "reload")
    WEIGHTS = (20, 6, 12, 6, 1, 1, 1)

    def spend(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            getattr(self, self.draw.choices(self.CALLS, self.WEIGHTS)[0])()
        for name, user in self.users.items():
            assert_ranked(self.recommender.recommend(name, 5, exclude_seen=False), self.model, user, 5, set(), None)


@pytest.mark.parametrize("late", ["append", "skip"])
@pytest.mark.parametrize("name", KINDS)
def test_random_calls(name: str, late: str, make: Make) -> None:
    """Every answer is that of a new encoding of all events, and memory stays what it was."""
    day = Day(name, make, seed=hash_of(name, late), late=late)
    share = SECONDS / 30
    day.spend(share / 3)
    before = psutil.Process().memory_info().rss
    day.spend(share * 2 / 3)
    assert psutil.Process().memory_info().rss - before < 30 * 2**20


def hash_of(*words: str) -> int:
    return sum(map(ord, "".join(words)))


# ------------------------------------------------------------------ two processes on one file
def item_of(event_id: str) -> str:
    return f"i{1 + sum(map(ord, event_id)) * 7 % (N_ITEMS - 1)}"


def serve(path: Path, number: int, seconds: float) -> None:
    """Updates, answers and a model of another version now and then, in a process of its own."""
    torch.set_num_threads(1)
    draw = random.Random(number)
    model, items = model_of("HoloMambaRec")
    recommender = Recommender(model, items, SQLiteStore(path))
    other = Recommender(model, items, SQLiteStore(path), storage="float16")  # which must never write
    end, count = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        user, event_id = f"shared{20 * (count // 400) + draw.randrange(20)}", f"{number}.{count}"
        assert recommender.update(user, item_of(event_id), event_id=event_id) == "applied"
        count += 1
        if count % 10 == 0:
            recommender.recommend_many([f"shared{draw.randrange(count)}" for _ in range(7)], 3)
            recommender.update_many([Event(f"own{number}", f"i{1 + n % 9}") for n in range(5)])
            with pytest.raises(StoreError, match="another checkpoint, bundle size or storage"):
                other.update(user, "i1")
    (path.parent / f"{number}.count").write_text(str(count))


def test_two_processes_on_one_file(tmp_path: Path) -> None:
    """No event is lost and none is read twice; the latest ones' order is in the record, and the state is theirs."""
    path, seconds = tmp_path / "states.db", SECONDS / 6
    model, items = model_of("HoloMambaRec")
    recommender = Recommender(model, items, SQLiteStore(path))
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=serve, args=(path, number, seconds)) for number in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    counts = [int((tmp_path / f"{number}.count").read_text()) for number in range(2)]
    ids = [f"{number}.{c}" for number in range(2) for c in range(counts[number])]
    items_by_key = {int(event_key(event_id)): int(item_of(event_id)[1:]) for event_id in ids}
    first = {int(event_key(event_id)) for event_id in ids[: counts[0]]}
    events, mixed = 0, 0
    for name in (name for name in recommender.store if name.startswith("shared")):
        record = recommender.codec.decode(recommender.store.get([name])[0], name)
        events += record.events
        if record.events <= 64 and mixed < 200:
            order = [items_by_key[int(key)] for key in record.ids]
            assert len(order) == record.events
            mixed += len({int(key) in first for key in record.ids}) == 2
            found = recommender.recommend(name, 5, exclude_seen=False)
            assert_ranked(found, model, User(order), 5, set(), None)
    assert events == len(ids)
    assert mixed > 5  # users whom both wrote
    for number in range(2):
        own = User([1 + n % 9 for n in range(5)] * (counts[number] // 10))
        assert_ranked(recommender.recommend(f"own{number}", 5, exclude_seen=False), model, own, 5, set(), None)
    assert sqlite3.connect(path).execute("PRAGMA integrity_check").fetchone() == ("ok",)
