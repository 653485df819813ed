"""Stores: one behaviour in memory, on disk and in Redis; and what is left after a crash."""

from __future__ import annotations

import os
import random
import resource
import signal
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from recbole_holo.errors import ConfigError
from recbole_holo.inference import Event, Recommender, RedisStore, SQLiteStore, StoreError
from recbole_holo.inference.stores import Conflict, OtherVersion, Superseded

from .conftest import N_ITEMS, Make, served


def test_records_are_kept(make: Make) -> None:
    store = make()
    assert store.version is None
    store.replace("v1", ())
    assert store.get([]) == []
    assert store.get(["a"]) == [None]
    store.put({})
    store.put({"a": b"1", "Ω": b"2\0"})
    store.put({"a": b"3"})
    again = make()
    assert again.version == "v1"
    assert again.get(["Ω", "nobody", "a"]) == [b"2\0", None, b"3"]
    assert len(again) == 2
    assert sorted(again) == ["a", "Ω"]
    again.delete(["a", "nobody"])
    assert store.get(["a"]) == [None]
    again.delete([])
    store.close()


def test_replacing_is_all_or_nothing(make: Make) -> None:
    store = make()
    store.replace("v1", ({"a": b"1", "b": b"2"},))

    def interrupted():
        yield {"a": b"new"}
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.replace("v2", interrupted())
    again = make()
    assert again.version == "v1"
    assert again.get(["a", "b"]) == [b"1", b"2"]
    again.replace("v2", ({"c": b"3"}, {}, {"d": b"4"}))
    assert again.version == "v2"
    assert again.get(["a", "b", "c", "d"]) == [None, None, b"3", b"4"]
    again.replace("v3", ())
    assert len(again) == 0
    again.put({"e": b"5"})
    again.replace("v3", ({"f": b"6"},))  # the same version anew
    assert sorted(make()) == ["f"]


def test_holding_users_may_be_read_and_written(make: Make) -> None:
    store = make()
    store.replace("v1", ())
    with store.holding(["b", "a", "b"]):
        store.put({"a": b"1"})
        assert store.get(["a"]) == [b"1"]
    with pytest.raises(ValueError, match="mine"), store.holding(["a"]):
        raise ValueError("mine")
    with store.holding(["a"]):
        store.put({"a": b"2"})
    assert make().get(["a"]) == [b"2"]


def test_two_processes_on_one_user_of_redis(make_redis: Make) -> None:
    one, other = (make_redis(patience=0.2) for _ in range(2))
    one.replace("v1", ())
    with one.holding(["a"]):
        with other.holding(["b"]):
            pass
        with pytest.raises(StoreError, match=r"busy: another process holds .*lock:a"), other.holding(["a"]):
            pass
    with other.holding(["a"]):
        pass


def test_a_store_begins_once(make: Make) -> None:
    """Of two processes that find a new store at once, the second one deletes nothing."""
    store = make()
    store.begin("v1")
    store.put({"a": b"1"})
    make().begin("v1")
    make().begin("v2")
    assert make().version == "v1"
    assert make().get(["a"]) == [b"1"]


def test_every_write_says_its_version(make: Make) -> None:
    """A writer that has an old model finds out when it writes, whoever changed the version meanwhile."""
    store = make()
    store.begin("v1")
    store.put({"a": b"1"}, "v1")
    assert store.get(["a"], "v1") == [b"1"]
    with store.holding(["a"]):
        pass
    make().replace("v2", ({"a": b"2"},))
    with pytest.raises(OtherVersion, match=r"states of version v2, .* are v1 .*call rebuild"):
        store.put({"b": b"1"}, "v1")
    for users in (["a"], []):
        with pytest.raises(OtherVersion):
            store.get(users, "v1")
    assert sorted(make()) == ["a"]
    assert make().get(["a", "b"], "v2") == [b"2", None]


def test_a_write_that_does_not_know_the_latest_is_refused(make: Make) -> None:
    """Stored, deleted, or new since it was read: nothing of the write is done."""
    store = make()
    store.begin("v1")
    store.put({"a": b"1", "b": b"1"})
    for change in ({"a": b"2"}, {"a": b"1", "new": b"1"}):
        read = dict(zip("ab", store.get(["a", "b"]), strict=True)) | {"new": None}
        make().put(change)
        with pytest.raises(Conflict, match="meanwhile: send the event again"):
            store.put({"b": b"9", "a": b"9", "new": b"9"}, "v1", read)
        assert store.get(["b"]) == [b"1"]
    read = {"a": store.get(["a"])[0]}
    make().delete(["a"])
    with pytest.raises(Conflict, match="user 'a'"):
        store.put({"a": b"9"}, "v1", read)
    store.put({"a": b"9", "b": b"9"}, "v1", {"a": None, "b": b"1"})
    assert store.get(["a", "b"]) == [b"9", b"9"]


def test_of_two_rebuilds_at_once_one_is_given_up(make: Make, request: pytest.FixtureRequest) -> None:
    """Their records are not mixed, and the store is never the half of one."""
    if "memory" in request.node.name:
        pytest.skip("one in memory is done in an instant")
    store = make()
    store.replace("v1", ({"old": b"1"},))

    def interrupted():
        yield {"a": b"1"}
        make().replace("v2", ({"b": b"2"}, {"c": b"2"}))
        yield {"d": b"1"}

    with pytest.raises(Superseded):
        store.replace("v1", interrupted())
    assert make().version == "v2"
    assert sorted(make()) == ["b", "c"]
    make().replace("v3", ({"e": b"3"},))
    assert sorted(store) == ["e"]


def test_a_lock_that_expired_loses_nothing(make_redis: Make) -> None:
    """The slower process reads the state again when its lock was another's meanwhile; both events are in it."""
    model, items = served()
    slow, fast = (Recommender(model, items, make_redis(patience=patience)) for patience in (0.1, 5.0))
    step, delayed = slow._read, []

    def late(*given: Any) -> None:
        step(*given)
        if not delayed:
            time.sleep(0.15)
            delayed.append(fast.update("a", "i2"))

    slow._read = late  # type: ignore[method-assign]
    assert slow.update("a", "i1") == "applied"
    assert delayed == ["applied"]
    alone = Recommender(model, items)
    alone.update_many([Event("a", "i2"), Event("a", "i1")])
    assert fast.recommend("a").items == alone.recommend("a").items
    record = fast.codec.decode(fast.store.get(["a"])[0], "a")
    assert (record.events, record.seen.tolist()) == (2, [2, 1])


def test_what_was_forgotten_meanwhile_stays_forgotten(make_redis: Make) -> None:
    model, items = served()
    one, other = (Recommender(model, items, make_redis()) for _ in range(2))
    one.update("a", "i1")
    step, done = one._read, []

    def late(*given: Any) -> None:
        step(*given)
        if not done:
            done.append(other.forget(["a"]))

    one._read = late  # type: ignore[method-assign]
    one.update("a", "i2")
    assert one.codec.decode(one.store.get(["a"])[0], "a").seen.tolist() == [2]


def test_a_state_that_others_always_store_first(make_redis: Make) -> None:
    """No endless loop: the event is refused, and may be sent again."""
    model, items = served()
    recommender = Recommender(model, items, make_redis())
    recommender.update("a", "i1")
    before, step = recommender.store.get(["a"])[0], recommender._read

    def late(*given: Any) -> None:
        step(*given)
        recommender.store.put({"a": before if len(tries) % 2 else recommender.codec.encode(given[0]["a"])})
        tries.append(1)

    tries: list[int] = []
    recommender._read = late  # type: ignore[method-assign]
    with pytest.raises(StoreError, match="send the event again"):
        recommender.update("a", "i2")
    assert len(tries) == 5


def test_a_client_that_decodes_what_it_reads() -> None:
    with pytest.raises(ConfigError, match="decode_responses"):
        RedisStore("redis://localhost:1/0?decode_responses=True")


def test_a_process_with_an_old_model(make: Make) -> None:
    """Another process rebuilds the store for a new model: the old one's calls fail, and write nothing."""
    (old_model, items), (new_model, _) = served(), served(seed=1)
    old = Recommender(old_model, items, make())
    old.update("a", "i1")
    assert not old.stale
    new = Recommender(new_model, items, make())
    assert new.stale
    new.rebuild([("a", ["i1"]), ("b", ["i2"])], show_progress=False)
    assert (old.stale, new.stale) == (True, False)
    for call in (
        lambda: old.update("new", "i2"),
        lambda: old.update_many([Event("a", "i2")]),
        lambda: old.recommend("a"),
        lambda: old.recommend_many(["nobody"]),
        lambda: old.rebuild([("c", ["i1"])], show_progress=False, keep_others=True),
    ):
        with pytest.raises(StoreError, match=r"states of version .*call rebuild\(\)"):
            call()
    assert sorted(make()) == ["a", "b"]
    assert [one.basis for one in new.recommend_many(["a", "b", "new"])] == ["history", "history", "popularity"]


def test_users_whose_states_cannot_be_used_are_named_alone(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    """One of another version, one damaged: the rest is answered, and they are read again from their events."""
    model, items = served()
    recommender, other = Recommender(model, items, make()), Recommender(served(seed=1)[0], items)
    recommender.update_many([Event(user, "i1") for user in "abc"])
    other.update("b", "i1")
    nan = recommender.codec.decode(recommender.store.get(["c"])[0], "c")
    nan.numbers = nan.numbers * float("nan")
    recommender.store.put({"b": other.store.get(["b"])[0], "c": recommender.codec.encode(nan)})
    with caplog.at_level("ERROR"):
        a, b, c, d = recommender.recommend_many(["a", "b", "c", "d"], k=3)
    assert [one.basis for one in (a, b, c, d)] == ["history", "popularity", "popularity", "popularity"]
    assert a.items == recommender.recommend("a", k=3).items
    assert [bool(one.problem) for one in (a, b, c, d)] == [False, True, True, False]
    assert "user 'b'" in b.problem
    assert "user 'b'" in caplog.text
    assert "user 'c' in the store is not finite" in caplog.text
    before = recommender.store.get(["a"])
    recommender.rebuild([("b", ["i1", "i2"]), ("c", ["i3"])], show_progress=False, keep_others=True)
    assert recommender.store.get(["a"]) == before
    alone = Recommender(model, items)
    alone.update_many([Event("b", "i1"), Event("b", "i2")])
    assert recommender.recommend("b", k=3).items == alone.recommend("b", k=3).items
    assert not recommender.recommend_many(["c"])[0].problem


def test_redis_that_is_not_there() -> None:
    with pytest.raises(StoreError, match="in Redis cannot be used"):
        RedisStore("redis://localhost:1/0").get(["a"])


# ------------------------------------------------------------------ faults
EVENTS = [(f"u{n * 7 % 11}", f"i{1 + n * n % (N_ITEMS - 1)}", f"e{n}") for n in range(3000)]


def replay(path: Path, first: int, acknowledged: int) -> None:
    """In a process of its own: applies events from ``first`` on, and writes down each one that was acknowledged."""
    torch.set_num_threads(1)
    model, items = served(bundle_size=3, bundle_recent=5)
    recommender = Recommender(model, items, SQLiteStore(path))
    for user, item, event_id in EVENTS[first:]:
        recommender.update(user, item, event_id=event_id)
        os.write(acknowledged, b".")


def forked(work: Callable[[], None]) -> int:
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    return child


def test_killed_at_twenty_moments(tmp_path: Path) -> None:
    """The states are those of an undisturbed run; the event that was not acknowledged may be sent again."""
    path, undisturbed = tmp_path / "states.db", tmp_path / "undisturbed.db"
    draw, done, kills = random.Random(0), 0, 0
    while done < len(EVENTS):
        read, write = os.pipe()
        child = forked(lambda first=done, pipe=write: replay(path, first, pipe))
        os.close(write)
        stop_after = draw.randrange(1, 2 * len(EVENTS) // 30) if kills < 20 else len(EVENTS)
        count = 0
        while count < stop_after and os.read(read, 1):
            count += 1
        if kills < 20 and done + count < len(EVENTS):
            time.sleep(draw.random() * 0.002)  # anywhere in an update
            os.kill(child, signal.SIGKILL)
            kills += 1
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0
        count += len(os.read(read, len(EVENTS)))  # acknowledged before the kill
        os.close(read)
        done += count
        assert sqlite3.connect(path).execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert kills == 20

    null = os.open(os.devnull, os.O_WRONLY)
    assert os.waitpid(forked(lambda: replay(undisturbed, 0, null)), 0)[1] == 0
    one, other = SQLiteStore(path), SQLiteStore(undisturbed)
    users = sorted(one)
    assert users == sorted(other)
    assert len(users) == 11
    assert one.get(users) == other.get(users)


def filled(path: Path, users: int = 40) -> SQLiteStore:
    store = SQLiteStore(path)
    store.replace("v1", ({f"u{n}": bytes([n]) * 20000 for n in range(users)},))
    store.close()
    return store


@pytest.mark.parametrize("part", [0.0, 0.3, 0.9])
def test_a_file_that_is_cut_off(tmp_path: Path, part: float) -> None:
    path = tmp_path / "states.db"
    filled(path)
    with path.open("r+b") as file:
        file.truncate(50 + int(part * path.stat().st_size))
    before = path.read_bytes()
    with pytest.raises(StoreError, match=r"states.db' cannot be opened .*restore it from a copy"):
        SQLiteStore(path)
    assert path.read_bytes() == before


def test_a_file_that_is_no_store(tmp_path: Path) -> None:
    path = tmp_path / "states.db"
    path.write_text("user_id:token\titem_id:token\n")
    with pytest.raises(StoreError, match="it is not a file of SQLite"):
        SQLiteStore(path)
    with pytest.raises(StoreError, match=r"cannot be opened .*is there such a folder"):
        SQLiteStore(tmp_path / "nowhere" / "states.db")


def test_a_full_disk(tmp_path: Path) -> None:
    """By a quota on the size of files: writing stops, what was acknowledged stays, and goes on when there is room."""
    path = tmp_path / "states.db"

    def fill() -> None:
        store = SQLiteStore(path)
        store.replace("v1", ())
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

        def fill_up() -> None:
            for n in range(100):
                store.put({f"u{n}": bytes([n]) * 20000})

        with pytest.raises(StoreError, match="make room on the disk"):
            fill_up()
        assert 3 < len(store) < 100
        last = len(store) - 1
        assert store.get([f"u{last}"]) == [bytes([last]) * 20000]
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        store.put({"later": b"1"})

    assert os.waitpid(forked(fill), 0)[1] == 0
    store = SQLiteStore(path)
    users = sorted(store)
    assert "later" in users
    assert all(store.get([user]) == [bytes([int(user[1:])]) * 20000] for user in users if user != "later")


def test_a_full_disk_while_rebuilding_keeps_the_old_states(tmp_path: Path) -> None:
    path = tmp_path / "states.db"

    def rebuild() -> None:
        store = SQLiteStore(path)
        store.replace("v1", ({"old": b"1"},))
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, resource.RLIM_INFINITY))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            store.replace("v2", ({f"u{n}": bytes(20000)} for n in range(100)))
        except StoreError:
            os._exit(7)

    assert os.WEXITSTATUS(os.waitpid(forked(rebuild), 0)[1]) == 7
    store = SQLiteStore(path)
    assert store.version == "v1"
    assert store.get(["old"]) == [b"1"]
    assert list(store) == ["old"]


def test_threads_on_one_file(tmp_path: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    store: Any = SQLiteStore(tmp_path / "states.db", durable=True)
    store.replace("v1", ())

    def count(_: int) -> None:
        with store.holding(["a"]):
            (found,) = store.get(["a"])
            store.put({"a": str(int(found or b"0") + 1).encode()})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(count, range(60)))
    assert store.get(["a"]) == [b"60"]
