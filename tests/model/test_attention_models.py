"""SequenceSASRec and LinRec against RecBole's SASRec, from which both are derived."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from recbole.model.sequential_recommender import SASRec
from torch import Tensor

from recbole_holo.bridge.registry import recbole_models
from recbole_holo.errors import ConfigError

from .conftest import Dataset, build_tiny, make_config
from .test_models import LENGTHS, histories, n_parameters, prefix, whole

SETTINGS = {
    "hidden_size": 16,
    "inner_size": 24,
    "n_layers": 3,
    "n_heads": 2,
    "hidden_dropout_prob": 0.0,
    "attn_dropout_prob": 0.0,
    "MAX_ITEM_LIST_LENGTH": 12,
    "initializer_range": 0.3,  # large enough for attention to be far from uniform
}


def recboles(**settings) -> SASRec:
    torch.manual_seed(3)
    return SASRec(make_config("SequenceSASRec", **{**SETTINGS, **settings}), Dataset(30)).eval()


def equipped(preset: str, recbole: SASRec, **settings):
    """A model of ours with the parameters of RecBole's."""
    model = build_tiny(preset, **{**SETTINGS, **settings})
    model.load_state_dict(recbole.state_dict())
    return model


@pytest.mark.parametrize("hidden_act", ["gelu", "relu", "swish", "tanh", "sigmoid"])
def test_every_position_is_recboles_sasrec_of_that_prefix(hidden_act):
    recbole = recboles(hidden_act=hidden_act)
    model = equipped("SequenceSASRec", recbole, hidden_act=hidden_act)
    seq = histories(lengths=[12, *LENGTHS])
    hidden = model.hidden_states(seq)
    for t in range(12):
        rows = seq[:, t] > 0
        padded = F.pad(seq[rows, : t + 1], (0, 11 - t))  # RecBole's rows have MAX_ITEM_LIST_LENGTH places, always
        expected = recbole.forward(padded, torch.full((int(rows.sum()),), t + 1))
        torch.testing.assert_close(hidden[rows, t], expected, rtol=1e-5, atol=1e-5)


def test_scores_and_parameters_are_those_of_recboles_sasrec():
    recbole = recboles()
    model = equipped("SequenceSASRec", recbole)
    recbole.load_state_dict(model.state_dict())
    assert n_parameters(model) == n_parameters(recbole)
    batch = prefix(model, histories(), torch.tensor([3, 29, 1, 12]))
    torch.testing.assert_close(model.full_sort_predict(batch), recbole.full_sort_predict(batch), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(model.predict(batch), recbole.predict(batch), rtol=1e-5, atol=1e-5)


def test_initial_parameters_are_drawn_as_recbole_draws_them():
    recbole = recboles(initializer_range=0.02)
    model = build_tiny("SequenceSASRec", n_items=2000, **{**SETTINGS, "initializer_range": 0.02})
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert torch.equal(parameter, recbole.get_parameter(name)), name  # zeros and ones
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=5 / parameter.numel() ** 0.5), name
    assert not model.item_embedding.weight[0].any()


def test_the_name_is_not_recboles():
    assert "SequenceSASRec" not in recbole_models()
    assert "LinRec" not in recbole_models()


def test_pre_norm_keeps_the_residual_stream_bare():
    model = build_tiny("SequenceSASRec", **{**SETTINGS, "norm": "pre", "n_layers": 1})
    seq = histories(lengths=[6, 6])
    attention, ffn = model.trm_encoder.layer[0].multi_head_attention, model.trm_encoder.layer[0].feed_forward
    h = model.LayerNorm(model.embed(seq))
    q, k, v = (p(attention.LayerNorm(h)).view(2, 6, 2, 8) for p in (attention.query, attention.key, attention.value))
    scores = torch.einsum("blhw,bmhw->bhlm", q, k) / 8**0.5
    weights = scores.masked_fill(torch.ones(6, 6).triu(1) > 0, -torch.inf).softmax(-1)
    h = h + attention.dense(torch.einsum("bhlm,bmhw->blhw", weights, v).flatten(-2))
    h = h + ffn.dense_2(F.gelu(ffn.dense_1(ffn.LayerNorm(h))))
    torch.testing.assert_close(model.hidden_states(seq), model.final_norm(h))


def test_attention_weights_are_dropped_in_training_only():
    model = build_tiny("SequenceSASRec", **{**SETTINGS, "attn_dropout_prob": 0.5})
    seq = histories()
    assert torch.equal(model.hidden_states(seq), model.hidden_states(seq))
    model.train()
    assert not torch.allclose(model.hidden_states(seq), model.hidden_states(seq))


def test_without_attention_dropout_no_matrix_of_positions_is_kept():
    model = build_tiny("SequenceSASRec", MAX_ITEM_LIST_LENGTH=600).train()
    sizes = []

    def pack(t: Tensor) -> Tensor:
        sizes.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model.calculate_loss(whole(model, histories(lengths=[600])))
    assert max(sizes) < 600 * 600


# ---------------------------------------------------------------------- LinRec
@pytest.mark.parametrize("key_norm", ["column", "position"])
def test_linrec_is_sasrec_with_the_published_attention(key_norm, monkeypatch):
    """RecBole's SASRec with its attention exchanged, as the authors' code does it; here for histories without pads."""
    recbole = recboles()

    def published(self, h: Tensor, mask: Tensor) -> Tensor:
        heads, width = self.num_attention_heads, self.attention_head_size
        q, k, v = (p(h).view(*h.shape[:2], heads, width).transpose(1, 2) for p in (self.query, self.key, self.value))
        q, k = F.elu(q), F.elu(k)
        q = q / torch.linalg.vector_norm(q, dim=3, keepdim=True)
        k = k / torch.linalg.vector_norm(k, dim=2 if key_norm == "column" else 3, keepdim=True)
        context = q @ (k.transpose(2, 3) @ v) / width**0.5
        out = self.dense(context.transpose(1, 2).reshape(h.shape))
        return self.LayerNorm(self.out_dropout(out) + h)

    for layer in recbole.trm_encoder.layer:
        monkeypatch.setattr(
            layer.multi_head_attention, "forward", published.__get__(layer.multi_head_attention), raising=True
        )
    model = equipped("LinRec_paper", recbole, key_norm=key_norm)
    seq = histories(lengths=[12, 12])
    expected = recbole.forward(seq, torch.tensor([12, 12]))
    torch.testing.assert_close(model.hidden_states(seq)[:, -1], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("key_norm", ["column", "position"])
@pytest.mark.parametrize("n_layers", [1, 2])
def test_the_two_forms_of_linrec_agree_after_the_last_item_in_one_layer(key_norm, n_layers):
    settings = {**SETTINGS, "n_layers": n_layers, "key_norm": key_norm}
    causal, published = build_tiny("LinRec", **settings), build_tiny("LinRec_paper", **settings)
    published.load_state_dict(causal.state_dict())
    seq, lengths = histories(), torch.tensor(LENGTHS)
    same = torch.isclose(causal.forward(seq, lengths), published.forward(seq, lengths), rtol=1e-4, atol=1e-5)
    assert same.all(-1).tolist() == [n_layers == 1 or length == 1 for length in LENGTHS]


@pytest.mark.parametrize("key_norm", ["column", "position"])
def test_only_the_causal_form_is_blind_to_later_items(key_norm):
    seq = histories(lengths=[9, 9])
    changed = seq.clone()
    changed[:, 5:] = (seq[:, 5:] + 10) % 29 + 1
    for preset, blind in (("LinRec", True), ("LinRec_paper", False)):
        model = build_tiny(preset, key_norm=key_norm)
        before, after = model.hidden_states(seq)[:, :5], model.hidden_states(changed)[:, :5]
        assert torch.allclose(before, after, rtol=1e-5, atol=1e-6) is blind


def test_the_form_without_a_mask_refuses_whole_sequences():
    with pytest.raises(ConfigError, match=r"causal: False .* train_on: prefixes, or causal: True"):
        build_tiny("LinRec_paper", train_on="sequences")
    model = build_tiny("LinRec_paper").train()
    model.calculate_loss(prefix(model, histories(), torch.tensor([3, 29, 1, 12]))).backward()
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


def test_linrec_on_a_window_of_several_chunks():
    """The chunks of the attention's causal form do not show in the model."""
    model = build_tiny("LinRec", MAX_ITEM_LIST_LENGTH=200)
    seq = histories(lengths=[200, 200])
    hidden = model.hidden_states(seq)
    for t in (63, 64, 129, 198):
        torch.testing.assert_close(model.hidden_states(seq[:, : t + 1])[:, t], hidden[:, t], rtol=1e-4, atol=1e-5)
