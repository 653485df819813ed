"""Whole Mamba-2 blocks by the C++ kernels: see native/mamba2.cpp."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from recbole_holo.ops import native
from recbole_holo.ops._mamba_native import WIDTH

if TYPE_CHECKING:
    from recbole_holo.ops.mamba2_block import Mamba2Sizes, Mamba2Weights
    from recbole_holo.ops.mamba_block import MambaState

Sizes = native.structure("Sizes", "batch length blocks model heads groups vectors order normed half")
Weights = native.structure("Weights", "", "in_proj in_bias conv conv_bias dt_bias rates skip norm out_proj out_bias")


class Kind(NamedTuple):
    """Channels of one kind: how many parts there are, the size of each, and that with what is added to fill vectors."""

    parts: int
    size: int
    filled: int


class GivenSizes(NamedTuple):
    """What the shapes of the kernels' arguments do not say."""

    headdim: int
    groups: int
    order: int
    normed: int  # channels that a mean square is taken over, without those added
    half: bool
    eps: float


def mamba2_native(
    hidden: Tensor, weights: Mamba2Weights, sizes: Mamba2Sizes, state: MambaState | None = None, half: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """As :func:`recbole_holo.ops.mamba2_block.mamba2_block_with_state`: the output and the last states, in float32.

    Without ``state`` the last states are empty. No gradient passes through them. ``half`` rounds the factors of the
    projections to bfloat16.
    """
    w = weights
    heads, model, taps = w.A.shape[1], hidden.shape[-1], w.conv1d_weight.shape[-1]
    d, p, n = (native.whole(size, native.lanes()) for size in (model, sizes.headdim, sizes.d_state))
    inner, shared = Kind(heads, sizes.headdim, p), Kind(sizes.ngroups, sizes.d_state, n)
    convolved = [inner, shared, shared]
    projected = [inner, *convolved, Kind(heads, 1, 1)]
    conv_bias = w.A.new_zeros(w.conv1d_weight.shape[:2]) if w.conv1d_bias is None else w.conv1d_bias
    conv = ssm = None
    if state is not None:
        conv = filled(F.pad(state.conv, (0, 0, WIDTH - taps, 0)), convolved, -1)
        ssm = filled(F.pad(state.ssm, (0, n - sizes.d_state)).flatten(2, 3), [inner], 2)
    out, last_conv, last_ssm = NativeMamba2.apply(
        F.pad(hidden.float(), (0, d - model)),
        F.pad(filled(w.in_proj_weight, projected, 1), (0, d - model)),
        None if w.in_proj_bias is None else filled(w.in_proj_bias, projected, 1),
        filled(F.pad(w.conv1d_weight, (WIDTH - taps, 0)), convolved, 1).transpose(1, 2),
        filled(conv_bias, convolved, 1),
        w.dt_bias.float(),
        w.A.float(),
        w.D.float(),
        filled(w.norm_weight, [inner], 1),
        F.pad(filled(w.out_proj_weight, [inner], 2), (0, 0, 0, d - model)),
        None if w.out_proj_bias is None else F.pad(w.out_proj_bias.float(), (0, d - model)),
        conv,
        ssm,
        GivenSizes(p, sizes.ngroups, n, heads // sizes.ngroups * sizes.headdim, half, sizes.norm_eps),
    )
    if state is not None:
        last_conv = emptied(last_conv[:, :, WIDTH - taps :], convolved)
        last_ssm = last_ssm.unflatten(2, (heads, p))[..., : sizes.headdim, : sizes.d_state]
    return out[..., :model], last_conv, last_ssm


def filled(tensor: Tensor, kinds: list[Kind], dim: int) -> Tensor:
    """With zeros behind each part of ``kinds`` along ``dim``: they have no input, and no output that anyone reads."""
    if all(kind.size == kind.filled for kind in kinds):
        return tensor.float()
    parts = tensor.float().movedim(dim, -1).split([kind.parts * kind.size for kind in kinds], -1)
    pairs = zip(parts, kinds, strict=True)
    grown = [F.pad(part.unflatten(-1, (k.parts, k.size)), (0, k.filled - k.size)).flatten(-2) for part, k in pairs]
    return torch.cat(grown, -1).movedim(-1, dim)


def emptied(tensor: Tensor, kinds: list[Kind]) -> Tensor:
    """What :func:`filled` added along the last dimension, cut off again."""
    pairs = zip(tensor.split([kind.parts * kind.filled for kind in kinds], -1), kinds, strict=True)
    return torch.cat([part.unflatten(-1, (k.parts, k.filled))[..., : k.size].flatten(-2) for part, k in pairs], -1)


class NativeMamba2(torch.autograd.Function):
    """The kernels as one differentiable function of float32 tensors whose widths fill vectors."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        *given, conv, ssm, ctx.given_sizes = rest
        hidden = hidden.contiguous()
        weights = [None if t is None else t.contiguous() for t in given]
        weights[5] = given[5] * native.LOG2_E
        sizes = sizes_of(hidden, weights, ctx.given_sizes)
        kept = None
        if any(ctx.needs_input_grad):
            state = sizes.heads * sizes.vectors * native.lanes() * sizes.order
            kept = hidden.new_empty(sizes.batch, sizes.blocks, native.segments(sizes.length) - 1, state)
        ssm = None if ssm is None else native.pack(ssm)
        # The kernel walks from the states to the last ones in place; the backward pass needs the first.
        last = [None if t is None else t.clone(memory_format=torch.contiguous_format) for t in (conv, ssm)]
        out = torch.empty_like(hidden)
        native.library().mamba2_forward(
            *common(sizes, weights, ctx.given_sizes), *map(native.pointer, (hidden, kept, *last, out))
        )
        ctx.save_for_backward(hidden, kept, None if conv is None else conv.contiguous(), ssm, *weights)
        states = [hidden.new_empty(0) if t is None else t for t in last]
        if ssm is not None:
            states[1] = native.unpack(states[1])
        ctx.mark_non_differentiable(*states)
        return out, states[0], states[1]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gout: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden, kept, conv, ssm, *weights = ctx.saved_tensors
        gout, ghidden, sizes = gout.contiguous(), torch.empty_like(hidden), sizes_of(hidden, weights, ctx.given_sizes)
        (projected, model), inner, channels = weights[0].shape[1:], weights[7].shape[1], weights[3].shape[1]
        shapes = [(projected, model), (native.whole(projected, native.lanes()),), (WIDTH, channels), (channels,)]
        shapes += [(sizes.heads,), (sizes.heads,), (sizes.heads,), (inner,), (model, inner), (model,)]
        shapes = [(sizes.blocks, *shape) for shape in shapes]
        sums = hidden.new_zeros(torch.get_num_threads(), sum(torch.Size(shape).numel() for shape in shapes))
        native.library().mamba2_backward(
            *common(sizes, weights, ctx.given_sizes),
            *map(native.pointer, (hidden, kept, conv, ssm, gout, ghidden, sums)),
        )
        gradients = list(native.split(sums, shapes))
        gradients[1] = gradients[1][:, :projected]
        wanted = (None if w is None else g for w, g in zip(weights, gradients, strict=True))
        return ghidden, *wanted, None, None, None


def sizes_of(hidden: Tensor, weights: list[Tensor | None], given: GivenSizes) -> Any:
    (batch, length, blocks, model), rates = hidden.shape, weights[5]
    assert rates is not None
    vectors = given.headdim // native.lanes()
    return Sizes(batch, length, blocks, model, rates.shape[1], given.groups, vectors, *given[2:5])


def common(sizes: Any, weights: list[Tensor | None], given: GivenSizes) -> tuple[Any, ...]:
    return (
        ctypes.byref(sizes),
        ctypes.byref(Weights(*map(native.pointer, weights))),
        ctypes.c_float(given.eps),
        torch.get_num_threads(),
    )
