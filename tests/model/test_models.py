"""Every model in both of its presets: sizes, positions, gradients, losses, settings."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from recbole.data.interaction import Interaction
from torch import Tensor, nn

from recbole_holo.errors import ConfigError
from recbole_holo.layers import Mamba
from recbole_holo.layers.feed_forward import FeedForward, SwiGLU
from recbole_holo.layers.rope import rotary

from .conftest import ALL_PRESETS, MODELS, STATE_SPACE, build, build_tiny, read_yaml

LENGTHS = [9, 1, 5, 7]
UNTRAINED = {"bundle_roles"}  # HoloMambaRec's authors allocate them and never use them


def histories(n_items: int = 30, lengths: list[int] = LENGTHS, width: int | None = None, seed: int = 1) -> Tensor:
    """Random histories ``[B, width]``, pads on the right."""
    generator = torch.Generator().manual_seed(seed)
    seq = torch.randint(1, n_items, (len(lengths), width or max(lengths)), generator=generator)
    return seq * (torch.arange(seq.shape[1]) < torch.tensor(lengths)[:, None])


def whole(model, seq: Tensor) -> Interaction:
    """A batch of whole sequences: each item is the target of the position before it."""
    target = F.pad(seq[:, 1:], (0, 1))
    return Interaction({model.ITEM_SEQ: seq, model.ITEM_SEQ_LEN: (seq > 0).sum(1), model.ITEM_TARGETS: target})


def prefix(model, seq: Tensor, target: Tensor) -> Interaction:
    """A batch of prefixes with one target each."""
    return Interaction({model.ITEM_SEQ: seq, model.ITEM_SEQ_LEN: (seq > 0).sum(1), model.ITEM_ID: target})


def n_parameters(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


# ---------------------------------------------------------------------- sizes, against the published code
@pytest.mark.parametrize(
    ("preset", "n_items", "n_values", "overrides", "expected"),
    [
        ("HoloMambaRec_paper", 3707, 19, {}, 919_201),
        ("HoloMambaRec_paper", 12_102, 51, {"num_layers": 2}, 2_465_761),
        ("Mamba4Rec", 3417, None, {}, 290_944),
        ("Mamba4Rec_paper", 3417, None, {}, 290_944),
        ("Mamba4Rec_paper", 12_102, None, {}, 846_784),
        ("Mamba4Rec_paper", 12_102, None, {"num_layers": 2}, 918_912),
        ("RecMamba_paper", 1001, None, {}, 38_784 + 64 * (1001 + 2000)),
    ],
)
def test_parameter_count_is_the_published_one(preset, n_items, n_values, overrides, expected):
    assert n_parameters(build(preset, n_items, n_values, **overrides)) == expected


def test_recmamba_block_count():
    assert n_parameters(Mamba(64, d_state=32)) == 38_784


def test_hydra_default_heads_are_cheaper_than_one_wide_head():
    config = read_yaml("model/Hydra.yaml")
    d = config["hidden_size"]
    assert config["head_dim"] is None
    assert config["latent_heads"] * (d // 4) ** 2 < d**2


# ---------------------------------------------------------------------- one meaning of positions
def test_a_position_sees_no_later_item(preset):
    model, seq = build_tiny(preset), histories(lengths=[9, 9])
    hidden = model.hidden_states(seq)
    assert hidden.shape == (2, 9, 16)
    assert hidden.isfinite().all()
    for t in (0, 3, 7):
        changed = seq.clone()
        changed[:, t + 1 :] = (seq[:, t + 1 :] + 10) % 29 + 1
        other = model.hidden_states(changed)
        torch.testing.assert_close(other[:, : t + 1], hidden[:, : t + 1], rtol=1e-5, atol=1e-6)
        assert (other[:, t + 1 :] - hidden[:, t + 1 :]).abs().amax(-1).gt(1e-7).all()


def test_pads_and_batch_companions_change_nothing(any_preset):
    model, seq = build_tiny(any_preset), histories()
    hidden = model.hidden_states(seq)
    longer = model.hidden_states(F.pad(seq, (0, 3)))
    for row, length in enumerate(LENGTHS):
        alone = model.hidden_states(seq[row : row + 1, :length])
        for other in (longer[row, :length], alone[0]):
            torch.testing.assert_close(other, hidden[row, :length], rtol=1e-5, atol=1e-6)


def test_forward_is_encode_at_the_last_item(any_preset):
    model, seq = build_tiny(any_preset), histories()
    lengths = torch.tensor(LENGTHS)
    expected = model.hidden_states(seq)[torch.arange(len(LENGTHS)), lengths - 1]
    torch.testing.assert_close(model.forward(seq, lengths), expected, rtol=0, atol=0)


def test_whole_sequence_loss_is_the_mean_of_prefix_losses(preset):
    model, seq = build_tiny(preset, loss_type="CE"), histories()
    losses = []
    for row, length in zip(seq, LENGTHS, strict=True):
        for t in range(1, length):
            losses.append(model.calculate_loss(prefix(model, row[None, :t], row[t : t + 1])))
    loss = model.calculate_loss(whole(model, seq))
    torch.testing.assert_close(loss, torch.stack(losses).mean(), rtol=1e-5, atol=1e-6)


def test_histories_without_a_target_give_a_loss_of_zero(preset):
    model = build_tiny(preset)
    loss = model.calculate_loss(whole(model, histories(lengths=[1, 1])))
    loss.backward()
    assert loss == 0


# ---------------------------------------------------------------------- scoring
@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_predict_is_full_sort_predict_gathered(any_preset, similarity):
    model, seq = build_tiny(any_preset, similarity=similarity), histories()
    items = torch.tensor([3, 29, 1, 12])
    batch = prefix(model, seq, items)
    scores = model.full_sort_predict(batch)
    assert scores.shape == (4, 30)
    torch.testing.assert_close(model.predict(batch), scores.gather(1, items[:, None])[:, 0], rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------------- training
def test_gradients_reach_every_parameter(preset):
    model = build_tiny(preset).train()
    model.calculate_loss(whole(model, histories(lengths=[9, 8, 9, 7]))).backward()
    unreached = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0}
    assert unreached == (UNTRAINED if preset == "HoloMambaRec_paper" else set())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("loss_type", ["CE", "InfoNCE", "SampledCE"])
def test_the_pad_row_stays_zero(preset, loss_type):
    model = build_tiny(preset, loss_type=loss_type).train()
    tables = [m.weight for m in model.modules() if isinstance(m, nn.Embedding) and m.padding_idx == 0]
    assert tables
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.01)
    for _ in range(2):
        assert all(not table[0].any() for table in tables)
        assert all(table[1:].any(-1).all() for table in tables)
        optimizer.zero_grad()
        model.calculate_loss(whole(model, histories())).backward()
        optimizer.step()
    assert all(not table[0].any() for table in tables)


@pytest.mark.parametrize("loss_type", ["CE", "BPR", "BCE", "gBCE", "InfoNCE", "SampledCE"])
@pytest.mark.parametrize("name", MODELS)
def test_every_loss_learns_a_handful_of_sequences(name, loss_type):
    model = build_tiny(name, loss_type=loss_type).train()
    batch = whole(model, histories(lengths=[8] * 6))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    curve = []
    for _ in range(50):
        optimizer.zero_grad()
        loss = model.calculate_loss(batch)
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    assert all(math.isfinite(value) for value in curve)
    first, last = sum(curve[:3]) / 3, sum(curve[-3:]) / 3
    assert last < 0.6 * first


def test_the_temperature_is_learned_when_asked():
    model = build_tiny("Hydra", learn_temperature=True).train()
    model.calculate_loss(whole(model, histories())).backward()
    assert model.log_temperature.exp().item() == pytest.approx(0.05)
    assert model.log_temperature.grad.abs() > 0
    assert "log_temperature" not in build_tiny("Hydra").state_dict()


def test_state_dict_round_trip(any_preset):
    model, other, seq = build_tiny(any_preset), build_tiny(any_preset, seed=7), histories()
    assert not torch.equal(model.hidden_states(seq), other.hidden_states(seq))
    other.load_state_dict(model.state_dict())
    assert torch.equal(model.hidden_states(seq), other.hidden_states(seq))


# ---------------------------------------------------------------------- initialisation
def test_mamba4rec_paper_draws_what_the_published_code_draws():
    model = build("Mamba4Rec_paper", n_items=3417)
    for name, module in model.named_modules():
        if isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all(), name
            assert (module.bias == 0).all(), name
        if isinstance(module, nn.Linear) and module.bias is not None:
            assert (module.bias == 0).all(), name
        if isinstance(module, (nn.Linear, nn.Embedding)):
            weight = module.weight[1:] if isinstance(module, nn.Embedding) else module.weight
            assert weight.mean().abs() < 0.02 * 5 / weight.numel() ** 0.5, name
            assert weight.std().item() == pytest.approx(0.02, rel=5 / weight.numel() ** 0.5), name


def test_recmamba_paper_draws_xavier_embeddings():
    model = build("RecMamba_paper", n_items=1000)
    assert model.item_embedding.weight[1:].std().item() == pytest.approx((2 / 1064) ** 0.5, rel=0.03)
    assert model.position_embedding.std().item() == pytest.approx((2 / 2064) ** 0.5, rel=0.03)


@pytest.mark.parametrize("name", ["HoloMambaRec", "RecMamba", "Mamba4Rec"])
def test_ssm_init_reaches_the_mamba_blocks(name):
    def blocks(ssm_init: str) -> list[Mamba]:
        return [m for m in build_tiny(name, ssm_init=ssm_init).modules() if isinstance(m, Mamba)]

    official = F.softplus(blocks("official")[0].dt_proj.bias)
    assert official.min() >= 0.999e-3
    assert official.max() <= 1.001e-1
    assert all((block.dt_proj.bias == 0).all() for block in blocks("recbole"))
    assert all(F.softplus(block.dt_proj.bias).min() > 0.2 for block in blocks("linear"))
    steps = torch.arange(1, 9).log()
    assert all(not torch.allclose(block.A_log, steps.expand_as(block.A_log)) for block in blocks("xavier"))


def test_ssm_init_reaches_the_latent_heads():
    def dt_bias(ssm_init: str) -> Tensor:
        return build_tiny("Hydra", ssm_init=ssm_init).layers[0].latent.mamba.dt_bias

    official = F.softplus(dt_bias("official"))
    assert official.min() >= 0.999e-3
    assert official.max() <= 1.001e-1
    assert (dt_bias("linear") == 0).all()


# ---------------------------------------------------------------------- settings
@pytest.mark.parametrize(
    ("name", "field", "overrides"),
    [
        ("Hydra", "headdim", {"headdim": 3}),
        ("Hydra", "head_dim", {"head_dim": 5}),
        ("Hydra", "hidden_size", {"hidden_size": 18}),
        ("Hydra", "latent_heads", {"latent_heads": 0}),
        ("Hydra", "headdim", {"headdim": 0}),
        ("Hydra", "expand", {"expand": 0}),
        ("Hydra", "chunk_size", {"chunk_size": 0}),
        ("Hydra", "inner_size", {"inner_size": -1}),
        ("Hydra", "rope_base", {"rope_base": 0}),
        ("Hydra", "temperature", {"temperature": 0.0}),
        ("Hydra", "num_negatives", {"num_negatives": None}),
        ("Hydra", "similarity", {"similarity": "euclid"}),
        ("Hydra", "initializer_range", {"initializer_range": None}),
        ("RecMamba", "norm", {"norm": "layer"}),
        ("RecMamba", "position_embedding", {"position_embedding": "rope"}),
        ("RecMamba", "embedding_init", {"embedding_init": "uniform"}),
        ("RecMamba", "initializer_range", {"initializer_range": None}),
        ("RecMamba", "inner_size", {"inner_size": 0}),
        ("RecMamba", "layer_dropout_prob", {"layer_dropout_prob": None}),
        ("RecMamba_paper", "MAX_ITEM_LIST_LENGTH", {"MAX_ITEM_LIST_LENGTH": None}),
        ("Mamba4Rec", "num_layers", {"num_layers": 0}),
        ("Mamba4Rec", "dropout_prob", {"dropout_prob": 1.0}),
        ("Mamba4Rec", "loss_type", {"loss_type": "ce"}),
        ("LinRec", "causal", {"causal": False}),
        ("LinRec", "key_norm", {"key_norm": "row"}),
        ("LinRec", "n_heads", {"n_heads": 3}),
        ("SequenceSASRec", "n_heads", {"n_heads": 5}),
        ("SequenceSASRec", "n_layers", {"n_layers": 0}),
        ("SequenceSASRec", "inner_size", {"inner_size": None}),
        ("SequenceSASRec", "hidden_act", {"hidden_act": "mish"}),
        ("SequenceSASRec", "layer_norm_eps", {"layer_norm_eps": 0}),
        ("SequenceSASRec", "attn_dropout_prob", {"attn_dropout_prob": 1.0}),
        ("SequenceSASRec", "hidden_dropout_prob", {"hidden_dropout_prob": None}),
        ("SequenceSASRec", "norm", {"norm": "none"}),
        ("SequenceSASRec", "MAX_ITEM_LIST_LENGTH", {"MAX_ITEM_LIST_LENGTH": 0}),
        *((name, "ssm_init", {"ssm_init": "offical"}) for name in STATE_SPACE),
        *((name, "d_state", {"d_state": 0}) for name in STATE_SPACE),
        *((name, "d_conv", {"d_conv": 5}) for name in STATE_SPACE),
    ],
)
def test_a_bad_setting_is_named(name, field, overrides):
    with pytest.raises(ConfigError) as error:
        build_tiny(name, **overrides)
    assert error.value.field == field
    assert str(error.value).startswith(f"{field}: ")


def test_learned_positions_refuse_longer_sequences():
    model = build_tiny("RecMamba_paper")
    model.hidden_states(histories(lengths=[12]))
    with pytest.raises(ConfigError, match=r"MAX_ITEM_LIST_LENGTH: 12 .* sequence of 13"):
        model.hidden_states(histories(lengths=[13]))
    build_tiny("RecMamba").hidden_states(histories(lengths=[40]))
    with pytest.raises(ConfigError, match=r"MAX_ITEM_LIST_LENGTH: 12 .* sequence of 13"):
        build_tiny("SequenceSASRec").hidden_states(histories(lengths=[13]))


@pytest.mark.parametrize("norm", ["none", "pre", "post"])
@pytest.mark.parametrize("residual", [True, False])
@pytest.mark.parametrize("ffn", [True, False])
def test_recmamba_layer_is_what_its_settings_say(norm, residual, ffn):
    model = build_tiny("RecMamba", norm=norm, residual=residual, ffn=ffn, num_layers=1, scale_embedding=True)
    layer, seq = model.layers[0], histories(lengths=[6, 6])
    x = 4.0 * model.item_embedding(seq)  # sqrt(16)
    for branch, normed in ((layer.mamba, layer.mamba_norm), (layer.ffn, layer.ffn_norm)):
        if branch is None:
            assert not ffn
            continue
        out = branch(normed(x)) if norm == "pre" else branch(x)
        out = x + out if residual else out
        x = normed(out) if norm == "post" else out
    torch.testing.assert_close(model.hidden_states(seq), model.final_norm(x))
    assert isinstance(model.final_norm, nn.LayerNorm if norm == "pre" else nn.Identity)


def test_mamba4rec_has_the_mamba_residual_in_a_stack_only():
    x = torch.randn(2, 5, 16)
    for num_layers in (1, 2):
        layer = build_tiny("Mamba4Rec", num_layers=num_layers).layers[0]
        h = layer.mamba_norm(layer.mamba(x) + (x if num_layers > 1 else 0))
        torch.testing.assert_close(layer(x), layer.ffn_norm(layer.ffn(h) + h))


def test_hydra_block_follows_its_equations():
    model = build_tiny("Hydra", num_layers=1, final_norm=False)
    seq = histories(lengths=[7, 7])
    block, e = model.layers[0], model.item_embedding(seq)
    h = model.norm(e)
    latent, n = block.latent, block.latent_norm(h)
    x = F.silu(latent.w_x(n)).view(2, 7, 4, 4)
    z = F.silu(latent.w_z(n)).view(2, 7, 4, 4)
    gated = torch.cat([latent.mamba(x)[:, :, i] * rotary(z[:, :, i]) for i in range(4)], dim=-1)
    h = h + latent.w_o(gated)
    torch.testing.assert_close(model.hidden_states(seq), h + block.ffn(block.ffn_norm(h)))


def test_hydra_heads_are_independent():
    mamba = build_tiny("Hydra").layers[0].latent.mamba
    x = torch.randn(2, 6, 4, 4)
    changed = x.clone()
    changed[:, :, 2] += 1.0
    difference = (mamba(changed) - mamba(x)).abs().amax((0, 1, 3))
    assert difference[2] > 1e-4
    assert difference[[0, 1, 3]].max() < 1e-6


@pytest.mark.parametrize("name", MODELS)
def test_every_value_of_the_tuning_space_builds(name):
    defaults = read_yaml(f"model/{name}.yaml")
    for field, values in read_yaml(f"search/{name}.yaml")["choice"].items():
        assert field in defaults
        for value in values:
            build(name, n_items=5, n_values=3, **{field: value})


@pytest.mark.parametrize("name", MODELS)
def test_the_paper_preset_sets_every_key_of_the_model(name):
    defaults, paper = read_yaml(f"model/{name}.yaml"), read_yaml(f"model/{name}_paper.yaml")
    model_keys = list(defaults)[: list(defaults).index("train_batch_size")]
    assert [key for key in model_keys if key not in paper] == []


# ---------------------------------------------------------------------- layers of these models
def test_rotary_keeps_norms_and_position_zero():
    x = torch.randn(2, 3, 7, 8)
    y = rotary(x)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    torch.testing.assert_close(y[..., 0, :], x[..., 0, :])
    assert (y[..., 1:, :] - x[..., 1:, :]).abs().amax(-1).gt(1e-3).all()


def test_rotary_inner_products_depend_on_the_distance():
    a, b = torch.randn(8), torch.randn(8)
    rotated_a, rotated_b = rotary(a.expand(10, 8)), rotary(b.expand(10, 8))
    products = rotated_a @ rotated_b.T
    for distance in range(-5, 6):
        diagonal = products.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))


def test_rotary_in_pieces_is_rotary_at_once():
    x = torch.randn(2, 3, 9, 6)
    y = rotary(x, base=100.0)
    torch.testing.assert_close(rotary(x[..., 4:, :], 100.0, offset=4), y[..., 4:, :])
    starts = torch.tensor([2, 5])
    rows = torch.stack([x[0, :, 2:5], x[1, :, 5:8]])
    expected = torch.stack([y[0, :, 2:5], y[1, :, 5:8]])
    torch.testing.assert_close(rotary(rows, 100.0, offset=starts[:, None]), expected)


def test_rotary_refuses_an_odd_width():
    with pytest.raises(ValueError, match="even width"):
        rotary(torch.randn(3, 5))


def test_feed_forwards_follow_their_equations():
    x = torch.randn(2, 3, 8)
    gated, plain = SwiGLU(8, 12), FeedForward(8, 12, std=0.02)
    torch.testing.assert_close(gated(x), gated.down(F.silu(gated.gate(x)) * gated.up(x)))
    torch.testing.assert_close(plain(x), plain.w_2(F.gelu(plain.w_1(x))))
    assert not plain.w_1.bias.any()
    assert plain.w_1.weight.std() < 0.03


@pytest.mark.parametrize("preset", ALL_PRESETS)
def test_a_batch_of_prefixes_is_encoded_in_groups_of_nearly_one_length(preset, monkeypatch):
    """The loss and its gradients are those of the whole batch, with fewer positions."""
    model = build_tiny(preset, MAX_ITEM_LIST_LENGTH=50, loss_type="CE").train()
    torch.manual_seed(0)
    length = torch.randint(1, 51, (60,))
    seq = torch.randint(1, model.n_items, (60, 50)).masked_fill(torch.arange(50) >= length[:, None], 0)
    target = torch.randint(1, model.n_items, (60,))
    batch = Interaction({model.ITEM_SEQ: seq, model.ITEM_SEQ_LEN: length, model.POS_ITEM_ID: target})
    parameters = [p for p in model.parameters() if p.requires_grad]
    torch.manual_seed(1)
    whole_loss = model.loss(model.forward(seq, length), target)
    wanted = torch.autograd.grad(whole_loss, parameters, allow_unused=True)

    positions, encode = [], model.hidden_states
    monkeypatch.setattr(model, "hidden_states", lambda item_seq: positions.append(item_seq.numel()) or encode(item_seq))
    torch.manual_seed(1)
    loss = model.calculate_loss(batch)
    torch.testing.assert_close(loss, whole_loss, atol=1e-5, rtol=1e-5)
    for found, expected in zip(torch.autograd.grad(loss, parameters, allow_unused=True), wanted, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-3)
    assert sum(positions) < 0.65 * seq.numel()
