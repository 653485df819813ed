"""Whole Mamba-1 blocks, fused where there are kernels and composed of the other operations elsewhere."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from recbole_holo.ops import backend
from recbole_holo.ops.causal_conv1d import causal_conv1d
from recbole_holo.ops.selective_scan import selective_scan, selective_scan_with_state


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

        dtype = backend.product_type(hidden)
        return mamba_native(hidden, weights, half=dtype == torch.bfloat16)[0].to(dtype)
    if implementation == "mamba-ssm":
        w = weights
        out = backend.kernel("mamba_block")(
            xz=backend.dense(F.linear(hidden, w.in_proj_weight, w.in_proj_bias).transpose(1, 2)),
            conv1d_weight=w.conv1d_weight.unsqueeze(1),
            conv1d_bias=None if w.conv1d_bias is None else backend.dense(w.conv1d_bias),
            x_proj_weight=w.x_proj_weight,
            delta_proj_weight=w.dt_proj_weight,
            out_proj_weight=w.out_proj_weight,
            out_proj_bias=None,  # of a bias the function sums the gradient over its channels, too
            A=w.A.float(),
            D=backend.dense(w.D.float()),
            delta_bias=backend.dense(w.dt_proj_bias.float()),
            delta_softplus=True,
        )
        return out if w.out_proj_bias is None else out + w.out_proj_bias.to(out.dtype)
    x, z = F.linear(hidden, weights.in_proj_weight, weights.in_proj_bias).chunk(2, -1)
    x = causal_conv1d(x, weights.conv1d_weight, weights.conv1d_bias, "silu")
    y = selective_scan(**_scan_arguments(x, z, weights))
    return F.linear(y, weights.out_proj_weight, weights.out_proj_bias)


def mamba_block_with_state(
    hidden: Tensor, weights: MambaWeights, state: MambaState | None, lengths: Tensor | None = None
) -> tuple[Tensor, MambaState]:
    """:func:`mamba_block` of a part of a sequence, from the state before it (None: the beginning) to that after it.

    Parts of any lengths, one after the other, give the outputs of the whole. No gradient passes from a part to the part
    before it: that is truncated back-propagation, in the memory of one part.

    Args:
        lengths: ``[batch]``, the steps of each row that are not pads (on the right), 0 to L: the state after the part
            is that after them. All if None.
    """
    implementation = backend.choose("mamba_block", hidden)
    if lengths is None and implementation == "native" and _feeds_all_threads(hidden):
        from recbole_holo.ops._mamba_native import mamba_native  # compiles, so only when it is needed

        state, dtype = None if state is None else MambaState(*(t.detach() for t in state)), backend.product_type(hidden)
        out, *last = mamba_native(hidden, weights, state, half=dtype == torch.bfloat16)
        return out.to(dtype), MambaState(*last)
    x, z = F.linear(hidden, weights.in_proj_weight, weights.in_proj_bias).chunk(2, -1)
    earlier = weights.conv1d_weight.shape[1] - 1
    before = x.new_zeros(x.shape[0], earlier, x.shape[2]) if state is None else state.conv.detach().to(x.dtype)
    extended = torch.cat([before, x], 1)
    x = causal_conv1d(extended, weights.conv1d_weight, weights.conv1d_bias, "silu")[:, earlier:]
    ssm = None if state is None else state.ssm.detach()
    arguments = _scan_arguments(x, z, weights)
    if lengths is not None:
        delta = standing_still(arguments["delta"], arguments["delta_bias"], lengths)
        arguments.update(delta=delta, delta_bias=None, delta_softplus=False)
    y, ssm = selective_scan_with_state(**arguments, initial_state=ssm)
    out = F.linear(y, weights.out_proj_weight, weights.out_proj_bias)
    return out, MambaState(latest(extended, earlier, lengths).detach(), ssm.detach())


def standing_still(delta: Tensor, bias: Tensor, lengths: Tensor) -> Tensor:
    """Step sizes ``[batch, L, channels]`` of a scan, 0 from ``lengths [batch]`` on, where nothing changes."""
    valid = torch.arange(delta.shape[1], device=delta.device) < lengths.unsqueeze(-1)
    with backend.without_autocast(delta):
        return F.softplus(backend.working(delta) + bias) * valid.unsqueeze(-1)


def latest(extended: Tensor, count: int, lengths: Tensor | None) -> Tensor:
    """The last ``count`` steps of ``[batch, count + L, channels]``, or with ``lengths`` the last of count + lengths."""
    if lengths is None:
        return extended[:, extended.shape[1] - count :]
    at = lengths.unsqueeze(-1) + torch.arange(count, device=lengths.device)
    return extended.gather(1, at.unsqueeze(-1).expand(-1, -1, extended.shape[2]))


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
