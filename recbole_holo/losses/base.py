"""What a loss is given, and what it must give."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from recbole_holo.data.histories import Seen
from recbole_holo.ops.losses import ItemVectors
from recbole_holo.ops.seen_items import SeenItems


@dataclass(frozen=True)
class SeenRivals:
    """What the user of each position had seen, in the numbers of the rivals.

    Attributes:
        seen: the same by item ids.
        known: ids of the rivals ``[n_rivals]``; None: ids are the numbers.
        number: of every item ``[n_items]``; None likewise.
    """

    seen: Seen
    known: Tensor | None
    number: Tensor | None

    def ranges(self) -> SeenItems:
        """As ranges of events, for a softmax over all rivals."""
        found = self.seen.ranges()
        return found if self.number is None else found._replace(items=self.number[found.items])

    def among(self, rivals: Tensor) -> Tensor:
        """Which of ``rivals [K]`` each position's user had seen: ``[M, K]``."""
        return self.seen.among(self._ids(rivals))

    def contains(self, rivals: Tensor) -> Tensor:
        """Whether each position's user had seen its one of ``rivals [M]``: ``[M]``."""
        return self.seen.contains(self._ids(rivals))

    def _ids(self, rivals: Tensor) -> Tensor:
        return rivals if self.known is None else self.known[rivals]


@dataclass(frozen=True)
class Positions:
    """The supervised positions of a batch and the items that compete there, its rivals.

    Rivals are numbered from 1; number 0 is the pad, which is never a target and should never be a rival. They are all
    items, or with ``cold_items: attributes`` those that occur in training.

    Attributes:
        hidden: ``[M, d]``, as the encoder gave it; at least one position.
        targets: ``[M]``, in the numbers of the rivals.
        n_rivals: with the pad.
        cosine: whether scores are cosines.
        temperature: what scores are divided by, a scalar; None = 1.
        bias: of every rival ``[n_rivals]``, as it is before that division; None: there is none.
        seen: what is no rival of a position's target; None: nothing.
        table: makes the rivals' vectors ``[n_rivals, d]``, of length 1 where scores are cosines.
        vectors_for: how many rivals' vectors are wanted → what gives these alone (unnormalised), and whether its
            gradient is sparse.
    """

    hidden: Tensor
    targets: Tensor
    n_rivals: int
    cosine: bool
    temperature: Tensor | None
    bias: Tensor | None
    seen: SeenRivals | None
    table: Callable[[], Tensor]
    vectors_for: Callable[[int], tuple[ItemVectors, bool]]

    @property
    def query(self) -> Tensor:
        """What is multiplied with an item's vector to give its score over the temperature: ``[M, d]``."""
        query = F.normalize(self.hidden, dim=-1) if self.cosine else self.hidden
        return query if self.temperature is None else query / self.temperature

    @property
    def divisor(self) -> float | Tensor:
        """The temperature as a number or a scalar tensor."""
        return 1.0 if self.temperature is None else self.temperature

    @property
    def scaled_bias(self) -> Tensor | None:
        """The bias over the temperature."""
        return self.bias if self.bias is None or self.temperature is None else self.bias / self.temperature


class Loss(nn.Module):
    """The mean loss over supervised positions.

    Attributes:
        reads_whole_table: whether every item gets a gradient, so that ``sparse_embedding`` saves nothing.
    """

    reads_whole_table = False

    def __init__(self, config: Any, dataset: Any, item_field: str, rivals: Tensor | None) -> None:
        """Reads its settings; see :func:`recbole_holo.losses.make_loss`."""
        super().__init__()

    def forward(self, positions: Positions) -> Tensor:
        """A scalar."""
        raise NotImplementedError
