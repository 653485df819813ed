"""What eval_args may say, splits at moments of time, and rows that files have split already."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from recbole.config import Config as RecBoleConfig
from recbole.data import create_dataset as recbole_create_dataset
from recbole.data.dataset import Dataset

from recbole_holo.bridge.config import Config
from recbole_holo.data import GAPS
from recbole_holo.data.loader import create_dataset, data_preparation
from recbole_holo.errors import ConfigError, DataError
from recbole_holo.quick_start import run

SECONDS = 1_760_000_000
TIMED = {"load_col": {"inter": ["user_id", "item_id", "timestamp"]}, "topk": [1], "valid_metric": "NDCG@1"}


def by_time(**split: Any) -> dict[str, Any]:
    return {"eval_args": {"split": split, "order": "TO", "group_by": "user", "mode": "full"}}


def an_hour_of_clicks(users: int = 30, events: int = 12) -> list[tuple[str, str, int]]:
    """Steps of seconds, in no order of time, with ties within users and across them."""
    draw = np.random.default_rng(0)
    rows = [
        (f"u{user}", f"i{draw.integers(40)}", SECONDS + int(draw.integers(3600)) // 2 * 2)
        for user in range(users)
        for _ in range(events)
    ]
    return [rows[place] for place in draw.permutation(len(rows))]


def loaded(model: str, name: str, **settings: Any) -> Any:
    config = Config(model, name, config_dict={"state": "ERROR", **TIMED, **settings})
    data = create_dataset(config)
    return data, data_preparation(config, data)


# ---------------------------------------------------------------------- at moments of time
@pytest.mark.skipif(not hasattr(Dataset, "time_based_split"), reason="RecBole 1.2.0 has no split TS")
@pytest.mark.parametrize("model", ["SASRec", "BPR"])
@pytest.mark.parametrize("parts", [[0.8, 0.1, 0.1], [3, 1, 2], [0.7, 0, 0.3]])
def test_ts_is_recboles_where_it_has_it(model: str, parts: list[float], write_dataset: Callable[..., str]) -> None:
    rows = [(user, item, time - SECONDS) for user, item, time in an_hour_of_clicks()]  # float32 has these
    name = write_dataset(rows)
    settings = {"state": "ERROR", "train_neg_sample_args": None, **TIMED, **by_time(TS=parts)}
    theirs = recbole_create_dataset(RecBoleConfig(model, name, config_dict=settings)).build()
    config = Config(model, name, config_dict=settings)
    mine = create_dataset(config).build()
    for their_part, my_part in zip(theirs, mine, strict=True):
        for field in ("user_id", "item_id", "timestamp"):
            assert torch.equal(their_part.inter_feat[field], my_part.inter_feat[field]), field


@pytest.mark.parametrize("model", ["SASRec", "RecMamba", "BPR"])
def test_ts_is_at_an_exact_moment(model: str, write_dataset: Callable[..., str]) -> None:
    # In float32 the moment lies on a grid of 128 s: the part of test events is another than was asked for.
    name = write_dataset([(f"u{n % 20}", f"i{n % 60}", SECONDS + 10 * n) for n in range(300)])
    tested = {}
    for precision in ("float64", "float32"):
        settings = {**by_time(TS=[0.8, 0.1, 0.1]), "time_precision": precision}
        _, (_, _, test) = loaded(model, name, train_on="prefixes", **settings)
        tested[precision] = len(test.dataset)
    assert tested["float64"] == (30 if model == "BPR" else 28)
    assert tested["float32"] != tested["float64"]


@pytest.mark.parametrize(("model", "mode"), [("RecMamba", "sequences"), ("RecMamba", "prefixes"), ("BPR", "sequences")])
@pytest.mark.parametrize("split", [{"time": [SECONDS + 2000, SECONDS + 3000]}, {"time_quantiles": [0.6, 0.8]}])
def test_a_run_on_a_split_at_moments(
    model: str, mode: str, split: dict[str, Any], write_dataset: Callable[..., str], tiny: dict[str, Any]
) -> None:
    name = write_dataset(an_hour_of_clicks())
    found = run(model, name, config_dict={**tiny, **by_time(**split), "train_on": mode, "epochs": 1})
    assert found["report"]["config"]["eval_args"]["split"] == split
    assert 0 <= found["report"]["test"]["ndcg@5"] <= 1


def test_moments_are_said(write_dataset: Callable[..., str], caplog: pytest.LogCaptureFixture) -> None:
    name = write_dataset([(f"u{n % 5}", f"i{n % 7}", SECONDS + n) for n in range(100)])
    with caplog.at_level(logging.INFO):
        loaded("SASRec", name, **by_time(time_quantiles=[0.5, 0.75]))
    said = f"split: validation begins at {SECONDS + 50} and test at {SECONDS + 75}; 45, 25 and 25 targets."
    assert said in [record.getMessage() for record in caplog.records]


@pytest.mark.parametrize("model", ["SASRec", "BPR"])
@pytest.mark.parametrize("moments", [[SECONDS, SECONDS + 50], [1000 * SECONDS, 1000 * SECONDS + 9], [5, 6]])
def test_moments_outside_the_data(model: str, moments: list[float], write_dataset: Callable[..., str]) -> None:
    name = write_dataset([(f"u{n % 5}", f"i{n % 7}", SECONDS + n) for n in range(100)])
    with pytest.raises(DataError, match=rf"eval_args: split {{time: .*from {SECONDS} to {SECONDS + 99}.* same unit"):
        loaded(model, name, **by_time(time=moments))


@pytest.mark.parametrize("model", ["RecMamba", "BPR"])
def test_times_that_are_normalized_are_split_in_the_files_unit(model: str, write_dataset: Callable[..., str]) -> None:
    # RecBole's ml-100k.yaml has normalize_all: times are then numbers from 0 to 1.
    name = write_dataset([(f"u{n % 5}", f"i{n % 10}", SECONDS + n) for n in range(100)])
    settings = {**by_time(time=[SECONDS + 60, SECONDS + 80]), "normalize_all": True, "train_on": "prefixes"}
    _, loaders = loaded(model, name, **settings)
    first = 5 if model == "RecMamba" else 0
    assert [len(loader.dataset) for loader in loaders] == [60 - first, 20, 20]


def test_gaps_of_times_that_are_normalized_are_in_the_files_unit(write_dataset: Callable[..., str]) -> None:
    # A recommender is given times in that unit.
    name = write_dataset([(f"u{n % 5}", f"i{n % 7}", SECONDS + n) for n in range(100)])
    settings = {"event_time": "gap", "normalize_all": True}
    data, (train, _, _) = loaded("RecMamba", name, **settings)
    assert train.dataset.gap_buckets.unit == 5
    assert data.event_times.min() == SECONDS
    assert set(next(iter(train))[GAPS].flatten().tolist()) == {0, 2}


def test_float32_rounds_what_recbole_would_read(write_dataset: Callable[..., str]) -> None:
    rows = an_hour_of_clicks()
    name = write_dataset(rows)
    settings = {"state": "ERROR", "train_neg_sample_args": None, "normalize_all": True, **TIMED}
    theirs = recbole_create_dataset(RecBoleConfig("SASRec", name, config_dict=settings)).build()[2]
    _, (_, _, test) = loaded("SASRec", name, normalize_all=True, time_precision="float32")
    assert torch.equal(test.dataset[slice(None)]["item_id_list"], theirs[slice(None)]["item_id_list"])


# ---------------------------------------------------------------------- what eval_args may say
@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("SASRec", {"order": "RO"}, r"eval_args: order: 'RO' .*SASRec reads events in the order of time"),
        ("BPR", {"order": "time"}, r"eval_args: order: 'time' .*TO"),
        ("BPR", {"group_by": "item"}, r"eval_args: group_by: 'item' .*user or none"),
        ("BPR", {"split": "RS"}, r"eval_args: split: 'RS' .*LS: valid_and_test"),
        ("BPR", {"split": {"RS": [0.8, 0.1, 0.1], "LS": "test_only"}}, r"eval_args: split: .*name one"),
        ("BPR", {"split": {"LO": "test_only"}}, r"eval_args: split: 'LO' .*LS"),
        ("SASRec", {"split": {"LS": "both"}}, r"eval_args: split: .*valid_and_test"),
        ("SASRec", {"split": {"RS": [0.8, 0.2]}}, r"eval_args: split: .*\[0.8, 0.1, 0.1\]"),
        ("SASRec", {"split": {"RS": [0.8, -0.1, 0.1]}}, r"eval_args: split: .*\[0.8, 0.1, 0.1\]"),
        ("SASRec", {"split": {"TS": 0.8}}, r"eval_args: split: .*\[0.8, 0.1, 0.1\]"),
        ("SASRec", {"split": {"time": [2, 1]}}, r"eval_args: split: .*in that order"),
        ("SASRec", {"split": {"time": ["2020-01-01", "2020-02-01"]}}, r"eval_args: split: .*unit of the data"),
        ("SASRec", {"split": {"time": [1, float("nan")]}}, r"eval_args: split: "),
        ("SASRec", {"split": {"time_quantiles": [0.8, 0.1, 0.1]}}, r"eval_args: split: .*\[0.8, 0.9\]"),
        ("SASRec", {"split": {"time_quantiles": [80, 90]}}, r"eval_args: split: .*between 0 and 1"),
        ("BPR", {"split": {"TS": [0.8, 0.1, 0.1]}, "order": "RO"}, r"eval_args: order: .*TS.* use TO"),
        ("BPR", {"split": {"time": [1, 2]}, "order": "RO"}, r"eval_args: order: .*time.* use TO"),
        ("BPR", {"spilt": {"time": [1, 2]}}, r"eval_args: 'spilt' .*split"),
    ],
)
def test_bad_eval_args_are_refused_before_anything_is_read(model: str, arguments: dict[str, Any], message: str) -> None:
    given = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full", **arguments}
    with pytest.raises(ConfigError, match=message):
        Config(model, "any", config_dict={"eval_args": given})


@pytest.mark.parametrize(
    ("model", "split", "order"),
    [("SASRec", {"LS": "test_only"}, "TO"), ("BPR", {"time": [1, 2]}, "TO"), ("BPR", {"RS": [8, 1, 1]}, "RO")],
)
def test_a_split_alone_is_in_the_order_of_time_where_there_is_no_other(model: str, split: Any, order: str) -> None:
    config = Config(model, "any", config_dict={"eval_args": {"split": split}})
    assert config["eval_args"]["order"] == order
    assert config["eval_args"]["mode"] == {"valid": "full", "test": "full"}
    again = Config(model, "any", config_dict=config.given, complete=True)
    assert again["eval_args"] == config["eval_args"]


def test_exact_moments_need_exact_times() -> None:
    with pytest.raises(ConfigError, match=r"time_precision: 'float32' .*float64"):
        Config("SASRec", "any", config_dict={**by_time(time=[1, 2]), "time_precision": "float32"})


@pytest.mark.parametrize(
    ("model", "given", "set_to", "kept"),
    [
        ("BPR", {}, {"ties": "item", "time_precision": "float32"}, {"rm_dup_inter": "first"}),
        ("SASRec", {"benchmark_filename": ["a", "b", "c"]}, {"ties": "random", "rm_dup_inter": "last"}, {}),
        ("RecMamba", {"benchmark_filename": ["a", "b", "c"]}, {"user_inter_num_interval": "[5,inf)"}, {}),
    ],
)
def test_settings_of_the_order_without_effect_are_said(
    model: str,
    given: dict[str, Any],
    set_to: dict[str, Any],
    kept: dict[str, Any],
    caplog: pytest.LogCaptureFixture,
) -> None:
    # Rows in random order, and those of files, know no ties: a report must not claim an order.
    with caplog.at_level(logging.WARNING):
        config = Config(model, "any", config_dict={**given, **set_to, **kept})
    [said] = [record.getMessage() for record in caplog.records]
    assert all(f"{field}: {value}" in said for field, value in set_to.items())
    assert "without effect" in said
    assert ("benchmark_filename" if given else "order: RO") in said
    plain = Config(model, "any", config_dict=given)
    assert all(config[field] == plain[field] for field in set_to)
    assert all(config[field] == value for field, value in kept.items())


def test_no_word_where_nothing_was_asked_for(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        Config("BPR", "any", config_dict={"ties": "file"})
        Config("SASRec", "any", config_dict={"benchmark_filename": ["a", "b", "c"]})
    assert not caplog.records


# ---------------------------------------------------------------------- rows that are dropped, and rows that stay
@pytest.mark.parametrize("order", ["RO", "TO"])
@pytest.mark.parametrize("ties", ["file", "random"])
@pytest.mark.parametrize("model", ["BPR", "RecMamba"])
def test_removing_repeats_changes_nothing_where_there_are_none(
    model: str, ties: str, order: str, write_dataset: Callable[..., str]
) -> None:
    # Numbers of items, random splits and random ties follow the order of the rows.
    if model == "RecMamba" and order == "RO":
        return
    rows = list({(user, item): (user, item, time // 60 * 60) for user, item, time in an_hour_of_clicks()}.values())
    name = write_dataset(rows)
    arguments = {"split": {"RS": [0.6, 0.2, 0.2]}, "order": order, "group_by": "user", "mode": "full"}
    settings = {"eval_args": arguments, "train_on": "prefixes", **({"ties": ties} if order == "TO" else {})}
    found = []
    for keep in (None, "first"):
        torch.manual_seed(0)
        _, loaders = loaded(model, name, rm_dup_inter=keep, **settings)
        found.append([loader.dataset.inter_feat["item_id"].tolist() for loader in loaders])
    assert found[0] == found[1]


@pytest.mark.parametrize(("row", "column"), [(("", "i0", 2), "user_id"), (("u0", "", 9), "item_id")])
@pytest.mark.parametrize("model", ["RecMamba", "BPR"])
def test_a_row_without_a_user_or_an_item_is_named(
    model: str, row: tuple[str, str, int], column: str, write_dataset: Callable[..., str]
) -> None:
    # RecBole drops such rows, and of both kinds at once the wrong ones: it looks for the second kind in the places
    # where they were before it dropped the first.
    rows = [(f"u{n % 3}", f"i{n % 6}", n) for n in range(24)]
    with pytest.raises(DataError, match=rf"broken\.inter, line 4, column '{column}': '' is empty"):
        loaded(model, write_dataset([*rows[:2], row, *rows[2:]], "broken"), train_on="prefixes")


# ---------------------------------------------------------------------- files with a history in each row
HEAD = ["user_id:token", "item_id:token", "item_id_list:token_seq"]
ROWS = {
    "train": [("u", "3", "10 2"), ("v", "2", "5")],
    "valid": [("u", "4", "10 2 3")],
    "test": [("u", "5", "10 2 3 4"), ("v", "10", "5 2")],
}


def files(write_dataset: Callable[..., str], head: list[str] = HEAD, **rows: Any) -> dict[str, Any]:
    written = {f"{part}.inter": ("\t".join(head), lines) for part, lines in {**ROWS, **rows}.items()}
    write_dataset([], "files", **written)
    return {
        "benchmark_filename": list(ROWS),
        "load_col": {"inter": [column.split(":")[0] for column in head]},
        "train_on": "prefixes",
    }


@pytest.mark.parametrize("alias", [None, [], ["item_id_list"]])
@pytest.mark.parametrize("model", ["RecMamba", "SASRec", "FEARec", "BPR"])
def test_a_history_is_read_in_the_numbers_of_the_items(
    model: str, alias: Any, write_dataset: Callable[..., str]
) -> None:
    # Without an alias RecBole numbers the lists by themselves, and 10 is read as another item.
    data, loaders = loaded(model, "files", alias_of_item_id=alias, **files(write_dataset))
    for loader, lines in zip(loaders, ROWS.values(), strict=True):
        rows = loader.dataset.inter_feat
        found = zip(rows["user_id"], rows["item_id"], rows["item_id_list"], strict=True)
        read = [
            (data.id2token("user_id", int(u)), data.id2token("item_id", int(i)), [x for x in own.tolist() if x])
            for u, i, own in found
        ]
        assert sorted((u, i, " ".join(data.id2token("item_id", own).tolist())) for u, i, own in read) == sorted(lines)
    assert data.num("item_id") == 1 + len({"2", "3", "4", "5", "10"})


@pytest.mark.parametrize("model", ["RecMamba", "SASRec"])
def test_lists_of_other_columns_are_numbered_as_those(model: str, write_dataset: Callable[..., str]) -> None:
    head = ["user_id:token", "article:token", "article_list:token_seq", "shop:token", "shop_list:token_seq"]
    lines = {
        part: [(*row, f"s{row[1]}", " ".join(f"s{i}" for i in row[2].split())) for row in own]
        for part, own in ROWS.items()
    }
    settings = {**files(write_dataset, head, **lines), "ITEM_ID_FIELD": "article"}
    data, loaders = loaded(model, "files", **settings)  # RecBole looks for item_id_list, whatever the field's name
    row = loaders[2].dataset[np.array([0])]
    assert data.id2token("article", row["article_list"][0].tolist()).tolist() == ["10", "2", "3", "4"]
    assert data.id2token("shop", row["shop_list"][0].tolist()).tolist() == ["s10", "s2", "s3", "s4"]
    assert row["item_length"].tolist() == [4]


@pytest.mark.parametrize("model", ["RecMamba", "SASRec"])
def test_histories_are_cut_to_the_latest_events(model: str, write_dataset: Callable[..., str]) -> None:
    # SASRec has no positions for more, and other models read more than MAX_ITEM_LIST_LENGTH says.
    head = [*HEAD, "timestamp:float", "timestamp_list:float_seq"]
    lines = {
        part: [(*row, 9, " ".join(str(n) for n in range(len(row[2].split())))) for row in own]
        for part, own in ROWS.items()
    }
    data, loaders = loaded(model, "files", MAX_ITEM_LIST_LENGTH=2, **files(write_dataset, head, **lines))
    row = loaders[2].dataset[np.array([0])]
    assert data.id2token("item_id", row["item_id_list"][0].tolist()).tolist() == ["3", "4"]
    assert row["timestamp_list"].tolist() == [[2, 3]]
    assert row["item_length"].tolist() == [2]


@pytest.mark.parametrize(
    ("rows", "settings", "message"),
    [
        (
            [("u", "5", "1 2"), ("u", "5", "")],
            {},
            r"1 rows have an empty item_id_list, the first in line 3 of files.test",
        ),
        ([("u", "", "1 2")], {}, r"files.test.inter, line 2, column 'item_id': '' is empty"),
        ([("", "5", "1 2")], {}, r"files.test.inter, line 2, column 'user_id': '' is empty"),
        ([("u", "5", "1")], {"seq_len": {"item_id_list": 2}}, "seq_len: .*oldest .*MAX_ITEM_LIST_LENGTH"),
        ([("u", "5", "1")], {"load_col": {"inter": ["user_id", "item_id"]}}, "benchmark_filename: .*'item_id_list'"),
        ([("u", "5", "1")], {"load_col": {"inter": ["user_id", "item_id_list"]}}, "ITEM_ID_FIELD: .*'item_id'"),
    ],
)
def test_rows_that_cannot_be_read(
    rows: Any, settings: dict[str, Any], message: str, write_dataset: Callable[..., str]
) -> None:
    # A missing id is numbered as the pad.
    with pytest.raises((DataError, ConfigError), match=message):
        loaded("RecMamba", "files", **{**files(write_dataset, test=rows), **settings})


def test_lists_of_unequal_lengths(write_dataset: Callable[..., str]) -> None:
    head = [*HEAD, "timestamp:float", "timestamp_list:float_seq"]
    lines = {part: [(*row, 9, "1") for row in own] for part, own in ROWS.items()}
    message = "timestamp_list that is not as long as item_id_list, the first in line 2 of files.train"
    with pytest.raises(DataError, match=message):
        loaded("SASRec", "files", **files(write_dataset, head, **lines))
