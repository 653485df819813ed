"""The selective scan of Mamba (Gu and Dao, arXiv 2312.00752)."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from recbole_holo.ops import backend


class ScanArguments(NamedTuple):
    """What :func:`selective_scan` is given, on its way to one of the forms."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None
    delta_softplus: bool


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
    given = ScanArguments(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    implementation = backend.choose("selective_scan", u)
    if implementation == "mamba-ssm":
        return _cuda(given)
    if implementation == "native":
        return _native(given, None)[0]
    if implementation == "numba":
        return _numba(given)
    return _reference(given, None)[0]


def selective_scan_with_state(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`selective_scan` from a state h_{-1} to the state h_{L-1}; gradients pass through both.

    Args:
        initial_state: ``[batch, D, N]``; zeros if None.

    Returns:
        ``[batch, L, D]`` in the type of ``u``, and ``[batch, D, N]`` in float32 (float64 inputs: float64).
    """
    given = ScanArguments(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    implementation = backend.choose("selective_scan", u)
    if implementation == "native":
        return _native(given, initial_state)
    if implementation == "reference":
        return _reference(given, initial_state)
    return _with_state_steps(given, initial_state)


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
    return _reference(ScanArguments(u, delta, A, B, C, D, z, delta_bias, delta_softplus), None)[0]


def _reference(given: ScanArguments, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    dtype = given.u.dtype
    with backend.without_autocast(given.u):
        u, A, B, C = (backend.working(t) for t in (given.u, given.A, given.B, given.C))
        delta = _step_sizes(given)
        h = u.new_zeros(u.shape[0], *A.shape) if initial_state is None else initial_state.to(u.dtype)
        outputs = []
        # unbind, not indexing: the gradient of x[:, t] is a zero tensor as large as x for every t, quadratic in L.
        steps = (t.unbind(1) for t in (delta, delta * u, B, C))
        for delta_t, x_t, b_t, c_t in zip(*steps, strict=True):
            h = torch.exp(delta_t.unsqueeze(-1) * A) * h + x_t.unsqueeze(-1) * b_t.unsqueeze(1)  # [batch, D, N]
            outputs.append(torch.matmul(h, c_t.unsqueeze(-1)).squeeze(-1))
        y = torch.stack(outputs, 1) if outputs else torch.zeros_like(u)
        return _skip_and_gate(y, u, given).to(dtype), h


def _native(given: ScanArguments, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    from recbole_holo.ops._selective_scan_native import selective_scan_native  # compiles, so only when it is needed

    y, last = selective_scan_native(given, initial_state)
    return y.to(given.u.dtype), last


def _numba(given: ScanArguments) -> Tensor:
    from recbole_holo.ops._selective_scan_numba import NumbaSelectiveScan  # imports numba, so only when it is needed

    zeros = torch.zeros(given.u.shape[-1])
    y = NumbaSelectiveScan.apply(
        *(t.float() for t in (given.u, given.delta, given.A, given.B, given.C)),
        zeros if given.D is None else given.D.float(),
        None if given.z is None else given.z.float(),
        zeros if given.delta_bias is None else given.delta_bias.float(),
        given.delta_softplus,
    )
    return y.to(given.u.dtype)


def _cuda(given: ScanArguments) -> Tensor:
    """The kernel takes ``[batch, D, L]``, one type for what changes with time and float32 for the parameters."""
    dtype = given.u.dtype
    timed = {"u": given.u, "delta": given.delta, "B": given.B, "C": given.C, "z": given.z}
    fixed = {"D": given.D, "delta_bias": given.delta_bias}
    y = backend.kernel("selective_scan")(
        A=given.A.float(),
        **{name: None if t is None else backend.dense(t.to(dtype).transpose(1, 2)) for name, t in timed.items()},
        **{name: None if t is None else backend.dense(t.float()) for name, t in fixed.items()},
        delta_softplus=given.delta_softplus,
    )
    return backend.with_gradient(y).transpose(1, 2)


def _with_state_steps(given: ScanArguments, initial_state: Tensor | None) -> tuple[Tensor, Tensor]:
    """For kernels that know no state: N steps more in front write it, N more behind read it.

    A step in front has so small a step size that nothing decays, an input as much larger, and B picks one state. A step
    behind has step size 0, so nothing changes, and C picks one state.
    """
    dtype, (batch, length, _), order = given.u.dtype, given.u.shape, given.A.shape[1]
    u, B, C = (t.float() for t in (given.u, given.B, given.C))
    delta = _step_sizes(given)
    small = 2.0**-30
    pick = torch.eye(order, device=u.device).expand(batch, order, order)  # [batch, step, state]
    nothing = u.new_zeros(batch, order, u.shape[2])
    written = nothing if initial_state is None else initial_state.float().transpose(1, 2) / small
    y = selective_scan(
        torch.cat([written, u, nothing], 1),
        torch.cat([nothing + small, delta, nothing], 1),
        given.A,
        torch.cat([pick, B, pick], 1),
        torch.cat([pick, C, pick], 1),
    )
    y, last = y[:, order : order + length], y[:, order + length :].transpose(1, 2)
    return _skip_and_gate(y, u, given).to(dtype), last


def _step_sizes(given: ScanArguments) -> Tensor:
    delta = backend.working(given.delta)
    if given.delta_bias is not None:
        delta = delta + given.delta_bias
    return F.softplus(delta) if given.delta_softplus else delta


def _skip_and_gate(y: Tensor, u: Tensor, given: ScanArguments) -> Tensor:
    if given.D is not None:
        y = y + given.D * u
    return y if given.z is None else y * F.silu(backend.working(given.z))
