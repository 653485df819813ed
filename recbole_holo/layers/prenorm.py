"""A branch behind its norm, of whose input nothing is kept that the norm can make again."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks


def prenorm(norm: nn.Module, branch: Callable[[Tensor], Tensor], h: Tensor) -> Tensor:
    """``branch(norm(h))``, in the memory of one tensor less: the backward pass computes ``norm(h)`` again from ``h``.

    A norm costs next to nothing beside a branch, and what it gives is all that a fused branch keeps.
    """
    if not torch.is_grad_enabled():
        return branch(norm(h))
    x = norm(h)
    if not x.requires_grad:
        return branch(x)
    source = h.detach()

    def pack(kept: Tensor) -> Tensor | torch.Size:
        return kept.shape if kept.data_ptr() == x_pointer and kept.numel() == source.numel() else kept

    def unpack(kept: Tensor | torch.Size) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        with torch.no_grad():
            return norm(source).to(dtype).view(kept)

    x_pointer, dtype = x.data_ptr(), x.dtype
    with saved_tensors_hooks(pack, unpack):
        return branch(x)
