"""What a checkpoint from a stranger cannot have done, each way planted."""

from __future__ import annotations

import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from recbole_holo.bridge import checkpoint, registry, strangers
from recbole_holo.bridge.checkpoint import CheckpointError
from recbole_holo.bridge.config import Config
from recbole_holo.errors import ConfigError, DataError
from recbole_holo.inference import Recommender
from recbole_holo.quick_start import load_data_and_model, prepare


class Exploit:
    def __reduce__(self):
        return os.system, ("touch exploited",)


@pytest.fixture
def planted(cyclic_dataset: str, tiny: dict[str, Any]) -> Any:
    """A checkpoint of plain values with other settings than it was made with."""
    trainer, train, _, _ = prepare(Config("RecMamba", cyclic_dataset, config_dict=tiny))
    trainer._train_data = train
    trainer._save_checkpoint(0, verbose=False)
    state = checkpoint.load(trainer.saved_model_file)

    def plant(model: str = "RecMamba", dataset: str = cyclic_dataset, **settings: Any) -> str:
        config = {"model": model, "dataset": dataset, "given": state["config"]["given"] | settings}
        checkpoint.save({**state, "config": config}, "stranger.pth")
        return "stranger.pth"

    return plant


RUNS = [
    ("KD_DAGFM", {"teacher": "__import__('os').system('touch exploited') and CrossNet"}),
    ("KD_DAGFM", {"phase": "finetuning", "warm_up": "evil.pth"}),
    ("ConvNCF", {"train_method": "after_pretrain", "pre_model_path": "evil.pth"}),
    ("LDiffRec", {"n_cate": 2}),
    ("NAIS", {"pretrain_path": "evil.pth"}),
    ("NeuMF", {"use_pretrain": True, "mf_pretrain_path": "evil.pth", "mlp_pretrain_path": "evil.pth"}),
    ("NeuMF", {"use_pretrain": "True", "mf_pretrain_path": "evil.pth", "mlp_pretrain_path": "evil.pth"}),
    ("NeuMF", {"use_pretrain": 1, "mf_pretrain_path": "evil.pth", "mlp_pretrain_path": "evil.pth"}),
    ("RaCT", {"train_stage": "finetune", "pre_model_path": "evil.pth"}),
    ("S3Rec", {"train_stage": "finetune", "pre_model_path": "evil.pth", "item_attribute": "genre"}),
    ("XGBoost", {}),
    ("LightGBM", {}),
]


@pytest.mark.parametrize(("model", "settings"), RUNS, ids=[f"{m}-{i}" for i, (m, _) in enumerate(RUNS)])
def test_models_that_run_or_unpickle_a_setting_are_not_built(model: str, settings: dict, planted: Any) -> None:
    """KD_DAGFM's teacher was evaluated by load_data_and_model."""
    for name in ("evil.pth", "dataset/cycle/item_emb.npy"):
        Path(name).write_bytes(pickle.dumps(Exploit()))
    path = planted(model, **settings)
    with pytest.raises(CheckpointError, match=rf"of the model {model}.*vouches for: .*trust_checkpoint=True"):
        load_data_and_model(path)
    with pytest.raises(CheckpointError):
        Recommender.load(path)
    assert not Path("exploited").exists()


@pytest.mark.parametrize("model", [m for m, refusal in strangers.REFUSED.items() if refusal.setting])
def test_their_harmless_settings_are_allowed(model: str, planted: Any) -> None:
    refusal = strangers.REFUSED[model]
    path = planted(model, **{refusal.setting: refusal.harmless})
    state = checkpoint.load(path)
    assert strangers.settings_of(state["config"], path, {}, False)[refusal.setting] == refusal.harmless


def test_trust_builds_them(planted: Any) -> None:
    path = planted("KD_DAGFM", teacher="CrossNet")
    state = checkpoint.load(path)
    assert strangers.settings_of(state["config"], path, {}, True)["teacher"] == "CrossNet"


def test_every_model_of_recbole_was_read() -> None:
    """A later RecBole's that is in no list is refused as unknown."""
    assert registry.recbole_models().keys() <= strangers.PLAIN_MODELS | strangers.REFUSED.keys()
    assert not strangers.PLAIN_MODELS & strangers.REFUSED.keys()
    with pytest.raises(CheckpointError, match="nobody has read"):
        strangers._check_model("Later", {}, "x.pth")


def test_models_that_are_allowed_call_nothing_that_runs_or_loads() -> None:
    """What reading found, by a search that a new version of RecBole cannot slip by."""
    runs = re.compile(
        r"(?<![.\w])(eval|exec|compile|__import__|open)\(|import_module|(torch|np|numpy|pickle|joblib)\.load"
    )
    for name, module in registry.recbole_models().items():
        source = Path(__import__("recbole").__file__).parent.parent.joinpath(*module.split(".")).with_suffix(".py")
        found = runs.search(source.read_text(encoding="utf-8"))
        assert found is None or name in strangers.REFUSED, (name, found)


@pytest.mark.parametrize(
    "settings",
    [
        {"data_path": "/etc"},
        {"data_path": "../elsewhere"},
        {"data_path": "dataset/../../elsewhere"},
        {"data_path": "'/etc'"},
        {"benchmark_filename": ["x/../../secret"]},
        {"benchmark_filename": "['x/../../secret']"},
        {"additional_feat_suffix": ["x/../../secret"]},
        {"dataset": "../../elsewhere"},
        {"dataset": ".."},
    ],
    ids=str,
)
def test_paths_outside_are_not_read(settings: dict, planted: Any, tmp_path: Path) -> None:
    outside = tmp_path.parent / "elsewhere" / "cycle"
    outside.mkdir(parents=True, exist_ok=True)
    (outside / "cycle.inter").write_text((tmp_path / "dataset/cycle/cycle.inter").read_text())
    error = DataError if "'" in settings.get("data_path", "") else ConfigError  # that is a folder of this name
    with pytest.raises(error):
        load_data_and_model(planted(**settings))
    assert not (tmp_path.parent / "log").exists()


def test_a_path_that_the_user_says_is_read(planted: Any, tmp_path: Path) -> None:
    os.rename("dataset", tmp_path.parent / "moved")
    path = planted(data_path=str(tmp_path.parent / "moved"))
    with pytest.raises(ConfigError, match="lies outside of the working directory"):
        load_data_and_model(path)
    load_data_and_model(path, data_path=str(tmp_path.parent / "moved"))
    load_data_and_model(path, trust_checkpoint=True)


def test_what_a_checkpoint_does_not_choose(planted: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process group was joined at the address that it named, and what it named was unpickled."""
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *a, **k: pytest.fail("joined"))
    Path("evil.pth").write_bytes(pickle.dumps(Exploit()))
    path = planted(
        local_rank=0, world_size=2, ip="10.0.0.1", port="1", offset=0, nproc=2, log_wandb=True,
        dataset_save_path="evil.pth", dataloaders_save_path="evil.pth", checkpoint_dir="/root/elsewhere",
    )  # fmt: skip
    config = load_data_and_model(path)[0]
    assert config["checkpoint_dir"] == str(Path.cwd())
    assert not config["log_wandb"]
    assert not Path("exploited").exists()


def test_only_what_a_model_names_is_set_on_it(planted: Any) -> None:
    """Any attribute of a model could be set by its name."""
    path = planted()
    state = checkpoint.load(path)
    checkpoint.save({**state, "other_parameter": {"n_items": 3, "hidden_states": "x"}}, path)
    model = load_data_and_model(path)[1]
    assert model.n_items == 21
    assert callable(model.hidden_states)


@pytest.mark.parametrize(
    "change",
    [
        {"config": None},
        {"config": {"model": "RecMamba"}},
        {"config": {"model": "RecMamba", "dataset": "cycle", "given": {}}},
        {"config": {"model": "RecMamba", "dataset": "cycle", "given": {"metrics": 3}}},
        {"config": {"model": ["RecMamba"], "dataset": "cycle", "given": {}}},
        {"state_dict": None},
        {"state_dict": {}},
        {"catalogue": {"tokens": 3}},
        {"catalogue": {"item_attributes": {"x": {}}}},
    ],
    ids=str,
)
def test_what_is_not_in_its_form_is_a_clear_error(change: dict, planted: Any) -> None:
    state = checkpoint.load(planted())
    checkpoint.save({**state, **change}, "odd.pth")
    for load in (load_data_and_model, Recommender.load):
        with pytest.raises(CheckpointError, match=r"odd\.pth"):
            load("odd.pth")


def test_a_catalogue_does_not_make_a_model_of_recboles_served(planted: Any) -> None:
    with pytest.raises(CheckpointError, match="a model of RecBole's own"):
        Recommender.load(planted("SASRec"))
