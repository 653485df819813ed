"""The scan of Mamba-2 by the C++ kernels: see native/ssd.cpp."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from recbole_holo.ops import native

if TYPE_CHECKING:
    from recbole_holo.ops.state_space_dual import DualArguments

Arguments = native.structure(
    "Arguments",
    "batch length heads groups parts vectors order softplus begins ends x_row dt_row b_row c_row",
    "x dt b c rates skip bias",
)


def state_space_dual_native(
    given: DualArguments, initial_state: Tensor | None, wants_state: bool
) -> tuple[Tensor, Tensor]:
    """As :func:`recbole_holo.ops.state_space_dual.state_space_dual_with_state`: outputs and last state, in float32.

    The state is empty unless ``wants_state``.
    """
    (heads, width), (groups, order) = given.x.shape[2:], given.B.shape[2:]
    zeros = given.x.new_zeros(heads, dtype=torch.float32)
    D, dt_bias = (zeros if t is None else t.float() for t in (given.D, given.dt_bias))
    # Channels and states that are added to fill vectors have no input, and no output that anyone reads.
    channels, states = (native.whole(size, native.lanes()) - size for size in (width, order))
    x, B, C = (F.pad(t.float(), (0, by)) for t, by in ((given.x, channels), (given.B, states), (given.C, states)))
    initial = None if initial_state is None else F.pad(initial_state.float(), (0, states, 0, channels)).flatten(1, 2)
    tensors = (x.flatten(2), given.dt.float(), given.A.float(), B.flatten(2), C.flatten(2), D, dt_bias, initial)
    y, last = NativeStateSpaceDual.apply(*tensors, groups, given.dt_softplus, wants_state)
    y = y.unflatten(-1, (heads, -1))[..., :width]
    return y, last.unflatten(1, (heads, -1))[:, :, :width, :order] if wants_state else last


class NativeStateSpaceDual(torch.autograd.Function):
    """The kernels as one differentiable function of float32 tensors whose widths fill vectors, heads flattened."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor, Tensor]:
        *tensors, initial, ctx.groups, ctx.softplus, ctx.wants_state = given
        x, dt, B, C = (native.evenly_spaced(tensors[i]) for i in (0, 1, 3, 4))
        rates, D, bias = tensors[2] * native.LOG2_E, tensors[5].contiguous(), tensors[6].contiguous()
        (batch, length, channels), order, lanes = x.shape, B.shape[2] // ctx.groups, native.lanes()
        state = x.new_empty(batch, channels // lanes, order, lanes) if initial is None else native.pack(initial)
        first = None if initial is None else state.clone()
        kept = None
        if any(ctx.needs_input_grad):
            kept = x.new_empty(batch, native.segments(length) - 1, channels * order)
        y = x.new_empty(x.shape)
        ctx.save_for_backward(x, dt, B, C, rates, D, bias, first, kept)
        native.library().ssd_op_forward(
            ctypes.byref(arguments(ctx, x, dt, B, C, rates, D, bias, first)),
            torch.get_num_threads(),
            *map(native.pointer, (kept, state, y)),
        )
        return y, native.unpack(state) if ctx.wants_state else y.new_empty(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor, glast: Tensor) -> tuple[Tensor | None, ...]:
        *tensors, kept = ctx.saved_tensors
        x, dt, B, first = tensors[0], tensors[1], tensors[2], tensors[-1]
        given, threads, heads = arguments(ctx, *tensors), torch.get_num_threads(), dt.shape[2]
        gy, gx, gdt = gy.contiguous(), x.new_empty(x.shape), dt.new_empty(dt.shape)
        gb, gc = (B.new_empty(given.parts, *B.shape) for _ in range(2))
        last_shape = (given.batch, x.shape[2] // native.lanes(), given.order, native.lanes())
        gstate = native.pack(glast) if ctx.wants_state else x.new_empty(last_shape)
        sums = x.new_zeros(threads, 3 * heads)
        native.library().ssd_op_backward(
            ctypes.byref(given),
            threads,
            *map(native.pointer, (kept, first, gy, gx, gdt, gb, gc, gstate, sums)),
        )
        gA, gD, gbias = native.split(sums, [(heads,)] * 3)
        gb, gc = (t[0] if len(t) == 1 else t.sum(0) for t in (gb, gc))
        return gx, gdt, gA, gb, gc, gD, gbias, None if first is None else native.unpack(gstate), None, None, None


def arguments(
    ctx: Any,
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    rates: Tensor,
    D: Tensor,
    bias: Tensor,
    first: Tensor | None,
) -> Any:
    (batch, length, channels), heads, groups = x.shape, len(rates), ctx.groups
    # With fewer groups of all sequences than threads, the heads of a group are shared out; no part is empty.
    shared = heads // groups
    parts = min(-(-torch.get_num_threads() // max(batch * groups, 1)), shared)
    parts = -(-shared // -(-shared // parts))
    vectors, order = channels // heads // native.lanes(), B.shape[2] // groups
    sizes = (batch, length, heads, groups, parts, vectors, order, ctx.softplus, first is None, not ctx.wants_state)
    rows = (t.stride(1) for t in (x, dt, B, C))
    return Arguments(*sizes, *rows, *map(native.pointer, (x, dt, B, C, rates, D, bias)))
