"""Binary cross-entropy with one negative a position."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from recbole_holo.losses.pairwise import Pairwise
from recbole_holo.ops import losses


class BCE(Pairwise):
    """``-log σ(s⁺) - log(1 - σ(s⁻))`` (SASRec's, Kang and McAuley 2018), s⁻ of one uniform negative a position."""

    def function(self) -> Callable[..., Tensor]:
        return losses.bce
