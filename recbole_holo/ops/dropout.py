"""Dropout without a stored mask: PyTorch's draws its numbers one by one on a CPU, which costs as much as a layer."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from recbole_holo.ops import backend, native


def dropout(x: Tensor, p: float, training: bool = True) -> Tensor:
    """Entries of ``x`` are 0 with probability ``p``, else multiplied by ``1 / (1 - p)``; ``x`` itself if not training.

    On a CPU the mask is a hash of one seed and the position: the seed is drawn from PyTorch's generator, so
    ``torch.manual_seed`` and a restored random state repeat it, and the backward pass computes the mask again.
    Elsewhere, and in float64, it is PyTorch's dropout.
    """
    if not training or p == 0:
        return x
    if x.dtype == torch.float64 or not backend.runs_native(x):
        return F.dropout(x, p)
    return Dropout.apply(x.float(), *draws(p)).to(x.dtype)


def draws(p: float) -> tuple[int, float, Tensor]:
    """What the kernels drop with probability ``p`` by: a threshold, the scale of the rest, and a seed, newly drawn."""
    seed = torch.randint(2**62, (1,)) if p else torch.zeros(1, dtype=torch.long)
    return round(p * 2**31), 1 / (1 - p), seed


class Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, *drawn: Any) -> Tensor:
        ctx.drawn = drawn
        return _dropped(x, *drawn)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        return _dropped(gy, *ctx.drawn), None, None, None


def _dropped(x: Tensor, threshold: int, scale: float, seed: Tensor) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    native.library().dropout(
        ctypes.c_int64(x.numel()),
        torch.get_num_threads(),
        native.pointer(seed),
        threshold,
        ctypes.c_float(scale),
        *map(native.pointer, (x, y)),
    )
    return y
