"""Matrices in 4 to 8 bits a number: made, read, and multiplied without ever being whole again."""

from __future__ import annotations

import ctypes
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from recbole_holo.ops import backend, native

BITS = (4, 5, 6, 7, 8)
_PLANES = {4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}  # bits that lie together, the lowest first
_ROWS = 2**14  # that are floats at a time
_FEW = 16  # queries up to which rows are multiplied as they are read


class Quantized(NamedTuple):
    """``[n, d]``: integers from -127 (of 8 bits) or -7 (of 4) up to these, times a scale a row, which makes the row's
    largest number the largest integer."""

    codes: Tensor  # [n, bytes] uint8: plane by plane, in a byte are numbers d/2 (of 4 bits), d/4 or d/8 apart
    scales: Tensor  # [n, 1] float16
    bits: int
    width: int


def quantize(matrix: Tensor, bits: int) -> Quantized:
    """``matrix [n, d]`` in ``bits`` a number; what is read again is within half a step of it."""
    matrix, most = matrix.float(), 2 ** (bits - 1) - 1
    scales = (matrix.abs().amax(1, keepdim=True) / most).half()
    safe = scales.float().clamp(min=torch.finfo(torch.float32).tiny)
    numbers = (matrix / safe).round().clamp(-most, most).add(most + 1).to(torch.uint8)
    planes, done = [], 0
    for plane in _PLANES[bits]:
        a_byte = 8 // plane
        part = (numbers >> done) & (2**plane - 1)
        parts = F.pad(part, (0, -part.shape[1] % a_byte)).chunk(a_byte, 1)
        planes.append(torch.stack([part << plane * i for i, part in enumerate(parts)]).sum(0, dtype=torch.uint8))
        done += plane
    return Quantized(torch.cat(planes, 1), scales, bits, matrix.shape[1])


def dequantize(matrix: Quantized) -> Tensor:
    """``[n, d]`` float32. The codes may have other dimensions in front: ``[..., bytes]`` → ``[..., d]``."""
    codes, scales, bits, width = matrix
    sizes = [-(-width * plane // 8) for plane in _PLANES[bits]]
    numbers, done = torch.zeros((), dtype=torch.uint8, device=codes.device), 0
    for plane, part in zip(_PLANES[bits], codes.split(sizes, -1), strict=True):
        parts = [(part >> plane * i) & (2**plane - 1) for i in range(8 // plane)]
        numbers = numbers | (torch.cat(parts, -1)[..., :width] << done)
        done += plane
    return (numbers.float() - 2 ** (bits - 1)) * scales.float()


@torch.no_grad()
def quantized_product(query: Tensor, matrix: Quantized) -> Tensor:
    """``query [B, d]`` times every row: ``[B, n]`` float32, without a gradient.

    For few queries on a CPU a C++ kernel has a row's numbers in the cache only: one query and 100,000 rows of 64 take
    one core 1.4, 9.6, 5.5 and 2.1 ms in 8, 7, 6 and 4 bits, 1.4 ms in float32.
    """
    query = query.float()
    if len(query) <= _FEW and backend.runs_native(query):
        codes, query, scales = matrix.codes.contiguous(), query.contiguous(), matrix.scales.float()
        out = query.new_empty(len(query), len(codes))
        sizes = Sizes(len(codes), matrix.width, matrix.bits, codes.shape[1], len(query))
        given = map(native.pointer, (codes, scales, query, out))
        native.library().quantized_product(ctypes.byref(sizes), torch.get_num_threads(), *given)
        return out
    every = (slice(first, first + _ROWS) for first in range(0, len(matrix.codes), _ROWS))
    parts = (matrix._replace(codes=matrix.codes[rows], scales=matrix.scales[rows]) for rows in every)
    return torch.cat([query @ dequantize(part).T for part in parts], 1)


Sizes = native.structure("Sizes", "rows width bits bytes queries")
