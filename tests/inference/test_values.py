"""Ids, times, events, numbers and lists: what docs/serving.md says of each holds in every call and in every store."""

from __future__ import annotations

import re
from collections.abc import Callable
from datetime import date, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch

from recbole_holo.errors import ConfigError
from recbole_holo.inference import Event, Recommender

from .conftest import N_ITEMS, Make, served

GUIDE = (Path(__file__).resolve().parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
NAMES = {"nan": float("nan"), "inf": float("inf"), "np": np, "Event": Event}
NAMES |= {"datetime": datetime, "date": date, "timezone": timezone}
Call = Callable[[Recommender, Any], Any]

# Where each row of the guide's table can be given.
CALLS: dict[str, dict[str, Call]] = {
    "a user": {
        "event": lambda r, v: Event(v, "i1"),
        "update": lambda r, v: r.update(v, "i1"),
        "rebuild": lambda r, v: r.rebuild([(v, ["i1"])], show_progress=False, keep_others=True),
        "recommend": lambda r, v: r.recommend(v),
        "recommend_many": lambda r, v: r.recommend_many([v]),
        "forget": lambda r, v: r.forget([v]),
    },
    "an item": {
        "event": lambda r, v: Event("5", v),
        "update": lambda r, v: r.update("5", v),
        "history": lambda r, v: r.recommend(history=[v]),
        "candidates": lambda r, v: r.recommend(history=["i1"], candidates=[v]),
        "similar_items": lambda r, v: r.similar_items(v),
        "rebuild": lambda r, v: r.rebuild([("5", [v])], show_progress=False, keep_others=True),
    },
    "an event id": {
        "event": lambda r, v: Event("5", "i1", None, v),
        "update": lambda r, v: r.update("5", "i1", None, v),
    },
    "a time": {
        "event": lambda r, v: Event("5", "i1", v),
        "update": lambda r, v: r.update("5", "i1", v),
        "history": lambda r, v: r.recommend(history=["i1"], timestamps=[v]),
        "rebuild": lambda r, v: r.rebuild([("5", ["i1"], [v])], show_progress=False, keep_others=True),
    },
    "an event": {
        "update_many": lambda r, v: r.update_many([Event("6", "i1"), v]),
        "generator": lambda r, v: r.update_many(e for e in [v]),
    },
    "a list of events": {"update_many": lambda r, v: r.update_many(v)},
    "`k`": {
        "recommend": lambda r, v: r.recommend("5", k=v),
        "recommend_many": lambda r, v: r.recommend_many(["5"], v),
        "history": lambda r, v: r.recommend(history=["i1"], k=v),
        "similar_items": lambda r, v: r.similar_items("i1", k=v),
    },
    "a history": {
        "recommend": lambda r, v: r.recommend(history=v),
        "rebuild": lambda r, v: r.rebuild([("5", v)], show_progress=False, keep_others=True),
    },
    "times of a history of two": {
        "recommend": lambda r, v: r.recommend(history=["i1", "i2"], timestamps=v),
        "rebuild": lambda r, v: r.rebuild([("5", ["i1", "i2"], v)], show_progress=False, keep_others=True),
    },
    "candidates": {
        "history": lambda r, v: r.recommend(history=["i1"], candidates=v),
        "user": lambda r, v: r.recommend("5", candidates=v),
    },
    "users": {"recommend_many": lambda r, v: r.recommend_many(v), "forget": lambda r, v: r.forget(v)},
    "histories to rebuild from": {
        "rebuild": lambda r, v: r.rebuild(v, show_progress=False),
        "keep_others": lambda r, v: r.rebuild(v, show_progress=False, keep_others=True),
    },
}


def table() -> dict[str, tuple[list[str], list[str]]]:
    """The guide's: of each row what is taken and what is refused, as Python."""
    rows = re.findall(r"^\| (.*) \| (.*) \| (.*) \|$", GUIDE.split("## What may be given")[1], re.M)
    rows = rows[1 : 1 + len(CALLS)]
    return {name: tuple(re.findall(r"`([^`]+)`", cell) for cell in cells) for name, *cells in rows}  # type: ignore[misc]


ROWS = table()
REFUSED = [(row, call, text) for row in CALLS for call in CALLS[row] for text in ROWS[row][1]]
TAKEN = [(row, call, text) for row in CALLS for call in CALLS[row] for text in ROWS[row][0]]


def value(text: str) -> Any:
    return eval(text, dict(NAMES))


def content(recommender: Recommender) -> dict[str, bytes | None]:
    users = sorted(recommender.store)
    return dict(zip(users, recommender.store.get(users), strict=True))


@pytest.fixture
def recommender(make: Make) -> Recommender:
    model, items = served()
    found = Recommender(model, items, make())
    found.update_many([Event("5", "i3", 1.0, "first"), Event("55", "i4")])
    return found


def test_the_guides_table_is_all_there() -> None:
    assert list(ROWS) == list(CALLS)
    assert len(REFUSED) > 150
    assert len(TAKEN) > 80


# What was no id, time, event, number or list was applied under a name that nothing finds again, read letter by letter,
# or ended in AttributeError, TypeError, OverflowError, UnicodeEncodeError.
def test_what_is_refused_is_named_and_changes_nothing(recommender: Recommender) -> None:
    before = content(recommender)
    assert len(before) == 2
    for row, call, text in REFUSED:
        given = value(text)
        if row == "a user" and call == "recommend" and given is None:
            continue  # no user is given
        try:
            with pytest.raises(ConfigError, match="cannot be used: "):
                CALLS[row][call](recommender, given)
        except BaseException as error:
            raise AssertionError(f"{row} {text}, {call}: {error!r}") from error
        assert content(recommender) == before, f"{row} {text}, {call}"


def test_what_is_taken_is_taken() -> None:
    model, items = served()
    recommender = Recommender(model, items)
    for row, call, text in TAKEN:
        recommender.forget(list(recommender.store))
        recommender.update("5", "i3")
        if row == "an item" and text == "5" and call in ("candidates", "similar_items"):
            continue  # it is no item of the catalogue
        try:
            CALLS[row][call](recommender, value(text))
        except BaseException as error:
            raise AssertionError(f"{row} {text}, {call}: {error!r}") from error


def test_a_number_and_its_digits_are_one_id_in_every_store(make: Make) -> None:
    """A user 5, "5" and numpy's 5 were up to three users, and others in memory than in a file."""
    model, items = served()
    recommender = Recommender(model, items, make())
    for user in ("5", 5, np.int64(5), np.str_("5")):
        recommender.update(user, "i1")
    recommender.update_many([Event(5, "i2"), Event("5", "i3")])
    recommender.update("Ω\0 x", "i1")
    assert sorted(recommender.store) == ["5", "Ω\0 x"]
    record = recommender.codec.decode(recommender.store.get(["5"])[0], "5")
    assert record.events == 6
    assert recommender.recommend(5) == recommender.recommend("5") == recommender.recommend_many([np.int64(5)])[0]
    assert recommender.update(6, "i1", event_id=7) == "applied"
    assert recommender.update(6, "i1", event_id="7") == "skipped: repeated"
    recommender.forget([5, np.int32(6)])
    assert sorted(recommender.store) == ["Ω\0 x"]


def test_a_wrong_time_leaves_the_order_after_it_alone() -> None:
    """After nan nothing was late any more, after infinity everything was."""
    model, items = served()
    recommender = Recommender(model, items)
    recommender.update("a", "i1", 100)
    for wrong in (float("nan"), float("inf"), -float("inf")):
        with pytest.raises(ConfigError, match="timestamp: "):
            recommender.update("a", "i2", wrong)
    assert recommender.update("a", "i2", 99) == "late"
    assert recommender.update("a", "i3", 101) == "applied"


@pytest.mark.parametrize(("unit", "second"), [("s", 1.0), ("ms", 1e-3), ("ns", 1e-9), ("D", 86400.0)])
def test_datetimes_are_what_has_passed_since_1970(unit: str, second: float) -> None:
    model, items = served()
    recommender = Recommender(model, items, time_unit=unit)
    moment = datetime(2024, 5, 29, 12, 30, 0, 250_000, tzinfo=timezone.utc)
    elsewhere = moment.astimezone(timezone(timedelta(hours=9)))
    times = [moment, elsewhere, pd.Timestamp(elsewhere), np.datetime64("2024-05-29T12:30:00.250")]
    for n, given in enumerate(times):
        assert recommender.update(f"u{n}", "i1", given) == "applied"
        record = recommender.codec.decode(recommender.store.get([f"u{n}"])[0], f"u{n}")
        assert record.time == pytest.approx(moment.timestamp() / second, rel=1e-15)
    assert recommender.update("u0", "i2", moment - timedelta(seconds=1)) == "late"
    assert recommender.update("u0", "i2", moment.timestamp() / second) == "applied"  # numbers and datetimes agree
    for naive in (datetime(2024, 5, 29), pd.Timestamp("2024-05-29"), pd.NaT):
        with pytest.raises(ConfigError, match="time"):
            recommender.update("u0", "i2", naive)
    with pytest.raises(ConfigError, match="time_unit: 'fortnight'"):
        Recommender(model, items, time_unit="fortnight")


def test_a_repeated_candidate_is_recommended_once() -> None:
    model, items = served()
    recommender = Recommender(model, items)
    for given in ({"history": ["i1"]}, {"user": "nobody"}):
        once = recommender.recommend(**given, candidates=["i7", "i8", "i9"])
        twice = recommender.recommend(**given, candidates=["i8", "i8", "i7", "i9", "i8"])
        assert twice == once
        assert len(set(twice.items)) == 3


def test_lists_that_can_be_read_only_once() -> None:
    model, items = served()
    recommender = Recommender(model, items)
    history = ["i1", "nothing", "i5"]
    found = recommender.recommend(history=(item for item in history), timestamps=iter([1, 2, 3]))
    assert found == recommender.recommend(history=history)
    assert found.unknown == ["nothing"]
    recommender.update_many(Event(user, "i1") for user in "ab")
    assert len(recommender.recommend_many(iter("ab"))) == 2
    recommender.forget(user for user in "a")
    assert list(recommender.store) == ["b"]


def test_one_id_instead_of_a_list_forgets_nobody() -> None:
    """``forget("ab")`` would have deleted the users a and b."""
    model, items = served()
    recommender = Recommender(model, items)
    recommender.update_many(Event(user, "i1") for user in "ab")
    with pytest.raises(ConfigError, match=r"users: 'ab' cannot be used: .*\['ab'\]"):
        recommender.forget("ab")
    assert len(recommender.store) == 2


def test_a_rebuild_that_is_refused_leaves_the_store_as_it_was(recommender: Recommender) -> None:
    before = content(recommender)
    for last in (("b", ["i1", None]), ("a", ["i2"]), ("b", "i1"), ("b", ["i1"], [float("inf")]), "ab"):
        with pytest.raises(ConfigError):
            recommender.rebuild((h for h in [("a", ["i1"]), last]), show_progress=False)
        assert content(recommender) == before


def test_other_numbers_and_switches() -> None:
    model, items = served()
    for setting in ({"remember": 2.5}, {"remember": "3"}, {"remember": True}):
        with pytest.raises(ConfigError, match="remember"):
            Recommender(model, items, **setting)  # type: ignore[arg-type]
    recommender = Recommender(model, items)
    for size in (0, 2.5, "3"):
        with pytest.raises(ConfigError, match="batch_size"):
            recommender.update_many([Event("a", "i1")], size)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="exclude_seen: 'no'"):
        recommender.recommend(history=["i1"], exclude_seen="no")  # type: ignore[arg-type]
    assert len(recommender.recommend(history=["i1"], k=10**9).items) == N_ITEMS - 2
    with torch.no_grad():
        assert recommender.recommend(history=["i1"], k=np.int64(2)) == recommender.recommend(history=["i1"], k=2)
