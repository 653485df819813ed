"""Histories read in parts: the state carried from one to the next."""

from __future__ import annotations

import pytest
import torch

from recbole_holo.errors import ConfigError
from recbole_holo.layers.carried import Carried
from recbole_holo.tracing import CpuPeak

from .conftest import STATE_SPACE, build, build_tiny

NAMES = [name for name, model in STATE_SPACE.items() if model.carries_state]


def batch_of(model, batch: int, length: int):
    items = torch.randint(1, model.n_items, (batch, length + 1))
    targets = items[:, 1:].clone()
    targets[:, : length // 3] = 0  # events that another window has as targets
    return {model.ITEM_SEQ: items[:, :-1], model.ITEM_TARGETS: targets}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [1, 5, 12])
def test_hidden_states_are_those_of_the_whole(name, steps):
    model, items = build_tiny(name), torch.randint(1, 30, (3, 12))
    carried, parts = Carried(), []
    with torch.no_grad():
        for part in items.split(steps, 1):
            parts.append(model.hidden_states(part, carried))
            carried.position += part.shape[1]
        torch.testing.assert_close(torch.cat(parts, 1), model.hidden_states(items), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_terms_add_up_to_the_loss(name):
    model = build_tiny(name, loss_type="CE", similarity="dot", temperature=1.0)
    batch = batch_of(model, 4, 12)
    terms = torch.stack(list(model.losses_in_parts(batch, 5)))
    torch.testing.assert_close(terms.sum(), model.calculate_loss(batch))


@pytest.mark.parametrize("name", NAMES)
def test_one_part_has_the_gradients_of_the_whole(name):
    model = build_tiny(name, loss_type="CE", similarity="dot", temperature=1.0)
    batch, parameters = batch_of(model, 4, 12), [p for p in model.parameters() if p.requires_grad]
    whole = torch.autograd.grad(model.calculate_loss(batch), parameters, allow_unused=True)
    (term,) = model.losses_in_parts(batch, 12)
    for found, expected in zip(torch.autograd.grad(term, parameters, allow_unused=True), whole, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_memory_does_not_grow_with_the_history(name):
    def peak(length: int, steps: int) -> int:
        model = build(name, n_values=None, MAX_ITEM_LIST_LENGTH=length, loss_type="CE").train()
        batch, watch = batch_of(model, 2, length), CpuPeak()
        watch.change(("step", "all"))
        with watch:
            for term in model.losses_in_parts(batch, steps):
                term.backward()
        return watch.peaks[("step", "all")]

    assert peak(1024, 128) < 1.1 * peak(256, 128)
    assert peak(1024, 1024) > 3 * peak(1024, 128)


def test_models_without_a_state_refuse():
    with pytest.raises(ConfigError, match=r"train_steps_at_once: 8 .*SequenceSASRec .*carries no state"):
        build_tiny("SequenceSASRec", train_steps_at_once=8)
