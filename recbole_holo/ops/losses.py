r"""Losses on the hidden states of supervised positions, and the negatives they need.

All take ``hidden [M, d]`` (positions without a target are removed before), ``targets [M]`` (item ids from 1) and the
item table ``item_vectors [V, d]``, optionally with a ``bias [V]``, and return the mean over the M positions. Item 0 is
the pad.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

_LOGITS_AT_ONCE = 2**26  # elements of [M, V]: 256 MiB in float32, and as much again for their gradient
_LOGITS_PER_CHUNK = 2**24


def cross_entropy(
    hidden: Tensor,
    targets: Tensor,
    item_vectors: Tensor,
    bias: Tensor | None = None,
    chunk_size: int | None = None,
    exclude_pad: bool = False,
) -> Tensor:
    r"""Softmax cross-entropy over the whole catalogue.

    Args:
        hidden: ``[M, d]``.
        targets: ``[M]``.
        item_vectors: ``[V, d]``.
        bias: ``[V]``, added to the scores.
        chunk_size: rows whose scores exist at one time; the others are computed in turn and again in the backward
            pass. None decides by size: all rows at once up to 2²⁶ scores, else chunks of about 2²⁴.
        exclude_pad: leave item 0 out of the softmax. RecBole's losses keep it in, hence the default.

    Returns:
        Scalar.
    """
    if exclude_pad:
        item_vectors, targets = item_vectors[1:], targets - 1
        bias = None if bias is None else bias[1:]
    rows, items = hidden.shape[0], item_vectors.shape[0]
    if chunk_size is None:
        chunk_size = rows if rows * items <= _LOGITS_AT_ONCE else max(1, _LOGITS_PER_CHUNK // items)
    if chunk_size >= rows:
        return _summed_cross_entropy(hidden, targets, item_vectors, bias) / rows
    total = hidden.new_zeros((), dtype=torch.float32)
    for part, wanted in zip(hidden.split(chunk_size), targets.split(chunk_size), strict=True):
        total = total + checkpoint(
            _summed_cross_entropy, part, wanted, item_vectors, bias, use_reentrant=False, preserve_rng_state=False
        )
    return total / rows


def info_nce(
    hidden: Tensor,
    targets: Tensor,
    item_vectors: Tensor,
    negatives: Tensor,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    cosine: bool = False,
) -> Tensor:
    r"""``-log( exp(s⁺/τ) / (exp(s⁺/τ) + Σ_k exp(s⁻_k/τ)) )`` with one positive and K negatives.

    A negative that happens to be the target of its row is left out of the sum.

    Args:
        hidden: ``[M, d]``.
        targets: ``[M]``.
        item_vectors: ``[V, d]``.
        negatives: ``[K]``, shared by all rows, or ``[M, K]``.
        bias: ``[V]``, added to the scores.
        temperature: τ, a number or a scalar tensor.
        cosine: score by the cosine instead of the dot product.

    Returns:
        Scalar.
    """
    positive_vectors, negative_vectors = item_vectors[targets], item_vectors[negatives]
    if cosine:
        hidden = F.normalize(hidden, dim=-1)
        positive_vectors, negative_vectors = (F.normalize(v, dim=-1) for v in (positive_vectors, negative_vectors))
    positive = (hidden * positive_vectors).sum(-1)  # [M]
    if negatives.dim() == 1:
        negative = hidden @ negative_vectors.T  # [M, K]
    else:
        negative = torch.bmm(negative_vectors, hidden.unsqueeze(-1)).squeeze(-1)
    if bias is not None:
        positive, negative = positive + bias[targets], negative + bias[negatives]
    scores = torch.cat([positive.unsqueeze(-1), negative.to(positive.dtype)], -1).float() / temperature
    hit = F.pad(negatives == targets.unsqueeze(-1), (1, 0))  # after the division: -inf / τ has no gradient for τ
    scores = scores.masked_fill(hit, -torch.inf)
    return (scores.logsumexp(-1) - scores[:, 0]).mean()


def bpr(hidden: Tensor, targets: Tensor, negatives: Tensor, item_vectors: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""``-log σ(s⁺ - s⁻)`` with one negative a row: ``negatives [M]``. Returns a scalar."""
    positive = _scores(hidden, targets, item_vectors, bias)
    negative = _scores(hidden, negatives, item_vectors, bias)
    return -F.logsigmoid(positive - negative).mean()


def bce(hidden: Tensor, targets: Tensor, negatives: Tensor, item_vectors: Tensor, bias: Tensor | None = None) -> Tensor:
    r"""``-log σ(s⁺) - log(1 - σ(s⁻))`` with one negative a row: ``negatives [M]``. Returns a scalar."""
    positive = _scores(hidden, targets, item_vectors, bias)
    negative = _scores(hidden, negatives, item_vectors, bias)
    return (F.softplus(-positive) + F.softplus(negative)).mean()


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


def _summed_cross_entropy(hidden: Tensor, targets: Tensor, item_vectors: Tensor, bias: Tensor | None) -> Tensor:
    return F.cross_entropy(F.linear(hidden, item_vectors, bias), targets, reduction="sum")


def _scores(hidden: Tensor, items: Tensor, item_vectors: Tensor, bias: Tensor | None) -> Tensor:
    """Score of one item a row: ``[M, d]``, ``[M]`` → ``[M]``."""
    scores = (hidden * item_vectors[items]).sum(-1)
    return scores if bias is None else scores + bias[items]
