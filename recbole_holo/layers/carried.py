"""What a stack keeps of a sequence between its parts, and how a layer takes the next part or the next step."""

from __future__ import annotations

from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from recbole_holo.ops import backend
from recbole_holo.ops.mamba_block import MambaState
from recbole_holo.ops.step import Stepper


class Carried:
    """The states of the layers of one model after the parts of a sequence it has read so far.

    One object goes with one batch of sequences: pass it to every part in turn. Parts need not be equally long; without
    ``lengths``, a sequence that ended in an earlier part goes on with pads, and what comes out for it means nothing.

    Attributes:
        position: steps read so far, one number or ``[B]``.
        states: of each layer; none at the beginning.
        lengths: ``[B]``, steps of this part that are not pads; pads leave the states as they are. None: all.
        in_place: the part is one step long, and the states are changed where they lie (inference).
    """

    def __init__(
        self,
        position: int | Tensor = 0,
        states: dict[nn.Module, MambaState] | None = None,
        lengths: Tensor | None = None,
        in_place: bool = False,
    ) -> None:
        self.position = position
        self.states = {} if states is None else states
        self.lengths = lengths
        self.in_place = in_place

    def step(self, layer: Recurrent, hidden: Tensor) -> Tensor:
        """``[B, 1, …]`` → likewise, the layer's state being changed."""
        return layer.step(hidden.squeeze(1), self.states[layer]).unsqueeze(1)


class Watched:
    """The parameters of modules, to be asked often whether they changed: walking modules takes longer than a step."""

    def __init__(self, *modules: nn.Module) -> None:
        every = (one for module in modules for one in module.modules())
        self._places = [(one._parameters, name) for one in every for name in one._parameters]

    def stamp(self) -> tuple[int, ...]:
        """Other numbers where a parameter was exchanged, moved or written to (by PyTorch's fused optimizers not)."""
        found = (place[name] for place, name in self._places)
        return tuple(number for p in found if p is not None for number in (p.data_ptr(), p._version))


class StateShapes(NamedTuple):
    """Of the state of one sequence."""

    conv: tuple[int, ...]
    ssm: tuple[int, ...]


class Recurrent(nn.Module):
    """A layer with a state of constant size: reads a sequence whole, in parts, or step by step."""

    def state_shapes(self) -> StateShapes:
        """Of a :class:`~recbole_holo.ops.mamba_block.MambaState`, without the batch."""
        raise NotImplementedError

    def forward_from(
        self, hidden: Tensor, state: MambaState | None, lengths: Tensor | None = None
    ) -> tuple[Tensor, MambaState]:
        """The next part of sequences ``[B, L, …]``, from the state before it (None: the beginning) to that after it.

        Of each row the first ``lengths [B]`` steps are read, all if None. The state carries no gradient.
        """
        raise NotImplementedError

    def step(self, hidden: Tensor, state: MambaState) -> Tensor:
        """The next step of sequences ``[B, …]``; ``state`` is changed in place, and nothing has a gradient."""
        known = _steppers.get(self)
        if known is None or known.stamp != (backend.get_backend(), known.watched.stamp()):
            watched = Watched(self)
            known = _steppers[self] = _Prepared(watched, (backend.get_backend(), watched.stamp()), self.make_stepper())
        return known.stepper(hidden, state)

    def make_stepper(self) -> Stepper:
        """The step with the parameters as they are."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> Any:
        _steppers.pop(self, None)  # PyTorch's fused optimizers change parameters without counting it as a change
        return super().train(mode)


class _Prepared(NamedTuple):
    watched: Watched
    stamp: tuple[object, ...]
    stepper: Stepper


# Not kept in the layers: pointers into prepared weights can be neither copied nor pickled.
_steppers: WeakKeyDictionary[Recurrent, _Prepared] = WeakKeyDictionary()


def through(layer: Recurrent, hidden: Tensor, carried: Carried | None) -> Tensor:
    """``layer(hidden)``, or where there is something to carry the next part or step from the state before it."""
    if carried is None:
        return layer(hidden)
    if carried.in_place:
        return carried.step(layer, hidden)
    hidden, carried.states[layer] = layer.forward_from(hidden, carried.states.get(layer), carried.lengths)
    return hidden
