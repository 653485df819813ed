"""A whole Mamba block after its input projection, fused on CUDA and composed of the other operations elsewhere."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from recbole_holo.ops import backend
from recbole_holo.ops.causal_conv1d import causal_conv1d
from recbole_holo.ops.selective_scan import selective_scan
from recbole_holo.ops.state_space_dual import state_space_dual


def mamba_inner(
    xz: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    x_proj_weight: Tensor,
    dt_proj_weight: Tensor,
    dt_proj_bias: Tensor,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    A: Tensor,
    D: Tensor,
) -> Tensor:
    r"""``out_proj(scan(SiLU(conv(x))) · SiLU(z))`` of Mamba-1.

    Args:
        xz: ``[batch, L, 2·d_inner]``, x first.
        conv1d_weight: ``[d_inner, W]``; conv1d_bias: ``[d_inner]`` or None.
        x_proj_weight: ``[dt_rank + 2N, d_inner]``, for the step size, B and C.
        dt_proj_weight: ``[d_inner, dt_rank]``; dt_proj_bias: ``[d_inner]``.
        out_proj_weight: ``[d_model, d_inner]``; out_proj_bias: ``[d_model]`` or None.
        A: ``[d_inner, N]``, negative.
        D: ``[d_inner]``.

    Returns:
        ``[batch, L, d_model]``.
    """
    if backend.choose("mamba_inner", xz) == "mamba-ssm":
        return backend.kernel("mamba_inner")(
            xz=xz.transpose(1, 2),
            conv1d_weight=conv1d_weight.unsqueeze(1),
            conv1d_bias=conv1d_bias,
            x_proj_weight=x_proj_weight,
            delta_proj_weight=dt_proj_weight,
            out_proj_weight=out_proj_weight,
            out_proj_bias=out_proj_bias,
            A=A.float(),
            D=D.float(),
            delta_bias=dt_proj_bias.float(),
            delta_softplus=True,
        )
    x, z = xz.chunk(2, -1)
    x = causal_conv1d(x, conv1d_weight, conv1d_bias, "silu")
    dt_rank, d_state = dt_proj_weight.shape[1], A.shape[1]
    dt, B, C = F.linear(x, x_proj_weight).split([dt_rank, d_state, d_state], -1)
    delta = F.linear(dt, dt_proj_weight)
    y = selective_scan(x, delta, A, B, C, D, z, dt_proj_bias, delta_softplus=True)
    return F.linear(y, out_proj_weight, out_proj_bias)


def mamba2_inner(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    norm_weight: Tensor,
    norm_eps: float,
    headdim: int,
    ngroups: int,
    d_state: int,
    chunk_size: int,
    norm_before_gate: bool = False,
) -> Tensor:
    r"""``RMSNorm(SSD(SiLU(conv(x, B, C)), dt) · SiLU(z))`` of Mamba-2, without its output projection.

    Args:
        zxbcdt: ``[batch, L, 2·d_inner + 2·ngroups·d_state + H]`` in the order z, x, B, C, dt; H = d_inner / headdim.
        conv1d_weight: ``[d_inner + 2·ngroups·d_state, W]``; conv1d_bias: ``[d_inner + 2·ngroups·d_state]`` or None.
        dt_bias, A, D: ``[H]``, A negative.
        norm_weight: ``[d_inner]``; the norm is taken over d_inner / ngroups values at a time.
        norm_eps: added to the mean square.
        chunk_size: steps multiplied out at once; changes speed and rounding only.
        norm_before_gate: ``RMSNorm(y) · SiLU(z)`` instead.

    Returns:
        ``[batch, L, d_inner]``.
    """
    d_inner, heads = norm_weight.shape[0], A.shape[0]
    if _fused_mamba2(zxbcdt, conv1d_weight.shape[0], d_inner):
        # The function's own default of norm_before_gate is the opposite of that of the module it was written for.
        return backend.kernel("mamba2_inner")(
            zxbcdt=zxbcdt,
            conv1d_weight=conv1d_weight,
            conv1d_bias=conv1d_bias,
            dt_bias=dt_bias,
            A=A.float(),
            D=D,
            chunk_size=chunk_size,
            activation="silu",
            rmsnorm_weight=norm_weight,
            rmsnorm_eps=norm_eps,
            headdim=headdim,
            ngroups=ngroups,
            norm_before_gate=norm_before_gate,
        )
    shared = ngroups * d_state
    z, xbc, dt = zxbcdt.split([d_inner, d_inner + 2 * shared, heads], -1)
    x, B, C = causal_conv1d(xbc, conv1d_weight, conv1d_bias, "silu").split([d_inner, shared, shared], -1)
    y = state_space_dual(
        x.unflatten(-1, (heads, headdim)),
        dt,
        A,
        B.unflatten(-1, (ngroups, d_state)),
        C.unflatten(-1, (ngroups, d_state)),
        D,
        dt_bias,
        dt_softplus=True,
        chunk_size=chunk_size,
    )
    return gated_rms_norm(y.flatten(-2), z, norm_weight, norm_eps, ngroups, norm_before_gate)


def gated_rms_norm(
    y: Tensor, z: Tensor, weight: Tensor, eps: float, ngroups: int = 1, norm_before_gate: bool = False
) -> Tensor:
    r"""``RMSNorm(y · SiLU(z)) · weight``, or ``RMSNorm(y) · weight · SiLU(z)``, group by group.

    Args:
        y, z: ``[..., d]``.
        weight: ``[d]``.
        ngroups: the last dimension is normalised in that many equal parts.

    Returns:
        ``[..., d]`` in the type of ``y``.
    """
    dtype = y.dtype
    y, gate = backend.working(y), F.silu(backend.working(z))
    if not norm_before_gate:
        y = y * gate
    y = F.rms_norm(y.unflatten(-1, (ngroups, -1)), (y.shape[-1] // ngroups,), eps=eps).flatten(-2) * weight
    return (y * gate if norm_before_gate else y).to(dtype)


def _fused_mamba2(zxbcdt: Tensor, convolved: int, d_inner: int) -> bool:
    """Whether the fused kernel runs: it reads the convolution's channels in place, 8 at a time."""
    if backend.choose("mamba2_inner", zxbcdt) != "mamba-ssm":
        return False
    sizes = {"projected": zxbcdt.shape[-1], "convolved": convolved, "inner": d_inner}
    if any(size % 8 for size in sizes.values()):
        found = ", ".join(f"{size} {name}" for name, size in sizes.items())
        backend.note("mamba2_inner", "composed", f"{found} channels: the fused kernel takes multiples of 8")
        return False
    return True
