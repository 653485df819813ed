import pytest
import torch

from recbole_holo.ops import MambaState, MambaWeights, mamba_block, mamba_block_with_state


def mamba_arguments(length: int, d_model=5, d_inner=10, order=3, rank=2, width=4, batch=3) -> list[torch.Tensor]:
    return [
        torch.randn(batch, length, d_model),
        torch.randn(2 * d_inner, d_model) / d_model**0.5,
        torch.randn(2 * d_inner),
        torch.randn(d_inner, width),
        torch.randn(d_inner),
        torch.randn(rank + 2 * order, d_inner) / d_inner**0.5,
        torch.randn(d_inner, rank),
        torch.randn(d_inner) - 3,
        -torch.rand(d_inner, order) * 8,
        torch.randn(d_inner),
        torch.randn(d_model, d_inner) / d_inner**0.5,
        torch.randn(d_model),
    ]


def mamba(hidden: torch.Tensor, *weights: torch.Tensor) -> torch.Tensor:
    return mamba_block(hidden, MambaWeights(*weights))


SHAPES = {
    "nothing fills a vector": {"d_model": 5, "d_inner": 10, "order": 3},
    "everything does": {"d_model": 16, "d_inner": 32, "order": 16},
    "wider than a panel": {"d_model": 80, "d_inner": 160, "order": 20, "rank": 5},
    "short convolution": {"width": 2},
}


@pytest.mark.parametrize("length", [1, 3, 16, 33, 130])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_mamba_block(compare, length, shape):
    compare(mamba, mamba, mamba_arguments(length, **shape))


@pytest.mark.parametrize("length", [1, 2, 65])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_autocast_rounds_the_factors_of_products_only(length, shape):
    """Odd numbers of steps and of columns, because bfloat16 products take both in pairs."""
    inputs = [t.requires_grad_() for t in mamba_arguments(length, **shape)]
    weights = torch.randn_like(inputs[0])
    found = []
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = mamba(*inputs)
        assert y.dtype == (torch.bfloat16 if enabled else torch.float32)
        found.append([y, *torch.autograd.grad((y.float() * weights).sum(), inputs)])
    for exact, rounded in zip(*found, strict=True):
        assert (exact - rounded).norm() <= 0.1 * exact.norm() + 1e-6


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_parts_of_a_sequence_give_the_whole(batch, shape):
    hidden, *weights = mamba_arguments(150, batch=batch, **shape)
    block, state, outputs = MambaWeights(*weights), None, []
    for part in hidden.split([1, 2, 70, 64, 13], 1):
        out, state = mamba_block_with_state(part, block, state)
        outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, 1), mamba_block(hidden, block), rtol=1e-4, atol=1e-5)


def test_gradients_of_a_part_are_those_with_its_state_held_fixed(compare):
    hidden, *weights = mamba_arguments(20, d_model=16, d_inner=32)
    _, state = mamba_block_with_state(hidden, MambaWeights(*weights), None)

    def run(hidden, *weights):
        held = MambaState(*(t.to(hidden.dtype) for t in state))
        return mamba_block_with_state(hidden, MambaWeights(*weights), held)[0]

    compare(run, run, [hidden, *weights])
