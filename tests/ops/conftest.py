"""Comparison of values and gradients with a float64 reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

from recbole_holo.ops import backend

Compare = Callable[..., None]


@pytest.fixture(autouse=True)
def _automatic_backend() -> Iterator[None]:
    torch.manual_seed(0)
    backend.set_backend("auto")
    yield
    backend.set_backend("auto")


@pytest.fixture
def compare() -> Compare:
    """``compare(f, reference, inputs)``: equal values and gradients, relative to the largest entry of each.

    ``inputs`` are float64; ``f`` gets them in float32, ``reference`` the same rounded values in float64. None inputs
    are passed on. A gradient that vanishes in exact arithmetic may be rounding noise.
    """

    def check(
        function: Callable[..., Tensor],
        reference: Callable[..., Tensor],
        inputs: Sequence[Tensor | None],
        rtol: float = 1e-5,
    ) -> None:
        single = [None if t is None else t.detach().float().requires_grad_() for t in inputs]
        double = [None if t is None else t.detach().double().requires_grad_() for t in single]
        y, expected = function(*single), reference(*double)
        assert y.dtype == torch.float32
        weights = torch.randn_like(expected)
        gradients = torch.autograd.grad(y, [t for t in single if t is not None], weights.float())
        references = torch.autograd.grad(expected, [t for t in double if t is not None], weights)
        for name, a, b in zip(
            ["value", *(f"gradient {i}" for i in range(len(gradients)))],
            [y, *gradients],
            [expected, *references],
            strict=True,
        ):
            assert a.shape == b.shape
            error, size = (a.double() - b).abs().max().item(), b.abs().max().item()
            assert error <= rtol * max(size, 1e-3), f"{name}: error {error:.1e} of {size:.1e}"

    return check
