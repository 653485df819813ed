"""Attention without a softmax, linear in the length: the L2-normalised dot product of LinRec (arXiv 2411.01537)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from recbole_holo.ops import backend

KEY_NORMS = ("column", "position")
_TINY = 1e-24  # of a squared norm: an all-zero column gives 0, and a gradient of 0, instead of nan


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None = None,
    causal: bool = True,
    key_norm: str = "column",
    chunk_size: int = 64,
) -> Tensor:
    r"""``ρ₁(ELU(Q)) (ρ₂(ELU(K))ᵀ V) / √N`` for each head (Liu et al., SIGIR 2023).

    ρ₁ gives every query the L2 norm 1. What ρ₂ divides by is ``key_norm``:

    * ``column``, the paper's equation: each of the N columns of K, over all positions, gets norm 1;
    * ``position``, what the authors' code computes: each key gets norm 1, as the queries do.

    The paper has no mask, so every position sees all others: ``causal=False``. The causal form is ours: position ``t``
    sums over the positions ``s ≤ t``, and the norm of a column is the running one, over ``s ≤ t`` too. Position ``t``
    then has the value that the paper's form gives for the sequence cut off after ``t``, with either norm.

    Args:
        q, k: ``[batch, L, H, N]``: H heads of width N.
        v: ``[batch, L, H, P]``.
        valid: ``[batch, L]``, False where keys and values are left out (pads); None = all count. The causal form does
            not need it for pads that follow on the right.
        chunk_size: see :func:`causal_product`.

    Returns:
        ``[batch, L, H, P]`` in the type of ``v``. Computed in float32 (float64 inputs: float64).
    """
    dtype = v.dtype
    with backend.without_autocast(q):
        q, k, v = (backend.working(t).transpose(1, 2) for t in (q, k, v))  # [batch, H, L, ...]
        q = F.normalize(F.elu(q), dim=-1) * q.shape[-1] ** -0.5
        k = F.elu(k)
        if valid is not None:
            k = k * valid[:, None, :, None]
        if key_norm == "position":
            k = F.normalize(k, dim=-1)
        elif causal:
            # A column's norm so far scales all its entries alike, so it can divide the query instead of every key.
            q = q / k.square().cumsum(-2).clamp_min(_TINY).sqrt()
        else:
            k = F.normalize(k, dim=-2)
        y = causal_product(q, k, v, chunk_size) if causal else q @ (k.mT @ v)
        return y.transpose(1, 2).to(dtype)


def causal_product(q: Tensor, k: Tensor, v: Tensor, chunk_size: int = 64) -> Tensor:
    """``y_t = Σ_{s ≤ t} (q_t · k_s) v_s`` in ``O(L·(chunk_size·(N + P) + N·P))`` time.

    Chunks of equal length: inside one a masked product, between them the running sum of ``kᵀv``. Memory, what is kept
    for the gradient included, is ``L·(chunk_size + N·P / chunk_size)`` a head: linear in L, and of the size of the
    inputs while ``chunk_size`` is of the size of N and P.

    Args:
        q, k: ``[..., L, N]``.
        v: ``[..., L, P]``.
        chunk_size: positions multiplied out at once; changes speed and rounding only.

    Returns:
        ``[..., L, P]``.
    """
    length = q.shape[-2]
    chunks = -(-length // chunk_size)
    size = -(-length // chunks)  # even chunks: 65 positions are 33 + 32, not 64 + 1 and 63 of padding
    pad = (0, 0, 0, chunks * size - length)
    q, k, v = (F.pad(t, pad).unflatten(-2, (chunks, size)) for t in (q, k, v))
    y = (q @ k.mT).tril() @ v
    if chunks > 1:
        states = (k.mT @ v)[..., :-1, :, :].cumsum(-3)  # [..., chunks - 1, N, P]: before the second chunk, the third …
        y = y + q @ F.pad(states, (0, 0, 0, 0, 1, 0))
    return y.flatten(-3, -2)[..., :length, :]
