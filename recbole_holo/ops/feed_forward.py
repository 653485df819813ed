"""Position-wise feed-forward layers, fused on a CPU so that nothing as wide as their inside is ever held."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from recbole_holo.ops import backend, native
from recbole_holo.ops.dropout import draws, dropout

FEW = 512  # rows up to which calling the kernel costs more than it saves, where nothing is kept for a gradient


class FeedForwardWeights(NamedTuple):
    """Two linear maps; the first is twice as high in a gated layer, the gate first."""

    up: Tensor  # [inner, d] or [2·inner, d]
    up_bias: Tensor | None
    down: Tensor  # [d, inner]
    down_bias: Tensor | None


def feed_forward(x: Tensor, weights: FeedForwardWeights, gated: bool = False, p: float = 0.0) -> Tensor:
    """``down(Dropout(GELU(up(x))))``; gated (SwiGLU): ``down(Dropout(SiLU(a) ⊙ b))`` with ``a, b = up(x)``.

    On a CPU the C++ kernel keeps ``x`` alone for the backward pass and computes the rest again. Under autocast it
    rounds the factors of the products, where the processor has AVX512-BF16.

    Args:
        x: ``[..., d]``.
        p: probability of dropout inside; 0 when not training.

    Returns:
        ``[..., d]``, of the type in which the products run.
    """
    dtype = backend.product_type(x)
    if _is_native(x, weights, dtype):
        threshold, scale, seed = draws(p)
        up, up_bias, down, down_bias = weights
        biases = (torch.zeros(len(w)) if b is None else b for w, b in ((up, up_bias), (down, down_bias)))
        given = [t.float() for t in (x.flatten(0, -2), up, next(biases), down, next(biases))]
        settings = int(gated), int(dtype == torch.bfloat16), threshold
        return FeedForward.apply(settings, scale, seed, *given).view(x.shape).to(dtype)
    hidden = F.linear(x, weights.up, weights.up_bias)
    if gated:
        gate, value = hidden.chunk(2, -1)
        hidden = F.silu(gate) * value
    else:
        hidden = F.gelu(hidden)
    return F.linear(dropout(hidden, p), weights.down, weights.down_bias)


def is_small(x: Tensor) -> bool:
    """Whether a layer of plain operations is faster: nothing is kept for a gradient, and there are few rows."""
    if torch.is_grad_enabled():
        return False
    return not backend.runs_native(x) or x.numel() < FEW * x.shape[-1]


def _is_native(x: Tensor, weights: FeedForwardWeights, dtype: torch.dtype) -> bool:
    if dtype not in (torch.float32, torch.bfloat16) or not backend.runs_native(x):
        return False
    return not is_small(x) and x.dim() > 1 and not any(size % native.lanes() for size in weights.down.shape)


Sizes = native.structure("Sizes", "rows d inner gated half threshold")
Weights = native.structure("Weights", "", "up up_bias down down_bias")


class FeedForward(torch.autograd.Function):
    """The kernel, in float32."""

    @staticmethod
    def forward(
        ctx: Any, settings: tuple[int, int, int], scale: float, seed: Tensor, x: Tensor, *weights: Tensor
    ) -> Tensor:
        given = [tensor.contiguous() for tensor in (seed, x, *weights)]
        ctx.settings, ctx.scale = settings, scale
        ctx.save_for_backward(*given)
        out = torch.empty_like(given[1])
        native.library().feed_forward(*_arguments(ctx, *given), native.pointer(out))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gout: Tensor) -> tuple[Tensor | None, ...]:
        seed, x, *weights = ctx.saved_tensors
        gout, gx = gout.contiguous(), torch.empty_like(x)
        shapes = [tuple(weight.shape) for weight in weights]
        sums = x.new_zeros(torch.get_num_threads(), sum(weight.numel() for weight in weights))
        native.library().feed_forward_backward(
            *_arguments(ctx, seed, x, *weights), *map(native.pointer, (gout, gx, sums))
        )
        return None, None, None, gx, *native.split(sums, shapes)


def _arguments(ctx: Any, seed: Tensor, x: Tensor, *weights: Tensor) -> tuple[Any, ...]:
    (rows, d), inner = x.shape, weights[2].shape[1]
    return (
        ctypes.byref(Sizes(rows, d, inner, *ctx.settings)),
        ctypes.byref(Weights(*map(native.pointer, weights))),
        torch.get_num_threads(),
        native.pointer(seed),
        ctypes.c_float(ctx.scale),
        native.pointer(x),
    )
