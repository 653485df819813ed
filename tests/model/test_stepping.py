"""Histories as states: one event at a time, prefilled, and mixtures of both give the parallel pass's hidden states."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from recbole_holo.layers.carried import Recurrent
from recbole_holo.model.stepping import PART, State
from recbole_holo.ops import backend

from .conftest import PRESETS, STATE_SPACE, build, build_tiny

STEPPING = [name for name in PRESETS if name.removesuffix("_paper") in STATE_SPACE]
BUNDLED = {"bundle_size": 3, "bundle_recent": 5}


def parallel(model, items: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """The hidden state after each history, from the pass that training uses."""
    return model.forward(items, lengths)


def stepped(model, items: torch.Tensor) -> torch.Tensor:
    """The hidden states after every event ``[B, L, d]``."""
    state, seen = model.init_state(len(items)), []
    for column in items.T:
        hidden, state = model.step(column, state)
        seen.append(hidden)
    return torch.stack(seen, 1)


def small(preset: str, **settings):
    learned = {"MAX_ITEM_LIST_LENGTH": 40}
    return build_tiny(preset, **{**learned, **settings})


@pytest.mark.parametrize("preset", STEPPING)
@pytest.mark.parametrize("n_values", [5, None], ids=["attributes", "no attributes"])
def test_stepping_is_the_parallel_pass(preset, n_values):
    model, items = build(preset, n_values=n_values), torch.randint(1, 30, (3, 40))
    with torch.no_grad():
        torch.testing.assert_close(stepped(model, items), model.hidden_states(items), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("preset", STEPPING)
@pytest.mark.parametrize("n_values", [5, None], ids=["attributes", "no attributes"])
@pytest.mark.parametrize("settings", [{}, BUNDLED], ids=["plain", "bundled"])
def test_at_sizes_that_fill_no_vector(preset, n_values, settings):
    model, items = (
        small(preset, hidden_size=24, d_state=5, n_values=n_values, **settings),
        torch.randint(1, 30, (27, 31)),
    )
    with torch.no_grad():
        found = stepped(model, items)
        for length in (1, 4, 5, 6, 7, 8, 9, 17, 31):
            expected = parallel(model, items[:, :length], torch.full((27,), length))
            torch.testing.assert_close(found[:, length - 1], expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("preset", STEPPING)
@pytest.mark.parametrize("settings", [{}, BUNDLED], ids=["plain", "bundled"])
def test_prefill_of_unequal_histories_and_steps_from_there(preset, settings):
    model, lengths = small(preset, **settings), torch.tensor([0, 1, 4, 5, 8, 12, 25])
    items = torch.randint(1, 30, (len(lengths), 34))
    histories = items[:, :25] * (torch.arange(25) < lengths[:, None])
    with torch.no_grad():
        state = model.encode(histories)
        assert state.events.tolist() == lengths.tolist()
        assert not state.numbers[0].any()
        torch.testing.assert_close(
            model.last_hidden(state)[1:], parallel(model, histories[1:], lengths[1:]), rtol=1e-4, atol=2e-5
        )
        for _ in range(9):  # each row goes on where it stopped
            hidden, state = model.step(items[torch.arange(len(lengths)), state.events], state)
        for row, n in enumerate(state.events.tolist()):
            expected = parallel(model, items[row : row + 1, :n], torch.tensor([n]))
            torch.testing.assert_close(hidden[row : row + 1], expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("preset", STEPPING)
@pytest.mark.parametrize("settings", [{}, BUNDLED], ids=["plain", "bundled"])
def test_parts_of_unequal_lengths(preset, settings):
    """Micro-batches, where a user has many events, one or none."""
    model = small(preset, **settings)
    counts = torch.tensor([[3, 0, 9], [0, 1, 0], [7, 7, 7], [0, 0, 0], [1, 20, 2]])
    items, state = torch.randint(1, 30, (5, 30)), model.init_state(5)
    with torch.no_grad():
        for part in counts.T:
            at = state.events[:, None] + torch.arange(int(part.max()))
            new = items.gather(1, at) * (torch.arange(int(part.max())) < part[:, None])
            before = state
            hidden, state = model.advance(new, state)
            for old, tensor in zip(before, state, strict=True):
                assert torch.equal(old[part == 0], tensor[part == 0])
        for row, n in enumerate(counts.sum(1).tolist()):
            if n:
                expected = parallel(model, items[row : row + 1, :n], torch.tensor([n]))
                torch.testing.assert_close(hidden[row : row + 1], expected, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", STATE_SPACE)
def test_long_histories_in_several_parts(name):
    model, items = small(name), torch.randint(1, 30, (2, 2 * PART + 77))
    lengths = torch.tensor([2 * PART + 77, PART + 1])
    histories = items * (torch.arange(items.shape[1]) < lengths[:, None])
    found = model.last_hidden(model.encode(histories))
    with torch.no_grad():
        torch.testing.assert_close(found, parallel(model, histories, lengths), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", STATE_SPACE)
def test_the_step_kernels_are_the_plain_form(name):
    model, items = build(name), torch.randint(1, 30, (30, 6))
    fast, again = stepped(model, items), copy.deepcopy(model).double()
    torch.testing.assert_close(fast.double(), stepped(again, items), rtol=1e-4, atol=1e-5)
    backend.set_backend("reference")
    try:
        torch.testing.assert_close(stepped(model, items), fast, rtol=1e-4, atol=1e-5)
    finally:
        backend.set_backend("auto")


@pytest.mark.parametrize("preset", STEPPING)
@pytest.mark.parametrize("n_values", [5, None], ids=["attributes", "no attributes"])
@pytest.mark.parametrize("settings", [{}, BUNDLED], ids=["plain", "bundled"])
def test_in_bfloat16(preset, n_values, settings):
    model, items = small(preset, n_values=n_values, **settings), torch.randint(1, 30, (4, 20))
    lengths = torch.full((4,), 20)
    with torch.no_grad():
        exact = parallel(model, items, lengths)
        with torch.autocast("cpu", torch.bfloat16):
            expected, found = parallel(model, items, lengths), stepped(model, items)[:, -1]
            prefilled = model.last_hidden(model.encode(items))
    # As far from the float32 result as the parallel pass is, twice over.
    near = 2 * float((expected.float() - exact).abs().max()) + 1e-3
    assert float((found.float() - exact).abs().max()) < near
    assert float((prefilled.float() - exact).abs().max()) < near


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_size_of_bundles_is_that_of_serving(size):
    model = small("HoloMambaRec", bundle_size=4, bundle_recent=5, bundle_inference=size)
    items = torch.randint(1, 30, (3, 30))
    with torch.no_grad():
        expected = parallel(model, items, torch.full((3,), 30))
        torch.testing.assert_close(stepped(model, items)[:, -1], expected, rtol=1e-4, atol=2e-5)
    assert model.state_layout().recent == (0 if size == 1 else 5 + size - 1)


def test_learned_positions_end_at_the_last():
    model = small("RecMamba_paper", MAX_ITEM_LIST_LENGTH=12)
    items = torch.randint(1, 30, (2, 20))
    with torch.no_grad():
        found = stepped(model, items)
        torch.testing.assert_close(found[:, :12], model.hidden_states(items[:, :12]), rtol=1e-4, atol=2e-5)
        torch.testing.assert_close(model.last_hidden(model.encode(items)), found[:, -1], rtol=1e-4, atol=2e-5)
        longer = small("RecMamba_paper", MAX_ITEM_LIST_LENGTH=20)
        longer.load_state_dict(model.state_dict() | {"position_embedding": longer.position_embedding})
        table = model.position_embedding
        longer.position_embedding.copy_(torch.cat([table, table[-1:].expand(8, -1)]))
        torch.testing.assert_close(found, longer.hidden_states(items), rtol=1e-4, atol=2e-5)


def test_a_state_is_what_it_says():
    model = build("HoloMambaRec", hidden_size=64, num_layers=2, d_state=16)
    layout = model.state_layout()
    assert layout.size == 64 + 2 * (3 * 128 + 128 * 16)
    assert model.init_state(7).numbers.shape == (7, layout.size)
    assert "now.1.ssm: 128 x 16" in str(layout)
    assert str(4 * layout.size + 8) in str(layout)


def test_steps_leave_the_state_before_them_alone():
    model = small("HoloMambaRec", **BUNDLED)
    state = model.encode(torch.randint(1, 30, (3, 7)))
    before = State(*(tensor.clone() for tensor in state))
    model.step(torch.tensor([1, 2, 3]), state)
    model.advance(torch.randint(1, 30, (3, 4)), state)
    for old, now in zip(before, state, strict=True):
        assert torch.equal(old, now)


@pytest.mark.parametrize("change", ["load", "in place", "fused"])
def test_a_step_follows_the_parameters(change):
    model, other = small("RecMamba"), small("RecMamba", seed=1)
    items = torch.randint(1, 30, (2, 6))
    before = stepped(model, items)
    if change == "load":
        model.load_state_dict(other.state_dict())
    elif change == "in place":
        with torch.no_grad():
            for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
                mine.copy_(theirs)
    else:
        model.train()
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1, fused=True)
        model.hidden_states(items).square().sum().backward()
        optimizer.step()
        model.eval()
    with torch.no_grad():
        assert not torch.allclose(stepped(model, items), before, atol=1e-3)
        torch.testing.assert_close(stepped(model, items), model.hidden_states(items), rtol=1e-4, atol=2e-5)


def test_copies_and_training_mode():
    model, items = small("Hydra"), torch.randint(1, 30, (2, 4))
    before = stepped(model, items)
    torch.testing.assert_close(stepped(copy.deepcopy(model), items), before)
    with pytest.raises(RuntimeError, match=r"training mode.*eval\(\)"):
        stepped(model.train(), items)


def test_every_block_of_the_models_is_recurrent():
    for name in STATE_SPACE:
        model = small(name)
        blocks = [block for block in model.modules() if isinstance(block, Recurrent)]
        assert len(blocks) == len(model.layers)
        hidden = torch.randn(2, 4, *((4, 4) if name == "Hydra" else (16,)))
        _, state = blocks[0].forward_from(hidden, None)
        assert tuple(state.conv.shape[1:]) == tuple(blocks[0].state_shapes().conv)
        assert tuple(state.ssm.shape[1:]) == tuple(blocks[0].state_shapes().ssm)


def test_pads_leave_the_hidden_state_alone():
    model = small("Mamba4Rec")
    state = model.encode(torch.randint(1, 30, (3, 7)))
    hidden, after = model.advance(F.pad(torch.randint(1, 30, (3, 0)), (0, 3)), state)
    assert torch.equal(hidden, model.last_hidden(state))
    assert torch.equal(after.numbers, state.numbers)


@pytest.mark.parametrize("preset", STEPPING)
def test_a_step_of_a_model_is_one_call(preset):
    """All but learned positions, whose steps run module by module."""
    model = build(preset)
    model.step(torch.tensor([1]), model.init_state(1))
    assert (model._program() is None) == (preset == "RecMamba_paper")
