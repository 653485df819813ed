"""A history as a state of constant size: prefilled in parallel, moved on one event at a time."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from recbole_holo.layers.bundling import TemporalBundling
from recbole_holo.layers.carried import Carried, Recurrent, Watched
from recbole_holo.layers.event_time import EventTime
from recbole_holo.layers.traced_step import step_program
from recbole_holo.ops import backend
from recbole_holo.ops.mamba_block import MambaState
from recbole_holo.ops.step_program import StepProgram

# Not kept in the models: a program can be neither copied nor pickled.
_programs: WeakKeyDictionary[nn.Module, tuple[Watched, object, StepProgram | None]] = WeakKeyDictionary()
PART = 1024  # positions of a history that are encoded at a time


class State(NamedTuple):
    """What a model keeps of B histories, however long they are.

    ``numbers`` of a history are, in float32: its hidden state ``[d]``; of each Mamba block, in the order of the layers,
    the last inputs of its convolution and the state of its scan; with bundling, the same blocks' once more as they were
    behind the last bundle (:class:`StateLayout` has names, places and sizes). With d 64, two Mamba-1 layers of 16
    states and no bundling that is 64 + 2·(3·128 + 128·16) = 4,928 numbers: 19.7 KB.
    """

    events: Tensor  # [B] int64: how many were read
    recent: Tensor  # [B, R] int64: the events not in a bundle yet, oldest first, then 0; R = 0 without bundling. An
    # event is its item's number, plus n_items times what a model with ``event_time`` reads of its time.
    numbers: Tensor  # [B, S] float32

    def rows(self, index: Tensor | slice) -> State:
        """Of some of the histories."""
        return State(*(tensor[index] for tensor in self))


class Field(NamedTuple):
    """Some of a state's numbers: which, and their shape in one history."""

    name: str
    start: int
    shape: tuple[int, ...]

    @property
    def end(self) -> int:
        return self.start + math.prod(self.shape)


class StateLayout(NamedTuple):
    """Where the numbers of a state are.

    Attributes:
        fields: all of them, in order: ``hidden``, then ``now.0.conv``, ``now.0.ssm``, ``now.1.conv`` … of the blocks,
            and with bundling ``bundled.0.conv`` …
        recent: R, the events that are kept as they are.
    """

    fields: tuple[Field, ...]
    recent: int

    @property
    def size(self) -> int:
        """Numbers a history."""
        return self.fields[-1].end

    def __str__(self) -> str:
        lines = [f"{field.name}: {' x '.join(map(str, field.shape))}" for field in self.fields]
        return "\n".join([*lines, f"recent events: {self.recent}", f"{4 * self.size + 8 * self.recent + 8} bytes"])


@lru_cache(maxsize=64)
def state_layout(d: int, shapes: tuple[tuple[int, ...], ...], recent: int) -> StateLayout:
    """Of a model of width d whose blocks have states of ``shapes`` (conv and ssm in turn)."""
    fields = [Field("hidden", 0, (d,))]
    for when in ("now", "bundled") if recent else ("now",):
        for number, shape in enumerate(shapes):
            name = f"{when}.{number // 2}.{('conv', 'ssm')[number % 2]}"
            fields.append(Field(name, fields[-1].end, shape))
    return StateLayout(tuple(fields), recent)


class Stepping(nn.Module):
    """Stepping for a model whose :meth:`encode_vectors` takes what is :class:`~recbole_holo.layers.carried.Carried`.

    Stepping event by event, prefilling, and any mixture give the hidden states of the parallel pass over the whole
    history, to rounding. A history has no end: positions go on counting, and what a model does beyond the lengths it
    was trained on is its own (RecMamba's learned positions stay at the last one).

    With bundling the latest R + k - 1 events at most are kept as they are. Where k of them become a bundle, the blocks
    go on from their states behind the last bundle: they read the new one, and the R events after it again, which is
    R/k + 1 tokens an event on average, whatever the length of the history.

    A model with ``event_time`` is given what it reads of the events' times as ``gaps``, in the shape of the items; None
    = nothing is known of them.

    Nothing here has a gradient. Call ``model.eval()`` first.
    """

    hidden_size: int
    n_items: int
    bundling: TemporalBundling | None
    event_time: EventTime | None
    embed_items: Any
    embed_events: Any
    encode_vectors: Any

    def state_layout(self) -> StateLayout:
        """The numbers of a state of this model, as it is now: bundling's k outside training has a part in it."""
        blocks = self._blocks()
        shapes = tuple(tuple(shape) for block in blocks for shape in block.state_shapes())
        bundling = self._bundled()
        return state_layout(self.hidden_size, shapes, bundling.recent + bundling.size - 1 if bundling else 0)

    def init_state(self, batch: int) -> State:
        """Of ``batch`` histories without an event."""
        layout, device = self.state_layout(), next(self.parameters()).device
        return State(
            torch.zeros(batch, dtype=torch.int64, device=device),
            torch.zeros(batch, layout.recent, dtype=torch.int64, device=device),
            torch.zeros(batch, layout.size, device=device),
        )

    @torch.no_grad()
    def step(
        self, items: Tensor, state: State, in_place: bool = False, gaps: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """One event more of each history: ``items [B]``, no pads → hidden ``[B, d]`` and the state then.

        With ``in_place`` the tensors of ``state`` may be overwritten, which saves copying them.
        """
        self._check_mode()
        bundling = self._bundled()
        if not in_place:
            state = State(*(tensor.clone() for tensor in state))
        if bundling is None:
            return self._step(self.embed_events(items, gaps), state, state.events)
        items = self._with_times(items, gaps)
        full = state.events - self._bundles(state.events) * bundling.size == bundling.recent + bundling.size - 1
        if bool(full.any()):
            _, advanced = self._advance(items[full].unsqueeze(1), state.rows(full), bundling)
            for mine, theirs in zip(state, advanced, strict=True):
                mine[full] = theirs
        rest = ~full
        if bool(rest.all()):
            return self._step(self._embed(items), self._remember(items, state), self._tokens(state.events))
        if bool(rest.any()):
            part = self._remember(items[rest], state.rows(rest))
            _, stepped = self._step(self._embed(items[rest]), part, self._tokens(part.events))
            for mine, theirs in zip(state, stepped, strict=True):
                mine[rest] = theirs
        return self.last_hidden(state), state

    def encode(self, histories: Tensor, gaps: Tensor | None = None) -> State:
        """The state after histories ``[B, L]``, pads (0) on the right, read in one parallel pass."""
        return self.advance(histories, self.init_state(len(histories)), in_place=True, gaps=gaps)[1]

    @torch.no_grad()
    def advance(
        self, items: Tensor, state: State, in_place: bool = False, gaps: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """Some events more of each history: ``items [B, L]``, pads (0) on the right → hidden ``[B, d]`` and the state
        then, in one parallel pass. A row of pads stays as it was. ``in_place`` as for :meth:`step`."""
        self._check_mode()
        if not in_place:
            state = state._replace(numbers=state.numbers.clone())
        bundling, items = self._bundled(), self._with_times(items, gaps)
        if bundling is None:
            lengths = (items > 0).sum(1)
            self._read(items, lengths, state.events, state.numbers, "now")
            state = State(state.events + lengths, state.recent, state.numbers)
            return self.last_hidden(state), state
        return self._advance(items, state, bundling)

    def _advance(self, items: Tensor, state: State, bundling: TemporalBundling) -> tuple[Tensor, State]:
        """:meth:`advance` with bundles; what is not in one yet, and what is new, as one sequence, and then as in the
        parallel pass over everything."""
        lengths = (items > 0).sum(1)
        k, before = bundling.size, self._bundles(state.events)
        kept = state.events - before * k
        items = _joined(state.recent, kept, items, lengths)
        total = state.events + lengths
        windows = self._bundles(total) - before
        numbers, most = state.numbers, int(windows.max())
        if most:
            width = most * k
            grown = items if items.shape[1] >= width else nn.functional.pad(items, (0, width - items.shape[1]))
            bundles = bundling.bundles(grown[:, :width].unflatten(1, (most, k)), self._embed)
            self._read(bundles, windows, before, numbers, "bundled")
        remaining = total - (before + windows) * k
        recent = _from(items, windows * k, remaining, state.recent.shape[1])
        changed = lengths > 0
        again = numbers.clone()
        self._copy(again, "bundled", "now")
        self._read(recent, torch.where(changed, remaining, 0), before + windows, again, "now")
        numbers = torch.where(changed.unsqueeze(-1), again, numbers)
        state = State(total, recent, numbers)
        return self.last_hidden(state), state

    def read_vectors(self, x: Tensor, position: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
        """One event more without bundles, as a function of tensors that changes none of them: for graphs.

        ``x [B, d]`` as :meth:`embed_events` gives it, at ``position [B]``, and the numbers ``[B, S]`` before it →
        hidden ``[B, d]`` and the numbers after it.
        """
        carried = Carried(position, self._states(numbers, "now"))
        hidden = self.encode_vectors(x.unsqueeze(1), carried)[:, 0]
        states = [tensor.flatten(1) for block in self._blocks() for tensor in carried.states[block]]
        return hidden, torch.cat([hidden, *states], 1)

    def last_hidden(self, state: State) -> Tensor:
        """The hidden state after the last event of each history, ``[B, d]``; zero where there is none."""
        return state.numbers[:, : self.state_layout().fields[0].end]

    # ------------------------------------------------------------------ inside
    def _with_times(self, items: Tensor, gaps: Tensor | None) -> Tensor:
        """Events ``[...]`` as one number each, pads as 0; see :class:`State`."""
        return items if self.event_time is None or gaps is None else items + self.n_items * gaps * (items > 0)

    def _embed(self, events: Tensor) -> Tensor:
        """What the encoder reads of events ``[...]``: ``[..., d]``."""
        if self.event_time is None:
            return self.embed_items(events)
        return self.embed_events(events % self.n_items, events.div(self.n_items, rounding_mode="floor"))

    def _step(self, x: Tensor, state: State, position: Tensor) -> tuple[Tensor, State]:
        """One token ``[B, d]`` more, in the place of ``state.numbers``."""
        program = self._program()
        if program is not None:
            hidden = program(x, position, state.numbers)
        else:
            carried = Carried(position, self._states(state.numbers, "now"), in_place=True)
            hidden = self.encode_vectors(x.unsqueeze(1), carried)[:, 0]
        state.numbers[:, : hidden.shape[-1]] = hidden
        return hidden, State(state.events + 1, state.recent, state.numbers)

    def _read(self, what: Tensor, lengths: Tensor, position: Tensor, numbers: Tensor, when: str) -> None:
        """Events ``[B, L]`` or vectors ``[B, L, d]``, of which ``lengths [B]`` count, in the place of ``numbers``."""
        for part in what.split(PART, 1):
            own = lengths.clamp(max=part.shape[1])
            carried = Carried(position, self._states(numbers, when), own)
            hidden = self.encode_vectors(part if part.dim() == 3 else self._embed(part), carried)
            last = hidden.gather(1, (own - 1).clamp(min=0)[:, None, None].expand(-1, 1, hidden.shape[-1]))[:, 0]
            width = hidden.shape[-1]
            numbers[:, :width] = torch.where(own.unsqueeze(-1) > 0, last.to(numbers.dtype), numbers[:, :width])
            for block, into in self._states(numbers, when).items():
                for tensor, after in zip(into, carried.states[block], strict=True):
                    tensor.copy_(after)
            lengths, position = lengths - own, position + own

    def _program(self) -> StepProgram | None:
        """A step as one call of the C++ kernels, where they are and the model can be traced."""
        known = _programs.get(self)
        if known is None or known[1] != (backend.get_backend(), known[0].stamp()):
            watched, program = Watched(self), None
            if backend.runs_native(next(self.parameters())) and next(self.parameters()).dtype == torch.float32:
                fields = {field.name: field.start for field in self.state_layout().fields}
                places: dict[nn.Module, tuple[int, int]] = {}
                places |= {b: (fields[f"now.{i}.conv"], fields[f"now.{i}.ssm"]) for i, b in enumerate(self._blocks())}
                program = step_program(self, self.hidden_size, places)
            known = _programs[self] = watched, (backend.get_backend(), watched.stamp()), program
        return known[2]

    def _blocks(self) -> list[Recurrent]:
        found: list[Recurrent] | None = self.__dict__.get("_recurrent")
        if found is None:
            found = self.__dict__["_recurrent"] = [block for block in self.modules() if isinstance(block, Recurrent)]
        return found

    def _states(self, numbers: Tensor, when: str) -> dict[nn.Module, MambaState]:
        """Views of the blocks' states ``now`` or ``bundled``."""
        blocks, fields = self._blocks(), self.state_layout().fields[1:]
        fields = fields[: 2 * len(blocks)] if when == "now" else fields[2 * len(blocks) :]
        views = [numbers[:, field.start : field.end].view(-1, *field.shape) for field in fields]
        return {block: MambaState(*views[2 * i : 2 * i + 2]) for i, block in enumerate(blocks)}

    def _copy(self, numbers: Tensor, source: str, target: str) -> None:
        ends = {field.name.split(".")[0]: field.end for field in self.state_layout().fields}
        starts = {"now": ends["hidden"], "bundled": ends["now"]}
        numbers[:, starts[target] : ends[target]] = numbers[:, starts[source] : ends[source]].clone()

    def _bundled(self) -> TemporalBundling | None:
        return self.bundling if self.bundling is not None and self.bundling.size > 1 else None

    def _bundles(self, events: Tensor) -> Tensor:
        """Of histories of so many events, how many bundles."""
        assert self.bundling is not None
        return (events - self.bundling.recent).clamp(min=0).div(self.bundling.size, rounding_mode="floor")

    def _tokens(self, events: Tensor) -> Tensor:
        assert self.bundling is not None
        return events - self._bundles(events) * (self.bundling.size - 1)

    def _remember(self, items: Tensor, state: State) -> State:
        """With ``items`` behind the events that are not in a bundle yet."""
        assert self.bundling is not None
        kept = state.events - self._bundles(state.events) * self.bundling.size
        return state._replace(recent=state.recent.scatter(1, kept.unsqueeze(-1), items.unsqueeze(-1)))

    def train(self, mode: bool = True) -> Any:
        _programs.pop(self, None)  # see Recurrent.train
        return super().train(mode)

    def _check_mode(self) -> None:
        if self.training:
            raise RuntimeError(f"{type(self).__name__} is in training mode, where stepping would drop out: call eval()")


def _joined(first: Tensor, counts: Tensor, second: Tensor, more: Tensor) -> Tensor:
    """Of each row the first ``counts [B]`` of ``first [B, R]``, then ``second [B, L]``: ``[B, R + L]``, then 0."""
    position = torch.arange(first.shape[1] + second.shape[1], device=first.device).expand(len(first), -1)
    both = torch.cat([first, second], 1)
    at = torch.where(position < counts.unsqueeze(-1), position, position - counts.unsqueeze(-1) + first.shape[1])
    valid = position < (counts + more).unsqueeze(-1)
    return both.gather(1, at.clamp(max=both.shape[1] - 1)).masked_fill(~valid, 0)


def _from(items: Tensor, start: Tensor, count: Tensor, width: int) -> Tensor:
    """Of each row of ``items [B, L]`` the ``count [B]`` from ``start [B]`` on: ``[B, width]``, then 0."""
    position = torch.arange(width, device=items.device).expand(len(items), -1)
    at = (position + start.unsqueeze(-1)).clamp(max=items.shape[1] - 1)
    return items.gather(1, at).masked_fill(position >= count.unsqueeze(-1), 0)
