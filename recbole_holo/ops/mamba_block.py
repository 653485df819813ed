"""Whole Mamba blocks, fused where there are kernels and composed of the other operations elsewhere."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from recbole_holo.ops import backend
from recbole_holo.ops.causal_conv1d import causal_conv1d
from recbole_holo.ops.selective_scan import selective_scan, selective_scan_with_state
from recbole_holo.ops.state_space_dual import state_space_dual


class MambaWeights(NamedTuple):
    """The parameters of a Mamba-1 block, under the names and in the order of ``mamba_ssm.Mamba``."""

    in_proj_weight: Tensor  # [2·d_inner, d_model], x first
    in_proj_bias: Tensor | None  # [2·d_inner]
    conv1d_weight: Tensor  # [d_inner, W]
    conv1d_bias: Tensor | None  # [d_inner]
    x_proj_weight: Tensor  # [dt_rank + 2N, d_inner], for the step size, B and C
    dt_proj_weight: Tensor  # [d_inner, dt_rank]
    dt_proj_bias: Tensor  # [d_inner]
    A: Tensor  # [d_inner, N], negative
    D: Tensor  # [d_inner]
    out_proj_weight: Tensor  # [d_model, d_inner]
    out_proj_bias: Tensor | None  # [d_model]


class MambaState(NamedTuple):
    """What a Mamba block keeps of the steps behind it: the last inputs of its convolution, and the scan's state."""

    conv: Tensor  # [batch, W - 1, d_inner]
    ssm: Tensor  # [batch, d_inner, N]


def mamba_block(hidden: Tensor, weights: MambaWeights) -> Tensor:
    r"""``x, z = in_proj(hidden)``, then ``out_proj(scan(SiLU(conv(x))) · SiLU(z))``: Mamba-1.

    Args:
        hidden: ``[batch, L, d_model]``.

    Returns:
        ``[batch, L, d_model]``.
    """
    implementation = backend.choose("mamba_block", hidden)
    if implementation == "native" and _feeds_all_threads(hidden):
        from recbole_holo.ops._mamba_native import mamba_native  # compiles, so only when it is needed

        return mamba_native(hidden, weights)[0].to(backend.product_type(hidden))
    if implementation == "mamba-ssm":
        w = weights
        return backend.kernel("mamba_block")(
            xz=F.linear(hidden, w.in_proj_weight, w.in_proj_bias).transpose(1, 2),
            conv1d_weight=w.conv1d_weight.unsqueeze(1),
            conv1d_bias=w.conv1d_bias,
            x_proj_weight=w.x_proj_weight,
            delta_proj_weight=w.dt_proj_weight,
            out_proj_weight=w.out_proj_weight,
            out_proj_bias=w.out_proj_bias,
            A=w.A.float(),
            D=w.D.float(),
            delta_bias=w.dt_proj_bias.float(),
            delta_softplus=True,
        )
    x, z = F.linear(hidden, weights.in_proj_weight, weights.in_proj_bias).chunk(2, -1)
    x = causal_conv1d(x, weights.conv1d_weight, weights.conv1d_bias, "silu")
    y = selective_scan(**_scan_arguments(x, z, weights))
    return F.linear(y, weights.out_proj_weight, weights.out_proj_bias)


def mamba_block_with_state(
    hidden: Tensor, weights: MambaWeights, state: MambaState | None
) -> tuple[Tensor, MambaState]:
    """:func:`mamba_block` of a part of a sequence, from the state before it (None: the beginning) to that after it.

    Parts of any lengths, one after the other, give the outputs of the whole. No gradient passes from a part to the part
    before it: that is truncated back-propagation, in the memory of one part.
    """
    implementation = backend.choose("mamba_block", hidden)
    if implementation == "native" and _feeds_all_threads(hidden):
        from recbole_holo.ops._mamba_native import mamba_native  # compiles, so only when it is needed

        out, *last = mamba_native(hidden, weights, None if state is None else MambaState(*(t.detach() for t in state)))
        return out.to(backend.product_type(hidden)), MambaState(*last)
    x, z = F.linear(hidden, weights.in_proj_weight, weights.in_proj_bias).chunk(2, -1)
    earlier = weights.conv1d_weight.shape[1] - 1
    before = x.new_zeros(x.shape[0], earlier, x.shape[2]) if state is None else state.conv.detach().to(x.dtype)
    extended = torch.cat([before, x], 1)
    x = causal_conv1d(extended, weights.conv1d_weight, weights.conv1d_bias, "silu")[:, earlier:]
    ssm = None if state is None else state.ssm.detach()
    y, ssm = selective_scan_with_state(**_scan_arguments(x, z, weights), initial_state=ssm)
    out = F.linear(y, weights.out_proj_weight, weights.out_proj_bias)
    return out, MambaState(extended[:, extended.shape[1] - earlier :].detach(), ssm.detach())


def _scan_arguments(x: Tensor, z: Tensor, weights: MambaWeights) -> dict[str, Any]:
    rank, order = weights.dt_proj_weight.shape[1], weights.A.shape[1]
    dt, B, C = F.linear(x, weights.x_proj_weight).split([rank, order, order], -1)
    delta = F.linear(dt, weights.dt_proj_weight)
    return {"u": x, "delta": delta, "A": weights.A, "B": B, "C": C, "D": weights.D, "z": z} | {
        "delta_bias": weights.dt_proj_bias,
        "delta_softplus": True,
    }


def _feeds_all_threads(hidden: Tensor) -> bool:
    """Whether the C++ block, where a thread takes whole sequences, can use all threads; the scan alone always can."""
    return hidden.shape[0] >= torch.get_num_threads()


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
