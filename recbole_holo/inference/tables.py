"""Tables of vectors in few bits, read by row and multiplied without ever being whole again."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recbole_holo.ops import quantization
from recbole_holo.ops.quantization import Quantized, dequantize, quantize, quantized_product

BITS = (*quantization.BITS, 16, 32)
_ROWS = 2**14  # of a table that are floats at a time


class CompressedTable(nn.Module):
    """``[n, d]`` in ``bits`` a number, optionally as the product of ``[n, rank]`` in these bits and ``[rank, d]``.

    32 is float, 16 is bfloat16, fewer are integers times a scale a row
    (:class:`~recbole_holo.ops.quantization.Quantized`). The low rank is the best in the least squares (Eckart & Young).

    Args:
        table: ``[n, d]``.
        bits: 4 to 8, 16 or 32.
        rank: at most d; None = all.
    """

    codes: Tensor  # [n, r]; of integers [n, bytes]
    scales: Tensor | None  # [n, 1]
    basis: Tensor | None  # [r, d]

    def __init__(self, table: Tensor, bits: int = 8, rank: int | None = None) -> None:
        super().__init__()
        basis, scales, table = None, None, table.detach().float()
        if rank is not None and rank < table.shape[1]:
            vectors = torch.linalg.eigh(table.double().T @ table.double())[1][:, -rank:].float()
            table, basis = table @ vectors, vectors.T.contiguous().bfloat16()
        self.bits, self.width = bits, table.shape[1]
        if bits >= 16:
            codes = table.clone() if bits == 32 else table.bfloat16()
        else:
            codes, scales, _, _ = quantize(table, bits)
        for name, value in (("codes", codes), ("scales", scales), ("basis", basis)):
            self.register_buffer(name, value)

    def extra_repr(self) -> str:
        return f"{len(self.codes)}, {self.width}, bits={self.bits}"

    def __len__(self) -> int:
        return len(self.codes)

    def forward(self, items: Tensor) -> Tensor:
        """Rows ``items [...]`` as floats: ``[..., d]``."""
        codes = self.codes[items]
        if self.scales is None:
            rows = codes.float()
        else:
            rows = dequantize(Quantized(codes, self.scales[items], self.bits, self.width))
        return rows if self.basis is None else rows @ self.basis.float()

    def scores(self, query: Tensor, bias: Tensor | None = None) -> Tensor:
        """``query [B, d]`` times every row: ``[B, n]``."""
        if self.basis is not None:
            query = query @ self.basis.float().T
        if self.scales is None:
            scores = torch.cat([query @ rows.float().T for rows in self.codes.split(_ROWS)], 1)
        else:
            scores = quantized_product(query, Quantized(self.codes, self.scales, self.bits, self.width))
        return scores if bias is None else scores + bias
