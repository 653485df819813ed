"""A run that goes on from a checkpoint with other settings, and one that is stopped."""

from __future__ import annotations

import os
import re
import shlex
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import recbole
import torch
import yaml

from recbole_holo import cli
from recbole_holo.bridge import checkpoint, registry, resources
from recbole_holo.bridge.config import LAUNCH_KEYS, Config
from recbole_holo.data.loader import create_dataset, data_preparation
from recbole_holo.errors import ConfigError
from recbole_holo.quick_start import latest_checkpoint, load_data_and_model, run
from recbole_holo.training import resuming
from recbole_holo.training.stopping import Stopped
from recbole_holo.training.trainer import HoloTrainer, get_trainer_class

ROOT = Path(__file__).resolve().parents[2]


# ---------------------------------------------------------------------- the table
def test_the_table_in_the_docs_is_the_codes() -> None:
    assert resuming.table() in (ROOT / "docs/checkpoints.md").read_text(encoding="utf-8")


def test_every_setting_has_its_place_in_the_table() -> None:
    """What is in none is refused as part of the model; that must not happen to one by accident."""
    files = [Path(recbole.__file__).parent / "properties" / name for name in ("overall.yaml", "dataset/sample.yaml")]
    keys = {key for file in [*files, resources.properties("overall.yaml")] for key in yaml.safe_load(file.read_text())}
    parts = {key.split(".")[0] for key in resuming.BY_KEY}
    assert keys - {"resume"} - set(LAUNCH_KEYS) <= parts
    assert len(resuming.BY_KEY) == sum(len(rule.keys) for rule in resuming.RULES), "a setting is there twice"


def test_settings_of_our_models_that_are_obeyed_or_refused() -> None:
    effects = {
        key: resuming.rule_of(key).effect
        for model in registry.MODELS
        for key in yaml.safe_load(resources.properties("model", f"{model}.yaml").read_text())
    }
    part_of_the_model = {"d_state", "expand", "d_conv", "norm", "residual", "latent_heads", "n_heads", "final_norm"}
    assert all(effects[key] == "refused" for key in part_of_the_model & effects.keys())
    assert effects["dropout_prob"] == effects["loss_type"] == "obeyed"


# ---------------------------------------------------------------------- optimizer
@pytest.mark.parametrize(
    ("learner", "changed"),
    [
        ("adam", {"learning_rate": 0.05}),
        ("adamw", {"adam_betas": [0.5, 0.9]}),
        ("adam", {"weight_decay": 0.3}),
        ("sgd", {"learning_rate": 0.05}),
        ("rmsprop", {"weight_decay": 0.3}),
    ],
)
@pytest.mark.parametrize("model", ["RecMamba", "SASRec"])
def test_what_the_optimizer_goes_on_with(
    model: str, learner: str, changed: dict[str, Any], cyclic_dataset: str, tiny: dict[str, Any]
) -> None:
    """It kept rate, betas and decay of the checkpoint, bit for bit, while the report said the new ones."""
    settings = {**tiny, "learner": learner, "lr_scheduler": None, "epochs": 1, "learning_rate": 0.001}
    path = run(model, cyclic_dataset, config_dict=settings)["report"]["checkpoint"]
    trainers = []
    for said in (settings, {**settings, **changed}):
        config = Config(model, cyclic_dataset, config_dict={**said, "epochs": 2})
        train, _, _ = data_preparation(config, create_dataset(config))
        trainer = get_trainer_class(config)(config, registry.get_model_class(model)(config, train._dataset))
        fresh = [{k: v for k, v in group.items() if k != "params"} for group in trainer.optimizer.param_groups]
        trainer.resume_checkpoint(path)
        now = [{k: v for k, v in group.items() if k != "params"} for group in trainer.optimizer.param_groups]
        assert now == fresh
        trainers.append(trainer)
    one, other = (trainer.optimizer.state_dict()["state"] for trainer in trainers)
    for index, slots in one.items():  # what was learned of the gradients stays
        assert all(torch.equal(v, other[index][slot]) for slot, v in slots.items() if torch.is_tensor(v))


@pytest.mark.parametrize(
    "changed",
    [
        {"hidden_size": 32},
        {"d_state": 8},
        {"learner": "sgd"},
        {"seed": 7},
        {"ties": "item"},
        {"item_attributes": ["genre"], "binding": "role"},
        {"eval_args": {"split": {"RS": [0.8, 0.1, 0.1]}, "order": "TO", "group_by": "user", "mode": "full"}},
        {"user_inter_num_interval": "[6,inf)"},
        {"temperature": 0.5},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_what_cannot_be_obeyed_is_refused_by_name(
    changed: dict[str, Any], cyclic_dataset: str, tiny: dict[str, Any]
) -> None:
    """Some were a traceback, some were passed over while the report said them."""
    tiny["eval_args"] = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"}
    path = run("RecMamba", cyclic_dataset, config_dict={**tiny, "epochs": 1})["report"]["checkpoint"]
    (cyclic_dataset_folder := Path("dataset") / cyclic_dataset).rename(cyclic_dataset_folder.with_name("away"))
    name = next(iter(changed)).replace("eval_args", r"eval_args\.split")
    with pytest.raises(ConfigError, match=rf"{name}.*the run in '{re.escape(path)}' has"):  # before data are looked for
        run("RecMamba", cyclic_dataset, config_dict={**tiny, "epochs": 2, "resume": path, **changed})


# ---------------------------------------------------------------------- the best epoch
@pytest.mark.parametrize(
    "changed",
    [
        {"valid_metric": "Hit@3"},  # of the saved results
        {"valid_metric": "MRR@20", "topk": [3, 5, 20]},  # which do not have it
        {"eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "uni5"}},
        {"MAX_ITEM_LIST_LENGTH": 4},
        {"metric_decimal_place": 2},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_the_best_epoch_is_measured_as_the_next_ones_are(
    changed: dict[str, Any], cyclic_dataset: str, tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """New epochs competed with the old score of another metric, lost, and the old epoch was reported as the best."""
    tiny["eval_args"] = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"}
    path = run("RecMamba", cyclic_dataset, config_dict=tiny)["report"]["checkpoint"]
    said = {**tiny, **changed, "epochs": 3, "learning_rate": 1e-9, "resume": path}
    state = checkpoint.load(path)
    config, model, _, train, valid, _ = load_data_and_model(path, **changed)
    trainer = get_trainer_class(config)(config, model)
    trainer.eval_collector.data_collect(train)
    wanted, _ = trainer._valid_epoch(valid)
    resumed = run("RecMamba", cyclic_dataset, config_dict={**said, "epochs": state["epoch"] + 1})  # nothing to train
    assert resumed["best_valid_score"] == wanted
    assert resumed["report"]["valid_metric"] in resumed["best_valid_result"]


def test_other_validation_data_measure_the_best_epoch_anew(
    cyclic_dataset: str, tiny: dict[str, Any], caplog: Any
) -> None:
    path = run("RecMamba", cyclic_dataset, config_dict={**tiny, "epochs": 4, "learning_rate": 0.02})["report"][
        "checkpoint"
    ]
    file = Path("dataset") / cyclic_dataset / "cycle.inter"
    rng = np.random.default_rng(0)
    more = [f"u{u}\ti{rng.integers(20)}\t{1_800_000_000 + k}" for u in range(40) for k in range(2)]
    file.write_text(file.read_text() + "\n".join(more) + "\n")
    saved = checkpoint.load(path)
    settings = {**tiny, "epochs": saved["epoch"] + 1, "resume": path, "state": "WARNING"}
    resumed = run("RecMamba", cyclic_dataset, config_dict=settings)
    assert resumed["best_valid_score"] < saved["best_valid_score"]  # what was learned says nothing of drawn items


def test_a_learned_table_of_positions_of_another_length_is_a_clear_error(
    cyclic_dataset: str, tiny: dict[str, Any]
) -> None:
    """It was a traceback out of PyTorch."""
    for model in ("SequenceSASRec", "SASRec"):
        path = run(model, cyclic_dataset, config_dict={**tiny, "epochs": 1})["report"]["checkpoint"]
        with pytest.raises(
            checkpoint.CheckpointError, match=r"position\w*\.weight is \[.*MAX_ITEM_LIST_LENGTH \(10 there, 20"
        ):
            load_data_and_model(path, MAX_ITEM_LIST_LENGTH=20)
        with pytest.raises(checkpoint.CheckpointError, match=r"position\w*\.weight is \["):
            run(model, cyclic_dataset, config_dict={**tiny, "MAX_ITEM_LIST_LENGTH": 20, "epochs": 2, "resume": path})


# ---------------------------------------------------------------------- the latest
def test_auto_goes_on_from_the_latest_that_is_whole(
    cyclic_dataset: str, tiny: dict[str, Any], write_dataset: Any
) -> None:
    settings = {**tiny, "epochs": 1}
    assert run("RecMamba", cyclic_dataset, config_dict={**settings, "resume": "auto"})["report"]["epochs"] == 1
    first = next(Path("saved").glob("RecMamba-cycle-*.pth"))
    second = run("RecMamba", cyclic_dataset, config_dict=settings)["report"]["checkpoint"]
    os.utime(first, (1, 1))
    run("Mamba4Rec", cyclic_dataset, config_dict=settings)
    rows = [line.split("\t") for line in (Path("dataset/cycle/cycle.inter")).read_text().splitlines()[1:]]
    run("RecMamba", write_dataset(rows, "cycle-2"), config_dict=settings)
    assert latest_checkpoint("saved", "RecMamba", cyclic_dataset) == second
    resumed = run("RecMamba", cyclic_dataset, config_dict={**settings, "epochs": 2, "resume": "auto"})["report"]
    assert resumed["checkpoint"] == second
    assert resumed["epochs"] == 1
    Path(second).write_bytes(Path(second).read_bytes()[:-100])
    assert latest_checkpoint("saved", "RecMamba", cyclic_dataset) == str(first)


# ---------------------------------------------------------------------- stopping
@pytest.fixture
def interrupted(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A run whose second epoch ends by what is done in it."""
    train_epoch, epochs = HoloTrainer._train_epoch, []

    def by(act: Any) -> None:
        def second(self: Any, *args: Any, **kwargs: Any) -> Any:
            epochs.append(1)
            if len(epochs) == 2:
                act()
            return train_epoch(self, *args, **kwargs)

        monkeypatch.setattr(HoloTrainer, "_train_epoch", second)

    return by


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stopped_command_says_how_to_go_on(
    number: int, status: int, cyclic_dataset: str, tiny: dict[str, Any], interrupted: Any, capsys: Any
) -> None:
    """Ctrl-C was a traceback, SIGTERM an end without a word."""
    before = signal.getsignal(number)
    interrupted(lambda: signal.raise_signal(number))
    words = ["--model=RecMamba", f"--dataset={cyclic_dataset}", *(f"--{key}={value}" for key, value in tiny.items())]
    assert cli.main([*words, "--resume=auto"]) == status
    assert signal.getsignal(number) is before
    found = next(Path("saved").glob("RecMamba-*.pth"))
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith(
        f"stopped by {signal.Signals(number).name}: the last checkpoint is saved/{found.name}; go on"
    )
    command = shlex.split(last.split("go on with: ")[1])
    assert command[-1] == f"--resume=saved/{found.name}"
    assert [word for word in command if word.startswith("--resume")] == command[-1:]
    assert cli.main(command[2:]) == 0
    assert checkpoint.load(found)["epoch"] >= 0


def test_a_host_is_interrupted_as_ever(cyclic_dataset: str, tiny: dict[str, Any], interrupted: Any) -> None:
    """A library raises KeyboardInterrupt, and knows the checkpoint; signals are the host's."""

    def stop() -> None:
        assert signal.getsignal(signal.SIGTERM) is before
        raise KeyboardInterrupt

    before = signal.getsignal(signal.SIGTERM)
    interrupted(stop)
    with pytest.raises(KeyboardInterrupt) as caught:
        run("RecMamba", cyclic_dataset, config_dict=tiny)
    assert isinstance(caught.value, Stopped)
    assert Path(caught.value.checkpoint).is_file()


def test_a_full_disk_ends_a_run_in_one_line(
    cyclic_dataset: str, tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    saves, save = [], torch.save

    def full(state: Any, file: Any) -> None:
        saves.append(1)
        if len(saves) == 2:
            raise OSError(28, "No space left on device")
        save(state, file)

    monkeypatch.setattr(torch, "save", full)
    tiny.update(epochs=9, eval_step=0)
    words = [f"--{key}={value}" for key, value in tiny.items()]
    assert cli.main(["--model=RecMamba", f"--dataset={cyclic_dataset}", *words]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    good = next(Path("saved").glob("RecMamba-*.pth"))
    assert len(error) == 1
    assert error[0].startswith(
        f"error: checkpoint: 'saved/{good.name}' could not be written: No space left on device. "
    )
    assert error[0].endswith(f"The last good checkpoint is saved/{good.name}: go on with --resume=saved/{good.name}")
    assert checkpoint.load(good)["epoch"] == 0


def test_leftovers_go_at_the_next_start(cyclic_dataset: str, tiny: dict[str, Any]) -> None:
    Path("saved").mkdir()
    Path("saved/.saving-killed.pth").write_bytes(b"half of it")
    run("RecMamba", cyclic_dataset, config_dict={**tiny, "epochs": 1})
    assert not list(Path("saved").glob(".saving*"))
