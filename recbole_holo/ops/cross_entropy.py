"""Softmax cross-entropy over the whole catalogue, without ever holding the scores of all positions."""

from __future__ import annotations

import ctypes
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from recbole_holo.ops import backend, native
from recbole_holo.ops.seen_items import SeenItems, check_ids, left_out

# Scores that exist at a time. On a CPU those of a thread and their gradient stay in its cache; a GPU wants long rows.
_NATIVE_SCORES, _NATIVE_ROWS, _NATIVE_ITEMS = 2**18, (6, 96), 2**15
_HALF_ROWS, _HALF_SUMS = 128, 2**27  # rows of a thread at a time; values of all threads' gradients of the table
_CPU_SCORES, _CPU_ROWS = 2**20, 32
_CUDA_SCORES = 2**26


def cross_entropy(
    hidden: Tensor,
    targets: Tensor,
    item_vectors: Tensor,
    bias: Tensor | None = None,
    chunk_size: int | None = None,
    exclude_pad: bool = False,
    seen: SeenItems | None = None,
) -> Tensor:
    r"""Mean of ``-log softmax(hidden · item_vectorsᵀ + bias)[target]``.

    Rows are taken in chunks, and the gradient of a chunk is computed while its scores exist, in their place: three
    matrix products a chunk, none repeated, and memory of one chunk and the gradients, whatever M and V. Under autocast
    the products run in its type, the softmax always in float32.

    Args:
        hidden: ``[M, d]``; positions without a target are left out before.
        targets: ``[M]``, item ids.
        item_vectors: ``[V, d]``.
        bias: ``[V]``, added to the scores.
        chunk_size: rows of a chunk (of a thread's chunk on a CPU); None decides by V and the device.
        exclude_pad: leave item 0 out of the softmax. RecBole's losses keep it in, hence the default.
        seen: items that each of the M rows leaves out of its softmax, never its target: they get no gradient.

    Returns:
        Scalar.

    Raises:
        ValueError: there are no rows; ``seen`` is of other rows, on another device or of other items; for the C++
            kernels, which do not look, also a target that is none of the items.
    """
    if seen is not None:
        seen.check(targets, len(item_vectors))
    if backend.runs_native(hidden):
        check_ids("targets", targets, int(exclude_pad), len(item_vectors))
        if seen is not None:
            seen.check_ranges()
    if exclude_pad:
        item_vectors, targets = item_vectors[1:], targets - 1
        bias = None if bias is None else bias[1:]
    if targets.numel() == 0:
        raise ValueError("targets: it is empty, and the mean over no positions has no value")
    dtype = backend.product_type(hidden)
    items = len(item_vectors)
    products = _native_products(hidden, dtype, items)
    if products:
        backend.note("cross_entropy", f"native, {products}")
        half = dtype == torch.bfloat16 and products != "float32"
        together = _rows_of_halves(len(targets), chunk_size) if half else _rows_of_floats(items, chunk_size)
        return NativeCrossEntropy.apply(hidden, item_vectors, bias, targets, seen, int(exclude_pad), together, half)
    backend.note("cross_entropy", f"chunks, {str(dtype).removeprefix('torch.')}")
    if chunk_size is None:
        on_cpu = hidden.device.type == "cpu"
        chunk_size = max(_CPU_SCORES // items, _CPU_ROWS) if on_cpu else max(_CUDA_SCORES // items, 1)
    if hidden.dtype == torch.float64:
        scores = (F.linear(part, item_vectors, bias) for part in hidden.split(chunk_size))
        if seen is not None:
            masks = left_out(seen, targets, items, int(exclude_pad), chunk_size)
            scores = (s.masked_fill(mask, -torch.inf) for s, mask in zip(scores, masks, strict=True))
        parts = zip(scores, targets.split(chunk_size), strict=True)
        return torch.stack([F.cross_entropy(s, t, reduction="sum") for s, t in parts]).sum() / hidden.shape[0]
    return CrossEntropy.apply(hidden, item_vectors, bias, targets, seen, int(exclude_pad), chunk_size, dtype)


def _native_products(hidden: Tensor, dtype: torch.dtype, items: int) -> str:
    """What the C++ kernel's products run in; empty if it does not run.

    A gradient of the table in each thread is worth it for small tables only.
    """
    if dtype not in (torch.float32, torch.bfloat16) or not backend.runs_native(hidden):
        return ""
    width = hidden.shape[1]
    if dtype == torch.bfloat16 and native.half_products():
        return native.half_products() if torch.get_num_threads() * items * width <= _HALF_SUMS else ""
    return "float32" if items <= _NATIVE_ITEMS and width % native.lanes() == 0 else ""


def _rows_of_floats(items: int, chunk_size: int | None) -> tuple[int, int]:
    """What threads get multiples of, which decides in which order numbers are summed; and rows at a time."""
    fewest, most = _NATIVE_ROWS
    share = chunk_size or min(max(_NATIVE_SCORES // items // fewest * fewest, fewest), most)
    return share, chunk_size or most


def _rows_of_halves(rows: int, most: int | None) -> tuple[int]:
    """The same for all of a thread's blocks, so that threads have equally much to do; even."""
    own = -(-rows // torch.get_num_threads())
    return (native.whole(-(-own // -(-own // (most or _HALF_ROWS))), 2),)


class NativeCrossEntropy(torch.autograd.Function):
    """Value and gradients by the C++ kernel, in float32."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        item_vectors: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        seen: SeenItems | None,
        pads: int,
        together: tuple[int, ...],
        half: bool,
    ) -> Tensor:
        ctx.types = [None if t is None else t.dtype for t in (hidden, item_vectors, bias)]
        (rows, width), items, threads = hidden.shape, item_vectors.shape[0], torch.get_num_threads()
        x, table, targets = hidden.float().contiguous(), item_vectors.float().contiguous(), targets.contiguous()
        bias = None if bias is None else bias.float().contiguous()
        losses = x.new_empty(rows)
        wants = any(ctx.needs_input_grad)
        g_hidden = torch.empty_like(x) if wants else None
        copies, kernels = (1, "cross_entropy_half") if half else (threads, "cross_entropy")
        g_table = x.new_zeros(copies, items, width) if wants else None
        g_bias = x.new_zeros(copies, items) if wants and bias is not None else None
        getattr(native.library(), kernels)(
            *map(ctypes.c_int64, (rows, items, width, *together)),
            threads,
            ctypes.c_float(1 / rows),
            _rows(seen, pads),
            *map(native.pointer, (x, table, bias, targets, losses, g_hidden, g_table, g_bias)),
        )
        summed = (None if g is None else g.sum(0) if copies > 1 else g[0] for g in (g_table, g_bias))
        ctx.save_for_backward(g_hidden, *summed)
        return losses.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gloss: Tensor) -> tuple[Tensor | None, ...]:
        return *_scaled(ctx, gloss), None, None, None, None, None


class CrossEntropy(torch.autograd.Function):
    """Value and gradients chunk by chunk, for any device and type of the products."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        item_vectors: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        seen: SeenItems | None,
        pads: int,
        chunk_size: int,
        dtype: torch.dtype,
    ) -> Tensor:
        ctx.types = hidden.dtype, item_vectors.dtype, None if bias is None else bias.dtype
        rows, (items, width) = hidden.shape[0], item_vectors.shape
        wants = any(ctx.needs_input_grad)
        table, x = item_vectors.detach().to(dtype), hidden.detach().to(dtype).contiguous()
        losses = torch.empty(rows, dtype=torch.float32, device=hidden.device)
        g_hidden = torch.empty_like(x) if wants else None
        g_table = torch.zeros(items, width, dtype=torch.float32, device=hidden.device) if wants else None
        g_bias = losses.new_zeros(items) if wants and bias is not None else None
        scale = 1.0 / rows
        fused = dtype == torch.float32 and backend.runs_native(hidden)  # all but the products
        masks = None if seen is None or fused else left_out(seen, targets, items, pads, chunk_size)
        with backend.without_autocast(hidden):
            buffer = torch.empty(min(chunk_size, rows), items, dtype=dtype, device=hidden.device)
            for first in range(0, rows, chunk_size):
                part = x[first : first + chunk_size]
                scores = torch.mm(part, table.T, out=buffer[: len(part)])
                here = slice(first, first + chunk_size)
                if fused:
                    own = None if seen is None else SeenItems(seen.items, seen.start[here], seen.end[here])
                    _native_softmax(scores, targets[here], bias, scale, losses[here], wants, own, pads)
                    g_scores = scores
                else:
                    if masks is not None:
                        scores.masked_fill_(next(masks), -torch.inf)
                    g_scores = _softmax(scores, targets[here], bias, scale, losses[here], wants)
                if g_hidden is None or g_table is None:
                    continue
                torch.mm(g_scores, table, out=g_hidden[first : first + chunk_size])
                if dtype == torch.float32:
                    g_table.addmm_(g_scores.T, part)
                else:
                    g_table += torch.mm(g_scores.T, part)
                if g_bias is not None:
                    g_bias += g_scores.sum(0, dtype=torch.float32)
        ctx.save_for_backward(g_hidden, g_table, g_bias)
        return losses.mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gloss: Tensor) -> tuple[Tensor | None, ...]:
        return *_scaled(ctx, gloss), None, None, None, None, None


def _scaled(ctx: Any, gloss: Tensor) -> list[Tensor | None]:
    pairs = zip(ctx.saved_tensors, ctx.types, strict=True)
    return [None if g is None else (g * gloss).to(dtype) for g, dtype in pairs]


Rows = native.structure("Rows", "pads", "items start end")


def _rows(seen: SeenItems | None, pads: int) -> Any:
    """``seen`` as the kernels take it, by reference; None stays it."""
    if seen is None:
        return None
    given = [tensor.long().contiguous() for tensor in (seen.items, seen.start, seen.end)]
    structure = Rows(pads, *map(native.pointer, given))
    structure.given = given  # as long as the structure lives
    return ctypes.byref(structure)


def _native_softmax(
    scores: Tensor,
    targets: Tensor,
    bias: Tensor | None,
    scale: float,
    losses: Tensor,
    gradient: bool,
    seen: SeenItems | None,
    pads: int,
) -> None:
    """:func:`_softmax` by the C++ kernel, of float32 scores, without what the rows have ``seen``."""
    targets = targets.contiguous()
    bias = None if bias is None else bias.float().contiguous()
    native.library().softmax_cross_entropy(
        *map(ctypes.c_int64, scores.shape),
        torch.get_num_threads(),
        int(gradient),
        ctypes.c_float(scale),
        _rows(seen, pads),
        *map(native.pointer, (targets, bias, scores, losses)),
    )


def _softmax(
    scores: Tensor, targets: Tensor, bias: Tensor | None, scale: float, losses: Tensor, gradient: bool
) -> Tensor:
    """Writes the losses of rows of scores; returns the gradient of ``scale · Σ losses``, in the place of the scores."""
    log_scores = scores.float() if bias is None else scores.float() + bias
    partition = log_scores.logsumexp(-1, keepdim=True)
    index = targets.unsqueeze(-1)
    losses.copy_((partition - log_scores.gather(-1, index)).squeeze(-1))
    if not gradient:
        return scores
    probabilities = (log_scores - partition).exp_().mul_(scale)
    probabilities.scatter_add_(-1, index, torch.full_like(index, -scale, dtype=torch.float32))
    return scores.copy_(probabilities)
