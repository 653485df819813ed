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

from recbole_holo.inference import MemoryStore, Recommender, RedisStore, SQLiteStore, StateStore, StoreError

from .conftest import N_ITEMS, served

Make = Callable[[], StateStore]


@pytest.fixture(params=["memory", "sqlite", "redis"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    """A function that opens the same store again, as another process would."""
    if request.param == "memory":
        store = MemoryStore()
        return lambda: store
    if request.param == "sqlite":
        return lambda: SQLiteStore(tmp_path / "states.db")
    import fakeredis

    server = fakeredis.FakeServer()
    return lambda: RedisStore(fakeredis.FakeRedis(server=server))


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


def test_two_processes_on_one_user_of_redis() -> None:
    import fakeredis

    server = fakeredis.FakeServer()
    one, other = (RedisStore(fakeredis.FakeRedis(server=server), patience=0.2) for _ in range(2))
    one.replace("v1", ())
    with one.holding(["a"]):
        with other.holding(["b"]):
            pass
        with pytest.raises(StoreError, match=r"busy: another process holds .*lock:a"), other.holding(["a"]):
            pass
    with other.holding(["a"]):
        pass


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
