"""Dropout without a stored mask: PyTorch's draws its numbers one by one on a CPU, which costs as much as a layer."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from recbole_holo.ops import native


def dropout(x: Tensor, p: float, training: bool = True) -> Tensor:
    """Entries of ``x`` are 0 with probability ``p``, else multiplied by ``1 / (1 - p)``; ``x`` itself if not training.

    On a CPU the mask is a hash of one seed and the position: the seed is drawn from PyTorch's generator, so
    ``torch.manual_seed`` and a restored random state repeat it, and the backward pass computes the mask again.
    Elsewhere, and for other types than float32, it is PyTorch's dropout.
    """
    if not training or p == 0:
        return x
    if x.device.type != "cpu" or x.dtype != torch.float32 or native.problem():
        return F.dropout(x, p)
    return Dropout.apply(x, p, torch.randint(2**62, (1,)))


class Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, seed: Tensor) -> Tensor:
        ctx.arguments = p, seed
        return _dropped(x, p, seed)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        return _dropped(gy, *ctx.arguments), None, None


def _dropped(x: Tensor, p: float, seed: Tensor) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    threshold, scale = round(p * 2**31), ctypes.c_float(1 / (1 - p))
    native.library().dropout(
        ctypes.c_int64(x.numel()),
        torch.get_num_threads(),
        native.pointer(seed),
        threshold,
        scale,
        *map(native.pointer, (x, y)),
    )
    return y
