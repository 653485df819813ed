"""Mamba-2 blocks that read a sequence in parts; what they share with Mamba-1 is in test_mamba.py."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from recbole_holo.layers import LatentMamba2, Mamba2

BLOCKS = {
    "Mamba2": (lambda: Mamba2(20, d_state=5, headdim=8, ngroups=5), (20,)),
    "Mamba2 with biases": (lambda: Mamba2(16, d_state=16, headdim=16, bias=True), (16,)),
    "LatentMamba2": (lambda: LatentMamba2(3, 8, d_state=5, headdim=4), (3, 8)),
    "LatentMamba2, short convolution": (lambda: LatentMamba2(4, 16, d_state=64, headdim=16, d_conv=2), (4, 16)),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_parts_of_a_sequence_give_the_whole(name):
    torch.manual_seed(0)
    build, shape = BLOCKS[name]
    block, hidden = build(), torch.randn(2, 90, *shape)
    state, outputs = None, []
    for part in hidden.split([1, 2, 70, 17], 1):
        out, state = block.forward_from(part, state)
        outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, 1), block(hidden), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", BLOCKS)
def test_states_of_a_batch_can_be_picked_row_by_row(name):
    """The batch is the first dimension of every state: sequences can be left out or reordered between parts."""
    torch.manual_seed(0)
    build, shape = BLOCKS[name]
    block, hidden = build(), torch.randn(3, 20, *shape)
    _, state = block.forward_from(hidden[:, :11], None)
    rows = torch.tensor([2, 0])
    out, _ = block.forward_from(hidden[rows, 11:], type(state)(*(t[rows] for t in state)))
    torch.testing.assert_close(out, block(hidden)[rows, 11:], rtol=1e-4, atol=1e-5)


def test_a_part_trains_the_weights_but_not_through_its_state():
    block: nn.Module = LatentMamba2(2, 8, d_state=4, headdim=8)
    _, state = block.forward_from(torch.randn(2, 6, 2, 8), None)
    assert not any(t.requires_grad for t in state)
    out, _ = block.forward_from(torch.randn(2, 6, 2, 8), state)
    out.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in block.parameters())
