"""Cross-entropy over all items."""

from __future__ import annotations

from torch import Tensor

from recbole_holo.losses.base import Loss, Positions
from recbole_holo.ops import cross_entropy


class CE(Loss):
    """``-log softmax(s)[target]`` over all rivals."""

    reads_whole_table = True

    def forward(self, positions: Positions) -> Tensor:
        seen = None if positions.seen is None else positions.seen.ranges()
        # The pad is never a target; as a rival it would train its row away from zero.
        return cross_entropy(
            positions.query, positions.targets, positions.table(), positions.scaled_bias, exclude_pad=True, seen=seen
        )
