"""Items with attributes, in every model: what is read, what is scored, what is folded, what is cold."""

from __future__ import annotations

import pytest
import torch
from scipy.sparse import coo_matrix
from torch import Tensor

from recbole_holo.data.attributes import ItemAttribute
from recbole_holo.errors import ConfigError
from recbole_holo.layers.holographic import FORMS
from recbole_holo.ops import bind

from .conftest import MODELS, TINY, Dataset, make_config
from .test_models import histories, whole

N_ITEMS, COLD = 30, [5, 11, 29]


class Described(Dataset):
    """Items with two attributes, of which some occur in no training event."""

    def __init__(self) -> None:
        super().__init__(N_ITEMS)
        genre, tags = (
            torch.arange(N_ITEMS) % 4 + 1,
            torch.stack([torch.arange(N_ITEMS) % 6, torch.arange(N_ITEMS) % 3], 1),
        )
        genre[0] = 0
        for name, index, count in (("genre", genre, 5), ("tags", tags, 6)):
            self.item_attributes[name] = ItemAttribute(name, index, count, [str(value) for value in range(count)])

    def inter_matrix(self, form: str) -> coo_matrix:
        items = [item for item in range(1, N_ITEMS) if item not in COLD]
        return coo_matrix(([1.0] * len(items), ([1] * len(items), items)), shape=(2, N_ITEMS)).asformat(form)


def make(name: str, **settings):
    torch.manual_seed(0)
    config = make_config(name, **{**TINY, "binding": "both", **settings})
    return MODELS[name](config, Described())


def batch(model, without: list[int] = COLD):
    seq = histories(N_ITEMS, [9, 4, 7])
    for item in without:
        seq[seq == item] = 1
    return whole(model, seq)


def step(model) -> Tensor:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)  # which counts no versions
    loss = model.train().calculate_loss(batch(model))
    loss.backward()
    optimizer.step()
    model.eval()
    return loss


@pytest.mark.parametrize("binding", FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_every_model_reads_attributes(name, binding):
    model, seq = make(name, binding=binding).eval(), histories()
    before = model.hidden_states(seq)
    with torch.no_grad():
        for vectors in model.binding.attributes:
            vectors.embedding.weight.mul_(-1.5)
    after = model.hidden_states(seq)
    assert (before - after).abs().amax(-1)[seq > 0].gt(1e-6).all()
    model.train().calculate_loss(batch(model)).backward()
    assert all(p.grad.abs().sum() > 0 for p in model.binding.parameters())


@pytest.mark.parametrize("name", MODELS)
def test_without_a_binding_attributes_are_not_read(name):
    model = make(name, binding=None)
    assert model.binding is None
    assert model.attribute_report() == {}


@pytest.mark.parametrize("tie_weights", [True, False])
@pytest.mark.parametrize("binding", FORMS)
def test_the_folded_table_is_the_bound_one_and_follows_training(binding, tie_weights):
    model, seq = make("HoloMambaRec", binding=binding, bind_output=True, tie_weights=tie_weights).eval(), histories()
    for _ in range(2):
        hidden, scores = model.hidden_states(seq), model.score_all(model.hidden_states(seq)[:, 3])
        with torch.no_grad():
            torch.testing.assert_close(model.hidden_states(seq), hidden, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(model.score_all(hidden[:, 3]), scores, rtol=1e-5, atol=1e-5)
            assert model.item_vectors() is model.item_vectors()  # computed once
        step(model)
        assert not torch.allclose(model.hidden_states(seq), hidden)
    assert not any("folded" in name for name in model.state_dict())


def test_a_loaded_state_is_not_scored_with_the_old_table():
    model, other = make("Hydra", bind_output=True).eval(), make("Hydra", bind_output=True)
    step(other)
    with torch.no_grad():
        model.item_vectors()
        model.load_state_dict(other.state_dict())
        assert torch.equal(model.item_vectors(), other.item_vectors())


def test_output_is_bound_only_where_it_is_wanted():
    plain, bound = make("RecMamba"), make("RecMamba", bind_output=True)
    assert plain.item_vectors() is plain.item_embedding.weight
    items = torch.arange(N_ITEMS)
    torch.testing.assert_close(bound.item_vectors(), bound.binding(bound.item_embedding.weight, items))


@pytest.mark.parametrize(
    "loss",
    [{"loss_type": "CE"}, {"loss_type": "BPR"}, {"loss_type": "BCE"}, {"loss_type": "InfoNCE", "num_negatives": 64}],
)
@pytest.mark.parametrize("tie_weights", [True, False])
def test_cold_items_are_what_their_attributes_say(loss, tie_weights):
    settings = {"bind_output": True, "cold_items": "attributes", "tie_weights": tie_weights}
    model = make("HoloMambaRec", **settings, **loss)
    for _ in range(3):
        step(model)
    tables = [model.item_embedding.weight] + ([] if tie_weights else [model.head.weight])
    assert all(not table[COLD].any() for table in tables)
    zero = torch.zeros(len(COLD), TINY["hidden_size"])
    assert torch.equal(model.item_vectors()[COLD], model.binding(zero, torch.tensor(COLD)))
    assert model.item_vectors()[COLD].abs().sum(-1).gt(0).all()


@pytest.mark.parametrize(("name", "tie_weights"), [("HoloMambaRec", True), ("HoloMambaRec", False), ("RecMamba", True)])
def test_products_with_the_item_may_be_the_encoders_alone(name, tie_weights):
    """``bind_output: added``: read is e + Σ α (e ⊛ a) + β (r ⊛ a), scored with is the vector without the products."""
    model = make(name, bind_output="added", tie_weights=tie_weights)
    for training in (True, False, False):
        items, own = torch.arange(N_ITEMS), model.item_embedding.weight
        table = own if model.head is None else model.head.weight
        binding = model.train(training).binding
        roles, values = binding.roles_and_values()
        terms = [
            vectors(items, bind(role, a, binding.scale))
            for vectors, role, a in zip(binding.attributes, roles, values, strict=True)
        ]
        added = sum(weight * term for weight, term in zip(binding.beta, terms, strict=True))
        with torch.no_grad():
            torch.testing.assert_close(model.item_vectors(), table + added, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(model.embed_items(items), binding(own, items), rtol=1e-5, atol=1e-6)
        assert not torch.allclose(model.embed_items(items), own + added)
        step(model)
    (grown,) = torch.autograd.grad(model.train().item_vectors().sum(), model.binding.alpha, allow_unused=True)
    assert grown is None


@pytest.mark.parametrize("binding", [form for form in FORMS if form != "both"])
def test_what_is_added_is_all_or_nothing_in_the_other_forms(binding):
    model, same = make("Hydra", binding=binding, bind_output="added"), binding not in ("item", "triple")
    wanted = make("Hydra", binding=binding, bind_output=same)
    wanted.load_state_dict(model.state_dict())
    assert torch.equal(model.item_vectors(), wanted.item_vectors())


def test_cold_items_are_no_rivals_in_training():
    """Whatever is known of the cold items, the loss of the others is the same; as rivals it would not be."""
    for cold, same in (("attributes", True), ("train", False)):
        model = make("HoloMambaRec", bind_output=True, cold_items=cold).eval()
        loss = model.calculate_loss(batch(model))
        for vectors in model.binding.attributes:
            vectors.index[COLD] = vectors.index[[1, 2, 3]]
        changed = model.calculate_loss(batch(model))
        assert torch.equal(loss, changed) == same


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"binding": "rolle"}, "binding: 'rolle'.*did you mean role"),
        ({"binding_algebra": "unit"}, "binding_algebra: 'unit'.*unitary"),
        ({"binding": "concat", "binding_algebra": "unitary"}, "binding_algebra: 'unitary'.*concat binds nothing"),
        ({"attribute_size": 8}, "attribute_size: 8.*concat"),
        ({"attribute_range": 0}, "attribute_range: 0"),
        ({"attribute_floats": "soft"}, "attribute_floats: 'soft'"),
        ({"binding_alpha": "half"}, "binding_alpha: 'half'"),
        ({"bind_output": "role"}, "bind_output: 'role'.*False, True or added"),
        ({"cold_items": "attributes", "bind_output": False}, "cold_items: 'attributes'.*bind_output"),
        ({"cold_items": "attributes", "bind_output": True, "binding": "item"}, "cold_items.*role or both"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings, message):
    with pytest.raises(ConfigError, match=message):
        make("HoloMambaRec", **settings)
