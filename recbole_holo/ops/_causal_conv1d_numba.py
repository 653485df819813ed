"""The causal convolution with its bias and SiLU, and their gradient, in one pass over memory each, compiled by numba.

All arrays are float32. ``weight`` is ``[W, D]`` here, so that neighbouring channels are neighbours in memory; ``x`` is
read in place, rows ``x_row`` apart, because it is half of a projection.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numba import prange
from torch import Tensor
from torch.autograd.function import once_differentiable

from recbole_holo.ops._selective_scan_numba import (
    ONE,
    ZERO,
    arrays,
    compiled,
    evenly_spaced,
    follow_torch_threads,
    rows,
    sigmoid,
)


@compiled
def _forward(x, x_row, weight, bias, silu, y):
    batch, length, width = y.shape
    taps = weight.shape[0]
    for b in prange(batch):
        for t in range(length):
            out = y[b, t]
            for j in range(width):
                out[j] = bias[j]
            for k in range(max(0, taps - 1 - t), taps):
                at, tap = (b * length + t - taps + 1 + k) * x_row, weight[k]
                for j in range(width):
                    out[j] += tap[j] * x[at + j]
            if silu:
                for j in range(width):
                    out[j] = out[j] * sigmoid(out[j])


@compiled
def _backward(x, x_row, weight, bias, silu, gy, gx, gweight, gbias):
    batch, length, width = gy.shape
    taps, threads = weight.shape[0], gweight.shape[0]
    for thread in prange(threads):
        gweights, gbiases = np.zeros((taps, width), np.float32), np.zeros(width, np.float32)
        value, g = np.empty(width, np.float32), np.empty(width, np.float32)
        for b in range(thread * batch // threads, (thread + 1) * batch // threads):
            for t in range(length):
                first = max(0, taps - 1 - t)
                for j in range(width):
                    g[j] = gy[b, t, j]
                    gx[b, t, j] = ZERO
                if silu:
                    for j in range(width):
                        value[j] = bias[j]
                    for k in range(first, taps):
                        at, tap = (b * length + t - taps + 1 + k) * x_row, weight[k]
                        for j in range(width):
                            value[j] += tap[j] * x[at + j]
                    for j in range(width):
                        s = sigmoid(value[j])
                        g[j] *= s * (ONE + value[j] * (ONE - s))
                for j in range(width):
                    gbiases[j] += g[j]
                for k in range(first, taps):
                    source = t - taps + 1 + k
                    at, tap, gtap, gsource = (b * length + source) * x_row, weight[k], gweights[k], gx[b, source]
                    for j in range(width):
                        gtap[j] += g[j] * x[at + j]
                        gsource[j] += g[j] * tap[j]
        gweight[thread] = gweights
        gbias[thread] = gbiases


class NumbaCausalConv1d(torch.autograd.Function):
    """The kernels as one differentiable function; without bias that is zeros."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, silu: bool) -> Tensor:
        x, weight, bias = evenly_spaced(x), weight.T.contiguous(), bias.contiguous()
        y = torch.empty(x.shape)
        follow_torch_threads()
        _forward(*rows(x), *arrays(weight, bias), silu, *arrays(y))
        ctx.save_for_backward(x, weight, bias)
        ctx.silu = silu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        threads = min(follow_torch_threads(), max(x.shape[0], 1))
        gx, gweight = torch.empty(x.shape), torch.empty(threads, *weight.shape)
        gbias = torch.empty(threads, *bias.shape)
        _backward(*rows(x), *arrays(weight, bias), ctx.silu, *arrays(gy.contiguous(), gx, gweight, gbias))
        return gx, gweight.sum(0).T, gbias.sum(0), None
