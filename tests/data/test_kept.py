"""Data that are kept and read again: the same as made anew, whatever was changed since, and a line that says so."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from recbole.utils import init_seed

from recbole_holo.bridge.config import Config
from recbole_holo.data import kept
from recbole_holo.data.loader import create_dataset, data_preparation

ROWS = [(f"u{u}", f"i{(3 * u + t) % 12}", 100 + 5 * t // 2 + u) for u in range(9) for t in range(4 + u % 4)]
ITEMS = [(f"i{i}", f"g{i % 3}", f"b{i % 4}") for i in range(12)]
HEADER = "item_id:token\tgenre:token\tbrand:token"
SETTINGS = {"MAX_ITEM_LIST_LENGTH": 5, "checkpoint_dir": "kept", "topk": [3], "metrics": ["NDCG"]}
SETTINGS |= {"valid_metric": "NDCG@3", "state": "ERROR", "item_attributes": ["genre"], "hidden_size": 8}
MODEL = "HoloMambaRec"

LS, RS = {"LS": "valid_and_test"}, {"RS": [0.6, 0.2, 0.2]}
OTHERS: list[dict[str, Any]] = [
    {"eval_args": {"split": RS, "order": "TO", "group_by": "user", "mode": "full"}},
    {"eval_args": {"split": RS, "order": "TO", "group_by": "none", "mode": "full"}},
    {"eval_args": {"split": {"LS": "test_only"}, "order": "TO", "group_by": "user", "mode": "full"}},
    {"eval_args": {"split": LS, "order": "TO", "group_by": "user", "mode": "uni5"}},
    {"train_windows": "last"},
    {"train_on": "prefixes"},
    {"window_stride": 2},
    {"item_attributes": ["genre", "brand"]},
    {"attribute_shuffle": True},
    {"ties": "random"},
    {"ties": "item"},
    {"time_precision": "float32"},
    {"event_time": "gap", "event_time_buckets": 6},
    {"keep_unseen_items": True},
    {"rm_dup_inter": "last"},
    {"val_interval": {"timestamp": "[100,110]"}},
    {"user_inter_num_interval": "[5,inf)"},
    {"seed": 7, "ties": "random"},
    {"MAX_ITEM_LIST_LENGTH": 4},
]


def prepared(name: str = "toy", model: str = MODEL, **settings: Any) -> tuple[Any, ...]:
    config = Config(model, name, config_dict={**SETTINGS, **settings})
    init_seed(config["seed"], True)  # as a run does: RecBole's random splits draw from torch's own state
    dataset = create_dataset(config)
    return config, *data_preparation(config, dataset)


def content(config: Any, *loaders: Any) -> list[Any]:
    """All that batches of these loaders hold, and the ids and attributes behind the numbers."""
    found: list[Any] = []
    for loader in loaders:
        if loader is None:
            found.append(None)
            continue
        data = loader._dataset
        assert loader.config is config
        assert data.config is config
        found += [data.field2id_token["item_id"].tolist(), len(data), data.config["eval_args"]]
        found += [{n: (a.labels, a.index.tolist()) for n, a in getattr(data, "item_attributes", {}).items()}]
        torch.manual_seed(0)
        for batch in loader:
            rows = batch[0] if isinstance(batch, (tuple, list)) else batch
            found.append({field: values.tolist() for field, values in rows.interaction.items()})
    return found


@pytest.fixture
def paths(write_dataset: Callable[..., str]) -> dict[str, str]:
    write_dataset(ROWS, item=(HEADER, [*ITEMS, ("i99", "g1", "b1")]))
    prepared(save_dataset=True, save_dataloaders=True)
    return {
        "dataset_save_path": "kept/toy-SequenceDataset.pth",
        "dataloaders_save_path": f"kept/toy-for-{MODEL}-dataloader.pth",
    }


@pytest.mark.parametrize("which", ["dataset_save_path", "dataloaders_save_path"])
def test_what_is_kept_is_used_and_is_the_same(
    which: str, paths: dict[str, str], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert Path(paths[which]).is_file()
    fresh = content(*prepared())
    monkeypatch.setattr(kept, "write", lambda *_: pytest.fail("nothing is to be kept"))
    with caplog.at_level(logging.INFO):
        again = prepared(**{which: paths[which]}, hidden_size=16, epochs=3, learning_rate=0.1, dropout_prob=0.5)
    assert f"{which}: the data of {paths[which]} are used" in caplog.text
    assert content(*again) == fresh


@pytest.mark.parametrize("other", OTHERS, ids=str)
def test_other_settings_are_obeyed(
    other: dict[str, Any], paths: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    """RecBole compares a few settings only, and took kept data with their old configuration: another split ran as the
    old one and was reported as the new, other attributes were not read, a shuffled control was not shuffled."""
    fresh = content(*prepared(**other))
    for which, path in paths.items():
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            again = prepared(**{which: path}, **other)
        assert content(*again) == fresh
        assert f"{which}: {path} is not used, and the data are made anew: " in caplog.text
        name = next(iter(other))
        assert f"{name} was " in caplog.text


def test_other_sources_are_read(paths: dict[str, str], write_dataset: Callable[..., str], caplog: Any) -> None:
    """Another data set trained on the first one's events, and so did changed files."""
    write_dataset(ROWS[::-1], "second", item=(HEADER, ITEMS))
    changes: list[tuple[str, str, Callable[[], Any]]] = [
        ("second", "dataset was 'toy' and is 'second'", lambda: None),
        (
            "toy",
            "toy.inter is another file",
            lambda: write_dataset([*ROWS[:-1], ("u8", "i0", 990)], item=(HEADER, ITEMS)),
        ),
        ("toy", "toy.item is another file", lambda: write_dataset(ROWS, item=(HEADER, ITEMS[::-1]))),
        ("toy", "toy.user is new", lambda: write_dataset(ROWS, user=("user_id:token\tage:float", [("u0", 3)]))),
        ("toy", "toy.item is gone", lambda: Path("dataset/toy/toy.item").unlink()),
    ]
    for name, reason, change in changes:
        change()
        settings = {"item_attributes": []} if "gone" in reason else {}
        fresh = content(*prepared(name, **settings))
        for which, path in paths.items():
            caplog.clear()
            with caplog.at_level(logging.WARNING):
                assert content(*prepared(name, **{which: path}, **settings)) == fresh
            assert reason in caplog.text


def test_the_same_files_elsewhere_are_the_same_data(paths: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    """Content counts: a copy has other times."""
    Path("dataset").rename("moved")
    with caplog.at_level(logging.WARNING):
        prepared(data_path="moved", **paths)
    assert "is not used" not in caplog.text


def test_models_share_a_data_set_and_no_loaders(paths: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    asked = {"item_attributes": [], "load_col": None}
    prepared(save_dataset=True, save_dataloaders=True, **asked)
    fresh = content(*prepared(model="RecMamba", **asked))
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert content(*prepared(model="RecMamba", dataset_save_path=paths["dataset_save_path"], **asked)) == fresh
    assert "is not used" not in caplog.text
    with caplog.at_level(logging.WARNING):
        assert content(*prepared(model="RecMamba", **paths, **asked)) == fresh
    assert "it holds the loaders of HoloMambaRec, not the loaders of RecMamba" in caplog.text


@pytest.mark.parametrize("damage", ["cut", "bit", "head", "empty", "pickle"])
def test_damaged_files_are_made_anew(damage: str, paths: dict[str, str], caplog: pytest.LogCaptureFixture) -> None:
    """A file that was cut off ended in an EOFError; one of another program's was taken for the data."""
    fresh = content(*prepared())
    for which, path in paths.items():
        raw = bytearray(Path(path).read_bytes())
        if damage == "bit":
            raw[len(raw) // 2] ^= 1
        elif damage == "head":
            raw[len(kept.MAGIC) + 9] ^= 1
        new = {"cut": bytes(raw[: len(raw) // 2]), "empty": b"", "pickle": pickle.dumps({"a": 1})}.get(
            damage, bytes(raw)
        )
        Path(path).write_bytes(new)
        with caplog.at_level(logging.WARNING):
            assert content(*prepared(**{which: path})) == fresh
        assert "is not used, and the data are made anew" in caplog.text


@pytest.mark.parametrize("model", ["SASRec", "BPR", "GRU4Rec"])
def test_recboles_models_too(model: str, write_dataset: Callable[..., str], caplog: pytest.LogCaptureFixture) -> None:
    write_dataset(ROWS)
    prepared(model=model, item_attributes=[], load_col=None, save_dataset=True, save_dataloaders=True)
    files = sorted(map(str, Path("kept").glob("*.pth")))
    paths = dict(zip(("dataset_save_path", "dataloaders_save_path"), files, strict=True))
    split = {"split": RS, "order": "TO", "group_by": "user", "mode": "full"}
    for settings in ({}, {"eval_args": split}):
        fresh = content(*prepared(model=model, item_attributes=[], load_col=None, **settings))
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert content(*prepared(model=model, item_attributes=[], load_col=None, **paths, **settings)) == fresh
        assert ("is not used" in caplog.text) == bool(settings)


def test_a_write_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path, made = tmp_path / "kept.pth", kept.Fingerprint("numbers", {}, {})
    kept.write(path, made, [1])
    with pytest.raises((pickle.PicklingError, AttributeError, TypeError)):
        kept.write(path, made, lambda: None)
    assert kept.read(path, made, "x") == [1]
    assert [one.name for one in tmp_path.iterdir()] == ["kept.pth"]
