"""Sums of bound pairs: both forms against convolutions in float64, one by one."""

from __future__ import annotations

import pytest
import torch

from recbole_holo.ops import backend
from recbole_holo.ops.circular_convolution import circular_convolution
from recbole_holo.ops.superposition import FEW, superposes_rows, superposition, superposition_of_rows


def one_by_one(x, roles):
    return torch.stack([circular_convolution(x[..., j, :], roles[j]) for j in range(len(roles))]).sum(0)


@pytest.mark.parametrize("d", [1, 2, 7, 50, 64, 130])
@pytest.mark.parametrize("shape", [(1, 1), (3, 4), (2, 5, 3)])
def test_products_are_convolutions(compare, d, shape):
    compare(superposition, one_by_one, [torch.randn(*shape, d), torch.randn(shape[-1], d)])


@pytest.mark.parametrize("d", [1, 2, 7, 50, 64, 130])
@pytest.mark.parametrize("shape", [(1, 1), (700, 1), (5, 33, 4), (129, 8), (3, 5000, 2)])
@pytest.mark.parametrize("threads", [1, 3])
def test_rows_in_the_frequencies_are_convolutions(compare, d, shape, threads):
    """Also rows that occur often, once and never, and windows with the same row twice."""
    events = torch.randint(1, 90, shape)
    events[0, 0] = 91
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        compare(
            lambda table, roles: superposition_of_rows(table, events, roles),
            lambda table, roles: one_by_one(table[events], roles),
            [torch.randn(93, d), torch.randn(shape[-1], d)],
        )
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("row", [-1, 10, 2**40])
def test_an_event_that_is_no_row_is_an_error(row):
    with pytest.raises(IndexError, match=f"{row}.* of a table of 10 rows"):
        superposition_of_rows(torch.randn(10, 8), torch.tensor([[0, row]]), torch.randn(2, 8))


def test_autocast_leaves_it_in_float32():
    table, roles, events = torch.randn(40, 64), torch.randn(4, 64), torch.randint(40, (30, 4))
    wanted = superposition_of_rows(table, events, roles)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(superposition_of_rows(table, events, roles), wanted, rtol=0, atol=0)


def test_the_kernel_is_for_many_events_in_float32_on_a_cpu():
    many, roles = torch.zeros(FEW + 1, 4, dtype=torch.long), torch.randn(4, 64)
    assert superposes_rows(many, roles)
    assert not superposes_rows(many[: FEW // 8], roles)
    assert not superposes_rows(many, roles.double())
    with backend.excluding("native"):
        assert not superposes_rows(many, roles)
    backend.set_backend("reference")
    assert not superposes_rows(many, roles)
