"""What a stack keeps of a sequence between its parts."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class Carried:
    """The states of the layers of one model after the parts of a sequence it has read so far.

    One object goes with one batch of sequences: pass it to every part in turn. Parts need not be equally long; a
    sequence that ended in an earlier part goes on with pads, and what comes out for it means nothing.
    """

    def __init__(self) -> None:
        self.position = 0  # steps read so far
        self.states: dict[nn.Module, Any] = {}


def through(layer: nn.Module, hidden: Tensor, carried: Carried | None) -> Tensor:
    """``layer(hidden)``, or where there is something to carry ``layer.forward_from(hidden, its state)``."""
    if carried is None:
        return layer(hidden)
    forward_from: Any = layer.forward_from
    hidden, carried.states[layer] = forward_from(hidden, carried.states.get(layer))
    return hidden
