"""The time between events as an input: what a position knows of it, in every way a model is run."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from recbole_holo.data import GAPS
from recbole_holo.errors import ConfigError
from recbole_holo.layers.carried import Carried
from recbole_holo.layers.event_time import EventTime
from recbole_holo.model.base import SequenceRecommender
from recbole_holo.ops.circular_convolution import circular_convolution

from .conftest import PRESETS, STATE_SPACE, build_tiny
from .test_models import histories, prefix, whole

FORMS = ("add", "role")
KINDS = ("gap", "request")
BUNDLED = {"bundle_size": 3, "bundle_recent": 2, "MAX_ITEM_LIST_LENGTH": 20}
PLAIN_LOSS = {"loss_type": "CE", "similarity": "dot", "temperature": 1.0}


def timed(preset: str, form: str = "add", kind: str = "gap", **settings):
    """A model whose buckets say something: at the scale that they start with a test would not see them."""
    settings = {"event_time": kind, "event_time_form": form, "event_time_buckets": 9, **settings}
    model = build_tiny(preset, **settings)
    torch.nn.init.normal_(model.event_time.vectors, std=0.5)
    return model


def gaps_like(items: Tensor, model, seed: int = 2) -> Tensor:
    drawn = torch.randint(0, model.event_time.numbers, items.shape, generator=torch.Generator().manual_seed(seed))
    return drawn * (items > 0)


def with_gaps(batch, model):
    batch[GAPS] = gaps_like(batch[model.ITEM_SEQ], model)
    return batch


# ---------------------------------------------------------------------- the layer
def test_a_bucket_is_added_or_bound_with_a_role():
    gaps, d = torch.tensor([[0, 3, 1]]), 8
    added = EventTime(d, 4, 0.02)
    torch.testing.assert_close(added(gaps), added.vectors[gaps])
    bound = EventTime(d, 4, 0.02, form="role")
    expected = bound.beta[0] * circular_convolution(bound.roles[0], bound.vectors, "ortho")[gaps]
    torch.testing.assert_close(bound(gaps), expected)
    for form in FORMS:
        both = EventTime(d, 4, 0.02, kind="request", form=form)
        before, after = EventTime(d, 4, 0.02, form=form), EventTime(d, 4, 0.02, form=form)
        for i, one in enumerate((before, after)):
            one.load_state_dict({name: values.chunk(2)[i] for name, values in both.state_dict().items()})
        pair = torch.tensor([[1, 0, 3]])
        torch.testing.assert_close(both(gaps + 4 * pair), before(gaps) + after(pair))


# ---------------------------------------------------------------------- every way a model is run
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("form", FORMS)
def test_a_position_reads_its_own_gap_and_no_later_one(preset, form):
    model, items = timed(preset, form), histories(lengths=[9, 9])
    gaps = gaps_like(items, model)
    hidden = model.hidden_states(items, gaps=gaps)
    for t in (0, 3, 7):
        later = gaps.clone()
        later[:, t + 1 :] = (gaps[:, t + 1 :] + 1) % 9
        found = model.hidden_states(items, gaps=later)
        torch.testing.assert_close(found[:, : t + 1], hidden[:, : t + 1], rtol=1e-4, atol=1e-5)
        own = gaps.clone()
        own[:, t] = (gaps[:, t] + 1) % 9
        found = model.hidden_states(items, gaps=own)
        assert ((found[:, t] - hidden[:, t]).abs().amax(-1) > 1e-4).all()


@pytest.mark.parametrize("preset", PRESETS)
def test_what_pads_say_does_not_matter(preset):
    model, items = timed(preset), histories(lengths=[9, 4])
    gaps, lengths = gaps_like(items, model), torch.tensor([9, 4])
    noisy = torch.where(items > 0, gaps, 5)
    found, expected = (model.forward(items, lengths, one) for one in (noisy, gaps))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(
        model.forward(items[1:, :4], lengths[1:], gaps[1:, :4]), expected[1:], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_the_buckets_that_occur(preset, form, kind):
    model = timed(preset, form, kind).train()
    batch = with_gaps(whole(model, histories()), model)
    model.calculate_loss(batch).backward()
    n = 9
    before = batch[GAPS][batch[model.ITEM_TARGETS] > 0] % n
    for number in before.unique():
        assert model.event_time.vectors.grad[number].abs().sum() > 0
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.event_time.parameters())


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_prefixes_are_positions_of_sequences(preset, kind):
    model = timed(preset, kind=kind, **PLAIN_LOSS)
    seq = histories(lengths=[9])
    sequence = with_gaps(whole(model, seq), model)
    rows = torch.tril(torch.ones(8, 8, dtype=torch.long)) * seq[:, :8]
    prefixes = prefix(model, rows, seq[0, 1:])
    prefixes[GAPS] = torch.where(rows > 0, sequence[GAPS][:, :8], 0)
    torch.testing.assert_close(model.calculate_loss(prefixes), model.calculate_loss(sequence), rtol=1e-4, atol=1e-5)
    hidden = model.hidden_states(sequence[model.ITEM_SEQ], gaps=sequence[GAPS])[0, :8]
    scores = model.score_all(hidden)
    torch.testing.assert_close(model.full_sort_predict(prefixes), scores, rtol=1e-4, atol=1e-4)
    own = scores.gather(1, seq[0, 1:, None])[:, 0]
    torch.testing.assert_close(model.predict(prefixes), own, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", STATE_SPACE)
@pytest.mark.parametrize("form", FORMS)
def test_parts_are_the_whole(name, form):
    model = timed(name, form, **PLAIN_LOSS)
    batch = with_gaps(whole(model, histories(lengths=[12, 7, 1])), model)
    terms = torch.stack(list(model.losses_in_parts(batch, 5)))
    torch.testing.assert_close(terms.sum(), model.calculate_loss(batch))
    carried, parts = Carried(), []
    items, gaps = batch[model.ITEM_SEQ], batch[GAPS]
    for i in range(0, 12, 5):
        parts.append(model.hidden_states(items[:, i : i + 5], carried, gaps[:, i : i + 5]))
        carried.position += 5
    torch.testing.assert_close(torch.cat(parts, 1), model.hidden_states(items, gaps=gaps), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", STATE_SPACE)
@pytest.mark.parametrize("form", FORMS)
def test_gaps_are_added_before_events_are_bundled(name, form):
    model = timed(name, form, **BUNDLED)
    items = histories(lengths=[14, 9, 3])
    gaps, lengths = gaps_like(items, model), (items > 0).sum(1)
    n = model.event_time.numbers
    every = torch.arange(model.n_items * n)
    table = model.embed_events(every // n, every % n)
    numbers = items * n + gaps
    tokens, layout = model.bundling(numbers, lengths, lambda ids: F.embedding(ids, table))
    expected = layout.spread(model.encode_vectors(tokens))
    found = model.hidden_states(items, gaps=gaps)
    valid = items > 0
    torch.testing.assert_close(found[valid], expected[valid], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", STATE_SPACE)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [{}, BUNDLED], ids=["plain", "bundled"])
def test_stepping_and_prefilling_are_the_parallel_pass(name, form, kind, settings):
    model = timed(name, form, kind, **{"MAX_ITEM_LIST_LENGTH": 40, **settings})
    lengths = torch.tensor([0, 1, 5, 9])
    items = torch.randint(1, 30, (4, 17), generator=torch.Generator().manual_seed(6))
    gaps = gaps_like(items, model)
    known = torch.arange(9) < lengths[:, None]
    with torch.no_grad():
        state = model.encode(items[:, :9] * known, gaps[:, :9])  # what is behind a history's end is not its own
        torch.testing.assert_close(
            model.last_hidden(state)[1:],
            model.forward(items[1:, :9] * known[1:], lengths[1:], gaps[1:, :9]),
            rtol=1e-4,
            atol=2e-5,
        )
        for _ in range(8):
            at = torch.arange(4), state.events
            hidden, state = model.step(items[at], state, gaps=gaps[at])
        for row, n in enumerate(state.events.tolist()):
            expected = model.forward(items[row : row + 1, :n], torch.tensor([n]), gaps[row : row + 1, :n])
            torch.testing.assert_close(hidden[row : row + 1], expected, rtol=1e-4, atol=2e-5)


# ---------------------------------------------------------------------- settings
def test_without_it_nothing_changes():
    plain, told = build_tiny("RecMamba"), build_tiny("RecMamba", event_time=None, event_time_buckets=7)
    assert plain.event_time is None
    assert plain.state_dict().keys() == told.state_dict().keys()
    assert not any("event_time" in name for name in plain.state_dict())


def test_settings_that_cannot_be_used():
    for settings in ({"event_time": "gaps"}, {"event_time_buckets": 2}, {"event_time_form": "bind"}):
        (field,) = settings
        with pytest.raises(ConfigError, match=field):
            timed("RecMamba", **{"event_time": "gap", **settings})


def test_a_model_that_reads_no_times_says_so():
    class Plain(SequenceRecommender):
        pass

    from .conftest import Dataset, make_config

    with pytest.raises(ConfigError, match="Plain reads no times"):
        Plain(make_config("RecMamba", event_time="gap"), Dataset(30))


def test_unknown_times_are_bucket_zero():
    for name in (*STATE_SPACE, "SequenceSASRec"):
        model, items = timed(name), histories(lengths=[9])
        torch.testing.assert_close(model.hidden_states(items), model.hidden_states(items, gaps=torch.zeros_like(items)))
