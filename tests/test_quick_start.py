"""The three doors: run, objective_function, load_data_and_model; and exact resuming."""

from __future__ import annotations

import json
import logging
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recbole.config import Config as RecBoleConfig
from recbole.data import create_dataset as recbole_create_dataset
from recbole.data import data_preparation as recbole_data_preparation
from recbole.trainer import Trainer
from recbole.utils import get_model, init_logger, init_seed
from recbole.utils.case_study import full_sort_scores, full_sort_topk

from recbole_holo import quick_start
from recbole_holo.bridge import registry
from recbole_holo.bridge.checkpoint import CheckpointError, load, save
from recbole_holo.bridge.config import Config
from recbole_holo.bridge.metric_names import UNSEEN
from recbole_holo.data.loader import create_dataset, data_preparation
from recbole_holo.errors import ConfigError, NonFiniteLoss
from recbole_holo.quick_start import load_data_and_model, objective_function, run
from recbole_holo.training.trainer import HoloTrainer, get_trainer_class

OURS = list(registry.MODELS)


@pytest.mark.parametrize("model", OURS)
@pytest.mark.parametrize("mode", ["full", "uni5"])
def test_train_report_reload(model: str, mode: str, cyclic_dataset: str, tiny: dict[str, Any]) -> None:
    tiny["eval_args"] = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": mode}
    result = run(model, cyclic_dataset, config_dict={**tiny, "item_attributes": ["genre"]})
    report = result["report"]
    on_disk = json.loads(Path(report["checkpoint"]).with_suffix(".json").read_text())
    assert on_disk["test"] == result["test_result"]
    for key in ("parameters", "parameters_without_embeddings", "seconds_per_epoch", "peak_memory_bytes", "versions"):
        assert on_disk[key], key
    assert on_disk["config"]["hidden_size"] == 16
    assert on_disk["seed"] == on_disk["config"]["seed"]

    config, net, dataset, train, valid, test = load_data_and_model(report["checkpoint"])
    trainer = get_trainer_class(config)(config, net)
    trainer.eval_collector.data_collect(train)
    assert trainer.evaluate(test, load_best_model=False) == result["test_result"]
    assert trainer.evaluate(valid, load_best_model=False) == result["best_valid_result"]
    if mode == "full":
        users = dataset.token2id("user_id", ["u1", "u2", "u3"])
        scores, items = full_sort_topk(users, net, test, k=4)
        assert scores.shape == items.shape == (3, 4)
        assert torch.isfinite(scores).all()
        assert full_sort_scores(users, net, test)[0, 0] == -np.inf


@pytest.mark.parametrize("binding", ["item", "both", "concat"])
def test_all_kinds_of_attributes_train_report_and_reload(
    binding: str, cyclic_dataset: str, tiny: dict[str, Any]
) -> None:
    bound = {"item_attributes": ["genre", "tags", "price"], "attribute_floats": "learned", "bind_output": True}
    result = run("Hydra", cyclic_dataset, config_dict={**tiny, **bound, "binding": binding})
    assert list(result["report"]["attributes"]) == ["genre", "tags", "price"]
    assert all(one["share"] > 0 for one in result["report"]["attributes"].values())
    config, net, _, train, _, test = load_data_and_model(result["report"]["checkpoint"])
    trainer = get_trainer_class(config)(config, net)
    trainer.eval_collector.data_collect(train)
    assert trainer.evaluate(test, load_best_model=False) == result["test_result"]


@pytest.mark.parametrize("schedule", ["grow", "mixed"])
def test_a_bundled_model_trains_reloads_and_runs_at_other_sizes(
    schedule: str, cyclic_dataset: str, tiny: dict[str, Any]
) -> None:
    bundled = {"bundle_size": 4, "bundle_recent": 2, "bundle_schedule": schedule, "epochs": 8, "learning_rate": 0.02}
    result = run("HoloMambaRec", cyclic_dataset, config_dict={**tiny, **bundled, "item_attributes": ["genre"]})
    assert result["best_valid_result"]["hit@3"] > 0.3  # of twenty items in a walk
    scores = {}
    for size in (1, 2, 4):
        config, net, _, train, _, test = load_data_and_model(result["report"]["checkpoint"], bundle_inference=size)
        assert net.bundling.size == size
        trainer = get_trainer_class(config)(config, net)
        trainer.eval_collector.data_collect(train)
        scores[size] = trainer.evaluate(test, load_best_model=False)
    assert scores[4] == result["test_result"]
    assert scores[1]["hit@3"] > 0.3


def test_the_checkpoint_rebuilds_its_own_settings(
    cyclic_dataset: str, tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not those that yaml files and the command line say by the time it is loaded."""
    checkpoint = run("RecMamba", cyclic_dataset, config_dict={**tiny, "seed": 7})["report"]["checkpoint"]
    monkeypatch.setattr("sys.argv", ["x", "--seed=99", "--hidden_size=8"])
    monkeypatch.setattr(Config, "_read_yaml", lambda self, path: {"hidden_size": 4, "MAX_ITEM_LIST_LENGTH": 3})
    config = load_data_and_model(checkpoint)[0]
    assert (config["seed"], config["hidden_size"], config["MAX_ITEM_LIST_LENGTH"]) == (7, 16, 10)


def test_resuming_with_other_epochs_warns_where_the_rate_depends_on_them(
    cyclic_dataset: str, tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(logging.Logger, "warning", lambda self, text, *args: said.append(str(text)))
    half = run("RecMamba", cyclic_dataset, config_dict={**tiny, "epochs": 1, "lr_scheduler": "onecycle"})["report"]
    for settings, warned in (({"epochs": 1}, False), ({}, True), ({"epochs": 3, "lr_scheduler": None}, False)):
        said.clear()
        resumed = {**tiny, "epochs": 2, "lr_scheduler": "onecycle", "resume": half["checkpoint"], **settings}
        run("RecMamba", cyclic_dataset, config_dict=resumed)
        assert any("a run of 1" in text for text in said) is warned


def test_a_checkpoint_cannot_name_a_pickle_to_load(cyclic_dataset: str, tiny: dict[str, Any]) -> None:
    class Exploit:
        def __reduce__(self):
            return Path.touch, (Path("exploited"),)

    path = run("RecMamba", cyclic_dataset, config_dict=tiny)["report"]["checkpoint"]
    for name in ("evil.pth", f"saved/{cyclic_dataset}-for-RecMamba-dataloader.pth"):
        Path(name).write_bytes(pickle.dumps(Exploit()))
    state = load(path)
    state["config"]["given"] |= {"dataset_save_path": "evil.pth", "dataloaders_save_path": "evil.pth"}
    save(state, "stranger.pth")
    load_data_and_model("stranger.pth")
    assert not Path("exploited").exists()


@pytest.mark.parametrize("train_on", ["sequences", "prefixes"])
def test_resumed_training_equals_undisturbed_training(train_on: str, cyclic_dataset: str, tiny: dict[str, Any]) -> None:
    settings = {**tiny, "train_on": train_on, "eval_step": 0, "item_attributes": ["genre"], "dropout_prob": 0.3}
    settings["lr_scheduler"] = None  # a schedule goes over the run's epochs, and half a run is another one
    whole = run("HoloMambaRec", cyclic_dataset, config_dict={**settings, "epochs": 4})["report"]
    half = run("HoloMambaRec", cyclic_dataset, config_dict={**settings, "epochs": 2})["report"]
    rest = run("HoloMambaRec", cyclic_dataset, config_dict={**settings, "epochs": 4, "resume": half["checkpoint"]})
    assert rest["report"]["epochs"] == 2
    one, other = load(whole["checkpoint"]), load(rest["report"]["checkpoint"])
    assert one["epoch"] == other["epoch"] == 3
    for name, value in one["state_dict"].items():
        assert torch.equal(value, other["state_dict"][name]), name
    for index, slots in one["optimizer"]["state"].items():
        for slot, value in slots.items():
            assert torch.equal(value, other["optimizer"]["state"][index][slot]), (index, slot)
    assert rest["test_result"] == whole["test"]


def test_resuming_a_finished_run_trains_nothing(cyclic_dataset: str, tiny: dict[str, Any]) -> None:
    first = run("RecMamba", cyclic_dataset, config_dict=tiny)
    before = Path(first["report"]["checkpoint"]).read_bytes()
    epoch = load(first["report"]["checkpoint"])["epoch"]
    again = run(
        "RecMamba", cyclic_dataset, config_dict={**tiny, "epochs": epoch + 1, "resume": first["report"]["checkpoint"]}
    )
    assert again["test_result"] == first["test_result"]
    assert again["best_valid_result"] == first["best_valid_result"]
    assert Path(first["report"]["checkpoint"]).read_bytes() == before


@pytest.mark.parametrize("model", ["GRU4Rec", "SASRec", "BPR"])
def test_recbole_models_get_recboles_metrics(model: str, sorted_ml100k: str) -> None:
    settings = {
        "epochs": 1,
        "MAX_ITEM_LIST_LENGTH": 8,
        "hidden_size": 8,
        "embedding_size": 8,
        "inner_size": 8,
        "n_layers": 1,
        "num_layers": 1,
        "state": "ERROR",
        "show_progress": False,
        "train_batch_size": 4096,
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
    }
    mine = run(model, sorted_ml100k, config_dict=settings, saved=False)

    if model != "BPR":
        settings["train_neg_sample_args"] = None
    config = RecBoleConfig(model, sorted_ml100k, config_dict=settings)
    init_seed(config["seed"], config["reproducibility"])
    init_logger(config)
    train, valid, test = recbole_data_preparation(config, recbole_create_dataset(config))
    init_seed(config["seed"], config["reproducibility"])
    net = get_model(model)(config, train.dataset).to(config["device"])
    trainer = Trainer(config, net)
    _, best = trainer.fit(train, valid, saved=False, show_progress=False)
    # RecBole leaves out of a general model's ranking what users have seen, and of a sequential model's nothing.
    kind = UNSEEN if model == "BPR" else ""
    tested = trainer.evaluate(test, load_best_model=False)
    assert {name: mine["best_valid_result"][name + kind] for name in best} == best
    assert {name: mine["test_result"][name + kind] for name in tested} == tested
    assert mine["best_valid_score"] == best["mrr@10"]
    assert mine["test_result"]["recall@10"] > 0
    assert mine["test_result"]["recall@10" + UNSEEN] > mine["test_result"]["recall@10"]


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("ItemKNN", {}),  # keeps sparse matrices
        ("LightGCN", {}),  # a loss of shape [1]
        ("MultiVAE", {}),  # a loader of its own
        ("GRU4RecF", {"selected_features": ["genre"]}),  # keeps a module beside its parameters
        ("BERT4Rec", {}),  # a transform that leaves keys in the configuration
        ("FEARec", {}),  # reads padded lists from the data set
        ("S3Rec", {"item_attribute": "tags", "train_stage": "pretrain", "pretrain_epochs": 1, "save_step": 1}),
    ],
)
def test_recbole_models_of_every_kind_run_and_reload(
    model: str, settings: dict[str, Any], cyclic_dataset: str, tiny: dict[str, Any]
) -> None:
    load = {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "genre", "tags"]}
    result = run(model, cyclic_dataset, config_dict={**tiny, "epochs": 1, "load_col": load, **settings})
    checkpoint = next(Path("saved").glob("*-1.pth")) if model == "S3Rec" else result["report"]["checkpoint"]
    config, net, _, _, _, test = load_data_and_model(checkpoint)
    assert get_trainer_class(config)(config, net).evaluate(test, load_best_model=False) == result["test_result"]


def test_recbole_checkpoints(cyclic_dataset: str, tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """RecBole's models through us reload safely; RecBole's own pickles only when trusted."""
    settings = {**tiny, "train_neg_sample_args": None}
    ours = run("GRU4Rec", cyclic_dataset, config_dict=settings)
    config, net, _, train, _, test = load_data_and_model(ours["report"]["checkpoint"])
    trainer = get_trainer_class(config)(config, net)
    assert trainer.evaluate(test, load_best_model=False) == ours["test_result"]

    config = RecBoleConfig("GRU4Rec", cyclic_dataset, config_dict=settings)
    train, valid, test = recbole_data_preparation(config, recbole_create_dataset(config))
    net = get_model("GRU4Rec")(config, train.dataset)
    theirs = Trainer(config, net)
    theirs.fit(train, valid, show_progress=False)
    expected = theirs.evaluate(test, load_best_model=False)
    theirs._save_checkpoint(0, verbose=False)
    with pytest.raises(CheckpointError, match="trust_checkpoint"):
        load_data_and_model(theirs.saved_model_file)
    with pytest.warns(UserWarning, match="can run code"):
        config, net, _, _, _, test = load_data_and_model(theirs.saved_model_file, trust_checkpoint=True)
    found = get_trainer_class(config)(config, net).evaluate(test, load_best_model=False)
    assert {name: found[name] for name in expected} == expected


def test_objective_function_as_recboles_tuning_script_calls_it(
    cyclic_dataset: str, tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "sys.argv", ["run_hyper.py", "--params_file=x.test", "--model=RecMamba", f"--dataset={cyclic_dataset}"]
    )
    fixed = tmp_path / "fixed.yaml"
    fixed.write_text(json.dumps(tiny))
    result = objective_function({"learning_rate": 0.01}, [str(fixed)], saved=False)
    assert set(result) == {"model", "best_valid_score", "valid_score_bigger", "best_valid_result", "test_result"}
    assert result["model"] == "RecMamba"
    assert result["best_valid_score"] == result["best_valid_result"]["ndcg@5"]


def test_uni_mode_repeats_candidates_and_encodes_once(cyclic_dataset: str, tiny: dict[str, Any]) -> None:
    tiny["eval_args"] = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "uni5"}
    config = Config("RecMamba", cyclic_dataset, config_dict=tiny)
    train, valid, _ = data_preparation(config, create_dataset(config))
    net = registry.get_model_class("RecMamba")(config, train.dataset)
    trainer = HoloTrainer(config, net)
    encoded = []
    hidden_states = net.hidden_states
    net.hidden_states = lambda item_seq: encoded.append(len(item_seq)) or hidden_states(item_seq)
    first = trainer.evaluate(valid, load_best_model=False)
    assert sum(encoded) == len(valid.dataset)
    np.random.seed(123)
    assert trainer.evaluate(valid, load_best_model=False) == first


def evaluations(model: str, dataset: str, tiny: dict[str, Any], times: int, **settings: Any) -> list[Any]:
    """Of one untrained model on validation and test, with other draws of the process in between."""
    config = Config(model, dataset, config_dict={**tiny, "embedding_size": 8, **settings})
    train, valid, test = data_preparation(config, create_dataset(config))
    torch.manual_seed(0)
    net = registry.get_model_class(model)(config, train._dataset)
    trainer, found = get_trainer_class(config)(config, net), []
    for draw in range(times):
        random.seed(draw), np.random.seed(draw), torch.manual_seed(draw)
        before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
        for data in (valid, test):
            result = trainer.evaluate(data, load_best_model=False)
            found.append((result, trainer.evaluator.ranks.tolist()))
        assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    return found


# Data workers drew candidates by seeds of their own, others at every evaluation.
@pytest.mark.parametrize("mode", ["uni5", "pop5"])
@pytest.mark.parametrize("model", ["RecMamba", "GRU4Rec", "BPR"])
def test_candidates_are_the_same_at_every_evaluation_with_workers_or_without(
    model: str, mode: str, cyclic_dataset: str, tiny: dict[str, Any]
) -> None:
    tiny["eval_args"] = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": mode}
    one = evaluations(model, cyclic_dataset, tiny, 1)
    assert evaluations(model, cyclic_dataset, tiny, 3, worker=2) == 3 * one


# What RecBole's models and transforms draw in an evaluation was other each time, and shifted what training drew.
@pytest.mark.parametrize("model", ["Random", "DiffRec", "BERT4Rec"])
def test_what_models_draw_is_the_same_at_every_evaluation(
    model: str, cyclic_dataset: str, tiny: dict[str, Any]
) -> None:
    first, second, *rest = evaluations(model, cyclic_dataset, tiny, 2)
    assert [first, second] == rest


def test_a_loss_that_is_not_finite_stops_with_step_and_checkpoint(cyclic_dataset: str, tiny: dict[str, Any]) -> None:
    config = Config("RecMamba", cyclic_dataset, config_dict={**tiny, "epochs": 3})
    train, valid, _ = data_preparation(config, create_dataset(config))
    net = registry.get_model_class("RecMamba")(config, train.dataset)
    trainer = HoloTrainer(config, net)
    calls, calculate = [], net.calculate_loss

    def breaks_in_second_epoch(interaction):
        calls.append(1)
        return calculate(interaction) * (float("nan") if len(calls) == len(train) + 3 else 1.0)

    net.calculate_loss = breaks_in_second_epoch
    with pytest.raises(NonFiniteLoss, match=r"epoch 1, step 2.*last good checkpoint is") as caught:
        trainer.fit(train, valid, verbose=False)
    assert trainer.saved_model_file in str(caught.value)
    saved = load(trainer.saved_model_file)
    assert saved["epoch"] == 0
    assert all(torch.isfinite(value).all() for value in saved["state_dict"].values())


def test_unwritable_output_directory_fails_before_training(cyclic_dataset: str, tiny: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"checkpoint_dir.*cannot be written"):
        run("RecMamba", cyclic_dataset, config_dict={**tiny, "checkpoint_dir": "/proc/saved"})


@pytest.mark.parametrize(
    "settings",
    [
        {"enable_amp": True},
        {"worker": 1},
        {"clip_grad_norm": {"max_norm": 1.0}},
        {"save_dataset": True},
        {"save_dataloaders": True},
        {"learner": "sgd"},
        {"backend": "reference"},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_recboles_training_settings_work(settings: dict[str, Any], cyclic_dataset: str, tiny: dict[str, Any]) -> None:
    base = {**tiny, "item_attributes": ["genre"], "epochs": 1, **settings}
    first = run("HoloMambaRec", cyclic_dataset, config_dict=base)
    assert np.isfinite(first["best_valid_score"])
    if "save_dataset" in settings:
        base["dataset_save_path"] = f"saved/{cyclic_dataset}-SequenceDataset.pth"
    again = run("HoloMambaRec", cyclic_dataset, config_dict=base)  # with what was saved, where something was
    assert again["test_result"] == first["test_result"]


def test_weight_decay_spares_the_state_space(cyclic_dataset: str, tiny: dict[str, Any]) -> None:
    config = Config("RecMamba", cyclic_dataset, config_dict={**tiny, "weight_decay": 0.1, "learner": "adamw"})
    train, _, _ = data_preparation(config, create_dataset(config))
    net = registry.get_model_class("RecMamba")(config, train.dataset)
    decay = {id(p): g["weight_decay"] for g in HoloTrainer(config, net).optimizer.param_groups for p in g["params"]}
    for name, parameter in net.named_parameters():
        assert decay[id(parameter)] == (0.0 if name.endswith(("A_log", ".D")) else 0.1), name


def test_two_processes_equal_one(cyclic_dataset: str, tiny: dict[str, Any]) -> None:
    settings = {**tiny, "dropout_prob": 0.0, "epochs": 3, "item_attributes": ["genre"]}
    for train_on in ("sequences", "prefixes"):
        # First, in a fresh directory: the processes make the folders of logs together.
        two = run(
            "HoloMambaRec", cyclic_dataset, config_dict={**settings, "train_on": train_on}, nproc=2, port=_free_port()
        )
        one = run("HoloMambaRec", cyclic_dataset, config_dict={**settings, "train_on": train_on})
        assert two["test_result"] == one["test_result"]
        assert two["best_valid_result"] == one["best_valid_result"]
        left, right = load(one["report"]["checkpoint"]), load(two["report"]["checkpoint"])
        for name, value in left["state_dict"].items():
            torch.testing.assert_close(value, right["state_dict"][name], rtol=1e-3, atol=1e-5)


def _free_port() -> int:
    import socket

    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def test_peak_memory_begins_anew_with_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a GPU it is the process's; the run before may have needed more."""
    reset: list[torch.device] = []
    config: Any = {"backend": "auto", "device": torch.device("cuda", 0), "seed": 1, "reproducibility": True}
    for name in ("init_seed", "start_log"):
        monkeypatch.setattr(quick_start, name, lambda *given: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", reset.append)
    quick_start._start(config)
    assert reset == [config["device"]]
