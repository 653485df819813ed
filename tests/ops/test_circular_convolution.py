import doctest
import importlib

import pytest
import torch

from recbole_holo.errors import ConfigError
from recbole_holo.ops import bind, circular_convolution, circular_correlation, unbind, unitary

WIDTHS = (1, 2, 7, 16, 33)


def by_hand(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    d = a.shape[-1]
    return torch.stack([sum(a[..., i] * b[..., (k - i) % d] for i in range(d)) for k in range(d)], -1)


@pytest.mark.parametrize("d", WIDTHS)
def test_convolution_is_the_sum_of_products(compare, d):
    inputs = [torch.randn(3, 4, d), torch.randn(4, d)]
    compare(circular_convolution, by_hand, inputs)
    compare(lambda a, b: circular_convolution(a, b, scale="ortho"), lambda a, b: by_hand(a, b) / d**0.5, inputs)


@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("scale", ["none", "ortho"])
def test_correlation_is_the_sum_of_products(compare, d, scale):
    def by_hand(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        products = [sum(a[..., i] * b[..., (k + i) % d] for i in range(d)) for k in range(d)]
        return torch.stack(products, -1) / (d**0.5 if scale == "ortho" else 1)

    compare(lambda a, b: circular_correlation(a, b, scale), by_hand, [torch.randn(4, d), torch.randn(3, 4, d)])


@pytest.mark.parametrize("d", WIDTHS)
def test_correlation_is_convolution_with_the_reversed_index(d):
    a, b = torch.randn(3, d), torch.randn(3, d)
    reversed_a = a[..., [-i % d for i in range(d)]]
    torch.testing.assert_close(circular_correlation(a, b), circular_convolution(reversed_a, b))


@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize("scale", ["none", "ortho"])
def test_unitary_keys_unbind_exactly_and_keep_lengths(d, scale):
    key, value = unitary(torch.randn(5, d), scale), torch.randn(5, d)
    bound = bind(key, value, scale)
    torch.testing.assert_close(unbind(bound, key, scale), value)
    torch.testing.assert_close(bound.norm(dim=-1), value.norm(dim=-1))
    expected = torch.ones(5) * (d**0.5 if scale == "ortho" else 1.0)
    torch.testing.assert_close(key.norm(dim=-1), expected)
    torch.testing.assert_close(unitary(key, scale), key)


def test_random_keys_unbind_approximately():
    key, value = torch.randn(2, 4096)
    similarity = torch.cosine_similarity(unbind(bind(key, value, "ortho"), key, "ortho"), value, dim=0)
    assert 0.6 < similarity < 0.8  # 1/√2 for Gaussian keys


def test_orthonormal_scale_keeps_the_variance():
    bound = bind(torch.randn(200, 96), torch.randn(200, 96), scale="ortho")
    assert bound.var() == pytest.approx(1.0, abs=0.1)


@pytest.mark.parametrize("d", [1, 6, 7])
def test_unitary_of_an_empty_spectrum(d):
    x = torch.zeros(2, d, requires_grad=True)
    y = unitary(x)
    torch.testing.assert_close(y.detach(), torch.eye(d)[[0, 0]])
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    assert gradient.isfinite().all()
    constant = torch.full((d,), 3.0, requires_grad=True)  # every frequency but zero is empty
    y = unitary(constant)
    torch.testing.assert_close(y.norm(), torch.tensor(1.0))
    y[0].backward()
    assert constant.grad.isfinite().all()


def test_gradients_of_unitary():
    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(unitary, (x,))


def test_types():
    a, b = torch.randn(3, 12), torch.randn(3, 12)
    y = bind(a.bfloat16(), b.bfloat16())
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, bind(a.bfloat16().float(), b.bfloat16().float()).bfloat16())
    assert bind(a.bfloat16(), b).dtype == torch.float32
    assert bind(a.double(), b.double()).dtype == torch.float64
    torch.testing.assert_close(bind(a.double(), b.double()), by_hand(a.double(), b.double()))


def test_unknown_scale():
    with pytest.raises(ConfigError, match=r"scale: 'orto'.*did you mean ortho"):
        bind(torch.randn(4), torch.randn(4), scale="orto")


def test_examples_of_the_docstrings():
    module = importlib.import_module("recbole_holo.ops.circular_convolution")
    result = doctest.testmod(module)
    assert result.attempted >= 5
    assert result.failed == 0
