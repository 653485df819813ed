"""Whole Mamba-2 blocks, fused where there are kernels and composed of the other operations elsewhere."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from recbole_holo.ops import backend
from recbole_holo.ops.causal_conv1d import causal_conv1d
from recbole_holo.ops.mamba_block import MambaState, latest, standing_still
from recbole_holo.ops.state_space_dual import state_space_dual, state_space_dual_with_state


class Mamba2Weights(NamedTuple):
    """The parameters of v Mamba-2 blocks, under the names and in the order of ``mamba_ssm.Mamba2``, stacked."""

    in_proj_weight: Tensor  # [v, 2·d_inner + 2·ngroups·N + H, d_model], for z, x, B, C and the step size
    in_proj_bias: Tensor | None  # [v, 2·d_inner + 2·ngroups·N + H]
    conv1d_weight: Tensor  # [v, d_inner + 2·ngroups·N, W], for x, B and C
    conv1d_bias: Tensor | None  # [v, d_inner + 2·ngroups·N]
    dt_bias: Tensor  # [v, H]
    A: Tensor  # [v, H], negative
    D: Tensor  # [v, H]
    norm_weight: Tensor  # [v, d_inner]
    out_proj_weight: Tensor  # [v, d_model, d_inner]
    out_proj_bias: Tensor | None  # [v, d_model]


class Mamba2Sizes(NamedTuple):
    """What the shapes of the parameters do not say; d_inner = H · headdim."""

    headdim: int
    ngroups: int  # of heads that share B and C
    d_state: int
    norm_eps: float
    chunk_size: int


def mamba2_block(hidden: Tensor, weights: Mamba2Weights, sizes: Mamba2Sizes) -> Tensor:
    r"""``out_proj(mamba2_inner(in_proj(hidden)))`` of v independent Mamba-2 blocks side by side.

    Args:
        hidden: ``[batch, L, v, d_model]``.

    Returns:
        ``[batch, L, v, d_model]``.
    """
    if _native(hidden):
        from recbole_holo.ops._mamba2_native import mamba2_native  # compiles, so only when it is needed

        dtype = backend.product_type(hidden)
        return mamba2_native(hidden, weights, sizes, half=dtype == torch.bfloat16)[0].to(dtype)
    y = mamba2_inner(**_inner_arguments(hidden, weights, sizes))
    return project(y.unflatten(-1, (hidden.shape[2], -1)), weights.out_proj_weight, weights.out_proj_bias)


def mamba2_block_with_state(
    hidden: Tensor,
    weights: Mamba2Weights,
    sizes: Mamba2Sizes,
    state: MambaState | None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, MambaState]:
    """:func:`mamba2_block` of a part of a sequence, from the state before it (None: the beginning) to that after it.

    The state is ``conv [batch, v, W - 1, d_inner + 2·ngroups·N]`` and ``ssm [batch, v, H, headdim, N]``. Parts of any
    lengths, one after the other, give the outputs of the whole. No gradient passes from a part to the part before it.
    Of each row the first ``lengths [batch]`` steps are no pads (None: all), and the state after the part is that after
    them.
    """
    if state is None:
        batch, (v, channels, width) = len(hidden), weights.conv1d_weight.shape
        shapes = (batch, v, width - 1, channels), (batch, *weights.A.shape, sizes.headdim, sizes.d_state)
        state = MambaState(*(weights.A.new_zeros(shape) for shape in shapes))
    state = MambaState(*(t.detach() for t in state))
    if lengths is None and _native(hidden):
        from recbole_holo.ops._mamba2_native import mamba2_native  # compiles, so only when it is needed

        dtype = backend.product_type(hidden)
        out, *last = mamba2_native(hidden, weights, sizes, state, half=dtype == torch.bfloat16)
        return out.to(dtype), MambaState(*last)
    blocks, convolved = hidden.shape[2], sizes_by_kind(weights, sizes)
    state = MambaState(kind_by_kind(state.conv.transpose(1, 2), convolved, 2), state.ssm.flatten(1, 2))
    y, (conv, ssm) = mamba2_inner_with_state(**_inner_arguments(hidden, weights, sizes), state=state, lengths=lengths)
    out = project(y.unflatten(-1, (blocks, -1)), weights.out_proj_weight, weights.out_proj_bias)
    conv = block_by_block(conv, convolved, blocks).transpose(1, 2)
    return out, MambaState(conv, ssm.unflatten(1, (blocks, -1)))


def _native(hidden: Tensor) -> bool:
    """Whether the C++ block runs: where a thread takes whole sequences of a block, they must feed all threads."""
    feeds_all_threads = hidden.shape[0] * hidden.shape[2] >= torch.get_num_threads()
    return backend.choose("mamba2_block", hidden) == "native" and feeds_all_threads


def _inner_arguments(hidden: Tensor, weights: Mamba2Weights, sizes: Mamba2Sizes) -> dict[str, Any]:
    """The v blocks as one Mamba-2 with v times the heads and groups, whose channels are laid out kind by kind."""
    w, blocks, convolved = weights, hidden.shape[2], sizes_by_kind(weights, sizes)
    projected = [w.norm_weight.shape[1], *convolved, w.A.shape[1]]
    return {
        "zxbcdt": kind_by_kind(project(hidden, w.in_proj_weight, w.in_proj_bias), projected, 2),
        "conv1d_weight": kind_by_kind(w.conv1d_weight, convolved, 0),
        "conv1d_bias": None if w.conv1d_bias is None else kind_by_kind(w.conv1d_bias, convolved, 0),
        "dt_bias": w.dt_bias.flatten(),
        "A": w.A.flatten(),
        "D": w.D.flatten(),
        "norm_weight": w.norm_weight.flatten(),
        "norm_eps": sizes.norm_eps,
        "headdim": sizes.headdim,
        "ngroups": blocks * sizes.ngroups,
        "d_state": sizes.d_state,
        "chunk_size": sizes.chunk_size,
    }


def sizes_by_kind(weights: Mamba2Weights, sizes: Mamba2Sizes) -> list[int]:
    shared = sizes.ngroups * sizes.d_state
    return [weights.norm_weight.shape[1], shared, shared]  # x, B, C


def project(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``[batch, L, v, in]`` by ``[v, out, in]`` → ``[batch, L, v, out]``."""
    if len(weight) == 1:
        return F.linear(x, weight[0], None if bias is None else bias[0])
    y = torch.einsum("blvi,voi->blvo", x, weight)
    return y if bias is None else y + bias


def kind_by_kind(stacked: Tensor, sizes: list[int], dim: int) -> Tensor:
    """Joins axes ``dim`` (blocks) and ``dim + 1`` (kinds of channels of a block) so that kinds come before blocks."""
    if stacked.shape[dim] == 1:
        return stacked.squeeze(dim)
    return torch.cat([part.flatten(dim, dim + 1) for part in stacked.split(sizes, dim + 1)], dim)


def block_by_block(joined: Tensor, sizes: list[int], blocks: int) -> Tensor:
    """What :func:`kind_by_kind` joined at the last axis, apart again: ``[..., blocks, channels]``."""
    parts = joined.split([blocks * size for size in sizes], -1)
    return torch.cat([part.unflatten(-1, (blocks, -1)) for part in parts], -1)


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
    d_inner = norm_weight.shape[0]
    if _fused_mamba2(zxbcdt, conv1d_weight.shape[0], d_inner):
        # The function's own default of norm_before_gate is the opposite of that of the module it was written for.
        y = backend.kernel("mamba2_block")(
            zxbcdt=backend.dense(zxbcdt),
            conv1d_weight=conv1d_weight,
            conv1d_bias=None if conv1d_bias is None else backend.dense(conv1d_bias),
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
        return backend.with_gradient(y)
    z, xbc, dt = zxbcdt.split([d_inner, conv1d_weight.shape[0], A.shape[0]], -1)
    xbc = causal_conv1d(xbc, conv1d_weight, conv1d_bias, "silu")
    y = state_space_dual(**_dual_arguments(xbc, dt, A, D, dt_bias, headdim, ngroups, d_state, chunk_size))
    return gated_rms_norm(y.flatten(-2), z, norm_weight, norm_eps, ngroups, norm_before_gate)


def mamba2_inner_with_state(
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
    state: MambaState,
    lengths: Tensor | None = None,
) -> tuple[Tensor, MambaState]:
    """:func:`mamba2_inner` of a part of a sequence, from the state before it to that after it.

    The state is ``conv [batch, W - 1, d_inner + 2·ngroups·d_state]`` and ``ssm [batch, H, headdim, d_state]``, zeros at
    the beginning. No gradient passes through it. ``lengths [batch]``: steps that are no pads; all if None.
    """
    (channels, width), d_inner = conv1d_weight.shape, norm_weight.shape[0]
    z, xbc, dt = zxbcdt.split([d_inner, channels, A.shape[0]], -1)
    extended = torch.cat([state.conv.detach().to(xbc.dtype), xbc], 1)
    xbc = causal_conv1d(extended, conv1d_weight, conv1d_bias, "silu")[:, width - 1 :]
    arguments = _dual_arguments(xbc, dt, A, D, dt_bias, headdim, ngroups, d_state, chunk_size)
    if lengths is not None:
        arguments.update(dt=standing_still(dt, dt_bias, lengths), dt_bias=None, dt_softplus=False)
    y, ssm = state_space_dual_with_state(**arguments, initial_state=state.ssm.detach())
    y = gated_rms_norm(y.flatten(-2), z, norm_weight, norm_eps, ngroups)
    return y, MambaState(latest(extended, width - 1, lengths).detach(), ssm.detach())


def _dual_arguments(
    xbc: Tensor,
    dt: Tensor,
    A: Tensor,
    D: Tensor,
    dt_bias: Tensor,
    headdim: int,
    ngroups: int,
    d_state: int,
    chunk_size: int,
) -> dict[str, Any]:
    shared = ngroups * d_state
    x, B, C = xbc.split([xbc.shape[-1] - 2 * shared, shared, shared], -1)
    x, B, C = x.unflatten(-1, (-1, headdim)), B.unflatten(-1, (ngroups, -1)), C.unflatten(-1, (ngroups, -1))
    return {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "dt_bias": dt_bias, "chunk_size": chunk_size}


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
    if backend.choose("mamba2_block", zxbcdt) != "mamba-ssm":
        return False
    sizes = {"projected": zxbcdt.shape[-1], "convolved": convolved, "inner": d_inner}
    if any(size % 8 for size in sizes.values()):
        found = ", ".join(f"{size} {name}" for name, size in sizes.items())
        backend.note("mamba2_block", "composed", f"{found} channels: the fused kernel takes multiples of 8")
        return False
    return True
