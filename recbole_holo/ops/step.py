"""One event of each of many sequences: the steps of Mamba blocks, from a state that they move on in place.

What a step reads of the weights is prepared once, since preparing it costs more than the step. Preparing and stepping
keep no gradients: they are for inference.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from recbole_holo.ops import backend
from recbole_holo.ops.mamba2_block import (
    Mamba2Sizes,
    Mamba2Weights,
    block_by_block,
    gated_rms_norm,
    kind_by_kind,
    mamba2_block_with_state,
    project,
    sizes_by_kind,
)
from recbole_holo.ops.mamba_block import MambaState, MambaWeights, mamba_block_with_state

Stepper = Callable[[Tensor, MambaState], Tensor]


@torch.no_grad()
def mamba_stepper(weights: MambaWeights) -> Stepper:
    """A function ``(hidden [batch, d_model], state) → [batch, d_model]``: :func:`mamba_block` of the next step.

    The state, ``conv [batch, W - 1, d_inner]`` and ``ssm [batch, d_inner, N]``, zeros at the beginning, becomes that
    behind the step. Of either the rows of the batch may be any distance apart, the rest is contiguous.
    """
    implementation = backend.choose("mamba_step", weights.out_proj_weight)
    if implementation == "native":
        from recbole_holo.ops._step_native import mamba_step_native  # compiles, so only when it is needed

        return mamba_step_native(weights)
    if implementation == "mamba-ssm":
        return _cuda_mamba(weights)

    def step(hidden: Tensor, state: MambaState) -> Tensor:
        out, after = mamba_block_with_state(hidden.unsqueeze(1), weights, state)
        _replace(state, after)
        return out.squeeze(1)

    return step


@torch.no_grad()
def mamba2_stepper(weights: Mamba2Weights, sizes: Mamba2Sizes) -> Stepper:
    """As :func:`mamba_stepper`, of v Mamba-2 blocks side by side: ``[batch, v, d_model]`` → likewise.

    The state is ``conv [batch, v, W - 1, d_inner + 2·ngroups·N]`` and ``ssm [batch, v, H, headdim, N]``.
    """
    implementation = backend.choose("mamba2_step", weights.out_proj_weight)
    if implementation == "native":
        from recbole_holo.ops._step_native import mamba2_step_native  # compiles, so only when it is needed

        return mamba2_step_native(weights, sizes)
    if implementation == "mamba-ssm":
        return _cuda_mamba2(weights, sizes)

    def step(hidden: Tensor, state: MambaState) -> Tensor:
        out, after = mamba2_block_with_state(hidden.unsqueeze(1), weights, sizes, state)
        _replace(state, after)
        return out.squeeze(1)

    return step


def _cuda_mamba(w: MambaWeights) -> Stepper:
    update = backend.kernel("mamba_step")
    rank, order = w.dt_proj_weight.shape[1], w.A.shape[1]
    A, D, dt_bias = w.A.float().contiguous(), w.D.float(), w.dt_proj_bias.float()
    conv1d_bias = None if w.conv1d_bias is None else backend.dense(w.conv1d_bias)

    def step(hidden: Tensor, state: MambaState) -> Tensor:
        x, z = F.linear(hidden, w.in_proj_weight, w.in_proj_bias).chunk(2, -1)
        x = _convolve(x, state.conv, w.conv1d_weight, conv1d_bias)
        dt, B, C = F.linear(x, w.x_proj_weight).split([rank, order, order], -1)
        dt = F.linear(dt, w.dt_proj_weight)
        y = update(state.ssm, x, dt, A, B, C, D, z=z, dt_bias=dt_bias, dt_softplus=True)
        return F.linear(y, w.out_proj_weight, w.out_proj_bias)

    return step


def _cuda_mamba2(w: Mamba2Weights, sizes: Mamba2Sizes) -> Stepper:
    """The v blocks as one with v times the heads and groups."""
    update = backend.kernel("mamba2_step")
    blocks, inner = w.norm_weight.shape
    convolved = sizes_by_kind(w, sizes)
    conv1d_weight = kind_by_kind(w.conv1d_weight, convolved, 0)
    conv1d_bias = None if w.conv1d_bias is None else backend.dense(kind_by_kind(w.conv1d_bias, convolved, 0))
    shared, norm_weight = blocks * sizes.ngroups * sizes.d_state, w.norm_weight.flatten()
    # One number a head, as the kernel knows it: with a stride of 0 over channels and states.
    A = w.A.float().flatten()[:, None, None].expand(-1, sizes.headdim, sizes.d_state)
    D, dt_bias = (t.float().flatten().unsqueeze(-1).expand(-1, sizes.headdim) for t in (w.D, w.dt_bias))

    def step(hidden: Tensor, state: MambaState) -> Tensor:
        zxbcdt = project(hidden.unsqueeze(1), w.in_proj_weight, w.in_proj_bias).squeeze(1)  # [batch, v, projected]
        z, xbc, dt = zxbcdt.split([inner, sum(convolved), w.A.shape[1]], -1)
        conv = kind_by_kind(state.conv.transpose(1, 2), convolved, 2).contiguous()
        xbc = _convolve(kind_by_kind(xbc, convolved, 1), conv, conv1d_weight, conv1d_bias)
        state.conv.copy_(block_by_block(conv, convolved, blocks).transpose(1, 2))
        x, B, C = xbc.split([blocks * inner, shared, shared], -1)
        ssm = state.ssm.flatten(1, 2)
        y = update(
            ssm,
            x.unflatten(-1, (-1, sizes.headdim)),
            dt.flatten(1).unsqueeze(-1).expand(-1, -1, sizes.headdim),
            A,
            B.unflatten(-1, (-1, sizes.d_state)),
            C.unflatten(-1, (-1, sizes.d_state)),
            D,
            dt_bias=dt_bias,
            dt_softplus=True,
        )
        if ssm.data_ptr() != state.ssm.data_ptr():  # a copy, where the two dimensions could not be joined
            state.ssm.copy_(ssm.view_as(state.ssm))
        y = gated_rms_norm(y.flatten(1), z.flatten(1), norm_weight, sizes.norm_eps, blocks * sizes.ngroups)
        y = y.unflatten(-1, (blocks, -1)).unsqueeze(1)
        return project(y, w.out_proj_weight, w.out_proj_bias).squeeze(1)

    return step


def _convolve(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x [batch, D]``, ``state [batch, W - 1, D]`` of any floating type, changed in place."""
    before = state.transpose(1, 2).to(x.dtype).contiguous()
    y: Any = backend.kernel("causal_conv1d_step")(x.contiguous(), before, weight, bias, "silu")
    state.copy_(before.transpose(1, 2))
    return y


def _replace(state: MambaState, by: MambaState) -> None:
    for tensor, after in zip(state, by, strict=True):
        tensor.copy_(after)
