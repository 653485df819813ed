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
        out = np.empty(width, np.float32)
        for t in range(length):
            out[:] = bias
            for k in range(max(0, taps - 1 - t), taps):
                at = (b * length + t - taps + 1 + k) * x_row
                source, tap = x[at : at + width], weight[k]
                for j in range(width):
                    out[j] += tap[j] * source[j]
            y_t = y[b, t]
            if silu:
                for j in range(width):
                    y_t[j] = out[j] * sigmoid(out[j])
            else:
                for j in range(width):
                    y_t[j] = out[j]


@compiled
def _backward(x, x_row, weight, bias, silu, gy, gx, gweight, gbias):
    batch, length, width = gy.shape
    taps, threads = weight.shape[0], gweight.shape[0]
    for thread in prange(threads):
        gweights, gbiases = np.zeros((taps, width), np.float32), np.zeros(width, np.float32)
        out, g = np.empty(width, np.float32), np.empty(width, np.float32)
        for b in range(thread * batch // threads, (thread + 1) * batch // threads):
            for t in range(length):
                first = max(0, taps - 1 - t)
                g[:] = gy[b, t]
                gx[b, t] = ZERO
                if silu:
                    out[:] = bias
                    for k in range(first, taps):
                        at = (b * length + t - taps + 1 + k) * x_row
                        source, tap = x[at : at + width], weight[k]
                        for j in range(width):
                            out[j] += tap[j] * source[j]
                    for j in range(width):
                        s = sigmoid(out[j])
                        g[j] *= s * (ONE + out[j] * (ONE - s))
                for j in range(width):
                    gbiases[j] += g[j]
                for k in range(first, taps):
                    earlier = t - taps + 1 + k
                    at = (b * length + earlier) * x_row
                    source, tap, gtap, gsource = x[at : at + width], weight[k], gweights[k], gx[b, earlier]
                    for j in range(width):
                        gtap[j] += g[j] * source[j]
                    for j in range(width):
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
