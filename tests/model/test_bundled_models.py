"""State space models that read the older part of a history in bundles."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from recbole_holo.errors import ConfigError

from .conftest import STATE_SPACE, build_tiny
from .test_models import histories, prefix, whole

BUNDLED = {"bundle_size": 3, "bundle_recent": 2, "MAX_ITEM_LIST_LENGTH": 20, "loss_type": "CE"}
LENGTHS = [14, 1, 9, 3]


@pytest.fixture(params=STATE_SPACE)
def model(request):
    return build_tiny(request.param, **BUNDLED)


def reads_the_future(model, seq) -> bool:
    """Whether a change of later items moves the state of an earlier position."""
    hidden = model.hidden_states(seq)
    for t in range(seq.shape[1] - 1):
        changed = seq.clone()
        changed[:, t + 1 :] = (seq[:, t + 1 :] + 10) % 29 + 1
        if not torch.allclose(model.hidden_states(changed)[:, : t + 1], hidden[:, : t + 1], rtol=1e-4, atol=1e-6):
            return True
    return False


def test_a_window_never_holds_what_it_must_predict(model):
    assert not reads_the_future(model, histories(lengths=[14, 14]))


def test_a_planted_leak_is_caught(model, monkeypatch):
    """Windows that reach one event too far: each holds the event after it, its target."""
    bundles = model.bundling.bundles

    def leaking(items, embed):
        return bundles(F.pad(items.flatten(1)[:, 1:], (0, 1)).view_as(items), embed)

    monkeypatch.setattr(model.bundling, "bundles", leaking)
    assert reads_the_future(model, histories(lengths=[14, 14]))


def test_shuffled_future_items_do_not_change_the_loss(model):
    """The targets before position t, in a batch whose items from t on are exchanged."""
    seq = histories(lengths=[14, 14])
    for t in (2, 6, 11):
        batch, shuffled = whole(model, seq), whole(model, seq)
        shuffled[model.ITEM_SEQ] = torch.cat([seq[:, :t], seq[:, t:].flip(1)], 1)
        for one in (batch, shuffled):
            one[model.ITEM_TARGETS] = batch[model.ITEM_TARGETS].clone()
            one[model.ITEM_TARGETS][:, t:] = 0
        torch.testing.assert_close(model.calculate_loss(batch), model.calculate_loss(shuffled), rtol=1e-5, atol=1e-6)


def test_every_position_that_has_a_window_behind_it_predicts(model):
    hidden = model.hidden_states(histories(lengths=LENGTHS, width=14))
    first = hidden[0].abs().sum(-1) > 0  # of fourteen events four windows of three are bundled
    assert first.tolist() == [False, False] + [True] * 12
    assert (hidden[3, :3].abs().sum(-1) > 0).all()  # three events: all recent


def test_pads_and_companions_change_nothing(model):
    seq = histories(lengths=LENGTHS)
    hidden, longer = model.hidden_states(seq), model.hidden_states(F.pad(seq, (0, 4)))
    for row, length in enumerate(LENGTHS):
        alone = model.hidden_states(seq[row : row + 1, :length])
        for other in (longer[row, :length], alone[0]):
            torch.testing.assert_close(other, hidden[row, :length], rtol=1e-4, atol=1e-6)


def test_training_and_scoring_see_the_same_last_state(model):
    """The last position of a training row is the state that a history of that length is scored by."""
    seq = histories(lengths=[14, 14])
    last = model.hidden_states(seq)[:, -1]
    torch.testing.assert_close(model.forward(seq, torch.tensor([14, 14])), last, rtol=0, atol=0)
    loss = model.calculate_loss(prefix(model, seq, torch.tensor([3, 5])))
    rows = whole(model, seq)
    rows[model.ITEM_TARGETS][:] = 0
    rows[model.ITEM_TARGETS][:, -1] = torch.tensor([3, 5])
    torch.testing.assert_close(model.calculate_loss(rows), loss, rtol=1e-5, atol=1e-6)


def test_one_model_runs_at_several_sizes(model):
    seq, seen = histories(lengths=[14, 14]), []
    for size in (1, 2, 3):
        model.bundling.size = size
        seen.append(model.hidden_states(seq))
    assert not any(torch.allclose(a, b) for a, b in ((seen[0], seen[1]), (seen[1], seen[2])))
    unbundled = build_tiny(type(model).__name__, **{**BUNDLED, "bundle_size": 1})
    unbundled.load_state_dict({k: v for k, v in model.state_dict().items() if k != "bundling.roles"})
    torch.testing.assert_close(seen[0], unbundled.hidden_states(seq), rtol=0, atol=0)
    inference = build_tiny(type(model).__name__, **BUNDLED, bundle_inference=2)
    inference.load_state_dict(model.state_dict())
    torch.testing.assert_close(inference.hidden_states(seq), seen[1], rtol=0, atol=0)


def test_gradients_reach_the_roles_and_everything_else(model):
    model.train().calculate_loss(whole(model, histories(lengths=[14, 13, 14]))).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model.bundling.roles.grad.abs().sum(-1).gt(0).all()


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [6] * 8), ("grow", [1, 1, 2, 2, 4, 4, 6, 6]), ("mixed", [1, 2, 4, 6, 1, 2, 4, 6])],
)
def test_the_schedule(schedule, expected):
    model = build_tiny("HoloMambaRec", **{**BUNDLED, "bundle_size": 6}, bundle_schedule=schedule)
    sizes = []
    for step in range(8):
        model.set_progress(step / 8, step)
        sizes.append(model.bundling.training_size)
    assert sizes == expected
    assert model.bundling.size == 6


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("SequenceSASRec", {}, "bundle_size: 3.*SequenceSASRec bundles no events"),
        ("Hydra", {"bundle_recent": 0}, "bundle_recent: 0.*from 1 to MAX_ITEM_LIST_LENGTH"),
        ("Hydra", {"bundle_size": 2.5}, "bundle_size: 2.5"),
        ("RecMamba", {"bundle_size": 0}, "bundle_size: 0"),
        ("Hydra", {"bundle_inference": 4}, "bundle_inference: 4.*windows of up to 3"),
        ("Hydra", {"bundle_schedule": "growing"}, "bundle_schedule: 'growing'.*grow"),
        ("Hydra", {"train_steps_at_once": 4}, "train_steps_at_once: 4"),
    ],
)
def test_settings_that_do_not_fit_are_named(name, settings, message):
    with pytest.raises(ConfigError, match=message):
        build_tiny(name, **{**BUNDLED, **settings})
