"""A whole Mamba-1 block by the C++ kernels: see native/mamba.cpp."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from recbole_holo.ops import native

if TYPE_CHECKING:
    from recbole_holo.ops.mamba_block import MambaState, MambaWeights

WIDTH = 4  # of the kernel's convolution; narrower ones get zeros in front
Sizes = native.structure("Sizes", "batch length model inner order rank half")
Weights = native.structure(
    "Weights", "", "in_proj in_bias conv conv_bias x_proj dt_proj dt_bias rates skip out_proj out_bias"
)


def mamba_native(
    hidden: Tensor, weights: MambaWeights, state: MambaState | None = None, half: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`recbole_holo.ops.mamba_block.mamba_block_with_state`: the output and the last states, in float32.

    ``half`` rounds the factors of the projections to bfloat16. No gradient passes through the states.
    """
    w, lanes = weights, native.lanes()
    (model, inner), (order, rank, width) = (
        w.out_proj_weight.shape,
        (w.A.shape[1], w.dt_proj_weight.shape[1], w.conv1d_weight.shape[1]),
    )
    d, e, n = native.whole(model, lanes), native.whole(inner, lanes), native.whole_states(order)

    def grown(tensor: Tensor | None, *sizes: int) -> Tensor:
        """With zeros behind, up to ``sizes``: what they add is cut off again or read by nothing."""
        if tensor is None:
            return hidden.new_zeros(sizes, dtype=torch.float32)
        pairs = zip(reversed(tensor.shape), reversed(sizes), strict=True)
        missing = [by for size, want in pairs for by in (0, want - size)]
        return F.pad(tensor.float(), missing) if any(missing) else tensor.float()

    def parts(tensor: Tensor | None, sizes: list[int], wanted: list[int], *columns: int) -> Tensor:
        """Each part of the first dimension grown for itself."""
        if tensor is None or sizes == wanted:
            return grown(tensor, sum(wanted), *columns)
        pairs = zip(tensor.split(sizes), wanted, strict=True)
        return torch.cat([grown(part, rows, *columns) for part, rows in pairs])

    batch, length = hidden.shape[:2]
    if state is None:
        conv, ssm = (
            hidden.new_zeros(batch, WIDTH - 1, e, dtype=torch.float32),
            hidden.new_zeros(batch, e, n, dtype=torch.float32),
        )
    else:
        conv, ssm = F.pad(state.conv.float(), (0, e - inner, WIDTH - width, 0)), grown(state.ssm, batch, e, n)
    out, last_conv, last_ssm = NativeMamba.apply(
        half,
        grown(hidden, batch, length, d),
        parts(w.in_proj_weight, [inner, inner], [e, e], d),
        parts(w.in_proj_bias, [inner, inner], [e, e]),
        F.pad(grown(w.conv1d_weight, e, width), (WIDTH - width, 0)).T,
        grown(w.conv1d_bias, e),
        parts(w.x_proj_weight, [rank, order, order], [rank, n, n], e),
        grown(w.dt_proj_weight, e, rank),
        grown(w.dt_proj_bias, e),
        native.pack(grown(w.A, e, n)),
        grown(w.D, e),
        grown(w.out_proj_weight, d, e),
        grown(w.out_proj_bias, d),
        conv,
        ssm,
    )
    return out[..., :model], last_conv[:, WIDTH - width :, :inner], last_ssm[:, :inner, :order]


class NativeMamba(torch.autograd.Function):
    """The kernels as one differentiable function of float32 tensors whose widths fill vectors; A is packed."""

    @staticmethod
    def forward(ctx: Any, half: bool, hidden: Tensor, *rest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        *weights, conv_state, ssm_state = rest
        ctx.half = half
        hidden = hidden.contiguous()
        weights = [weight.contiguous() for weight in weights]
        weights[7] = weights[7] * native.LOG2_E
        blocks, order, lanes = weights[7].shape
        (batch, length, _), inner = hidden.shape, blocks * lanes
        kept = hidden.new_empty(batch, native.stretches(length), inner * order) if any(ctx.needs_input_grad) else None
        # The kernel walks from these states to the last ones in place; the backward pass needs the first of conv_state.
        conv, ssm = conv_state.clone(memory_format=torch.contiguous_format), native.pack(ssm_state)
        out = torch.empty_like(hidden)
        native.library().mamba_forward(
            *arguments(hidden, weights, ctx.half), *map(native.pointer, (hidden, kept, conv, ssm, out))
        )
        ctx.save_for_backward(hidden, kept, conv_state.contiguous(), *weights)
        last = native.unpack(ssm)
        ctx.mark_non_differentiable(conv, last)
        return out, conv, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gout: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden, kept, conv_state, *weights = ctx.saved_tensors
        gout, ghidden = gout.contiguous(), torch.empty_like(hidden)
        shapes = [tuple(weight.shape) for weight in weights]
        shapes[5] = shapes[5][::-1]
        sums = hidden.new_zeros(torch.get_num_threads(), sum(torch.Size(shape).numel() for shape in shapes))
        native.library().mamba_backward(
            *arguments(hidden, weights, ctx.half), *map(native.pointer, (hidden, kept, conv_state, gout, ghidden, sums))
        )
        gradients = list(native.split(sums, shapes))
        gradients[5] = gradients[5].T
        return None, ghidden, *gradients, None, None


def arguments(hidden: Tensor, weights: list[Tensor], half: bool) -> tuple[Any, ...]:
    (blocks, order, lanes), rank = weights[7].shape, weights[5].shape[1]
    sizes = Sizes(*hidden.shape, blocks * lanes, order, rank, half)
    return (
        ctypes.byref(sizes),
        ctypes.byref(Weights(*map(native.pointer, weights))),
        torch.get_num_threads(),
    )
