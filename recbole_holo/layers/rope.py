"""Rotary position embedding (Su et al., arXiv 2104.09864) with absolute positions."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary(x: Tensor, base: float = 10000.0, offset: int | Tensor = 0) -> Tensor:
    r"""Rotates coordinate ``i`` and ``i + d/2`` of the vector at position ``p`` by the angle ``p · base^(-2i/d)``.

    Positions are absolute: row ``t`` of ``x`` has position ``offset + t``. In attention only differences of positions
    survive the inner product of two rotated vectors; a rotated vector used by itself, as Hydra's gate, carries the
    position itself. So whoever computes a history piece by piece must pass where the piece starts.

    Args:
        x: ``[..., L, d]``, d even.
        base: the slowest pair turns with wavelength about ``2π · base`` positions.
        offset: position of the first row; an integer, or a tensor that broadcasts against ``x.shape[:-2]`` when rows
            of a batch start at different positions.

    Returns:
        ``[..., L, d]`` in the type of ``x``; norms are unchanged, and position 0 is unchanged.
    """
    length, d = x.shape[-2:]
    if d % 2:
        raise ValueError(f"rotary needs an even width, got {d}")
    half = torch.arange(d // 2, device=x.device, dtype=torch.float32)
    frequency = base ** (-2 * half / d)  # [d/2]
    start = offset.unsqueeze(-1) if isinstance(offset, Tensor) else offset
    position = start + torch.arange(length, device=x.device)  # [..., L]
    angle = position.unsqueeze(-1) * frequency  # [..., L, d/2], in float32 whatever the type of x
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)
