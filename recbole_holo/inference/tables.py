"""Tables of vectors in few bits, read by row and multiplied without ever being whole again."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BITS = (4, 8, 16, 32)
_ROWS = 2**14  # of a table that are floats at a time


class CompressedTable(nn.Module):
    """``[n, d]`` in ``bits`` a number, optionally as the product of ``[n, rank]`` in these bits and ``[rank, d]``.

    32 is float, 16 is bfloat16. 8 and 4 are integers from -127 to 127 and from -7 to 7 times a scale a row, which makes
    the row's largest number the largest integer. The low rank is the best in the least squares (Eckart & Young).

    Args:
        table: ``[n, d]``.
        bits: 4, 8, 16 or 32.
        rank: at most d; None = all.
    """

    codes: Tensor  # [n, r]; of four bits two a byte
    scales: Tensor | None  # [n, 1]
    basis: Tensor | None  # [r, d]

    def __init__(self, table: Tensor, bits: int = 8, rank: int | None = None) -> None:
        super().__init__()
        basis, table = None, table.detach().float()
        if rank is not None and rank < table.shape[1]:
            vectors = torch.linalg.eigh(table.double().T @ table.double())[1][:, -rank:].float()
            table, basis = table @ vectors, vectors.T.contiguous().bfloat16()
        self.bits, self.width = bits, table.shape[1]
        scales = None
        if bits == 32:
            codes = table.clone()
        elif bits == 16:
            codes = table.bfloat16()
        else:
            most = 2 ** (bits - 1) - 1
            scales = (table.abs().amax(1, keepdim=True) / most).half()
            safe = scales.float().clamp(min=torch.finfo(torch.float32).tiny)
            codes = (table / safe).round().clamp(-most, most).to(torch.int8)
            if bits == 4:
                pairs = F.pad(codes, (0, codes.shape[1] % 2)).add(8).to(torch.uint8)
                codes = pairs[:, ::2] | (pairs[:, 1::2] << 4)
        for name, value in (("codes", codes), ("scales", scales), ("basis", basis)):
            self.register_buffer(name, value)

    def extra_repr(self) -> str:
        return f"{len(self.codes)}, {self.width}, bits={self.bits}"

    def __len__(self) -> int:
        return len(self.codes)

    def forward(self, items: Tensor) -> Tensor:
        """Rows ``items [...]`` as floats: ``[..., d]``."""
        rows = self._floats(self.codes[items], None if self.scales is None else self.scales[items])
        return rows if self.basis is None else rows @ self.basis.float()

    def scores(self, query: Tensor, bias: Tensor | None = None) -> Tensor:
        """``query [B, d]`` times every row: ``[B, n]``."""
        if self.basis is not None:
            query = query @ self.basis.float().T
        every = (slice(first, first + _ROWS) for first in range(0, len(self), _ROWS))
        parts = (self._floats(self.codes[i], None if self.scales is None else self.scales[i]) for i in every)
        scores = torch.cat([query @ rows.T for rows in parts], 1)
        return scores if bias is None else scores + bias

    def _floats(self, codes: Tensor, scales: Tensor | None) -> Tensor:
        if self.bits == 4:
            codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)[..., : self.width].to(torch.int8) - 8
        return codes.float() if scales is None else codes.float() * scales.float()
