"""Where a batch's rows lie among all events, and with that everything that their users have seen."""

from __future__ import annotations

from typing import NamedTuple

import torch
from recbole.data.interaction import Interaction
from torch import Tensor

from recbole_holo.ops.seen_items import SeenItems


class Histories(NamedTuple):
    """The events behind a batch of rows: row ``b`` has event ``begin[b] + t`` at position ``t``.

    A row is a part of its user's history, which begins at event ``first[b]``: what the user has seen at position ``t``
    is ``items[first[b] : begin[b] + t + 1]``, also what lies before the row.
    """

    items: Tensor  # [n_events], item of every event, each user's together and in the order of time
    first: Tensor  # [B], event number
    begin: Tensor  # [B], event number

    def seen(self, row: Tensor, position: Tensor) -> SeenItems:
        """What had been seen after the event at ``position [M]`` of ``row [M]``, that event included."""
        first = self.first[row]
        return SeenItems(self.items, first, self.begin[row] + position + 1)

    def to(self, device: torch.device) -> Histories:
        return Histories(*(values.to(device) for values in self))


def histories_of(interaction: Interaction, item_seq: Tensor) -> Histories:
    """The histories of a batch: those that its loader knows, else what ``item_seq [B, L]`` itself shows."""
    known: Histories | None = getattr(interaction, "histories", None)
    if known is not None:
        return known
    begin = torch.arange(len(item_seq), device=item_seq.device) * item_seq.shape[1]
    return Histories(item_seq.flatten(), begin, begin)


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
