"""Clean-up memory: the known vector that a noisy one, such as what unbinding gives, was (Plate, 1995)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_ROWS = 4096  # of the noisy vectors that are compared at a time


def cleanup(noisy: Tensor, known: Tensor, k: int = 1) -> tuple[Tensor, Tensor]:
    """The ``k`` rows of ``known`` with the largest cosine to each noisy vector, largest first.

    Args:
        noisy: ``[..., d]``.
        known: ``[n, d]``; a zero row is like nothing (cosine 0). k is n at most.

    Returns:
        Cosines and row numbers, ``[..., k]`` each.

    >>> cleanup(torch.tensor([0.9, 0.1]), torch.eye(2))[1].tolist()
    [0]
    """
    known = F.normalize(known, dim=-1)
    flat = F.normalize(noisy, dim=-1).reshape(-1, noisy.shape[-1])
    parts = [(rows @ known.T).topk(min(k, len(known)), -1) for rows in flat.split(_ROWS)]
    values, numbers = zip(*parts, strict=True)
    shape = (*noisy.shape[:-1], -1)
    return torch.cat(values).reshape(shape), torch.cat(numbers).reshape(shape)
