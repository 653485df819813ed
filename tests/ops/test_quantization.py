"""Matrices in few bits: what is read again, and products with them, against the same numbers in float64."""

from __future__ import annotations

import pytest
import torch

from recbole_holo.ops import backend
from recbole_holo.ops.quantization import BITS, dequantize, quantize, quantized_product


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("width", [1, 2, 3, 5, 16, 50, 64, 65])
def test_codes_hold_the_nearest_integers(bits, width):
    torch.manual_seed(width)
    matrix = torch.randn(40, width, dtype=torch.double) * torch.logspace(-1, 3, 40).unsqueeze(1)
    matrix[7] = 0
    made, most = quantize(matrix, bits), 2 ** (bits - 1) - 1
    assert made.codes.shape[1] == sum(
        -(-width * plane // 8) for plane in {4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}[bits]
    )
    scales = made.scales.double()
    torch.testing.assert_close(scales * most, matrix.abs().amax(1, keepdim=True), rtol=1e-3, atol=0)
    integers = torch.where(scales > 0, matrix / scales, 0).float().round().clamp(-most, most)
    torch.testing.assert_close(dequantize(made), (integers * scales).float())
    again = quantize(dequantize(made), bits)
    assert torch.equal(again.codes, made.codes)  # stored once more, nothing is lost
    assert torch.equal(again.scales, made.scales)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("rows", "width", "queries"), [(1, 1, 1), (17, 5, 3), (100, 64, 16), (33, 50, 17), (9, 130, 1)]
)
@pytest.mark.parametrize("native", [True, False])
def test_products_are_those_of_the_numbers(bits, rows, width, queries, native, monkeypatch):
    torch.manual_seed(rows)
    matrix, query = quantize(torch.randn(rows, width), bits), torch.randn(queries, width)
    wanted = query.double() @ dequantize(matrix).double().T
    monkeypatch.setattr("recbole_holo.ops.quantization._ROWS", 7)
    with backend.excluding(*(() if native else ("native",))):
        found = quantized_product(query, matrix)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-5 * wanted.abs().max().item() + 1e-7)


def test_a_column_of_queries_need_not_be_contiguous():
    matrix, query = quantize(torch.randn(20, 8), 6), torch.randn(8, 2)
    torch.testing.assert_close(quantized_product(query.T, matrix), query.T @ dequantize(matrix).T)
