"""One step of Mamba blocks by the C++ kernels: see native/step.cpp."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from recbole_holo.ops import native

if TYPE_CHECKING:
    from recbole_holo.ops.mamba2_block import Mamba2Sizes, Mamba2Weights
    from recbole_holo.ops.mamba_block import MambaState, MambaWeights

MambaGiven = native.structure(
    "MambaGiven",
    "model inner order rank taps",
    "in_proj in_bias conv conv_bias x_proj dt_proj dt_bias rates skip out_proj out_bias",
)


Mamba2Given = native.structure(
    "Mamba2Given",
    "blocks model inner order taps heads groups",
    "in_proj in_bias conv conv_bias dt_bias rates skip norm out_proj out_bias",
    floats="eps",
)


class NativeStep:
    """Weights as the kernel reads them, and the kernel.

    Args:
        kernel: its name in the library.
        given: its structure, whose pointers are those of ``tensors``.
        tensors: kept as long as this object.

    Attributes:
        kind: ``mamba`` or ``mamba2``.
        address: of the structure.
    """

    def __init__(self, kernel: str, given: ctypes.Structure, tensors: list[Tensor | None]) -> None:
        self._function = getattr(native.library(), kernel)
        self._given, self._tensors = given, tensors
        self.kind = kernel.removesuffix("_step")
        self.address = ctypes.addressof(given)

    def __call__(self, hidden: Tensor, state: MambaState) -> Tensor:
        """``[batch, ..., model]`` → likewise; the state, float32, is changed in place."""
        x = hidden.float().contiguous()
        out = torch.empty_like(x)
        conv, ssm = state
        self._function(
            ctypes.byref(self._given),
            torch.get_num_threads(),
            ctypes.c_int64(len(x)),
            ctypes.c_void_p(x.data_ptr()),
            ctypes.c_void_p(conv.data_ptr()),
            ctypes.c_int64(conv.stride(0)),
            ctypes.c_void_p(ssm.data_ptr()),
            ctypes.c_int64(ssm.stride(0)),
            ctypes.c_void_p(out.data_ptr()),
        )
        return out


def mamba_step_native(weights: MambaWeights) -> NativeStep:
    """For :func:`recbole_holo.ops.step.mamba_stepper`."""
    w = weights
    (model, inner), order, rank = w.out_proj_weight.shape, w.A.shape[1], w.dt_proj_weight.shape[1]
    taps = w.conv1d_weight.shape[1]
    tensors = [
        panels(w.in_proj_weight.T),
        filled(w.in_proj_bias),
        filled(w.conv1d_weight.T),
        filled(w.A.new_zeros(inner) if w.conv1d_bias is None else w.conv1d_bias),
        panels(w.x_proj_weight.T),
        panels(w.dt_proj_weight.T),
        filled(w.dt_proj_bias),
        filled(w.A * native.LOG2_E),
        filled(w.D),
        panels(w.out_proj_weight.T),
        filled(w.out_proj_bias),
    ]
    return NativeStep("mamba_step", MambaGiven(model, inner, order, rank, taps, *map(native.pointer, tensors)), tensors)


def mamba2_step_native(weights: Mamba2Weights, sizes: Mamba2Sizes) -> NativeStep:
    """For :func:`recbole_holo.ops.step.mamba2_stepper`."""
    w = weights
    (blocks, model, inner), (channels, taps) = w.out_proj_weight.shape, w.conv1d_weight.shape[1:]
    tensors = [
        torch.cat([panels(block.T) for block in w.in_proj_weight]),
        filled(w.in_proj_bias),
        filled(w.conv1d_weight.transpose(1, 2)),
        filled(w.A.new_zeros(blocks, channels) if w.conv1d_bias is None else w.conv1d_bias),
        w.dt_bias.float().contiguous(),
        (w.A.float() * native.LOG2_E).contiguous(),
        w.D.float().contiguous(),
        w.norm_weight.float().contiguous(),
        torch.cat([panels(block.T) for block in w.out_proj_weight]),
        filled(w.out_proj_bias),
    ]
    numbers: tuple[Any, ...] = (blocks, model, inner, sizes.d_state, taps, w.A.shape[1], sizes.ngroups, sizes.norm_eps)
    return NativeStep("mamba2_step", Mamba2Given(*numbers, *map(native.pointer, tensors)), tensors)


def panels(matrix: Tensor) -> Tensor:
    """``[inner, width]`` in the order of the kernels' products, width filled up to vectors: flat."""
    matrix = matrix.float()
    inner, width = matrix.shape
    out = torch.empty(inner * native.whole(width, native.lanes()))
    row, column = map(ctypes.c_int64, matrix.stride())
    native.library().pack_panels(
        ctypes.c_void_p(matrix.data_ptr()),
        ctypes.c_int64(inner),
        ctypes.c_int64(width),
        row,
        column,
        native.pointer(out),
    )
    return out


def filled(tensor: Tensor | None) -> Tensor | None:
    """The last dimension filled up to vectors by zeros."""
    if tensor is None:
        return None
    return F.pad(tensor.float(), (0, native.whole(tensor.shape[-1], native.lanes()) - tensor.shape[-1])).contiguous()
