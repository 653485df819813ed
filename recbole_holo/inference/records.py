"""A user's state as bytes: what a store keeps."""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np

from recbole_holo.errors import ConfigError
from recbole_holo.model.stepping import StateLayout

STORAGES = ("float32", "float16", "int8")
_FORMAT = 1
# Checksum, format, storage, recent events, seen items, event ids, version, events, time.
_HEADER = struct.Struct("<IBBHIIQqd")
_GROUP = 16  # numbers that share a scale in int8: the states of one channel, where a channel has 16
_NO_IDS = np.zeros(0, dtype=np.uint64)
_NO_ITEMS = np.zeros(0, dtype=np.int32)


class StateError(RuntimeError):
    """A user's state that cannot be used: whose, why, and what to do. Nothing else is touched by it."""

    def __init__(self, user: str, problem: str) -> None:
        super().__init__(
            f"the state of user {user!r} {problem}: rebuild it from the history (Recommender.rebuild, keep_others)"
        )
        self.user = user


@dataclass
class Record:
    """What is known of one user.

    Attributes:
        events: how many were read.
        time: the latest event's, nan where no event had one.
        recent: see :class:`~recbole_holo.model.stepping.State`, without the zeros.
        seen: the latest distinct items, oldest first.
        ids: :func:`event_key` of the latest events that had an id, oldest first.
        numbers: of the state, float32.
    """

    numbers: np.ndarray
    events: int = 0
    time: float = float("nan")
    recent: np.ndarray = field(default_factory=lambda: _NO_ITEMS)
    seen: np.ndarray = field(default_factory=lambda: _NO_ITEMS)
    ids: np.ndarray = field(default_factory=lambda: _NO_IDS)


def event_key(event_id: str) -> np.uint64:
    """An event's id in 64 bits."""
    return np.uint64(int.from_bytes(blake2b(event_id.encode(), digest_size=8).digest(), "little"))


class Codec:
    """Records to bytes and back.

    Args:
        layout: of the model's states.
        storage: of their numbers: ``float32``, ``float16`` (half the size), or ``int8`` (a quarter and a bit: sixteen
            numbers have one float16 scale). How many bytes each takes is in results/streaming-cpu.md.
        checked: with a checksum, for what leaves the process.
        version: of what the states depend on, in hexadecimal digits; records of another are refused.

    Attributes:
        number_bytes: of the numbers of one state as stored.
    """

    def __init__(self, layout: StateLayout, storage: str = "float32", checked: bool = True, version: str = "0") -> None:
        if storage not in STORAGES:
            raise ConfigError("storage", storage, f"use {', '.join(STORAGES)}")
        self.layout, self.storage, self.checked = layout, storage, checked
        self._size, self._version = layout.size, int(version[:16], 16)
        self._groups = -(-self._size // _GROUP)
        sizes = {"float32": 4 * self._size, "float16": 2 * self._size, "int8": (_GROUP + 2) * self._groups}
        self.number_bytes = sizes[storage]

    def encode(self, record: Record) -> bytes:
        """The record as bytes."""
        arrays = [record.recent, record.seen, record.ids, self._packed(record.numbers)]
        head = _HEADER.pack(
            *(0, _FORMAT, STORAGES.index(self.storage), len(record.recent), len(record.seen), len(record.ids)),
            *(self._version, record.events, record.time),
        )
        parts = [memoryview(head)[4:], *(np.ascontiguousarray(array).data for array in arrays)]
        checksum = 0
        if self.checked:
            for part in parts:
                checksum = zlib.crc32(part, checksum)
        return b"".join([struct.pack("<I", checksum), *parts])

    def decode(self, data: bytes, user: str) -> Record:
        """The record of ``user``, whom an error names.

        Raises:
            StateError: cut off, damaged, of another format or storage, or not finite.
        """
        whole = len(data) >= _HEADER.size
        if not whole or (self.checked and zlib.crc32(memoryview(data)[4:]) != int.from_bytes(data[:4], "little")):
            raise StateError(user, f"is damaged ({len(data)} bytes)")
        _, form, storage, recent, seen, ids, version, events, time = _HEADER.unpack_from(data)
        if form != _FORMAT or STORAGES[storage] != self.storage:
            raise StateError(user, f"is stored as {STORAGES[storage]}, not as {self.storage}")
        if version != self._version:
            raise StateError(user, "is of another model or version")
        at, found = _HEADER.size, []
        for kind, count in ((np.int32, recent), (np.int32, seen), (np.uint64, ids)):
            found.append(np.frombuffer(data, kind, count, at))
            at += found[-1].nbytes
        if len(data) - at != self.number_bytes:
            raise StateError(user, f"has {len(data) - at} bytes, not {self.number_bytes}")
        return Record(self._unpacked(data, at), events, time, *found)

    def _packed(self, numbers: np.ndarray) -> np.ndarray:
        if self.storage == "float32":
            packed = np.ascontiguousarray(numbers, dtype=np.float32)
        elif self.storage == "float16":
            packed = numbers.clip(-65504, 65504).astype(np.float16)
        else:
            groups = np.zeros((self._groups, _GROUP), dtype=np.float32)
            groups.reshape(-1)[: self._size] = numbers
            # Up to the next float16, so that the largest number is not beyond 127 of it.
            scales = (np.abs(groups).max(1) * np.float32(1.001 / 127)).clip(6e-8, 65504).astype(np.float16)
            codes = np.rint(groups / scales[:, None].astype(np.float32)).clip(-127, 127).astype(np.int8)
            packed = np.concatenate([scales.view(np.int8), codes.reshape(-1)])
        return packed

    def _unpacked(self, data: bytes, at: int) -> np.ndarray:
        size = self._size
        if self.storage == "float32":
            return np.frombuffer(data, np.float32, size, at)
        if self.storage == "float16":
            return np.frombuffer(data, np.float16, size, at).astype(np.float32)
        scales = np.frombuffer(data, np.float16, self._groups, at).astype(np.float32)
        codes = np.frombuffer(data, np.int8, self._groups * _GROUP, at + 2 * self._groups)
        return (codes.reshape(-1, _GROUP) * scales[:, None]).reshape(-1)[:size]


def check_finite(numbers: np.ndarray, users: Sequence[str], what: str) -> None:
    """
    Raises:
        StateError: a row of ``numbers [B, S]`` with nan or infinity; its user is named.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if math.isfinite(numbers.sum()):  # a nan or an infinity in it would show
            return
    for user, row in zip(users, numbers, strict=True):
        if not np.isfinite(row).all():
            raise StateError(user, f"{what} is not finite (nan or inf)")
