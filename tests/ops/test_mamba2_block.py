from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from recbole_holo.ops import (
    Mamba2Sizes,
    Mamba2Weights,
    MambaState,
    backend,
    gated_rms_norm,
    mamba2_block,
    mamba2_block_with_state,
    mamba2_inner,
)

SHAPES = {
    "nothing fills a vector": {"blocks": 3, "model": 5, "headdim": 3, "heads": 4, "groups": 2, "order": 5},
    "everything does": {"blocks": 4, "model": 16, "headdim": 16, "heads": 2, "order": 64},
    "one wide block": {"model": 80, "headdim": 64, "heads": 2, "order": 20},
    "short convolution": {"blocks": 2, "width": 2},
}


def block_arguments(
    length: int, blocks=1, model=8, headdim=8, heads=2, groups=1, order=4, width=4, batch=3
) -> tuple[list[Tensor], Mamba2Sizes]:
    """``hidden``, then the weights, and the sizes."""
    inner = heads * headdim
    channels = inner + 2 * groups * order
    projected = inner + channels + heads
    tensors = [
        torch.randn(batch, length, blocks, model),
        torch.randn(blocks, projected, model) / model**0.5,
        torch.randn(blocks, projected),
        torch.randn(blocks, channels, width),
        torch.randn(blocks, channels),
        torch.randn(blocks, heads) - 3,
        -torch.rand(blocks, heads) * 8,
        torch.randn(blocks, heads),
        torch.randn(blocks, inner),
        torch.randn(blocks, model, inner) / inner**0.5,
        torch.randn(blocks, model),
    ]
    return tensors, Mamba2Sizes(headdim, groups, order, 1e-5, 8)


def chosen(op: str = "mamba2_block") -> str:
    return backend.choose(op, torch.zeros(1))


@pytest.mark.parametrize("length", [1, 3, 16, 33, 130])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_values_and_gradients(compare, length, shape):
    """In float32 the C++ block, in float64 the operations one by one."""
    tensors, sizes = block_arguments(length, **shape)

    def run(hidden, *weights):
        return mamba2_block(hidden, Mamba2Weights(*weights), sizes)

    assert chosen() == "native"
    compare(run, run, tensors, rtol=2e-5)


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_share_the_sequences(compare, threads):
    tensors, sizes = block_arguments(70, blocks=3, batch=2)

    def run(hidden, *weights):
        return mamba2_block(hidden, Mamba2Weights(*weights), sizes)

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        compare(run, run, tensors, rtol=2e-5)
    finally:
        torch.set_num_threads(before)


def test_without_biases(compare):
    tensors, sizes = block_arguments(20, blocks=2)
    absent = [i for i, name in enumerate(("hidden", *Mamba2Weights._fields)) if name.endswith("_bias")]
    absent.remove(5)
    tensors = [None if i in absent else t for i, t in enumerate(tensors)]

    def run(hidden, *weights):
        return mamba2_block(hidden, Mamba2Weights(*weights), sizes)

    compare(run, run, tensors, rtol=2e-5)


def test_blocks_side_by_side_are_independent():
    tensors, sizes = block_arguments(40, blocks=3)
    hidden, *weights = tensors
    together = mamba2_block(hidden, Mamba2Weights(*weights), sizes)
    for i in range(3):
        alone = mamba2_block(hidden[:, :, i : i + 1], Mamba2Weights(*(w[i : i + 1] for w in weights)), sizes)
        torch.testing.assert_close(together[:, :, i], alone[:, :, 0])


@pytest.mark.parametrize("length", [1, 2, 65])
def test_autocast_rounds_the_factors_of_products_only(length):
    tensors, sizes = block_arguments(length, blocks=2, model=16, headdim=16)
    inputs = [t.requires_grad_() for t in tensors]
    weights, found = torch.randn_like(inputs[0]), []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = mamba2_block(inputs[0], Mamba2Weights(*inputs[1:]), sizes)
        assert y.dtype == (torch.bfloat16 if enabled else torch.float32)
        found.append([y, *torch.autograd.grad((y.float() * weights).sum(), inputs)])
    for exact, rounded in zip(*found, strict=True):
        assert (exact - rounded).norm() <= 0.1 * exact.norm() + 1e-6


@pytest.fixture(params=["native", "native operations", "torch"])
def form(request):
    """The C++ block; with a single sequence and more threads, its operations; what there is without a compiler."""
    threads = torch.get_num_threads()
    if request.param == "native operations":
        torch.set_num_threads(3)
    try:
        with backend.excluding(*["native"] * (request.param == "torch")):
            yield request.param
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_parts_of_a_sequence_give_the_whole(form, shape):
    (hidden, *weights), sizes = block_arguments(150, batch=1, **shape)
    block, state, outputs = Mamba2Weights(*weights), None, []
    for part in hidden.split([1, 2, 70, 64, 13], 1):
        out, state = mamba2_block_with_state(part, block, sizes, state)
        outputs.append(out)
        assert state.conv.shape == (1, block.A.shape[0], weights[2].shape[2] - 1, weights[2].shape[1])
        assert state.ssm.shape == (1, *block.A.shape, sizes.headdim, sizes.d_state)
    expected = mamba2_block(hidden.double(), Mamba2Weights(*(w.double() for w in weights)), sizes)
    torch.testing.assert_close(torch.cat(outputs, 1).double(), expected, rtol=1e-4, atol=1e-5 * expected.abs().max())


def test_gradients_of_a_part_are_those_with_its_state_held_fixed(compare, form):
    (hidden, *weights), sizes = block_arguments(20, blocks=2, batch=1)
    _, state = mamba2_block_with_state(hidden, Mamba2Weights(*weights), sizes, None)

    def run(hidden, *weights):
        held = MambaState(*(t.to(hidden.dtype) for t in state))
        return mamba2_block_with_state(hidden, Mamba2Weights(*weights), sizes, held)[0]

    compare(run, run, [hidden, *weights], rtol=2e-5)


def test_no_gradient_reaches_the_state():
    (hidden, *weights), sizes = block_arguments(5)
    weights = [w.requires_grad_() for w in weights]
    _, state = mamba2_block_with_state(hidden, Mamba2Weights(*weights), sizes, None)
    assert not any(t.requires_grad for t in state)


def mamba2_arguments(length: int) -> list[torch.Tensor]:
    """d_inner 12, headdim 3, 4 heads, 2 groups, N 5."""
    channels = 12 + 2 * 2 * 5
    return [
        torch.randn(2, length, 12 + channels + 4),
        torch.randn(channels, 4),
        torch.randn(channels),
        torch.randn(4) - 3,
        -torch.rand(4) * 8,
        torch.randn(4),
        torch.randn(12),
    ]


def mamba2(*arguments: torch.Tensor, norm_before_gate: bool = False) -> torch.Tensor:
    return mamba2_inner(
        *arguments, 1e-5, headdim=3, ngroups=2, d_state=5, chunk_size=8, norm_before_gate=norm_before_gate
    )


@pytest.mark.parametrize("length", [1, 3, 33])
@pytest.mark.parametrize("norm_before_gate", [False, True])
def test_mamba2_inner(compare, length, norm_before_gate):
    def run(*arguments):
        return mamba2(*arguments, norm_before_gate=norm_before_gate)

    compare(run, run, mamba2_arguments(length), rtol=2e-5)


def test_norm_is_taken_group_by_group():
    y, z, weight = torch.randn(4, 7, 12), torch.randn(4, 7, 12), torch.randn(12)
    gated = y * F.silu(z)
    halves = [F.rms_norm(part, (6,), eps=1e-5) for part in gated.chunk(2, -1)]
    torch.testing.assert_close(gated_rms_norm(y, z, weight, 1e-5, ngroups=2), torch.cat(halves, -1) * weight)
    expected = F.rms_norm(y, (12,), weight, 1e-5) * F.silu(z)
    torch.testing.assert_close(gated_rms_norm(y, z, weight, 1e-5, norm_before_gate=True), expected)
