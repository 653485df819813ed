"""Where the states of users are kept: in memory, in a file that survives a crash, in Redis for several processes."""

from __future__ import annotations

import os
import sqlite3
import threading
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from typing import Any, Protocol

from recbole_holo.errors import ConfigError, MissingExtra

Read = Mapping[str, "bytes | None"]  # what a store held of users when it was read


class StoreError(RuntimeError):
    """A store that cannot be read or written: where, why, and what to do. What it holds is as it was."""


class OtherVersion(StoreError):
    """The store holds states of another version than asked for, perhaps since another process rebuilt it."""

    def __init__(self, found: str | None, wanted: str) -> None:
        super().__init__(
            f"the store holds states of version {found}, this model's are {wanted} (another checkpoint, bundle size or "
            "storage): call rebuild() with the users' histories, or use another store"
        )


class Conflict(StoreError):
    """Another process stored a user's state since it was read: read it again."""

    def __init__(self, user: str) -> None:
        super().__init__(f"the state of user {user!r} was stored by another process meanwhile: send the event again")


class Superseded(StoreError):
    """Another rebuild of the store began while one was under way."""

    def __init__(self) -> None:
        super().__init__(
            "another rebuild of the store began meanwhile, and this one was given up: rebuild one at a time"
        )


class StateStore(Protocol):
    """What a recommender needs of a store. Any object with these methods is one.

    Records are bytes under a user's id, a string, all of one version (which model, which layout). A change happens
    wholly or not at all, and is there for good when the call returns. Where a ``version`` is given and the store is of
    another one, nothing is read or written: :class:`OtherVersion`.
    """

    @property
    def version(self) -> str | None:
        """Of the records; None of a store that was never used."""
        ...

    def begin(self, version: str) -> None:
        """Makes a store that was never used one of ``version``; any other stays as it is."""
        ...

    def get(self, users: Sequence[str], version: str | None = None) -> list[bytes | None]:
        """The records of ``users``, None where there is none."""
        ...

    def put(self, records: Mapping[str, bytes], version: str | None = None, read: Read | None = None) -> None:
        """Writes all of ``records``; with ``read`` only if the store still holds that of their users.

        Raises:
            Conflict: it does not, and nothing is written.
        """
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

        Raises:
            Superseded: another process began to do the same meanwhile; the store is the other's.
        """
        ...

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[str]:
        """The users."""
        ...

    def close(self) -> None:
        """Ends the use of the store."""
        ...


def _check_version(found: str | None, wanted: str | None) -> None:
    if wanted is not None and found != wanted:
        raise OtherVersion(found, wanted)


class MemoryStore:
    """States in a dictionary, gone with the process."""

    def __init__(self) -> None:
        self._held: tuple[str | None, dict[str, bytes]] = (None, {})  # read at once, without waiting for a writer
        self._lock = threading.RLock()

    @property
    def version(self) -> str | None:
        return self._held[0]

    def begin(self, version: str) -> None:
        with self._lock:
            if self.version is None:
                self._held = (version, self._held[1])

    def get(self, users: Sequence[str], version: str | None = None) -> list[bytes | None]:
        found, records = self._held
        _check_version(found, version)
        return [records.get(user) for user in users]

    def put(self, records: Mapping[str, bytes], version: str | None = None, read: Read | None = None) -> None:
        with self._lock:
            found, held = self._held
            _check_version(found, version)
            for user in records:
                if read is not None and held.get(user) != read[user]:
                    raise Conflict(user)
            held.update(records)

    def delete(self, users: Iterable[str]) -> None:
        with self._lock:
            for user in users:
                self._held[1].pop(user, None)

    def holding(self, users: Sequence[str]) -> AbstractContextManager[Any]:
        return self._lock

    def replace(self, version: str, batches: Iterable[Mapping[str, bytes]]) -> None:
        made = {user: record for batch in batches for user, record in batch.items()}
        with self._lock:
            self._held = (version, made)

    def __len__(self) -> int:
        return len(self._held[1])

    def __iter__(self) -> Iterator[str]:
        return iter(list(self._held[1]))

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
                # The one that is being made, if any: a process that finds another's there gives its own up.
                self._db.execute("CREATE TABLE IF NOT EXISTS rebuilds (generation INTEGER PRIMARY KEY)")

    @property
    def version(self) -> str | None:
        with self._lock, self._explained("read"):
            return self._current()[1]

    def begin(self, version: str) -> None:
        with self._changing():
            if self._current()[1] is None:
                self._db.execute("INSERT INTO versions VALUES (0, ?)", (version,))

    def get(self, users: Sequence[str], version: str | None = None) -> list[bytes | None]:
        with self._lock, self._explained("read"), self._transaction("DEFERRED"):  # both of one moment
            generation, found = self._current()
            _check_version(found, version)
            return [self._record(generation, user) for user in users]

    def put(self, records: Mapping[str, bytes], version: str | None = None, read: Read | None = None) -> None:
        with self._changing():
            generation, found = self._current()
            _check_version(found, version)
            for user in records:
                if read is not None and self._record(generation, user) != read[user]:
                    raise Conflict(user)
            self._write(generation, records)

    def delete(self, users: Iterable[str]) -> None:
        with self._changing():
            generation = self._current()[0]
            gone = ((generation, user) for user in users)
            self._db.executemany("DELETE FROM states WHERE generation = ? AND user = ?", gone)

    @contextmanager
    def holding(self, users: Sequence[str]) -> Iterator[None]:
        with self._changing():
            yield

    def replace(self, version: str, batches: Iterable[Mapping[str, bytes]]) -> None:
        with self._changing():
            old = self._current()[0]
            (last,) = self._db.execute("SELECT max(generation) FROM rebuilds").fetchone()
            new = max(old, last or 0) + 1
            self._db.execute("DELETE FROM rebuilds")
            self._db.execute("INSERT INTO rebuilds VALUES (?)", (new,))
            self._db.execute("DELETE FROM states WHERE generation != ?", (old,))  # an interrupted attempt's
        for batch in batches:
            with self._changing():
                self._check_rebuilding(new)
                self._write(new, batch)
        with self._changing():
            self._check_rebuilding(new)
            self._db.execute("DELETE FROM rebuilds")
            self._db.execute("DELETE FROM versions")
            self._db.execute("INSERT INTO versions VALUES (?, ?)", (new, version))
        with self._changing():
            self._db.execute("DELETE FROM states WHERE generation < ?", (new,))

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

    def _record(self, generation: int, user: str) -> bytes | None:
        row = self._db.execute(
            "SELECT record FROM states WHERE generation = ? AND user = ?", (generation, user)
        ).fetchone()
        return None if row is None else row[0]

    def _check_rebuilding(self, generation: int) -> None:
        if self._db.execute("SELECT generation FROM rebuilds").fetchall() != [(generation,)]:
            raise Superseded

    @contextmanager
    def _changing(self) -> Iterator[None]:
        with self._lock, self._explained("written to"), self._transaction():
            yield

    def _write(self, generation: int, records: Mapping[str, bytes]) -> None:
        rows = ((generation, user, record) for user, record in records.items())
        self._db.executemany("INSERT OR REPLACE INTO states VALUES (?, ?, ?)", rows)

    @contextmanager
    def _transaction(self, kind: str = "IMMEDIATE") -> Iterator[None]:
        """All or nothing; a transaction inside another is a part of it."""
        if self._db.in_transaction:
            yield
            return
        self._db.execute(f"BEGIN {kind}")
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
            elif "locked" in str(error):
                remedy = "another process has been writing to it for more than a minute; try again."
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


# Of Redis, each at once. Of what was read: 0 = nothing, 1 and the record, or an empty string where nobody asks.
_PUT = """
local version = redis.call('GET', ARGV[1] .. ':version') or 'None'
if ARGV[2] ~= '' and version ~= ARGV[2] then return {'version'} end
local states = ARGV[1] .. ':states:' .. version
for i = 3, #ARGV, 3 do
  local found = redis.call('HGET', states, ARGV[i])
  local known = found and '1' .. found or '0'
  if ARGV[i + 1] ~= '' and ARGV[i + 1] ~= known then return {'user', ARGV[i]} end
end
for i = 3, #ARGV, 3 do redis.call('HSET', states, ARGV[i], ARGV[i + 2]) end
return {}
"""
_REPLACE = """
if redis.call('GET', ARGV[1] .. ':new') ~= ARGV[2] then
  redis.call('DEL', ARGV[2])
  return 0
end
local old = redis.call('GET', ARGV[1] .. ':version')
if old then redis.call('DEL', ARGV[1] .. ':states:' .. old) end
redis.call('DEL', ARGV[1] .. ':new')
if redis.call('EXISTS', ARGV[2]) == 1 then redis.call('RENAME', ARGV[2], ARGV[1] .. ':states:' .. ARGV[3]) end
redis.call('SET', ARGV[1] .. ':version', ARGV[3])
return 1
"""


class RedisStore:
    """States in Redis, for several processes (``pip install 'recbole-holo[redis]'``).

    Locks keep processes from computing the same user's state at once, and nothing depends on them: a state is stored
    only if Redis still holds what it was computed from, so a lock that expired while its holder was slow loses nothing.

    Args:
        client: a ``redis.Redis`` that gives bytes, or what makes one (``redis://localhost:6379/0``).
        prefix: of all keys.
        patience: seconds that a user's lock is held at most, and waited for.

    Raises:
        MissingExtra: redis is not installed.
        ConfigError: a client that decodes what it reads.
    """

    def __init__(self, client: Any = "redis://localhost:6379/0", prefix: str = "recbole_holo", patience: float = 10.0):
        try:
            import redis
        except ImportError as error:
            raise MissingExtra("RedisStore needs redis: pip install 'recbole-holo[redis]'") from error
        self._db: Any = redis.Redis.from_url(client) if isinstance(client, str) else client
        if self._db.connection_pool.connection_kwargs.get("decode_responses"):
            raise ConfigError("decode_responses", True, "states are bytes: use a client without it")
        self._prefix, self._patience = prefix, patience
        self._error, self._lock_error = redis.RedisError, redis.exceptions.LockError
        self._put, self._replace = map(self._db.register_script, (_PUT, _REPLACE))

    @property
    def version(self) -> str | None:
        with self._explained():
            found = self._db.get(f"{self._prefix}:version")
        return None if found is None else found.decode()

    def begin(self, version: str) -> None:
        with self._explained():
            self._db.set(f"{self._prefix}:version", version, nx=True)

    def get(self, users: Sequence[str], version: str | None = None) -> list[bytes | None]:
        wanted = self.version if version is None else version
        with self._explained(), self._db.pipeline(transaction=True) as together:  # both of one moment
            together.get(f"{self._prefix}:version")
            if users:
                together.hmget(f"{self._prefix}:states:{wanted}", [user.encode() for user in users])
            found, *records = together.execute()
        _check_version(None if found is None else found.decode(), version)
        return records[0] if users else []

    def put(self, records: Mapping[str, bytes], version: str | None = None, read: Read | None = None) -> None:
        given: list[str | bytes] = [self._prefix, version or ""]
        for user, record in records.items():
            given += [user.encode(), b"" if read is None else _as_read(read[user]), record]
        if not records:
            return
        with self._explained():
            problem = self._put(args=given)
        if problem and problem[0] == b"version":
            raise OtherVersion(self.version, str(version))
        if problem:
            raise Conflict(problem[1].decode())

    def delete(self, users: Iterable[str]) -> None:
        gone = [user.encode() for user in users]
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
                    with suppress(self._lock_error):  # it expired, and is perhaps another's by now
                        lock.release()

    def replace(self, version: str, batches: Iterable[Mapping[str, bytes]]) -> None:
        new = f"{self._prefix}:states:{version}:{uuid.uuid4().hex}"
        with self._explained():
            with self._db.pipeline(transaction=True) as together:
                together.get(f"{self._prefix}:new")
                together.set(f"{self._prefix}:new", new)
                interrupted = together.execute()[0]
            if interrupted is not None:
                self._db.delete(interrupted)
            for batch in batches:
                if batch:
                    self._db.hset(new, mapping={user.encode(): record for user, record in batch.items()})
            if not self._replace(args=[self._prefix, new, version]):
                raise Superseded

    def __len__(self) -> int:
        with self._explained():
            return int(self._db.hlen(self._states()))

    def __iter__(self) -> Iterator[str]:
        with self._explained():
            for user, _ in self._db.hscan_iter(self._states()):
                yield user.decode()

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


def _as_read(record: bytes | None) -> bytes:
    return b"0" if record is None else b"1" + record
