"""Settings that any model of the package has: a bias an item, cosine scores, a gated feed-forward."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from recbole_holo.errors import ConfigError
from recbole_holo.inference import Compression, compress, stored_bytes
from recbole_holo.inference.compression import restored, stored
from recbole_holo.inference.export import export_step
from recbole_holo.layers.feed_forward import FeedForward, SwiGLU, gated_width
from recbole_holo.losses import LOSSES

from .conftest import ALL_PRESETS, MODELS, STATE_SPACE, build, build_tiny
from .test_models import histories, n_parameters, prefix, whole

GATED = ["RecMamba", "SequenceSASRec", "LinRec"]
SCORED = [{}, {"similarity": "cosine", "temperature": 0.2}]


def biased(preset: str, **settings):
    """A model whose items have biases that matter, as if trained."""
    model = build_tiny(preset, item_bias=True, **settings)
    with torch.no_grad():
        model.item_bias[1:] = torch.linspace(-2, 2, model.n_items - 1)
    return model


# ---------------------------------------------------------------------- item bias
@pytest.mark.parametrize("preset", ALL_PRESETS)
def test_the_bias_starts_at_zero_and_is_the_only_difference(preset):
    plain, model, seq = build_tiny(preset), build_tiny(preset, item_bias=True), histories()
    assert n_parameters(model) == n_parameters(plain) + 30
    batch = prefix(model, seq, torch.tensor([3, 29, 1, 12]))
    assert torch.equal(model.full_sort_predict(batch), plain.full_sort_predict(batch))
    assert "item_bias" not in plain.state_dict()


@pytest.mark.parametrize("settings", SCORED)
@pytest.mark.parametrize("name", MODELS)
def test_scores_are_those_without_plus_the_bias(name, settings):
    model = biased(name, **settings)
    plain = copy.deepcopy(model)
    plain.item_bias = None
    items = torch.tensor([3, 29, 1, 12])
    batch = prefix(model, histories(), items)
    scores = model.full_sort_predict(batch)
    torch.testing.assert_close(scores, plain.full_sort_predict(batch) + model.item_bias)
    torch.testing.assert_close(model.predict(batch), scores.gather(1, items[:, None])[:, 0], rtol=1e-5, atol=1e-5)
    assert not torch.equal(scores.argmax(1), plain.full_sort_predict(batch).argmax(1))


@pytest.mark.parametrize("settings", SCORED)
def test_the_loss_is_the_softmax_of_the_scores_over_the_temperature(settings):
    model = biased("RecMamba", **settings).double().train()
    hidden, targets = torch.randn(20, 16, dtype=torch.float64), torch.randint(1, 30, (20,))
    scores = model.score_all(hidden) / model.log_temperature.exp()
    torch.testing.assert_close(model.loss(hidden, targets), F.cross_entropy(scores[:, 1:], targets - 1))


@pytest.mark.parametrize("settings", SCORED)
@pytest.mark.parametrize("loss_type", ["BPR", "BCE", "gBCE", "InfoNCE", "SampledCE"])
def test_a_sampled_loss_sees_the_scores(loss_type, settings, monkeypatch):
    """As a function of the scores of targets and negatives, whatever these are made of."""
    model = biased("RecMamba", loss_type=loss_type, **settings).train()
    hidden, targets = torch.randn(20, 16), torch.randint(1, 15, (20,))
    negatives = torch.arange(15, 30) if hasattr(model.criterion, "sampler") else torch.arange(20) % 15 + 15
    if hasattr(model.criterion, "sampler"):
        monkeypatch.setattr(model.criterion.sampler, "forward", lambda targets: (negatives, None))
    else:
        monkeypatch.setattr("recbole_holo.ops.losses.sample_negatives", lambda *_, **__: negatives)
    scores = model.score_all(hidden) / model.log_temperature.exp()
    own = scores.gather(1, targets[:, None])
    if loss_type in ("BPR", "BCE"):
        other = scores.gather(1, negatives[:, None])
        expected = F.softplus(other - own) if loss_type == "BPR" else F.softplus(-own) + F.softplus(other)
    elif loss_type == "gBCE":
        beta = model.criterion.beta
        expected = (beta * F.softplus(-own[:, 0]) + F.softplus(scores[:, negatives]).sum(1)) / (len(negatives) + 1)
    else:
        expected = torch.cat([own, scores[:, negatives]], 1).logsumexp(1) - own[:, 0]
    torch.testing.assert_close(model.loss(hidden, targets), expected.mean(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loss_type", LOSSES)
@pytest.mark.parametrize("name", MODELS)
def test_the_bias_and_the_temperature_are_learned_and_the_pad_has_none(name, loss_type):
    settings = {"loss_type": loss_type, "item_bias": True, "learn_temperature": True, "temperature": 0.5}
    model = build_tiny(name, similarity="cosine", **settings).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        model.calculate_loss(whole(model, histories(lengths=[9, 8, 9, 7]))).backward()
        optimizer.step()
    assert model.item_bias[1:].abs().max() > 0.005
    assert model.item_bias[0] == 0
    assert not math.isclose(model.log_temperature.exp().item(), 0.5, rel_tol=1e-3)


def test_more_frequent_items_get_more():
    model = build_tiny("RecMamba", item_bias=True).train()
    targets = torch.tensor([1] * 8 + [2] * 4 + [3])
    optimizer = torch.optim.Adam([model.item_bias], lr=0.05)
    for _ in range(60):
        optimizer.zero_grad()
        model.loss(torch.zeros(13, 16), targets).backward()
        optimizer.step()
    assert model.item_bias[1] > model.item_bias[2] > model.item_bias[3] > model.item_bias[4:].max()


def test_neither_is_decayed():
    model = build_tiny("RecMamba", item_bias=True, learn_temperature=True)
    kept = {name for name, p in model.named_parameters() if getattr(p, "_no_weight_decay", False)}
    assert {"item_bias", "log_temperature"} <= kept


def test_items_without_training_keep_a_bias_of_zero():
    """Numbered among the trained ones in the loss."""
    settings = {"binding": "role", "bind_output": True, "item_bias": True}
    model = build_tiny("RecMamba", **settings).train()
    known = torch.tensor([0, 2, 5, 6, 20])
    model.trained_items, model.trained_number = known, torch.zeros(30, dtype=torch.long)
    model.trained_number[known] = torch.arange(5)
    with torch.no_grad():
        model.item_bias[known[1:]] = torch.tensor([1.0, -1.0, 3.0, 0.5])
    hidden, targets = torch.randn(9, 16), known[torch.randint(1, 5, (9,))]
    scores = model.score_all(hidden)[:, known[1:]]
    loss = model.loss(hidden, targets)
    torch.testing.assert_close(loss, F.cross_entropy(scores, model.trained_number[targets] - 1), rtol=1e-5, atol=1e-5)
    loss.backward()
    assert set(model.item_bias.grad.nonzero().flatten().tolist()) == {2, 5, 6, 20}


@pytest.mark.parametrize("settings", SCORED)
@pytest.mark.parametrize("name", MODELS)
def test_a_compressed_model_keeps_the_bias(name, settings):
    model, seq = biased(name, **settings), histories()
    wanted = Compression(table_bits=32, weight_bits=16)
    small = compress(model, wanted)
    assert stored_bytes(compress(build_tiny(name, **settings), wanted)) == stored_bytes(small) - 2 * 30
    batch = prefix(model, seq, torch.tensor([3, 29, 1, 12]))
    with torch.no_grad():
        scores = model.full_sort_predict(batch)
        torch.testing.assert_close(small.full_sort_predict(batch), scores, rtol=0.03, atol=0.03)
        torch.testing.assert_close(small.predict(batch), model.predict(batch), rtol=0.03, atol=0.03)
        again = restored(build_tiny(name, item_bias=True, seed=9, **settings), wanted, stored(small))
        assert torch.equal(again.full_sort_predict(batch), small.full_sort_predict(batch))


@pytest.mark.parametrize("settings", SCORED)
def test_an_exported_step_has_the_bias(settings):
    model = biased("RecMamba", hidden_act="swiglu", **settings)
    state, items = model.init_state(3), torch.tensor([4, 1, 29])
    scores, _ = export_step(model).module()(items, state.events, state.numbers)
    with torch.no_grad():
        expected = model.score_all(model.step(items, state)[0])
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)


def test_an_index_finds_by_the_scores_with_the_bias():
    faiss = pytest.importorskip("faiss")
    from recbole_holo.inference.retrieval import FaissIndex, top_items

    assert faiss
    for settings in SCORED:
        model = biased("RecMamba", **settings)
        with torch.no_grad():
            hidden = model.forward(histories(), (histories() > 0).sum(1))
            exact = top_items(model, hidden, 5, [[]] * len(hidden))
            found = top_items(model, hidden, 5, [[]] * len(hidden), FaissIndex(model, "Flat"))
        assert [items for items, _ in found] == [items for items, _ in exact]


@pytest.mark.parametrize("value", ["learned", 2])
def test_another_bias_is_refused(value):
    with pytest.raises(ConfigError, match="item_bias"):
        build_tiny("RecMamba", item_bias=value)


# ---------------------------------------------------------------------- a gated feed-forward
@pytest.mark.parametrize("inner", [96, 128, 256, 512, 1024])
@pytest.mark.parametrize("d", [32, 64, 128])
def test_a_gated_layer_has_as_many_parameters(d, inner):
    gated, plain = SwiGLU(d, gated_width(inner)), FeedForward(d, inner)
    assert gated_width(inner) % 16 == 0
    assert n_parameters(gated) == pytest.approx(n_parameters(plain), rel=0.09)


@pytest.mark.parametrize("name", GATED)
def test_the_setting_puts_it_into_every_layer(name):
    gated, plain = build(name, hidden_act="swiglu"), build(name, hidden_act="gelu")
    layers = [module for module in gated.modules() if isinstance(module, SwiGLU)]
    assert [layer.up.out_features for layer in layers] == [176, 176]  # of 256
    assert not any(isinstance(module, SwiGLU) for module in plain.modules())
    assert n_parameters(gated) == pytest.approx(n_parameters(plain), rel=0.02)


@pytest.mark.parametrize("name", GATED)
def test_a_gated_model_is_causal_and_learns(name):
    model, seq = build_tiny(name, hidden_act="swiglu"), histories()
    hidden = model.hidden_states(seq)
    changed = seq.clone()
    changed[:, 5:] = 7
    torch.testing.assert_close(model.hidden_states(changed)[:, :5], hidden[:, :5])
    model.train().calculate_loss(whole(model, histories(lengths=[9, 8, 9, 7]))).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    other = build_tiny(name, hidden_act="swiglu", seed=7)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.hidden_states(seq), hidden)


def test_a_transformers_gated_layer_is_drawn_like_its_other_matrices():
    gated = build("SequenceSASRec", hidden_act="swiglu").trm_encoder.layer[0].feed_forward.gated
    for linear in (gated.gate, gated.up, gated.down):
        assert linear.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_a_gated_model_steps_and_is_made_small():
    model, items = build("RecMamba", hidden_act="swiglu"), torch.randint(1, 30, (3, 20))
    state, seen = model.init_state(3), []
    for column in items.T:
        hidden, state = model.step(column, state)
        seen.append(hidden)
    with torch.no_grad():
        whole_pass = model.hidden_states(items)
        torch.testing.assert_close(torch.stack(seen, 1), whole_pass, rtol=1e-4, atol=2e-5)
        small = compress(model, Compression(table_bits=32, weight_bits=8))
        error = (small.hidden_states(items) - whole_pass).norm() / whole_pass.norm()
    assert 0 < error < 0.05
    assert model._program() is not None  # one call of the kernels a step


def test_a_gated_layer_drops_inside_only_in_training():
    torch.manual_seed(0)
    layer, x = SwiGLU(64, 96, inner_dropout=0.5), torch.randn(600, 64)
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            plain = layer.eval()(x)
            assert torch.equal(layer(x), plain)
            dropped = torch.stack([layer.train()(x) for _ in range(200)])
        torch.testing.assert_close(dropped.mean(0), plain, atol=0.12, rtol=0)
        assert not torch.equal(dropped[0], dropped[1])
    few = x[:9]
    with torch.no_grad():
        assert not torch.equal(layer(few), layer(few))


def test_a_model_without_a_feed_forward_ignores_it_and_another_name_is_refused():
    assert not any(isinstance(m, SwiGLU) for m in build_tiny("RecMamba_paper", hidden_act="swiglu").modules())
    with pytest.raises(ConfigError, match="hidden_act"):
        build_tiny("RecMamba", hidden_act="relu")


def test_every_state_space_model_takes_all_of_them():
    assert {"RecMamba", "HoloMambaRec", "Hydra", "Mamba4Rec"} == set(STATE_SPACE)
    for name in STATE_SPACE:
        model, seq = biased(name, similarity="cosine", temperature=0.1, learn_temperature=True), histories()
        state = model.encode(seq)
        batch = prefix(model, seq, torch.tensor([3, 29, 1, 12]))
        with torch.no_grad():
            scores = model.score_all(model.last_hidden(state))
            torch.testing.assert_close(scores, model.full_sort_predict(batch), rtol=1e-4, atol=1e-4)
