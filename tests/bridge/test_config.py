"""Settings: precedence, literals, presets, and errors before work starts."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from recbole_holo.bridge import registry, resources
from recbole_holo.bridge.config import Config
from recbole_holo.errors import ConfigError


def test_precedence_lowest_to_highest(tmp_path: Path) -> None:
    assert Config("HoloMambaRec", "ml-1m")["MAX_ITEM_LIST_LENGTH"] == 200  # dataset_configs/ml-1m.yaml
    assert Config("HoloMambaRec", "nothing-special")["MAX_ITEM_LIST_LENGTH"] == 50  # RecBole's default
    first, second = tmp_path / "a.yaml", tmp_path / "b.yaml"
    first.write_text("MAX_ITEM_LIST_LENGTH: 30\nd_state: 8\nlearning_rate: 0.1\n")
    second.write_text("d_state: 9\nlearning_rate: 0.2\n")
    config = Config(
        "HoloMambaRec", "ml-1m", [first, second], {"learning_rate": 0.3, "expand": 3}, ["--expand=4", "--d_conv=3"]
    )
    assert [config[k] for k in ("MAX_ITEM_LIST_LENGTH", "d_state", "learning_rate", "expand", "d_conv")] == [
        30,
        9,
        0.3,
        4,
        3,
    ]


def test_presets_are_selected_by_name() -> None:
    config = Config("HoloMambaRec", "ml-1m", ["HoloMambaRec_paper"], argv=["--ssm_init=official"])
    assert (config["hidden_size"], config["num_layers"], config["MAX_ITEM_LIST_LENGTH"]) == (96, 3, 50)
    assert config["ssm_init"] == "official"
    with pytest.raises(ConfigError, match=r"no such file or preset.*HoloMambaRec_paper"):
        Config("HoloMambaRec", "ml-1m", ["HoloMambaRec_papr"])


@pytest.mark.parametrize("model", list(registry.MODELS))
def test_every_model_has_its_files(model: str) -> None:
    for name in (model, f"{model}_paper"):
        text = resources.presets()[name].read_text()
        Config(model, "ml-100k", [name])
        if not name.endswith("_paper"):
            keys = [line for line in text.splitlines() if re.match(r"\w+:", line)]
            assert sum("# (" in line for line in keys) >= len(keys) // 2, "keys carry their type"
    assert resources.properties("search", f"{model}.yaml").is_file()


def test_values_are_literals_and_never_code() -> None:
    argv = ["--topk=[5,10]", "--eval_args={'split': {'LS': 'test_only'}, 'order': 'TO', 'mode': 'full'}"]
    config = Config(
        "RecMamba", "ml-100k", argv=[*argv, "--valid_metric=NDCG@5", "--use_gpu=false", "--eval_max_elements=~"]
    )
    assert config["topk"] == [5, 10]
    assert config["eval_args"]["split"] == {"LS": "test_only"}
    assert config["use_gpu"] is False
    assert config["eval_max_elements"] is None
    text = "__import__('os').system('touch hacked')"
    assert Config("RecMamba", "ml-100k", config_dict={"wandb_project": text})["wandb_project"] == text
    assert not Path("hacked").exists()


def test_sys_argv_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["pytest", "--epochs=7", "--cov=x"])
    assert Config("RecMamba", "ml-100k")["epochs"] != 7
    foreign = Config("RecMamba", "ml-100k", argv=["--epochs=7", "--cov=x", "-q"], foreign_argv=True)
    assert foreign["epochs"] == 7
    assert foreign["cov"] is None


def test_unknown_keys_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        Config("RecMamba", "ml-100k", argv=["--learnin_rate=0.1"])
    assert "unknown key 'learnin_rate' = 0.1; did you mean learning_rate?" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        for model in (*registry.MODELS, "SASRec", "GRU4Rec", "BPR", "LightGCN"):
            Config(model, "ml-100k", config_dict={"load_col": None, "benchmark_filename": None, "nproc": 1})
    assert "unknown key" not in caplog.text


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "HoloMambarec"}, r"model: 'HoloMambarec'.*did you mean HoloMambaRec"),
        ({"model": "SASrec2"}, r"model: 'SASrec2'.*did you mean SASRec"),
        ({"backend": "gpu"}, r"backend: 'gpu'.*allowed: auto, cpu, cuda, reference"),
        ({"topk": 0}, r"topk: 0.*at least 1"),
        ({"topk": [10, -1]}, r"topk: \[10, -1\]"),
        ({"topk": "ten"}, r"topk: 'ten'"),
        ({"metrics": ["NDGC"]}, r"metrics: 'NDGC'.*did you mean NDCG|metrics: 'NDGC'.*ndcg"),
        ({"valid_metric": "NDCG@7"}, r"valid_metric: 'NDCG@7'"),
        ({"valid_metric": "NDCG"}, r"valid_metric: 'NDCG'.*did you mean NDCG@"),
        ({"valid_metric": "NDCG@7 (unseen)"}, r"NDCG@7 \(unseen\)'.*did you mean NDCG@.*each also with \(unseen\)"),
        ({"valid_metric": "NDCG@10 (seen)"}, r"valid_metric: 'NDCG@10 \(seen\)'"),
        ({"metrics": ["AUC"], "valid_metric": "AUC (unseen)"}, r"valid_metric: .*AUC is of single scores"),
        ({"exclude_last": 0}, r"exclude_last: 0.*or ~ for the whole history"),
        ({"model": "BPR", "exclude_last": 200}, r"exclude_last: 200.*BPR knows no order"),
        ({"epochs": -1}, r"epochs: -1"),
        ({"train_batch_size": 0}, r"train_batch_size: 0"),
        ({"learning_rate": "fast"}, r"learning_rate: 'fast'"),
    ],
)
def test_bad_settings_name_field_value_and_remedy(settings: dict[str, Any], message: str) -> None:
    model = settings.pop("model", "RecMamba")
    with pytest.raises(ConfigError, match=message):
        Config(model, "ml-100k", config_dict=settings)


@pytest.mark.parametrize("text", ["NDCG@10 (unseen)", "ndcg@10(unseen)", " NDCG @ 10 ( Unseen )", "ndcg@10 unseen"])
def test_valid_metric_is_either_column_however_it_is_spelled(text: str) -> None:
    assert (
        Config("RecMamba", "ml-100k", config_dict={"valid_metric": text})["valid_metric"].lower() == "ndcg@10 (unseen)"
    )
    small = {"metrics": ["AveragePopularity"], "valid_metric": text.lower().replace("ndcg", "averagepopularity")}
    assert not Config("RecMamba", "ml-100k", config_dict=small)["valid_metric_bigger"]


def test_what_only_our_models_read_is_dropped_for_recboles(caplog: pytest.LogCaptureFixture) -> None:
    asked = {"seen_items": "excluded", "event_time": "gap"}
    config = Config("SASRec", "ml-100k", config_dict=asked)
    assert (config["seen_items"], config["event_time"]) == ("kept", None)
    assert "seen_items: SASRec is RecBole's and does not read it; 'excluded' is dropped" in caplog.text
    ours = Config("RecMamba", "ml-100k", config_dict=asked)
    assert (ours["seen_items"], ours["event_time"]) == ("excluded", "gap")


def test_malformed_and_missing_files(tmp_path: Path) -> None:
    broken = tmp_path / "broken.yaml"
    broken.write_text("epochs: [1, 2\nseed: 3\n")
    with pytest.raises(ConfigError, match=r"broken\.yaml.*not well-formed yaml"):
        Config("RecMamba", "ml-100k", [broken])
    broken.write_text("- just\n- a list\n")
    with pytest.raises(ConfigError, match="key: value"):
        Config("RecMamba", "ml-100k", [broken])
    with pytest.raises(ConfigError, match="no such file or preset"):
        Config("RecMamba", "ml-100k", [tmp_path / "absent.yaml"])


def test_a_model_whose_package_is_missing_says_which() -> None:
    pytest.importorskip("recbole")
    try:
        import lightgbm  # noqa: F401
    except ModuleNotFoundError:
        with pytest.raises(ConfigError, match="lightgbm"):
            Config("LightGBM", "ml-100k")


@pytest.mark.parametrize("model", list(registry.MODELS))
def test_a_papers_setting_inherits_no_training_default_of_ours(model: str) -> None:
    """It is read over the model's defaults, so what it does not name would stay ours."""
    papers = yaml.safe_load(resources.properties("model", f"{model}_paper.yaml").read_text())
    trained_by = {"learning_rate", "lr_scheduler", "learner", "weight_decay", "epochs", "train_batch_size", "loss_type"}
    assert trained_by <= papers.keys()
    assert papers["lr_scheduler"] is None
