"""Counts in arrays by id: memory by the largest id, whatever the number of events."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from recbole_holo.data.prepare import _lines_numba as lines_numba


class CountsById:
    """Counts of ids that are not negative; the array grows with the largest, pages without a count take no memory."""

    def __init__(self) -> None:
        self.values = np.zeros(1 << 16, np.int32)

    def add(self, ids: np.ndarray) -> None:
        """Counts each id once for every time it is there."""
        self.values = _with_room(self.values, ids)
        lines_numba.count(ids, self.values)


class KindsById:
    """In which kinds of log ids occur, a bit for each kind."""

    def __init__(self, kinds: list[str]) -> None:
        if len(kinds) > 8:
            raise ValueError(f"{len(kinds)} kinds of log; a byte has room for 8")
        self._bits = {kind: np.uint8(1 << bit) for bit, kind in enumerate(kinds)}
        self._values = np.zeros(1 << 16, np.uint8)

    def add(self, ids: np.ndarray, kind: str) -> None:
        """Notes that the ids occur in logs of that kind."""
        self._values = _with_room(self._values, ids)
        self._values[ids] |= self._bits[kind]

    def count(self, kind: str | None = None) -> int:
        """How many ids occur in logs of that kind, or (None) of any."""
        return int(np.count_nonzero(self._values if kind is None else self._values & self._bits[kind]))


@dataclass(frozen=True)
class Ids:
    """The ids that occur, ascending, and how many events each has (int32 ``[n]``), among ids below ``size``."""

    ids: np.ndarray
    events: np.ndarray
    size: int

    @classmethod
    def of(cls, counts: CountsById) -> Ids:
        """The ids with a count above 0."""
        ids = np.flatnonzero(counts.values).astype(np.int32)
        return cls(ids, counts.values[ids], int(ids.max(initial=-1)) + 1)

    def chosen(self, which: np.ndarray) -> Ids:
        """Some of them: ``which`` is a mask ``[n]`` or positions, ascending."""
        return Ids(self.ids[which], self.events[which], self.size)

    def numbers(self) -> np.ndarray:
        """The position of each id in ``ids``, and -1 of other ids: int32 ``[size]``."""
        numbers = np.full(self.size, -1, np.int32)
        numbers[self.ids] = np.arange(len(self.ids), dtype=np.int32)
        return numbers


def _with_room(values: np.ndarray, ids: np.ndarray) -> np.ndarray:
    needed = int(ids.max(initial=-1)) + 1
    if needed <= len(values):
        return values
    larger = np.zeros(max(needed, 2 * len(values)), values.dtype)
    larger[: len(values)] = values
    return larger
