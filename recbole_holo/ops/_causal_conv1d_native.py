"""The causal convolution by the C++ kernels: see native/convolution.cpp."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from recbole_holo.ops import native

WIDTH = 4  # of the kernel; narrower convolutions get zeros in front
Arguments = native.structure("Arguments", "batch length channels silu x_row parts", "x weight bias")


def causal_conv1d_native(x: Tensor, weight: Tensor, bias: Tensor | None, silu: bool) -> Tensor:
    """As :func:`recbole_holo.ops.causal_conv1d.causal_conv1d`, in float32."""
    (channels, width), x = weight.shape, x.float()
    bias = x.new_zeros(channels) if bias is None else bias.float()
    weight = F.pad(weight.float(), (WIDTH - width, 0)).T
    missing = native.whole(channels, native.lanes()) - channels
    if missing:
        x, weight, bias = (F.pad(t, (0, missing)) for t in (x, weight, bias))
    return NativeCausalConv1d.apply(x, weight, bias, silu)[..., :channels]


class NativeCausalConv1d(torch.autograd.Function):
    """The kernels as one differentiable function of float32 tensors, ``weight [4, D]``, D a multiple of the lanes."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, silu: bool) -> Tensor:
        x, weight, bias = native.evenly_spaced(x), weight.contiguous(), bias.contiguous()
        y = x.new_empty(x.shape)
        native.library().convolution_forward(*arguments(x, weight, bias, silu), native.pointer(y))
        ctx.save_for_backward(x, weight, bias)
        ctx.silu = silu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        gy, gx, sums = gy.contiguous(), x.new_empty(x.shape), x.new_zeros(torch.get_num_threads(), 5 * len(bias))
        native.library().convolution_backward(
            *arguments(x, weight, bias, ctx.silu), *map(native.pointer, (gy, gx, sums))
        )
        return gx, *native.split(sums, [tuple(weight.shape), tuple(bias.shape)]), None


def arguments(x: Tensor, weight: Tensor, bias: Tensor, silu: bool) -> tuple[Any, int]:
    threads = torch.get_num_threads()
    parts = -(-threads // max(x.shape[0], 1))  # with fewer sequences than threads, the steps of one are shared out
    given = Arguments(*x.shape, silu, x.stride(1), parts, *map(native.pointer, (x, weight, bias)))
    return ctypes.byref(given), threads
