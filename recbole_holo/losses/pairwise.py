"""What losses of one negative a position share."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from recbole_holo.losses.base import Loss, Positions
from recbole_holo.losses.negatives import one_negative_each


class Pairwise(Loss):
    """A function of the scores of each position's target and of one uniform negative."""

    def function(self) -> Callable[..., Tensor]:
        """One of :mod:`recbole_holo.ops.losses`, with the arguments of its ``bpr``."""
        raise NotImplementedError

    def forward(self, positions: Positions) -> Tensor:
        negatives, left_out = one_negative_each(positions)
        vectors, sparse = positions.vectors_for(2 * len(negatives))
        query, bias = positions.query, positions.scaled_bias
        return self.function()(query, positions.targets, negatives, vectors, bias, positions.cosine, sparse, left_out)
