"""Rotary position embedding (Su et al., arXiv 2104.09864) with absolute positions."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn


@lru_cache(maxsize=16)
def _frequencies(d: int, base: float, device: torch.device) -> Tensor:
    """``base^(-2i/d)``: ``[d/2]``."""
    return base ** (-2 * torch.arange(d // 2, device=device, dtype=torch.float32) / d)


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
    start = offset.unsqueeze(-1) if isinstance(offset, Tensor) else offset
    position = start if length == 1 and isinstance(start, Tensor) else start + torch.arange(length, device=x.device)
    angle = position.unsqueeze(-1) * _frequencies(d, base, x.device)  # [..., L, d/2], in float32 whatever x is
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1)


class Rotary(nn.Module):
    """:func:`rotary` of the heads of a sequence.

    Args:
        heads: how many.
        base: of the wavelengths.
    """

    def __init__(self, heads: int, base: float = 10000.0) -> None:
        super().__init__()
        self.heads, self.base = heads, base

    def forward(self, x: Tensor, start: int | Tensor = 0) -> Tensor:
        """``[B, L, heads, d]``, the first at position ``start`` (one, or of each sequence ``[B]``) → likewise."""
        offset = start.unsqueeze(-1) if isinstance(start, Tensor) else start
        return rotary(x.transpose(1, 2), self.base, offset).transpose(1, 2)

    def frequencies(self, d: int) -> Tensor:
        """Radians a position of the pairs of coordinates ``[d/2]``."""
        return _frequencies(d, self.base, torch.device("cpu"))
