"""Steps of single blocks, and of stacks traced into programs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from recbole_holo.layers import LatentMamba2, Mamba
from recbole_holo.layers.carried import Carried, through
from recbole_holo.layers.mamba2 import Mamba2
from recbole_holo.layers.rope import Rotary
from recbole_holo.layers.traced_step import step_program
from recbole_holo.ops import backend
from recbole_holo.ops.mamba_block import MambaState

BLOCKS = {
    "mamba": (lambda: Mamba(24, d_state=5, d_conv=3, bias=True), (24,)),
    "mamba, filling vectors": (lambda: Mamba(64), (64,)),
    "mamba without conv bias": (lambda: Mamba(16, conv_bias=False, d_conv=2), (16,)),
    "mamba2": (lambda: Mamba2(20, d_state=12, headdim=5, ngroups=2, bias=True), (20,)),
    "latent": (lambda: LatentMamba2(3, 10, d_state=6, headdim=4), (3, 10)),
    "latent, filling vectors": (lambda: LatentMamba2(4, 16, d_state=16), (4, 16)),
}


def state_of(block: Any, batch: int) -> MambaState:
    return MambaState(*(torch.randn(batch, *shape) for shape in block.state_shapes()))


@pytest.fixture(params=["native", "composed", "reference"])
def implementation(request: pytest.FixtureRequest):
    if request.param == "native":
        yield
    elif request.param == "composed":
        with backend.excluding("native"):
            yield
    else:
        backend.set_backend("reference")
        yield
        backend.set_backend("auto")


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("batch", [1, 2, 24, 57])
def test_a_step_of_a_block_is_a_part_of_one_step(name: str, batch: int) -> None:
    """Values and states against float64, states in rows of a larger table as a recommender keeps them."""
    make, width = BLOCKS[name]
    torch.manual_seed(0)
    block = make().eval()
    hidden, state = torch.randn(batch, *width), state_of(block, batch)
    with torch.no_grad():
        exact = copy.deepcopy(block).double()
        expected, after = exact.forward_from(hidden.double().unsqueeze(1), MambaState(*(t.double() for t in state)))
        sizes = [t[0].numel() for t in state]
        table = torch.full((batch, 7 + sum(sizes) + 3), torch.nan)
        table[:, 7 : 7 + sum(sizes)] = torch.cat([t.flatten(1) for t in state], 1)
        views = table[:, 7 : 7 + sum(sizes)].split(sizes, 1)
        rows = MambaState(*(view.view(batch, *t.shape[1:]) for view, t in zip(views, state, strict=True)))
        found = block.step(hidden, rows)
    torch.testing.assert_close(found.double(), expected[:, 0], rtol=1e-4, atol=1e-5)
    for tensor, wanted in zip(rows, after, strict=True):
        torch.testing.assert_close(tensor.double(), wanted, rtol=1e-4, atol=1e-5)
    assert table[:, :7].isnan().all()
    assert table[:, -3:].isnan().all()


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("name", BLOCKS)
def test_parts_of_unequal_lengths(name: str) -> None:
    make, width = BLOCKS[name]
    torch.manual_seed(0)
    block, lengths = make().eval(), torch.tensor([0, 1, 2, 6, 11])
    hidden, state = torch.randn(5, 11, *width), state_of(block, 5)
    with torch.no_grad():
        out, after = block.forward_from(hidden, state, lengths)
        for row, length in enumerate(lengths.tolist()):
            own = MambaState(*(t[row : row + 1] for t in state))
            if length:
                expected, own = block.forward_from(hidden[row : row + 1, :length], own)
                torch.testing.assert_close(out[row, :length], expected[0], rtol=1e-4, atol=1e-5)
            for tensor, wanted in zip(after, own, strict=True):
                torch.testing.assert_close(tensor[row], wanted[0], rtol=1e-4, atol=1e-5)


class Stack(nn.Module):
    """What a model's encoder may do: ``odd`` is an operation that programs do not know."""

    def __init__(self, odd: bool) -> None:
        super().__init__()
        self.first, self.mamba, self.second = nn.Linear(20, 20), Mamba(20, d_state=5), nn.RMSNorm(20, eps=1e-6)
        self.latent, self.rotary, self.odd = LatentMamba2(2, 10, d_state=4), Rotary(2), odd

    def encode_vectors(self, x: Tensor, carried: Carried | None = None) -> Tensor:
        h = 0.5 * torch.nn.functional.silu(self.first(x))
        h = h + through(self.mamba, self.second(h), carried)
        g = self.rotary(h.unflatten(-1, (2, 10)), carried.position if carried else 0)
        h = (through(self.latent, h.unflatten(-1, (2, 10)), carried) * g).flatten(-2) + x
        return h.tanh() if self.odd else self.second(h)


@pytest.mark.parametrize("batch", [1, 30])
def test_a_traced_stack(batch: int) -> None:
    torch.manual_seed(0)
    stack = Stack(odd=False).eval()
    with torch.no_grad():
        stack.second.weight.copy_(torch.rand(20))
    sizes = [torch.Size(shape).numel() for b in (stack.mamba, stack.latent) for shape in b.state_shapes()]
    starts = [sum(sizes[:i]) for i in range(4)]
    places = {stack.mamba: tuple(starts[:2]), stack.latent: tuple(starts[2:])}
    program = step_program(stack, 20, places)
    assert program is not None
    items, numbers = torch.randn(batch, 9, 20), torch.zeros(batch, sum(sizes))
    found = torch.stack([program(x, torch.full((batch,), t), numbers) for t, x in enumerate(items.unbind(1))], 1)
    with torch.no_grad():
        torch.testing.assert_close(found, stack.encode_vectors(items), rtol=1e-4, atol=1e-5)


def test_a_stack_that_cannot_be_traced_has_no_program() -> None:
    stack = Stack(odd=True).eval()
    assert step_program(stack, 20, {stack.mamba: (0, 0), stack.latent: (0, 0)}) is None
