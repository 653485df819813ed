"""BPR with one negative a position."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from recbole_holo.losses.pairwise import Pairwise
from recbole_holo.ops import losses


class BPR(Pairwise):
    """``-log σ(s⁺ - s⁻)`` (Rendle et al. 2009), s⁻ of one uniform negative a position."""

    def function(self) -> Callable[..., Tensor]:
        return losses.bpr
