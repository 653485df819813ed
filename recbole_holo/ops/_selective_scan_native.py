"""The selective scan by the C++ kernels: see native/selective_scan.cpp."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from recbole_holo.ops import native

if TYPE_CHECKING:
    from recbole_holo.ops.selective_scan import ScanArguments

Arguments = native.structure(
    "Arguments", "batch length inner order groups softplus z_row", "u delta b c rates skip bias z"
)


def selective_scan_native(given: ScanArguments, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """As :func:`recbole_holo.ops.selective_scan.selective_scan`; returns the outputs and the last state, in float32."""
    (inner, order), u, z = given.A.shape, given.u, None if given.z is None else given.z.float()
    zeros = u.new_zeros(inner, dtype=torch.float32)
    initial = u.new_zeros(u.shape[0], inner, order, dtype=torch.float32) if initial_state is None else initial_state
    tensors = [t.float() for t in (u, given.delta, given.A, given.B, given.C)]
    tensors += [zeros if t is None else t.float() for t in (given.D, given.delta_bias)] + [initial.float()]
    # Channels and states that are added to fill vectors have no input, and no output that anyone reads.
    channels, states = native.whole(inner, native.lanes()) - inner, native.whole_states(order) - order
    if channels or states:
        wider, more = (0, channels), (0, states)
        grow = (wider, wider, more + wider, more, more, wider, wider, more + wider)
        tensors = [F.pad(tensor, by) for tensor, by in zip(tensors, grow, strict=True)]
        z = None if z is None else F.pad(z, (0, channels))
    y, last = NativeSelectiveScan.apply(*tensors, z, given.delta_softplus)
    return y[..., :inner], last[:, :inner, :order]


class NativeSelectiveScan(torch.autograd.Function):
    """The kernels as one differentiable function of float32 tensors whose widths fill vectors."""

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        bias: Tensor,
        initial: Tensor,
        z: Tensor | None,
        softplus: bool,
    ) -> tuple[Tensor, Tensor]:
        u, delta, B, C, D, bias = (t.contiguous() for t in (u, delta, B, C, D, bias))
        z = None if z is None else native.evenly_spaced(z)
        rates, state = native.pack(A * native.LOG2_E), native.pack(initial)
        (batch, length, inner), order, threads = u.shape, A.shape[1], torch.get_num_threads()
        kept = u.new_empty(batch, native.stretches(length), inner * order) if any(ctx.needs_input_grad) else None
        y = torch.empty_like(u)
        ctx.save_for_backward(u, delta, B, C, rates, D, bias, z, kept)
        ctx.softplus = softplus
        native.library().selective_scan_forward(
            ctypes.byref(arguments(u, delta, B, C, rates, D, bias, z, softplus)),
            threads,
            *map(native.pointer, (kept, state, y)),
        )
        return y, native.unpack(state)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor, glast: Tensor) -> tuple[Tensor | None, ...]:
        u, delta, B, C, rates, D, bias, z, kept = ctx.saved_tensors
        (batch, length, inner), order, threads = u.shape, rates.shape[1], torch.get_num_threads()
        given = arguments(u, delta, B, C, rates, D, bias, z, ctx.softplus)
        gu, gdelta, gz = torch.empty_like(u), torch.empty_like(u), None if z is None else torch.empty_like(u)
        gb, gc = (u.new_zeros(given.groups, batch, length, order) for _ in range(2))
        gstate = native.pack(glast)
        sums = u.new_zeros(threads, inner * order + 2 * inner)
        gy = gy.contiguous()
        native.library().selective_scan_backward(
            ctypes.byref(given), threads, *map(native.pointer, (kept, gy, gu, gdelta, gz, gb, gc, gstate, sums))
        )
        gA, gD, gbias = native.split(sums, [tuple(rates.shape), (inner,), (inner,)])
        return gu, gdelta, native.unpack(gA), gb.sum(0), gc.sum(0), gD, gbias, native.unpack(gstate), gz, None


def arguments(
    u: Tensor,
    delta: Tensor,
    B: Tensor,
    C: Tensor,
    rates: Tensor,
    D: Tensor,
    bias: Tensor,
    z: Tensor | None,
    softplus: bool,
) -> Any:
    (batch, length, inner), order = u.shape, rates.shape[1]
    # With fewer sequences than threads, the channels of a sequence are shared out.
    groups = min(-(-torch.get_num_threads() // max(batch, 1)), rates.shape[0])
    pointers = map(native.pointer, (u, delta, B, C, rates, D, bias, z))
    return Arguments(batch, length, inner, order, groups, softplus, 0 if z is None else z.stride(1), *pointers)
