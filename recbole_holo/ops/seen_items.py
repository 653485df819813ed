"""Which items a row leaves out of its softmax, as index tables: no mask of rows × items is ever held."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class SeenItems(NamedTuple):
    """Row ``i`` has seen ``items[start[i] : end[i]]``; an item may be among them several times, or row ``i``'s target.

    Rows of one history follow one another with ``end`` ascending, so that what a row has seen is what the row before it
    has, and a little more: a kernel that goes through the rows in order does work in proportion to them.
    """

    items: Tensor  # [n], ids; 0 = pad, which is left out in any case
    start: Tensor  # [M]
    end: Tensor  # [M]
    below: int | None = None  # ids are below it; None = they are looked through, for which a GPU is waited for

    def check(self, targets: Tensor, n_items: int) -> None:
        """
        Raises:
            ValueError: it is of other rows than ``targets``, on another device than they, or has ids of no item of
                ``n_items``.
        """
        if not self.start.shape == self.end.shape == targets.shape:
            raise ValueError(f"seen: it is of {len(self.start)} rows, and there are {len(targets)} targets")
        devices = {str(tensor.device) for tensor in (self.items, self.start, self.end)} - {str(targets.device)}
        if devices:
            raise ValueError(f"seen: it is on {', '.join(sorted(devices))}, and the targets are on {targets.device}")
        if self.below is None:
            check_ids("seen: items", self.items, 0, n_items)
        elif self.below > n_items:
            raise ValueError(f"seen: ids are below {self.below:,}, and the table has {n_items:,} rows")

    def check_ranges(self) -> None:
        """
        Raises:
            ValueError: a row's events are none of ``items``. Waits for a GPU.
        """
        if len(self.start):
            first, last = int(self.start.min()), int(self.end.max())
            if first < 0 or last > len(self.items):
                raise ValueError(f"seen: rows have events {first:,} to {last:,} of {len(self.items):,}")


def check_ids(name: str, ids: Tensor, least: int, n_items: int) -> None:
    """
    Raises:
        ValueError: ``ids`` are not all from ``least`` to ``n_items - 1``.
    """
    if ids.numel():
        low, high = (int(bound) for bound in ids.aminmax())
        if low < least or high >= n_items:
            wrong = low if low < least else high
            raise ValueError(f"{name}: {wrong} is not from {least} to {n_items - 1}, the last row of the table")


def left_out(seen: SeenItems, targets: Tensor, n_items: int, pads: int, chunk_size: int) -> Iterator[Tensor]:
    """For chunks of rows, which items each row leaves out of its softmax: those it has seen, but not its target.

    A history is gone through once a chunk, whatever the number of its rows: the position at which an item first occurs
    says which of the rows leave it out. A GPU is waited for once, to learn how many events the chunks have.

    Args:
        targets: ``[M]``, columns.
        n_items: columns, V.
        pads: items in front of those, which have none: item ``i`` is column ``i - pads``.
        chunk_size: rows of a chunk.

    Yields:
        ``[rows of the chunk, V]``, bool.
    """
    start, size, width = seen.start, (seen.end - seen.start).clamp(min=0), n_items + pads
    opens = torch.ones_like(start, dtype=torch.bool)
    opens[1:] = start[1:] != start[:-1]
    opens[::chunk_size] = True
    history = opens.cumsum(0) - 1  # [M]: number of the row's history; every chunk begins with another
    sizes = torch.zeros_like(start).scatter_reduce_(0, history, size, "amax")
    shift = torch.zeros_like(start).scatter_(0, history, start)  # [histories], and zeros up to M, as sizes
    ends = sizes.cumsum(0)
    shift -= ends - sizes  # of the events of all histories, counted one after the other, to where they are in items
    opened = torch.cat([history[::chunk_size], history[-1:] + 1])
    counted = torch.cat([ends.new_zeros(1), ends])[opened]
    histories, events = torch.stack([opened, counted]).tolist()
    for chunk in range(len(histories) - 1):
        (first, last), rows = histories[chunk : chunk + 2], slice(chunk * chunk_size, (chunk + 1) * chunk_size)
        never = torch.iinfo(torch.int32).max
        since = torch.full(((last - first) * width,), never, dtype=torch.int32, device=start.device)
        for begin in range(events[chunk], events[chunk + 1], chunk_size * width):  # no more at a time than scores
            event = torch.arange(begin, min(begin + chunk_size * width, events[chunk + 1]), device=start.device)
            own = torch.searchsorted(ends, event, right=True)
            at = seen.items[event + shift[own]] + (own - first) * width
            since.scatter_reduce_(0, at, (event - ends[own] + sizes[own]).int(), "amin")
        mask = since.view(-1, width)[history[rows] - first, pads:] < size[rows, None]
        yield mask.scatter_(1, targets[rows, None], False)
