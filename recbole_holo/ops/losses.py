r"""Losses on the hidden states of supervised positions, and the negatives they need.

All take ``hidden [M, d]`` (positions without a target are removed before), ``targets [M]`` (item ids from 1) and the
item table ``item_vectors [V, d]``, optionally with a ``bias [V]``, and return the mean over the M positions. Item 0 is
the pad. Instead of a table there may be a function that makes the vectors ``[..., d]`` of items ``[...]``, so that a
computed table need not be computed whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

ItemVectors = Tensor | Callable[[Tensor], Tensor]
_ROWS = 4096  # whose items' vectors exist at a time


def info_nce(
    hidden: Tensor,
    targets: Tensor,
    item_vectors: ItemVectors,
    negatives: Tensor,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    cosine: bool = False,
    log_counts: Tensor | None = None,
    sparse: bool = False,
    left_out: Tensor | None = None,
) -> Tensor:
    r"""``log( exp(s⁺/τ) + Σ_k exp(s⁻_k/τ - log E_k) ) - s⁺/τ`` with one positive and K negatives.

    Without ``log_counts`` (all E_k = 1) this is InfoNCE. With E_k, the number of times that negative k's item was to be
    expected among the K, it is the sampled softmax: the sum's expectation is that over all other items, so that the
    loss and its gradient tend to the full cross-entropy's (pad excluded) as K grows, and equal them where the negatives
    are all items once. The importance weights are Bengio & Senécal's (2008), their use with one shared sample is Jean
    et al.'s (2015); as Khrylchenko et al. (2025) point out, the positive is in the sum whatever is drawn, so, other
    than in the logits of Yi et al. (2019), it is not corrected.

    A negative that happens to be the target of its row is left out of the sum. Computed in float32 at least, also under
    autocast: a cosine over a small τ has too few digits in bfloat16.

    Args:
        hidden: ``[M, d]``.
        targets: ``[M]``.
        item_vectors: ``[V, d]``, or what makes vectors of items.
        negatives: ``[K]``, shared by all rows, or ``[M, K]``.
        bias: ``[V]``, added to the scores.
        temperature: τ, a number or a scalar tensor.
        cosine: score by the cosine instead of the dot product.
        log_counts: log E of each negative, of their shape; for K independent draws from q it is ``log(K q)``.
        sparse: the gradient of ``item_vectors`` is a sparse tensor; see :func:`torch.nn.functional.embedding`.
        left_out: ``[M, K]``, negatives that are none of a row; with ``log_counts`` the sum is then an estimate of that
            over the row's other items.

    Returns:
        Scalar.
    """
    offset = None if log_counts is None else -log_counts
    positive, negative, is_none = sample_scores(
        hidden, targets, item_vectors, negatives, bias, temperature, cosine, offset, sparse, left_out
    )
    # Not -inf: of a row without another negative its gradient is nan.
    negative = negative.masked_fill(is_none, torch.finfo(negative.dtype).min)
    return F.softplus(negative.logsumexp(-1) - positive).mean()


def sample_scores(
    hidden: Tensor,
    targets: Tensor,
    item_vectors: ItemVectors,
    negatives: Tensor,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    cosine: bool = False,
    offset: Tensor | None = None,
    sparse: bool = False,
    left_out: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores over the temperature of each row's target and of a sample, in float32 at least, also under autocast.

    Args:
        offset: of ``negatives``' shape, added to their scores; the others as :func:`info_nce`'s.

    Returns:
        ``[M]``, ``[M, K]``, and which of the sample are none of a row's negatives: its target, and what is
        ``left_out``, ``[M, K]``.
    """
    with torch.autocast(hidden.device.type, enabled=False):
        vectors = _gather(torch.cat([targets, negatives.flatten()]), item_vectors, cosine, sparse)
        dtype = torch.promote_types(torch.promote_types(hidden.dtype, vectors.dtype), torch.float32)
        query, vectors = hidden.to(dtype), vectors.to(dtype)
        query = (F.normalize(query, dim=-1) if cosine else query) / temperature
        positive_vectors, negative_vectors = vectors.split([len(targets), negatives.numel()])
        positive = (query * positive_vectors).sum(-1)  # [M]
        offset = query.new_zeros(negatives.shape) if offset is None else offset.to(dtype)
        if bias is not None:
            positive = positive + bias[targets] / temperature
            offset = offset + bias[negatives] / temperature
        if negatives.dim() == 1:
            negative = torch.addmm(offset, query, negative_vectors.T)  # [M, K]
        else:
            negative = offset + torch.bmm(negative_vectors.view(*negatives.shape, -1), query.unsqueeze(-1)).squeeze(-1)
    is_none = negatives == targets.unsqueeze(-1)
    return positive, negative, is_none if left_out is None else is_none | left_out


def bpr(
    hidden: Tensor,
    targets: Tensor,
    negatives: Tensor,
    item_vectors: ItemVectors,
    bias: Tensor | None = None,
    cosine: bool = False,
    sparse: bool = False,
    left_out: Tensor | None = None,
) -> Tensor:
    r"""``-log σ(s⁺ - s⁻)`` with one negative a row: ``negatives [M]``. Returns a scalar.

    ``cosine`` normalises the items' vectors (``hidden`` is taken as it is), ``sparse`` is :func:`info_nce`'s. A row
    whose negative is ``left_out [M]`` counts as none: its loss is 0.
    """
    positive, negative = _pair_scores(hidden, targets, negatives, item_vectors, bias, cosine, sparse)
    return _without(left_out, -F.logsigmoid(positive - negative)).mean()


def bce(
    hidden: Tensor,
    targets: Tensor,
    negatives: Tensor,
    item_vectors: ItemVectors,
    bias: Tensor | None = None,
    cosine: bool = False,
    sparse: bool = False,
    left_out: Tensor | None = None,
) -> Tensor:
    r"""``-log σ(s⁺) - log(1 - σ(s⁻))`` with one negative a row: ``negatives [M]``. Arguments as :func:`bpr`'s; of a row
    whose negative is ``left_out`` the first term counts alone."""
    positive, negative = _pair_scores(hidden, targets, negatives, item_vectors, bias, cosine, sparse)
    return (F.softplus(-positive) + _without(left_out, F.softplus(negative))).mean()


def _without(left_out: Tensor | None, values: Tensor) -> Tensor:
    return values if left_out is None else values.masked_fill(left_out, 0.0)


def sample_negatives(
    shape: Sequence[int], n_items: int, device: torch.device | str, exclude: Tensor | None = None
) -> Tensor:
    """Item ids drawn uniformly from 1..n_items-1, never the pad.

    Args:
        shape: of the result.
        n_items: size of the item table, pad included.
        exclude: of that shape, ids from 1: the entry that each draw must differ from. Draws come from one id fewer and
            are moved past it, so none has to be repeated.

    Raises:
        ValueError: no item is left to draw.
    """
    left_out = 1 if exclude is None else 2
    if n_items <= left_out:
        raise ValueError(f"n_items: {n_items!r} leaves no negative to draw: at least {left_out + 1} are needed")
    drawn = torch.randint(1, n_items - left_out + 1, tuple(shape), device=device)
    return drawn if exclude is None else drawn + (drawn >= exclude)


def _gather(items: Tensor, item_vectors: ItemVectors, cosine: bool, sparse: bool) -> Tensor:
    """Vectors of ``items [N]``, ``[N, d]``: all in one call, since each one's gradient is a table of its own."""
    if isinstance(item_vectors, Tensor):
        vectors = F.embedding(items, item_vectors, sparse=sparse)
    else:
        vectors = item_vectors(items)
    return F.normalize(vectors, dim=-1) if cosine else vectors


def _pair_scores(
    hidden: Tensor,
    targets: Tensor,
    negatives: Tensor,
    item_vectors: ItemVectors,
    bias: Tensor | None,
    cosine: bool,
    sparse: bool,
) -> tuple[Tensor, Tensor]:
    """Scores ``[M]`` of the target and of the negative of each row."""
    items = torch.stack([targets, negatives])  # [2, M]
    if cosine or not isinstance(item_vectors, Tensor):
        scores = (hidden * _gather(items, item_vectors, cosine, sparse)).sum(-1)
    else:
        scores = RowScores.apply(hidden, items, item_vectors, sparse)
    positive, negative = scores if bias is None else scores + bias[items]
    return positive, negative


class RowScores(torch.autograd.Function):
    """``hidden [M, d]`` against the vectors of ``items [K, M]``: ``[K, M]``, without ever holding all these vectors."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, items: Tensor, item_vectors: Tensor, sparse: bool) -> Tensor:
        ctx.sparse = sparse
        ctx.save_for_backward(hidden, items, item_vectors)
        parts = zip(hidden.split(_ROWS), items.split(_ROWS, 1), strict=True)
        return torch.cat([(h * item_vectors[i]).sum(-1) for h, i in parts], 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gscores: Tensor) -> tuple[Tensor | None, ...]:
        hidden, items, table = ctx.saved_tensors
        ghidden = torch.empty_like(hidden)
        gtable = None if ctx.sparse else torch.zeros_like(table)
        for first in range(0, len(hidden), _ROWS):
            rows = slice(first, first + _ROWS)
            weights, chosen = gscores[:, rows].unsqueeze(-1), items[:, rows]
            ghidden[rows] = (weights * table[chosen]).sum(0)
            if gtable is not None:
                gtable.index_add_(0, chosen.flatten(), (weights * hidden[rows]).flatten(0, 1).to(table.dtype))
        if gtable is None:
            values = (gscores.unsqueeze(-1) * hidden).flatten(0, 1).to(table.dtype)
            gtable = torch.sparse_coo_tensor(items.reshape(1, -1), values, table.shape, check_invariants=False)
        return ghidden, None, gtable, None
