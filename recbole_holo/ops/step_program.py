"""A stack of layers as a list of operations that the C++ kernels run at once, one event of each sequence.

With one event a sequence, calling modules and operators takes ten times as long as their arithmetic does. Nobody writes
the list: it is traced from the layers (:mod:`recbole_holo.layers.traced_step`), so that a model has one description.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from recbole_holo.ops import native
from recbole_holo.ops._step_native import NativeStep, filled, panels

KINDS = ("layer_norm", "rms_norm", "linear", "add", "multiply", "scale", "silu", "gelu", "rotate", "mamba", "mamba2")
_Operation = native.structure(
    "Operation", "kind a b out a_width width conv ssm heads", "weight bias block", floats="number"
)


class Step(NamedTuple):
    """One operation; what it reads and writes are numbers of values, of which 0 is the input of the stack.

    Args:
        kind: one of :data:`KINDS`.
        reads: one value, or two of one width.
        width: of what it makes.
        weight, bias: of norms and linear maps (``[out, in]``); of ``rotate`` the frequencies.
        number: eps of a norm, or the factor of ``scale``.
        heads: of ``rotate``: equal parts of a row.
        block: of a Mamba block, prepared; conv, ssm: where its states begin among the numbers of a sequence.
    """

    kind: str
    reads: Sequence[int]
    width: int
    weight: Tensor | None = None
    bias: Tensor | None = None
    number: float = 0.0
    heads: int = 1
    block: NativeStep | None = None
    conv: int = 0
    ssm: int = 0


class StepProgram:
    """``steps`` one after the other; value i + 1 is what step i makes, and the last is the result.

    Args:
        width: of the input and of the result.
    """

    def __init__(self, width: int, steps: Sequence[Step]) -> None:
        widths = [width, *(step.width for step in steps)]
        places, self._size = _places(widths, steps)
        self._kept: list[object] = []
        operations = [self._operation(step, i + 1, places, widths) for i, step in enumerate(steps)]
        self._operations = (_Operation * len(steps))(*operations)
        self._width, self._result = width, places[-1]
        self._run = native.library().run_steps

    def __call__(self, x: Tensor, position: Tensor, numbers: Tensor) -> Tensor:
        """``x [B, width]`` at ``position [B]`` (int64) → ``[B, width]``; the states in ``numbers [B, S]`` move on."""
        x, position = x.float().contiguous(), position.contiguous()
        out = torch.empty_like(x)
        self._run(
            self._operations,
            *map(ctypes.c_int64, (len(self._operations), self._size, self._width, self._result)),
            torch.get_num_threads(),
            ctypes.c_int64(len(x)),
            ctypes.c_void_p(x.data_ptr()),
            ctypes.c_void_p(position.data_ptr()),
            ctypes.c_void_p(numbers.data_ptr()),
            ctypes.c_int64(numbers.stride(0)),
            ctypes.c_void_p(out.data_ptr()),
        )
        return out

    def _operation(self, step: Step, made: int, places: list[int], widths: list[int]) -> ctypes.Structure:
        weight, bias = step.weight, step.bias
        if step.kind == "linear" and weight is not None:
            weight, bias = panels(weight.detach().T), filled(bias)
        tensors = [None if t is None else t.detach().float().contiguous() for t in (weight, bias)]
        self._kept += [*tensors, step.block]
        first, last = step.reads[0], step.reads[-1]
        return _Operation(
            KINDS.index(step.kind),
            *(places[first], places[last], places[made], widths[first], step.width, step.conv, step.ssm, step.heads),
            step.number,
            *map(native.pointer, tensors),
            None if step.block is None else step.block.address,
        )


def _places(widths: list[int], steps: Sequence[Step]) -> tuple[list[int], int]:
    """Where the values lie in a row of buffers, and how long it is: a place is free again after its last reader."""
    last = {value: i for i, step in enumerate(steps) for value in step.reads} | {len(steps): len(steps)}
    free: list[tuple[int, int]] = []  # width, place
    places: list[int] = []
    end = 0
    for value, width in enumerate(widths):
        whole = native.whole(width, native.lanes())
        found = next((spot for spot in free if spot[0] == whole), None)
        if found is None:
            places.append(end)
            end += whole
        else:
            free.remove(found)
            places.append(found[1])
        # What the step that made this value read for the last time; it is free from the next step on.
        done = [v for v in range(value + 1) if last.get(v, -1) == value - 1 and v != value] if value else []
        free += [(native.whole(widths[v], native.lanes()), places[v]) for v in done]
    return places, end
