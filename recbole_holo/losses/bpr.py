"""BPR with one negative a position."""

from __future__ import annotations

from torch import Tensor

from recbole_holo.losses.base import Loss, Positions
from recbole_holo.losses.negatives import one_negative_each
from recbole_holo.ops import losses


class BPR(Loss):
    """``-log σ(s⁺ - s⁻)`` (Rendle et al. 2009), s⁻ of one uniform negative a position."""

    def forward(self, positions: Positions) -> Tensor:
        negatives, left_out = one_negative_each(positions)
        vectors, sparse = positions.vectors_for(2 * len(negatives))
        query, bias = positions.query, positions.scaled_bias
        return losses.bpr(query, positions.targets, negatives, vectors, bias, positions.cosine, sparse, left_out)
