"""LinRec's attention against its equation, one position at a time in float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from recbole_holo.ops.linear_attention import causal_product, linear_attention


def inputs(length: int, batch: int = 2, heads: int = 2, n: int = 5, p: int = 3) -> list[Tensor]:
    return [torch.randn(batch, length, heads, width, dtype=torch.float64) for width in (n, n, p)]


def by_definition(
    q: Tensor, k: Tensor, v: Tensor, valid: Tensor | None = None, causal: bool = True, key_norm: str = "column"
) -> Tensor:
    """The paper's equation for every position, with the keys and values that this position may see."""
    batch, length, heads, n = q.shape
    q, k = F.elu(q), F.elu(k)
    out = []
    for b in range(batch):
        for t in range(length):
            seen = [s for s in range(t + 1 if causal else length) if valid is None or valid[b, s]]
            for h in range(heads):
                keys = k[b, seen, h]
                keys = keys / keys.norm(dim=0 if key_norm == "column" else 1, keepdim=True)
                out.append(q[b, t, h] / q[b, t, h].norm() @ (keys.T @ v[b, seen, h]) / n**0.5)
    return torch.stack(out).view(batch, length, heads, -1)


@pytest.mark.parametrize("length", [2, 7, 16, 17, 65, 129])
@pytest.mark.parametrize("key_norm", ["column", "position"])
@pytest.mark.parametrize("causal", [True, False])
def test_values_and_gradients_are_those_of_the_equation(length, key_norm, causal, compare):
    settings = {"causal": causal, "key_norm": key_norm}
    compare(partial(linear_attention, **settings, chunk_size=16), partial(by_definition, **settings), inputs(length))


@pytest.mark.parametrize("causal", [True, False])
def test_one_position(causal, compare):
    settings = {"causal": causal, "key_norm": "position"}
    compare(partial(linear_attention, **settings), partial(by_definition, **settings), inputs(1))
    q, k, v = (t.requires_grad_() for t in inputs(1))
    y = linear_attention(q, k, v, causal=causal)  # of a column of one number, the norm leaves the sign
    query = F.elu(q) / F.elu(q).norm(dim=-1, keepdim=True)
    torch.testing.assert_close(y, (query * k.sign()).sum(-1, keepdim=True) / 5**0.5 * v)
    torch.testing.assert_close(torch.autograd.grad(y.sum(), k)[0], torch.zeros_like(k))


@pytest.mark.parametrize("key_norm", ["column", "position"])
def test_a_long_sequence_in_chunks(key_norm, compare):
    """Against the same sum with a matrix of all pairs of positions."""

    def pairwise(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        q, k = F.normalize(F.elu(q), dim=-1), F.elu(k)
        norm = k.square().cumsum(-2).sqrt() if key_norm == "column" else k.new_ones(1)
        k = k if key_norm == "column" else F.normalize(k, dim=-1)
        return (((q / norm) @ k.mT).tril() @ v / q.shape[-1] ** 0.5).transpose(1, 2)

    compare(partial(linear_attention, key_norm=key_norm), pairwise, inputs(1501, batch=1, n=8, p=8), rtol=2e-5)


@pytest.mark.parametrize("key_norm", ["column", "position"])
def test_the_causal_form_is_the_papers_form_of_each_prefix(key_norm):
    q, k, v = inputs(19)
    causal = linear_attention(q, k, v, key_norm=key_norm, chunk_size=4)
    for t in (0, 3, 4, 18):
        prefix = linear_attention(q[:, : t + 1], k[:, : t + 1], v[:, : t + 1], causal=False, key_norm=key_norm)
        torch.testing.assert_close(causal[:, t], prefix[:, -1])
    assert (causal[:, 3] - linear_attention(q, k, v, causal=False, key_norm=key_norm)[:, 3]).abs().max() > 1e-2


@pytest.mark.parametrize("key_norm", ["column", "position"])
def test_what_is_not_valid_is_left_out(key_norm, compare):
    valid = torch.tensor([[True] * 6 + [False] * 3, [True] * 9])
    settings = {"valid": valid, "causal": False, "key_norm": key_norm}
    compare(partial(linear_attention, **settings), partial(by_definition, **settings), inputs(9))
    q, k, v = inputs(9)
    cut = linear_attention(q[:1, :6], k[:1, :6], v[:1, :6], causal=False, key_norm=key_norm)
    torch.testing.assert_close(linear_attention(q, k, v, **settings)[:1, :6], cut)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("key_norm", ["column", "position"])
def test_zero_keys_give_zeros_and_finite_gradients(causal, key_norm):
    q, k, v = (t.float().requires_grad_() for t in inputs(5))
    y = linear_attention(q, torch.zeros_like(k) * k, v, torch.zeros(2, 5, dtype=torch.bool), causal, key_norm)
    assert not y.any()
    y.sum().backward()
    assert all(t.grad.isfinite().all() for t in (q, k, v))


def test_the_chunk_size_changes_nothing_but_rounding():
    q, k, v = inputs(50)
    expected = (q @ k.mT).tril() @ v
    for chunk_size in (1, 7, 49, 50, 64):
        torch.testing.assert_close(causal_product(q, k, v, chunk_size), expected)


def test_half_precision_is_computed_in_single():
    q, k, v = (t.bfloat16() for t in inputs(40))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = linear_attention(q, k, v)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, linear_attention(q.float(), k.float(), v.float()).bfloat16(), rtol=0, atol=0)


def test_memory_is_linear_in_the_length_and_never_length_times_width_squared():
    def kept(length: int, width: int = 64) -> int:
        """Numbers kept for the gradient."""
        storages = {}

        def pack(t: Tensor) -> Tensor:
            storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes() // 4
            return t

        q, k, v = (torch.randn(1, length, 1, width, requires_grad=True) for _ in range(3))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            alive = linear_attention(q, k, v)
        assert alive.shape == v.shape
        return sum(storages.values())

    short, long = kept(1024), kept(2048)
    assert long < 2.1 * short
    assert long < 16 * 2048 * 64  # of the size of some inputs; L·d² would be that of 64, L² that of 32
