"""Models made small for serving: the tables, the whole, the states."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from recbole_holo.errors import ConfigError
from recbole_holo.inference import Compression, compress, stored_bytes, truncate_states
from recbole_holo.inference.compression import CRITERIA, state_worth
from recbole_holo.inference.tables import CompressedTable
from recbole_holo.layers import Mamba
from tests.model.conftest import MODELS, build, build_tiny
from tests.model.test_models import histories


@pytest.mark.parametrize(
    ("bits", "error"), [(4, 1 / 14), (5, 1 / 30), (6, 1 / 62), (7, 1 / 126), (8, 1 / 254), (16, 2**-8), (32, 0)]
)
@pytest.mark.parametrize("width", [7, 64])
def test_a_table_keeps_its_rows_within_half_a_step(bits, error, width):
    torch.manual_seed(0)
    weight = torch.randn(50, width) * torch.logspace(-3, 2, 50).unsqueeze(1)
    weight[0] = 0
    table = CompressedTable(weight, bits)
    rows = table(torch.arange(50))
    assert (rows - weight).abs().le(weight.abs().amax(1, keepdim=True) * error * 1.01).all()
    assert not rows[0].any()
    assert table(torch.tensor([[3, 4]])).shape == (1, 2, width)
    query, bias = torch.randn(3, width), torch.randn(50)
    torch.testing.assert_close(table.scores(query, bias), query @ rows.T + bias, rtol=1e-5, atol=1e-4)
    stored = sum(b.numel() * b.element_size() for b in table.buffers())
    assert stored <= 50 * (-(-width * bits // 8) + (2 if bits < 16 else 0))


def test_scores_do_not_depend_on_the_parts(monkeypatch):
    from recbole_holo.inference import tables

    table, query = CompressedTable(torch.randn(100, 8)), torch.randn(3, 8)
    whole = table.scores(query)
    monkeypatch.setattr(tables, "_ROWS", 7)
    torch.testing.assert_close(table.scores(query), whole)


def test_low_rank_is_the_best_there_is():
    torch.manual_seed(0)
    weight = torch.randn(200, 16) @ torch.diag(torch.logspace(0, -2, 16)) @ torch.randn(16, 16)
    table = CompressedTable(weight, 32, rank=5)
    singular = torch.linalg.svdvals(weight)
    error = (table(torch.arange(200)) - weight).norm()
    assert error == pytest.approx(singular[5:].norm().item(), rel=0.05)  # the basis is in bfloat16
    assert table.codes.shape == (200, 5)


@pytest.mark.parametrize(
    "settings", [{}, {"bind_output": True}, {"bind_output": "added"}, {"similarity": "cosine"}, {"tie_weights": False}]
)
@pytest.mark.parametrize("name", MODELS)
def test_a_compressed_model_scores_as_the_model_does(name, settings):
    model, seq = build_tiny(name, hidden_size=32, n_items=200, binding="both", **settings), histories(200)
    with torch.no_grad():
        model.item_embedding.weight.mul_(20)
        scores = model.score_all(model.hidden_states(seq)[:, 3])
        for (bits, tolerance), fold in product(((32, 1e-5), (16, 0.04), (8, 0.06)), (True, False)):
            small = compress(model, Compression(bits, bits, fold=fold))
            found = small.score_all(small.hidden_states(seq)[:, 3])
            assert (found - scores).norm() < tolerance * scores.norm()
            items = torch.tensor([4, 9, 3, 3])
            pairs = small.score_pairs(small.hidden_states(seq)[:, 3], items)
            torch.testing.assert_close(pairs, found.gather(1, items[:, None])[:, 0], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.score_all(model.hidden_states(seq)[:, 3]), scores)  # the model is as it was
    assert not any(p.requires_grad for p in small.parameters())


def test_a_quarter_of_the_size():
    model = build("HoloMambaRec", n_items=5000, binding=None)
    sizes = {bits: stored_bytes(compress(model, Compression(bits, bits))) for bits in (32, 16, 8, 4)}
    whole = stored_bytes(model)
    assert whole == sum(p.numel() for p in model.parameters()) * 4
    assert sizes[32] == whole
    assert sizes[16] == pytest.approx(whole / 2, rel=0.01)
    assert sizes[8] == pytest.approx(whole / 4, rel=0.06)  # a scale a row of 64
    assert stored_bytes(compress(model, Compression(8, 8, rank=32))) < 0.17 * whole


# ---------------------------------------------------------------------- states
@pytest.mark.parametrize("criterion", CRITERIA)
def test_states_that_say_nothing_go_first(criterion):
    torch.manual_seed(0)
    block = Mamba(8, d_state=6)
    with torch.no_grad():
        block.x_proj.weight[block.dt_rank + 2] = 0  # state 2 is never written
        block.x_proj.weight[block.dt_rank + 6 + 5] *= 1e-4  # state 5 is hardly read
    hidden = torch.randn(4, 30, 8)
    worth = state_worth(block, hidden, torch.ones(4, 30, dtype=torch.bool), criterion)
    assert set(worth.topk(4).indices.tolist()) == {0, 1, 3, 4}


def test_energy_is_what_the_states_add():
    torch.manual_seed(0)
    block, hidden = Mamba(8, d_state=3), torch.randn(2, 12, 8)
    valid = torch.arange(12) < torch.tensor([[12], [7]])
    worth = state_worth(block, hidden, valid, "energy")
    with torch.no_grad():
        x = hidden @ block.in_proj.weight[: block.d_inner].T
        padded = torch.nn.functional.pad(x.transpose(1, 2), (3, 0))
        x = torch.nn.functional.silu(
            torch.nn.functional.conv1d(padded, block.conv1d.weight, block.conv1d.bias, groups=block.d_inner)
        ).transpose(1, 2)
        dt, B, C = (x @ block.x_proj.weight.T).split([block.dt_rank, 3, 3], -1)
        step = torch.nn.functional.softplus(block.dt_proj(dt))
        for n in range(3):
            decay, total = torch.exp(step * -block.A_log[:, n].exp()), 0.0
            state = torch.zeros(2, block.d_inner)
            for t in range(12):
                state = decay[:, t] * state + step[:, t] * x[:, t] * B[:, t, n : n + 1]
                total += ((C[:, t, n : n + 1] * state).square().sum(1) * valid[:, t]).sum().item()
            assert worth[n].item() == pytest.approx(total, rel=1e-4)


def test_truncation_drops_exactly_what_a_dead_state_held():
    model, seq = build_tiny("HoloMambaRec"), histories()
    with torch.no_grad():
        for layer in model.layers:
            layer.mamba.x_proj.weight[layer.mamba.dt_rank + 3] = 0
        hidden = model.hidden_states(seq)
        small = compress(model, Compression(32, 32, states=7), seq)
        assert [layer.mamba.A_log.shape[1] for layer in small.layers] == [7] * len(small.layers)
        torch.testing.assert_close(small.hidden_states(seq), hidden, rtol=1e-4, atol=1e-6)
    dropped = sum(layer.mamba.d_inner + 2 * layer.mamba.d_inner for layer in model.layers)
    assert stored_bytes(small) == stored_bytes(compress(model, Compression(32, 32))) - 4 * dropped


@pytest.mark.parametrize(
    ("name", "states", "message"),
    [("Hydra", 2, "states: 2.*Hydra has no Mamba-1 block"), ("RecMamba", 9, "use 1 to 8"), ("RecMamba", 0, "1 to 8")],
)
def test_what_cannot_be_truncated_is_named(name, states, message):
    with pytest.raises(ConfigError, match=message):
        truncate_states(build_tiny(name), histories(), states)


def test_settings_are_checked():
    with pytest.raises(ConfigError, match=r"table_bits: 3.*4, 5, 6, 7, 8, 16, 32"):
        Compression(3)
    with pytest.raises(ConfigError, match="rank: 0"):
        Compression(rank=0)
    with pytest.raises(ConfigError, match=r"states: 4.*pass some"):
        compress(build_tiny("RecMamba"), Compression(states=4))


def test_attributes_that_are_bound_when_read_save_a_table():
    model = build_tiny("HoloMambaRec", hidden_size=32, n_items=2000, binding="item")
    folded, bound = (stored_bytes(compress(model, Compression(fold=fold))) for fold in (True, False))
    index = 2000  # one value an item
    values = model.binding.attributes[0].embedding.weight.shape[0]
    assert folded - bound == 2000 * (32 + 2) - index - values * (32 + 2) - 2  # and α in 16 bits
