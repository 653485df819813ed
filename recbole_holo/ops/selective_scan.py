"""The selective scan of Mamba (Gu and Dao, arXiv 2312.00752)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from recbole_holo.ops import backend


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> Tensor:
    r"""A diagonal linear recurrence whose decay, input and output weights change with every step.

    ``Δ_t = softplus(delta_t + delta_bias)``, ``h_t = exp(Δ_t A) h_{t-1} + Δ_t B_t u_t``,
    ``y_t = (C_t·h_t + D u_t) · SiLU(z_t)``, with h_{-1} = 0. It is causal: what is appended on the right of a sequence
    never changes an earlier output.

    Args:
        u, delta: ``[batch, L, D]``.
        A: ``[D, N]``, negative.
        B, C: ``[batch, L, N]``.
        D: ``[D]``, the skip; left out if None.
        z: ``[batch, L, D]``, the gate; left out if None.
        delta_bias: ``[D]``; left out if None.
        delta_softplus: apply softplus to ``delta + delta_bias``.

    Returns:
        ``[batch, L, D]`` in the type of ``u``. The recurrence itself runs in float32 (float64 inputs: float64).
    """
    implementation = backend.choose("selective_scan", u)
    if implementation == "mamba-ssm":
        return _selective_scan_cuda(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    if implementation == "numba":
        return _selective_scan_numba(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return selective_scan_reference(u, delta, A, B, C, D, z, delta_bias, delta_softplus)


def selective_scan_reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> Tensor:
    """:func:`selective_scan` step by step, by plain operations, for any device and floating type."""
    dtype = u.dtype
    with backend.without_autocast(u):
        u, delta, A, B, C = (backend.working(t) for t in (u, delta, A, B, C))
        if delta_bias is not None:
            delta = delta + delta_bias
        if delta_softplus:
            delta = F.softplus(delta)
        h, outputs = u.new_zeros(u.shape[0], *A.shape), []
        # unbind, not indexing: the gradient of x[:, t] is a zero tensor as large as x for every t, quadratic in L.
        steps = (t.unbind(1) for t in (delta, delta * u, B, C))
        for delta_t, x_t, b_t, c_t in zip(*steps, strict=True):
            h = torch.exp(delta_t.unsqueeze(-1) * A) * h + x_t.unsqueeze(-1) * b_t.unsqueeze(1)  # [batch, D, N]
            outputs.append(torch.matmul(h, c_t.unsqueeze(-1)).squeeze(-1))
        y = torch.stack(outputs, 1)
        if D is not None:
            y = y + D * u
        if z is not None:
            y = y * F.silu(backend.working(z))
    return y.to(dtype)


def _selective_scan_numba(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> Tensor:
    from recbole_holo.ops._selective_scan_numba import NumbaSelectiveScan  # imports numba, so only when it is needed

    zeros = torch.zeros(u.shape[-1])
    y = NumbaSelectiveScan.apply(
        *(t.float() for t in (u, delta, A, B, C)),
        zeros if D is None else D.float(),
        None if z is None else z.float(),
        zeros if delta_bias is None else delta_bias.float(),
        delta_softplus,
    )
    return y.to(u.dtype)


def _selective_scan_cuda(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> Tensor:
    """The kernel takes ``[batch, D, L]``, one type for what changes with time and float32 for the parameters."""
    delta, B, C = (t.to(u.dtype).transpose(1, 2) for t in (delta, B, C))
    y = backend.kernel("selective_scan")(
        u=u.transpose(1, 2),
        delta=delta,
        A=A.float(),
        B=B,
        C=C,
        D=None if D is None else D.float(),
        z=None if z is None else z.to(u.dtype).transpose(1, 2),
        delta_bias=None if delta_bias is None else delta_bias.float(),
        delta_softplus=delta_softplus,
    )
    return y.transpose(1, 2)
