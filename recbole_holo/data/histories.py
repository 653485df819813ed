"""Where a batch's rows lie among all events, and with that everything that their users have seen."""

from __future__ import annotations

from functools import cached_property
from typing import Any, NamedTuple
from uuid import uuid4
from weakref import WeakValueDictionary

import torch
from recbole.data.interaction import Interaction
from torch import Tensor
from torch.utils.data import get_worker_info

from recbole_holo.errors import DataError
from recbole_holo.ops.seen_items import SeenItems


class Events:
    """Every event of a data set once, each user's together and in the order of time.

    Args:
        items: ``[n_events]``.
        first: of every event, the number of its user's first ``[n_events]``.
        n_items: ids are below it.

    A data worker's batches name the events that the process has which reads them: they are not sent to and fro.
    """

    def __init__(self, items: Tensor, first: Tensor, n_items: int, name: str | None = None) -> None:
        self.items, self.first, self.n_items = items, first, n_items
        self._moved: dict[torch.device, Events] = {}
        self._name = name or uuid4().hex
        _named[self._name] = self

    def __reduce__(self) -> tuple[Any, ...]:
        values = () if get_worker_info() is not None else (self.items, self.first, self.n_items)
        return _known, (self._name, *values)

    @cached_property
    def _first_time(self) -> tuple[Tensor, Tensor]:
        """Every user's items by their keys, user · ids + item, ascending ``[n_events]``, and the event of each; the
        earliest comes first among equals."""
        keys, events = (self.first * self.n_items + self.items).sort(stable=True)
        return keys, events

    def first_time(self, first: Tensor, items: Tensor) -> Tensor:
        """The event in which the user whose first event is ``first [...]`` met ``items [...]``; the number of all
        events, which is later than any, where that never happened. Bisection: log₂ of all events a pair."""
        keys, events = self._first_time
        wanted = first * self.n_items + items
        place = torch.searchsorted(keys, wanted).clamp_(max=len(keys) - 1)
        return torch.where((keys[place] == wanted) & (items < self.n_items), events[place], len(keys))

    def to(self, device: torch.device) -> Events:
        if device not in self._moved:
            items = self.items.to(device)  # the same where they are there, also for cuda as cuda:0
            if items is self.items:
                return self
            self._moved[device] = Events(items, self.first.to(device), self.n_items)
        return self._moved[device]


_named: WeakValueDictionary[str, Events] = WeakValueDictionary()  # of this process


def _known(name: str, *values: Any) -> Events:
    """This process's events of that name, which never change; where there are none, new ones."""
    known = _named.get(name)
    if known is None:
        items, first, n_items = values
        known = Events(items, first, n_items, name)
    return known


class Histories(NamedTuple):
    """The events behind a batch of rows: row ``b`` has event ``begin[b] + t`` at position ``t``.

    A row is a part of its user's history, which begins at event ``first[b]``: what the user has seen at position ``t``
    is ``items[first[b] : begin[b] + t + 1]``, also what lies before the row.
    """

    events: Events
    begin: Tensor  # [B], event number

    @property
    def items(self) -> Tensor:
        """Of every event ``[n_events]``."""
        return self.events.items

    @property
    def first(self) -> Tensor:
        """Event number of each row's user's first event ``[B]``."""
        return self.events.first[self.begin]

    def at(self, row: Tensor, position: Tensor) -> Seen:
        """What had been seen after the event at ``position [M]`` of ``row [M]``, that event included."""
        return Seen(self, row, position)

    def to(self, device: torch.device) -> Histories:
        return Histories(self.events.to(device), self.begin.to(device))


class Seen(NamedTuple):
    """What users had seen at positions of their rows: those of ``row [M]`` after the events at ``position [M]``."""

    histories: Histories
    row: Tensor
    position: Tensor

    @property
    def end(self) -> Tensor:
        """Event number behind the last that counts ``[M]``."""
        return self.histories.begin[self.row] + self.position + 1

    def ranges(self) -> SeenItems:
        """As ranges of events."""
        events = self.histories.events
        return SeenItems(events.items, self.histories.first[self.row], self.end, events.n_items)

    def among(self, items: Tensor) -> Tensor:
        """Which of ``items [K]`` each position had seen: ``[M, K]``. Looked up once a row, not once a position."""
        first_time = self.histories.events.first_time(self.histories.first.unsqueeze(-1), items)  # [B, K]
        return first_time[self.row] < self.end.unsqueeze(-1)

    def contains(self, items: Tensor) -> Tensor:
        """Whether each position had seen its one of ``items [M]``: ``[M]``."""
        return self.histories.events.first_time(self.histories.first[self.row], items) < self.end


def check_padding(item_seq: Tensor, length: Tensor | None, names: tuple[str, str]) -> None:
    """Refuses histories that are not what models read: items first, then pads (0), and as long as is said.

    Reads back from the device whether all are right, which waits for a GPU.

    Args:
        item_seq: ``[B, L]``.
        length: of each history ``[B]``, at least 1; None: wherever its pads begin.
        names: of the two in the batch.

    Raises:
        DataError: pads before items, as on the left, or another length.
    """
    is_item = item_seq > 0
    said = is_item.sum(1) if length is None else length
    step = torch.arange(item_seq.shape[1], device=item_seq.device)
    wrong = (is_item != (step < said.unsqueeze(-1))).any(1)
    if length is not None:
        wrong |= length < 1
    if not wrong.any():
        return
    row = int(wrong.nonzero()[0])
    shown = ", ".join(map(str, item_seq[row, :8].tolist())) + (", …" if item_seq.shape[1] > 8 else "")
    also = "" if length is None else f", {names[1]} = {int(length[row])}"
    raise DataError(
        f"{names[0]}: row {row} is [{shown}]{also}; a history has its items first, oldest to latest, and pads (0) on "
        f"the right. {names[1]} is the number of its items, at least 1."
    )


def histories_of(interaction: Interaction, item_seq: Tensor, n_items: int) -> Histories:
    """The histories of a batch: those that its loader knows, else what ``item_seq [B, L]`` of ids below ``n_items``
    itself shows."""
    known: Histories | None = getattr(interaction, "histories", None)
    if known is not None:
        return known
    rows, width = item_seq.shape
    begin = torch.arange(rows, device=item_seq.device) * width
    return Histories(Events(item_seq.flatten(), begin.repeat_interleave(width), n_items), begin)


class EventBatch(Interaction):
    """A batch whose rows are known to lie among a data set's events.

    Attributes:
        histories: where.
    """

    def __init__(self, interaction: dict[str, Tensor], histories: Histories) -> None:
        super().__init__(interaction)
        self.histories = histories

    def to(self, device: torch.device, selected_field: str | None = None) -> EventBatch:
        moved = super().to(device, selected_field)
        return EventBatch(moved.interaction, self.histories.to(device))
