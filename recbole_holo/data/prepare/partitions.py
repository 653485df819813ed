"""Events on disk in parts that fit in memory, each with all the events of a range of users."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from recbole_holo.data.prepare import _lines_numba as lines_numba

PARTITION_EVENTS = 4_000_000
EVENT = np.dtype([("user", np.int32), ("item", np.int32), ("time", np.int64)])  # 16 bytes on disk, packed

Bars = Callable[[str, int], tqdm]  # a progress bar from what is done and its size in bytes


class Partitions:
    """The events of a data set, a file for each range of users; memory is that of the largest part.

    A part holds about ``part_events`` events, more only by those of its last user: a user is never divided.

    Args:
        folder: where the files go; it is the caller's to remove.
        events_of_user: how many events each user has, ``[n_users]``.
        n_items: number of items; users and items are numbered from 0 here.
        bars: makes the progress bars.
        part_events: events of a part.
    """

    def __init__(
        self, folder: Path, events_of_user: np.ndarray, n_items: int, bars: Bars, part_events: int = PARTITION_EVENTS
    ) -> None:
        before = np.cumsum(events_of_user, dtype=np.int64) - events_of_user
        _, part = np.unique(before // part_events, return_inverse=True)
        self._part_of_user = part.astype(np.int32)
        self._files = [folder / f"part-{number}" for number in range(int(part.max(initial=-1)) + 1)]
        self._bars = bars
        self.users = np.zeros(len(events_of_user), np.int32)
        self.items = np.zeros(n_items, np.int32)

    def append(self, user: np.ndarray, item: np.ndarray, time: np.ndarray) -> None:
        """Adds events after those already there; within a user, their order stays."""
        events = np.empty(len(user), EVENT)
        events["user"], events["item"], events["time"] = user, item, time
        part = self._part_of_user[events["user"]]
        events = events[np.argsort(part, kind="stable")]
        ends = np.cumsum(np.bincount(part, minlength=len(self._files)))
        for number in np.unique(part).tolist():
            with self._files[number].open("ab") as file:
                events[ends[number - 1] if number else 0 : ends[number]].tofile(file)

    def arrange(self, deduplicate: str) -> None:
        """Sorts every user's events by time, ties in the order they came in, and drops repeated items.

        Args:
            deduplicate: ``consecutive`` drops events with the item of the event just before, ``first`` keeps the first
                event with each item, ``none`` keeps all.
        """

        def arranged(events: np.ndarray) -> np.ndarray:
            order = np.argsort(events["time"], kind="stable")
            user = events["user"][order] - events["user"].min()
            narrow = user.astype(np.min_scalar_type(user.max()))  # 16 bits, mostly: sorted by radix
            events = events[order[np.argsort(narrow, kind="stable")]]
            if deduplicate == "none":
                return events
            if deduplicate == "consecutive":
                return events[_is_new(events["user"], events["item"])]
            by_item = np.lexsort((events["item"], events["user"]))  # stable: in time order within an item
            first = by_item[_is_new(events["user"][by_item], events["item"][by_item])]
            return events[np.sort(first)]

        self._rewrite("sorting", arranged)

    def keep_frequent(self, of_user: int, of_item: int) -> int:
        """Drops users with fewer than ``of_user`` and items with fewer than ``of_item`` events until none is left.

        What is left is the largest set in which all have that many; it does not depend on the order of dropping.

        Returns:
            passes over the events.
        """
        passes = 0
        while True:
            users, items = self.users >= of_user, self.items >= of_item
            if not (self.users[~users].any() or self.items[~items].any()):
                return passes
            passes += 1

            def frequent(events: np.ndarray, users: np.ndarray = users, items: np.ndarray = items) -> np.ndarray:
                kept = users[events["user"]] & items[events["item"]]
                return events if kept.all() else events[kept]

            self._rewrite(f"filtering, pass {passes}", frequent)

    def write(
        self, file: BinaryIO, user_token: np.ndarray, item_token: np.ndarray, time: Callable[[np.ndarray], np.ndarray]
    ) -> None:
        """Writes ``user<tab>item<tab>time`` lines, users in order: tokens by number, times as ``time`` makes them."""
        for _, events in self._read("writing .inter"):
            text = np.empty(len(events) * lines_numba.LINE_BYTES, np.uint8)
            tokens = user_token[events["user"]], item_token[events["item"]], time(events["time"])
            file.write(text[: lines_numba.format_lines(*tokens, text)].data)

    def _read(self, what: str) -> Iterator[tuple[Path, np.ndarray]]:
        files = [path for path in self._files if path.exists()]
        with self._bars(what, sum(path.stat().st_size for path in files)) as bar:
            for path in files:
                events = np.fromfile(path, EVENT)
                yield path, events
                bar.update(events.nbytes)

    def _rewrite(self, what: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
        """Replaces each part by ``change(part)``, and counts events by user and item again."""
        self.users[:] = 0
        self.items[:] = 0
        for path, events in self._read(what):
            changed = change(events)
            if changed is not events:
                changed.tofile(path)
            lines_numba.count(changed["user"], self.users)
            lines_numba.count(changed["item"], self.items)


def _is_new(user: np.ndarray, item: np.ndarray) -> np.ndarray:
    """Where user or item differ from those of the row before."""
    new = np.ones(len(user), bool)
    new[1:] = (user[1:] != user[:-1]) | (item[1:] != item[:-1])
    return new
