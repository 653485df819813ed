"""Where the states of users are kept: in memory, in a file that survives a crash, in Redis for several processes."""

from __future__ import annotations

import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

from recbole_holo.errors import MissingExtra


class StoreError(RuntimeError):
    """A store that cannot be read or written: where, why, and what to do. What it holds is as it was."""


class StateStore(Protocol):
    """What a recommender needs of a store. Any object with these methods is one.

    Records are bytes under a user's id, all of one version (which model, which layout). A change happens wholly or not
    at all, and is there for good when the call returns.
    """

    @property
    def version(self) -> str | None:
        """Of the records; None of a store that was never used."""
        ...

    def get(self, users: Sequence[str]) -> list[bytes | None]:
        """The records of ``users``, None where there is none."""
        ...

    def put(self, records: Mapping[str, bytes]) -> None:
        """Writes all of ``records``."""
        ...

    def delete(self, users: Iterable[str]) -> None:
        """Forgets users; those not there are no error."""
        ...

    def holding(self, users: Sequence[str]) -> AbstractContextManager[Any]:
        """Nobody else reads these users in order to write them, within the block."""
        ...

    def replace(self, version: str, batches: Iterable[Mapping[str, bytes]]) -> None:
        """The records of ``batches`` in the place of all there are, as those of ``version``.

        Until the last of them is written, the store is as before.
        """
        ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[str]:
        """The users."""
        ...

    def close(self) -> None:
        """Ends the use of the store."""
        ...


class MemoryStore:
    """States in a dictionary, gone with the process."""

    def __init__(self) -> None:
        self.version: str | None = None
        self._records: dict[str, bytes] = {}
        self._lock = threading.RLock()

    def get(self, users: Sequence[str]) -> list[bytes | None]:
        return [self._records.get(user) for user in users]

    def put(self, records: Mapping[str, bytes]) -> None:
        with self._lock:
            self._records.update(records)

    def delete(self, users: Iterable[str]) -> None:
        with self._lock:
            for user in users:
                self._records.pop(user, None)

    def holding(self, users: Sequence[str]) -> AbstractContextManager[Any]:
        return self._lock

    def replace(self, version: str, batches: Iterable[Mapping[str, bytes]]) -> None:
        made = {user: record for batch in batches for user, record in batch.items()}
        with self._lock:
            self.version, self._records = version, made

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._records))

    def close(self) -> None:
        pass


class SQLiteStore:
    """States in one file of SQLite, for millions of users on one machine.

    A killed process loses at most the update that was not acknowledged, and cannot break the file (write-ahead log).

    Args:
        path: of the file, made if there is none; ``-wal`` and ``-shm`` beside it belong to it.
        durable: wait for the disk at every update, so that nothing is lost when the power fails either.

    Raises:
        StoreError: no such folder, not a store, a file that is cut off.
    """

    def __init__(self, path: str | os.PathLike[str], durable: bool = False) -> None:
        self.path = os.fspath(path)
        self._lock = threading.RLock()
        with self._explained("opened"):
            self._check_whole()
            # Transactions are begun and ended here, and threads take turns.
            self._db = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False, timeout=60)
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.execute(f"PRAGMA synchronous = {'FULL' if durable else 'NORMAL'}")
            with self._transaction():
                self._db.execute("CREATE TABLE IF NOT EXISTS versions (generation INTEGER PRIMARY KEY, version TEXT)")
                self._db.execute(
                    "CREATE TABLE IF NOT EXISTS states "
                    "(generation INTEGER, user TEXT, record BLOB NOT NULL, PRIMARY KEY (generation, user))"
                )

    @property
    def version(self) -> str | None:
        with self._lock, self._explained("read"):
            return self._current()[1]

    def get(self, users: Sequence[str]) -> list[bytes | None]:
        with self._lock, self._explained("read"):
            generation, find = self._current()[0], "SELECT record FROM states WHERE generation = ? AND user = ?"
            rows = [self._db.execute(find, (generation, user)).fetchone() for user in users]
        return [None if row is None else row[0] for row in rows]

    def put(self, records: Mapping[str, bytes]) -> None:
        with self._lock, self._explained("written to"), self._transaction():
            self._write(self._current()[0], records)

    def delete(self, users: Iterable[str]) -> None:
        with self._lock, self._explained("written to"), self._transaction():
            generation = self._current()[0]
            gone = ((generation, user) for user in users)
            self._db.executemany("DELETE FROM states WHERE generation = ? AND user = ?", gone)

    @contextmanager
    def holding(self, users: Sequence[str]) -> Iterator[None]:
        with self._lock, self._explained("written to"), self._transaction():
            yield

    def replace(self, version: str, batches: Iterable[Mapping[str, bytes]]) -> None:
        with self._lock, self._explained("written to"):
            old = self._current()[0]
            new = old + 1
            with self._transaction():  # what an interrupted attempt may have left
                self._db.execute("DELETE FROM states WHERE generation != ?", (old,))
            for batch in batches:
                with self._transaction():
                    self._write(new, batch)
            with self._transaction():
                self._db.execute("DELETE FROM versions")
                self._db.execute("INSERT INTO versions VALUES (?, ?)", (new, version))
            with self._transaction():
                self._db.execute("DELETE FROM states WHERE generation != ?", (new,))

    def __len__(self) -> int:
        with self._lock, self._explained("read"):
            count = "SELECT count(*) FROM states WHERE generation = ?"
            return int(self._db.execute(count, (self._current()[0],)).fetchone()[0])

    def __iter__(self) -> Iterator[str]:
        with self._lock, self._explained("read"):
            every = self._db.execute("SELECT user FROM states WHERE generation = ?", (self._current()[0],)).fetchall()
        return (user for (user,) in every)

    def close(self) -> None:
        with self._lock:
            self._db.close()

    # ------------------------------------------------------------------ inside
    def _current(self) -> tuple[int, str | None]:
        row = self._db.execute("SELECT generation, version FROM versions").fetchone()
        return (0, None) if row is None else row

    def _write(self, generation: int, records: Mapping[str, bytes]) -> None:
        rows = ((generation, user, record) for user, record in records.items())
        self._db.executemany("INSERT OR REPLACE INTO states VALUES (?, ?, ?)", rows)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        """All or nothing; a transaction inside another is a part of it."""
        if self._db.in_transaction:
            yield
            return
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    @contextmanager
    def _explained(self, done: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            remedy = "restore it from a copy, or rebuild it from the histories."
            if "full" in str(error) or "disk I/O" in str(error):
                remedy = "make room on the disk."
            elif "unable to open" in str(error):
                remedy = "is there such a folder, and may it be written to?"
            raise StoreError(
                f"the store {self.path!r} cannot be {done} ({error}): {remedy} What was acknowledged before is kept."
            ) from error

    def _check_whole(self) -> None:
        """SQLite opens a file that is cut off, and finds out page by page."""
        if not os.path.exists(self.path) or not os.path.getsize(self.path):
            return
        with open(self.path, "rb") as file:
            head = file.read(100)
        if head[:16] != b"SQLite format 3\0":
            raise sqlite3.DatabaseError("it is not a file of SQLite")
        page = int.from_bytes(head[16:18], "big")
        expected, found = (
            int.from_bytes(head[28:32], "big") * (65536 if page == 1 else page),
            os.path.getsize(self.path),
        )
        if found < expected and not os.path.exists(f"{self.path}-wal"):
            raise sqlite3.DatabaseError(f"it is cut off: {found} of {expected} bytes")


class RedisStore:
    """States in Redis, for several processes (``pip install 'recbole-holo[redis]'``).

    Args:
        client: a ``redis.Redis``, or what makes one (``redis://localhost:6379/0``).
        prefix: of all keys.
        patience: seconds that a user's lock is held at most, and waited for.

    Raises:
        MissingExtra: redis is not installed.
    """

    def __init__(self, client: Any = "redis://localhost:6379/0", prefix: str = "recbole_holo", patience: float = 10.0):
        try:
            import redis
        except ImportError as error:
            raise MissingExtra("RedisStore needs redis: pip install 'recbole-holo[redis]'") from error
        self._db: Any = redis.Redis.from_url(client) if isinstance(client, str) else client
        self._prefix, self._patience = prefix, patience
        self._error = redis.RedisError

    @property
    def version(self) -> str | None:
        with self._explained():
            found = self._db.get(f"{self._prefix}:version")
        return None if found is None else found.decode()

    def get(self, users: Sequence[str]) -> list[bytes | None]:
        with self._explained():
            return self._db.hmget(self._states(), list(users)) if users else []

    def put(self, records: Mapping[str, bytes]) -> None:
        if records:
            with self._explained():
                self._db.hset(self._states(), mapping=dict(records))

    def delete(self, users: Iterable[str]) -> None:
        gone = list(users)
        if gone:
            with self._explained():
                self._db.hdel(self._states(), *gone)

    @contextmanager
    def holding(self, users: Sequence[str]) -> Iterator[None]:
        locks = [
            self._db.lock(f"{self._prefix}:lock:{user}", timeout=self._patience, blocking_timeout=self._patience)
            for user in sorted(set(users))  # in one order, so that two processes cannot wait for each other
        ]
        held = []
        with self._explained():
            try:
                for lock in locks:
                    if not lock.acquire():
                        raise StoreError(f"the store {self._prefix!r} is busy: another process holds {lock.name!r}")
                    held.append(lock)
                yield
            finally:
                for lock in held:
                    lock.release()

    def replace(self, version: str, batches: Iterable[Mapping[str, bytes]]) -> None:
        new = f"{self._prefix}:states:{version}:new"
        with self._explained():
            self._db.delete(new)
            for batch in batches:
                if batch:
                    self._db.hset(new, mapping=dict(batch))
            old = self._states()
            with self._db.pipeline(transaction=True) as together:
                together.delete(old)
                if self._db.exists(new):
                    together.rename(new, f"{self._prefix}:states:{version}")
                together.set(f"{self._prefix}:version", version)
                together.execute()

    def __len__(self) -> int:
        with self._explained():
            return int(self._db.hlen(self._states()))

    def __iter__(self) -> Iterator[str]:
        with self._explained():
            return (key.decode() for key, _ in self._db.hscan_iter(self._states()))

    def close(self) -> None:
        self._db.close()

    def _states(self) -> str:
        return f"{self._prefix}:states:{self.version}"

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except self._error as error:
            raise StoreError(f"the store {self._prefix!r} in Redis cannot be used ({error})") from error
