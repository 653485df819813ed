r"""The selective scan and its gradient on a CPU, compiled by numba on first use (some seconds).

All arrays are float32 and C-contiguous, with the names and shapes of :mod:`recbole_holo.ops.selective_scan`, but
``A [N, D]``, and ``z`` flat with rows ``z_row`` apart, because it is half of a projection and is read in place. Both
kernels walk blocks of :data:`LANES` channels, so that the innermost loop runs over neighbouring channels and becomes
vector instructions, and keep the state ``[N, LANES]`` of a block in the cache while time passes. The forward kernel
stores the state at every ``chunk``-th step; the backward kernel computes the states of one chunk again from there and
then walks it backwards. So memory grows with ``L / chunk`` states instead of L.

Importing this module imports numba; nothing else does.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from llvmlite import ir
from numba import njit, prange
from numba.core import types
from numba.extending import intrinsic
from torch import Tensor
from torch.autograd.function import once_differentiable

from recbole_holo.ops.native import evenly_spaced

LANES = 128  # fewer leave the vector units idle, more push the state of a chunk out of the L2 cache
CHUNK = 16

# Sums may be reordered in the kernels, which lets them run in vectors. Not so inside exp: reordering would cancel the
# addition that rounds there. The flags belong to each instruction, so they hold where exp is inlined.
_EXACT = {"contract", "nsz", "arcp", "afn"}
_REORDERED = {*_EXACT, "reassoc"}
# Any: numba's own types do not follow a function through its decorators.
inlined: Any = njit(fastmath=_EXACT, forceinline=True)
# Not kept in numba's cache: what lies there is unpickled and run without a look at whether it is whole, at every start.
compiled: Any = njit(parallel=True, fastmath=_REORDERED, error_model="numpy")
_intrinsic: Any = intrinsic
_settings: Any = numba.config

ZERO, HALF, ONE = np.float32(0), np.float32(0.5), np.float32(1)


@_intrinsic
def _float_of_bits(typing_context: Any, bits: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@_intrinsic
def _bits_of_float(typing_context: Any, value: Any) -> Any:
    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), generate


# exp(x) = 2ⁿ · exp(r), n = round(x / ln 2): polynomial and split ln 2 of the Cephes library (expf, error 1e-7).
_LOG2_E = np.float32(1.44269504088896341)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(2.12194440e-4)
_ROUND = np.float32(12582912.0)  # 1.5 · 2²³: adding it rounds to an integer and leaves that in the low bits
_ROUND_BITS = np.int32(0x4B400000)
_LOWEST, _HIGHEST = np.float32(-87.3365), np.float32(88.3762)
_EXP = tuple(
    np.float32(c) for c in (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5)
)
_E0, _E1, _E2, _E3, _E4, _E5 = _EXP


@inlined
def exp(x: float) -> float:
    """exp in float32; written out because numba would call the scalar library function, which no loop can vectorise."""
    x = min(max(x, _LOWEST), _HIGHEST)
    shifted = x * _LOG2_E + _ROUND
    n = shifted - _ROUND
    r = x - n * _LN2_HIGH
    r = r + n * _LN2_LOW
    p = ((((r * _E0 + _E1) * r + _E2) * r + _E3) * r + _E4) * r + _E5
    p = p * (r * r) + r + ONE
    power = (_bits_of_float(shifted) - _ROUND_BITS + np.int32(127)) << np.int32(23)
    return p * _float_of_bits(power)


# log(1+e) for e in [0, 1], polynomial of the Cephes library (logf).
_SQRT2 = np.float32(1.41421356)
_LOG = (7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1, -1.6668057665e-1)
_L0, _L1, _L2, _L3, _L4, _L5 = (np.float32(c) for c in _LOG)
_L6, _L7, _L8 = (np.float32(c) for c in (2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1))


@inlined
def log1p(e: float) -> float:
    y = ONE + e
    lost = (e - (y - ONE)) / y  # what the rounding of 1+e lost, to first order
    halve = y > _SQRT2
    k = ONE if halve else ZERO
    g = (y * HALF if halve else y) - ONE
    p = ((((((((g * _L0 + _L1) * g + _L2) * g + _L3) * g + _L4) * g + _L5) * g + _L6) * g + _L7) * g) + _L8
    g2 = g * g
    return g + (g * g2 * p - k * _LN2_LOW - HALF * g2) + k * _LN2_HIGH + lost


@inlined
def softplus(x: float) -> float:
    return HALF * (x + abs(x)) + log1p(exp(-abs(x)))


@inlined
def sigmoid(x: float) -> float:
    return ONE / (ONE + exp(-x))


# Rows are cut out as slices before the loops over channels: to numba ``first + j`` may be negative and count from the
# end, so it would load channel by channel; the bare ``j`` of a range is known not to be.


@compiled
def _forward(u, delta, A, B, C, D, z, z_row, bias, use_softplus, gated, keep, chunk, y, states):
    batch, length, width = u.shape
    order = A.shape[0]
    blocks = (width + LANES - 1) // LANES
    for task in prange(batch * blocks):
        b, first = task // blocks, task % blocks * LANES
        w = min(LANES, width - first)
        last = first + w
        rate, h = np.empty((order, LANES), np.float32), np.zeros((order, LANES), np.float32)
        step, x, out = np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.empty(LANES, np.float32)
        skip, offset = D[first:last], bias[first:last]
        for n in range(order):
            rate[n, :w] = A[n, first:last]
        for t in range(length):
            if keep and t % chunk == 0:
                for n in range(order):
                    states[b, t // chunk, n, first:last] = h[n, :w]
            u_t, delta_t, y_t = u[b, t, first:last], delta[b, t, first:last], y[b, t, first:last]
            for j in range(w):
                step[j] = delta_t[j] + offset[j]
            if use_softplus:
                for j in range(w):
                    step[j] = softplus(step[j])
            for j in range(w):
                x[j] = step[j] * u_t[j]
                out[j] = skip[j] * u_t[j]
            for n in range(order):
                b_n, c_n = B[b, t, n], C[b, t, n]
                for j in range(w):
                    state = exp(step[j] * rate[n, j]) * h[n, j] + x[j] * b_n
                    h[n, j] = state
                    out[j] += state * c_n
            if gated:
                at = (b * length + t) * z_row + first
                z_t = z[at : at + w]
                for j in range(w):
                    y_t[j] = out[j] * z_t[j] * sigmoid(z_t[j])
            else:
                for j in range(w):
                    y_t[j] = out[j]


@compiled
def _backward(
    u, delta, A, B, C, D, z, z_row, bias, use_softplus, gated, chunk, states, gy, gu, gdelta, gA, gB, gC, gD, gz, gbias
):
    batch, length, width = u.shape
    order, chunks, threads = A.shape[0], states.shape[1], gA.shape[0]
    blocks = (width + LANES - 1) // LANES
    # A thread takes whole sequences: gB and gC then sum over channels within it, and gA, gD, gbias have a slice each.
    for thread in prange(threads):
        h = np.empty((chunk + 1, order, LANES), np.float32)
        decay = np.empty((chunk, order, LANES), np.float32)
        steps, slopes = np.empty((chunk, LANES), np.float32), np.empty((chunk, LANES), np.float32)
        outs, x = np.empty((chunk, LANES), np.float32), np.empty(LANES, np.float32)
        rate, grate = np.empty((order, LANES), np.float32), np.empty((order, LANES), np.float32)
        gh, gout = np.empty((order, LANES), np.float32), np.empty(LANES, np.float32)
        gx, gstep = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
        gskip, goffset = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
        for task in range(thread * batch // threads * blocks, (thread + 1) * batch // threads * blocks):
            b, first = task // blocks, task % blocks * LANES
            w = min(LANES, width - first)
            last = first + w
            skip, offset = D[first:last], bias[first:last]
            grate[:], gh[:], gskip[:], goffset[:] = ZERO, ZERO, ZERO, ZERO
            for n in range(order):
                rate[n, :w] = A[n, first:last]
            for c in range(chunks - 1, -1, -1):
                start = c * chunk
                count = min(chunk, length - start)
                for n in range(order):
                    h[0, n, :w] = states[b, c, n, first:last]
                for i in range(count):
                    t = start + i
                    u_t, delta_t = u[b, t, first:last], delta[b, t, first:last]
                    for j in range(w):
                        steps[i, j] = delta_t[j] + offset[j]
                        slopes[i, j] = ONE
                    if use_softplus:
                        for j in range(w):
                            slopes[i, j] = sigmoid(steps[i, j])
                            steps[i, j] = softplus(steps[i, j])
                    for j in range(w):
                        x[j] = steps[i, j] * u_t[j]
                        outs[i, j] = skip[j] * u_t[j]
                    for n in range(order):
                        b_n, c_n = B[b, t, n], C[b, t, n]
                        for j in range(w):
                            a = exp(steps[i, j] * rate[n, j])
                            decay[i, n, j] = a
                            state = a * h[i, n, j] + x[j] * b_n
                            h[i + 1, n, j] = state
                            outs[i, j] += state * c_n
                for i in range(count - 1, -1, -1):
                    t = start + i
                    u_t, gy_t = u[b, t, first:last], gy[b, t, first:last]
                    gu_t, gdelta_t = gu[b, t, first:last], gdelta[b, t, first:last]
                    if gated:
                        at = (b * length + t) * z_row + first
                        z_t, gz_t = z[at : at + w], gz[b, t, first:last]
                        for j in range(w):
                            s = sigmoid(z_t[j])
                            gz_t[j] = gy_t[j] * outs[i, j] * s * (ONE + z_t[j] * (ONE - s))
                            gout[j] = gy_t[j] * z_t[j] * s
                    else:
                        for j in range(w):
                            gout[j] = gy_t[j]
                    for j in range(w):
                        x[j] = steps[i, j] * u_t[j]
                        gx[j] = ZERO
                        gstep[j] = ZERO
                    for n in range(order):
                        b_n, c_n = B[b, t, n], C[b, t, n]
                        sum_b, sum_c = ZERO, ZERO
                        for j in range(w):
                            g = gh[n, j] + gout[j] * c_n
                            sum_c += gout[j] * h[i + 1, n, j]
                            sum_b += g * x[j]
                            gx[j] += g * b_n
                            carried = g * decay[i, n, j]
                            gh[n, j] = carried
                            gexponent = carried * h[i, n, j]
                            gstep[j] += gexponent * rate[n, j]
                            grate[n, j] += gexponent * steps[i, j]
                        gB[b, t, n] += sum_b
                        gC[b, t, n] += sum_c
                    for j in range(w):
                        gu_t[j] = gx[j] * steps[i, j] + skip[j] * gout[j]
                        gdelta_t[j] = (gstep[j] + gx[j] * u_t[j]) * slopes[i, j]
                        goffset[j] += gdelta_t[j]
                        gskip[j] += gout[j] * u_t[j]
            gD[thread, first:last] += gskip[:w]
            gbias[thread, first:last] += goffset[:w]
            for n in range(order):
                gA[thread, n, first:last] += grate[n, :w]


class NumbaSelectiveScan(torch.autograd.Function):
    """The kernels as one differentiable function. Without skip or bias these are zeros; without gate ``z`` is None."""

    @staticmethod
    def forward(
        ctx: Any,
        u: Tensor,
        delta: Tensor,
        A: Tensor,
        B: Tensor,
        C: Tensor,
        D: Tensor,
        z: Tensor | None,
        bias: Tensor,
        use_softplus: bool,
    ) -> Tensor:
        u, delta, A, B, C, D, bias = (t.contiguous() for t in (u, delta, A.T, B, C, D, bias))
        gated = z is not None
        z = torch.empty(0, 0, 0) if z is None else evenly_spaced(z)
        batch, length, width = u.shape
        keep = any(ctx.needs_input_grad)
        chunk = min(CHUNK, max(length, 1))
        shape = (batch, -(-length // chunk), A.shape[0], width) if keep else (0, 0, 0, 0)
        states, y = torch.empty(shape), torch.empty_like(u)
        follow_torch_threads()
        inputs = arrays(u, delta, A, B, C, D)
        _forward(*inputs, *rows(z), *arrays(bias), use_softplus, gated, keep, chunk, *arrays(y, states))
        ctx.save_for_backward(u, delta, A, B, C, D, z, bias, states)
        ctx.options = use_softplus, gated, chunk
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor) -> tuple[Tensor | None, ...]:
        u, delta, A, B, C, D, z, bias, states = ctx.saved_tensors
        _, gated, _ = ctx.options
        (order, width), threads = A.shape, min(follow_torch_threads(), max(u.shape[0], 1))
        gu, gdelta, gB, gC = torch.empty_like(u), torch.empty_like(u), torch.zeros_like(B), torch.zeros_like(C)
        gz = torch.empty_like(u) if gated else torch.empty(0, 0, 0)
        gA, gD, gbias = (torch.zeros(shape) for shape in ((threads, order, width), (threads, width), (threads, width)))
        inputs = arrays(u, delta, A, B, C, D)
        gradients = arrays(gu, gdelta, gA, gB, gC, gD, gz, gbias)
        _backward(*inputs, *rows(z), *arrays(bias), *ctx.options, *arrays(states, gy.contiguous()), *gradients)
        return gu, gdelta, gA.sum(0).T, gB, gC, gD.sum(0), gz if gated else None, gbias.sum(0), None


def arrays(*tensors: Tensor) -> list[np.ndarray]:
    """The same memory for numba."""
    return [t.detach().numpy() for t in tensors]


def rows(x: Tensor) -> tuple[np.ndarray, int]:
    """The memory of an :func:`evenly_spaced` tensor from its first element on, and the distance of its rows.

    One flat array: given strides, numba would not know that neighbouring channels are neighbours in memory.
    """
    row, (batch, length, width) = x.stride(1), x.shape
    size = (batch * length - 1) * row + width if x.numel() else 0
    return x.detach().as_strided((size,), (1,)).numpy(), row


def follow_torch_threads() -> int:
    """Lets numba use as many threads as torch does; returns their number."""
    wanted = torch.get_num_threads()
    threads = min(wanted, _settings.NUMBA_NUM_THREADS)
    numba.set_num_threads(threads)
    if torch.get_num_threads() != wanted:  # numba starts its pool here, with all threads, in the OpenMP that torch uses
        torch.set_num_threads(wanted)
    return threads
