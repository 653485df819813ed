"""Rows of a matrix, with a gradient that costs no more than they do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def select_rows(x: Tensor, rows: Tensor) -> Tensor:
    """``x [N, d]``, ``rows [M]``, none twice → ``[M, d]``; the gradient is written into its places.

    That of ``index_select``, which allows for repeats, is added up, by sorting on a CPU.
    """
    return SelectedRows.apply(x, rows)


class SelectedRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor) -> Tensor:
        ctx.shape = x.shape
        ctx.save_for_backward(rows)
        return x.index_select(0, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (rows,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.shape).index_copy_(0, rows, gradient), None
