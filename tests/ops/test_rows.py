"""Rows of a matrix, and sums over threads: as PyTorch's own, with fewer parallel regions."""

import pytest
import torch

from recbole_holo.ops import native
from recbole_holo.ops.rows import select_rows


@pytest.mark.parametrize("count", [0, 1, 700, 1000])
def test_selected_rows_and_their_gradient(count):
    torch.manual_seed(count)
    rows = torch.randperm(1000)[:count].sort().values
    gradient = torch.randn(count, 16)
    found, wanted = [], []
    for kept, select in ((found, select_rows), (wanted, lambda x, rows: x.index_select(0, rows))):
        x = torch.randn(1000, 16, generator=torch.Generator().manual_seed(1)).requires_grad_()
        kept.append(select(x, rows))
        kept += torch.autograd.grad(kept[0], x, gradient)
    for one, other in zip(found, wanted, strict=True):
        assert torch.equal(one, other)


def test_in_other_types():
    x, rows = torch.randn(9, 3, dtype=torch.float64, requires_grad=True), torch.tensor([1, 4, 8])
    assert torch.autograd.gradcheck(lambda x: select_rows(x, rows), x)
    half = torch.randn(9, 3).bfloat16().requires_grad_()
    select_rows(half, rows).sum().backward()
    assert half.grad.dtype == torch.bfloat16
    assert half.grad.sum(1).nonzero().flatten().tolist() == [1, 4, 8]


@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_sums_of_threads_have_the_same_bits(threads):
    torch.manual_seed(0)
    sums = torch.randn(threads, 70_001)
    assert torch.equal(native.total(sums), sums.sum(0))
