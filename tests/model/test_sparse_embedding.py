"""Sparse gradients of item tables, of every model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy.sparse import csr_matrix
from torch import Tensor

from recbole_holo.errors import ConfigError
from recbole_holo.model.base import SequenceRecommender
from recbole_holo.model.mamba4rec import Mamba4Rec
from recbole_holo.quick_start import load_data_and_model, run
from recbole_holo.training.sparse import LazyAdamW

from .conftest import MODELS, TINY, Dataset, build_tiny, make_config
from .test_models import histories, whole


def gradients(model: SequenceRecommender, make: Callable[[], Any]) -> dict[str, Tensor]:
    torch.manual_seed(3)  # the same negatives
    model.zero_grad()
    model.calculate_loss(make()).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("loss_type", ["InfoNCE", "SampledCE", "BPR", "BCE", "gBCE"])
@pytest.mark.parametrize("similarity", ["dot", "cosine"])
@pytest.mark.parametrize("name", MODELS)
def test_sparse_gradients_of_a_model_are_the_dense_ones(name, similarity, loss_type):
    settings = {"loss_type": loss_type, "similarity": similarity, "num_negatives": 6, "n_items": 200}
    models = [build_tiny(name, sparse_embedding=sparse, **settings).train() for sparse in (True, False)]
    sparse, dense = (gradients(model, lambda model=model: whole(model, histories())) for model in models)
    assert {key for key, gradient in sparse.items() if gradient.is_sparse} == {"item_embedding.weight"}
    table = sparse["item_embedding.weight"].coalesce()
    assert len(table.indices()[0]) < 60  # of 200
    assert not table.to_dense()[0].any()
    for key, gradient in dense.items():
        torch.testing.assert_close(sparse[key].to_dense(), gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("loss_type", ["InfoNCE", "SampledCE", "BPR", "BCE", "gBCE"])
@pytest.mark.parametrize("cold", [False, True])
@pytest.mark.parametrize(
    "settings", [{"bind_output": True}, {"bind_output": "added", "tie_weights": False, "similarity": "cosine"}]
)
def test_of_a_bound_output_only_what_the_loss_is_about_is_bound(settings, cold, loss_type, monkeypatch):
    """The same loss and gradients as from the whole table; the item tables' gradients are sparse."""
    settings = {**settings, "binding": "both", "loss_type": loss_type, "num_negatives": 6, "n_items": 400}
    settings |= {"cold_items": "attributes"} if cold else {}
    occurs = csr_matrix(([1.0] * 299, ([0] * 299, range(1, 300))), shape=(1, 400))
    monkeypatch.setattr(Dataset, "inter_matrix", lambda self, form: occurs, raising=False)
    models = [build_tiny("HoloMambaRec", sparse_embedding=sparse, **settings).train() for sparse in (True, False)]
    bound: list[int] = []
    for model in models:
        model.binding.register_forward_pre_hook(lambda _, given: bound.append(given[1].numel()))
    lazy = [gradients(model, lambda model=model: whole(model, histories())) for model in models]
    assert max(bound) < 200
    monkeypatch.setattr(SequenceRecommender, "_vectors_for", lambda self, _: (self._trained_vectors(), False))
    dense = gradients(models[1], lambda: whole(models[1], histories()))
    tables = {"item_embedding.weight", *(["head.weight"] if "tie_weights" in settings else [])}
    assert {key for key, gradient in lazy[0].items() if gradient.is_sparse} == tables
    for found in lazy:
        assert found.keys() == dense.keys()
        for key, gradient in dense.items():
            torch.testing.assert_close(found[key].to_dense(), gradient, rtol=1e-5, atol=1e-7)


def test_an_untied_head_has_a_sparse_gradient_of_its_own():
    settings = {"tie_weights": False, "bind_output": False, "loss_type": "SampledCE", "sparse_embedding": True}
    model = build_tiny("HoloMambaRec", **settings).train()
    for seq in (histories(), histories(lengths=[1, 1])):  # without a target, too
        found = gradients(model, lambda seq=seq: whole(model, seq))
        assert {key for key, g in found.items() if g.is_sparse} == {"item_embedding.weight", "head.weight"}


@pytest.mark.parametrize("name", MODELS)
def test_lazy_training_learns_and_leaves_other_items_alone(name):
    settings = {"loss_type": "SampledCE", "sparse_embedding": True, "num_negatives": 8, "n_items": 500}
    model = build_tiny(name, **settings).train()
    optimizer = LazyAdamW(model.parameters(), lr=0.01, weight_decay=0.01)
    before = model.item_embedding.weight.detach().clone()
    batch, curve, touched = whole(model, histories(lengths=[8] * 6)), [], torch.zeros(500, dtype=torch.bool)
    for _ in range(50):
        optimizer.zero_grad()
        loss = model.calculate_loss(batch)
        loss.backward()
        touched[model.item_embedding.weight.grad.coalesce().indices()[0]] = True
        optimizer.step()
        curve.append(loss.item())
    assert sum(curve[-3:]) < 0.6 * sum(curve[:3])
    changed = (model.item_embedding.weight != before).any(-1)
    assert torch.equal(changed, touched)
    assert not touched[0]
    assert not touched.all()


def test_a_computed_table_gets_dense_gradients():
    class Projected(Mamba4Rec):
        def item_vectors(self) -> Tensor:
            return 2 * self.item_embedding.weight

    model = Projected(make_config("Mamba4Rec", **TINY, loss_type="InfoNCE", sparse_embedding=True), Dataset(30))
    found = gradients(model.train(), lambda: whole(model, histories()))
    assert not any(gradient.is_sparse for gradient in found.values())


def test_lookups_have_dense_gradients_unless_asked():
    model = build_tiny("Mamba4Rec", loss_type="InfoNCE").train()
    assert not any(g.is_sparse for g in gradients(model, lambda: whole(model, histories())).values())


# ---------------------------------------------------------------------- a whole run
SPARSE_RUN = {
    "loss_type": "SampledCE",
    "negative_distribution": "mixed",
    "sparse_embedding": True,
    "clip_grad_norm": {"max_norm": 1.0},
}


def test_a_run_trains_with_sparse_gradients_and_resumes(cyclic_dataset, tiny):
    settings = {**tiny, **SPARSE_RUN, "epochs": 3, "valid_metric": "NDCG@5", "lr_scheduler": None}
    whole_run = run("Mamba4Rec", cyclic_dataset, config_dict=settings)
    first = run("Mamba4Rec", cyclic_dataset, config_dict={**settings, "epochs": 1})
    resumed = run("Mamba4Rec", cyclic_dataset, config_dict={**settings, "resume": first["report"]["checkpoint"]})
    assert resumed["test_result"] == whole_run["test_result"]
    _, model, *_ = load_data_and_model(whole_run["report"]["checkpoint"])
    state = torch.load(whole_run["report"]["checkpoint"], weights_only=True)
    assert not model.item_embedding.weight[0].any()
    assert state["optimizer"]["state"][0]["exp_avg_sq"].shape == model.item_embedding.weight.shape


def test_a_run_refuses_a_learner_without_a_sparse_form(cyclic_dataset, tiny):
    with pytest.raises(ConfigError, match=r"^learner: 'sgd'"):
        run("Mamba4Rec", cyclic_dataset, config_dict={**tiny, **SPARSE_RUN, "learner": "sgd"})
