"""The order of time: every setting of it against sequences that are made here, one user at a time, from the rows."""

from __future__ import annotations

import json
import logging
import random
import struct
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recbole.config import Config as RecBoleConfig
from recbole.data import create_dataset as recbole_create_dataset

from recbole_holo.bridge.config import Config
from recbole_holo.cli import main
from recbole_holo.data.loader import create_dataset, data_preparation
from recbole_holo.data.order import id_ranks
from recbole_holo.errors import ConfigError, DataError
from recbole_holo.quick_start import load_data_and_model, run

Row = tuple[str, str, str]  # user, item, time, as in the file
LOAD = {"load_col": {"inter": ["user_id", "item_id", "timestamp"]}}


def rounded(time: str) -> float:
    """As C makes a float of it, independent of numpy."""
    return struct.unpack("f", struct.pack("f", float(time)))[0]


def expected(rows: Sequence[Row], ties: str, precision: str = "float64") -> dict[str, list[str]]:
    """Every user's items in order."""
    own: dict[str, list[tuple[Any, ...]]] = defaultdict(list)
    numbers = all(item.lstrip("-").isdigit() for _, item, _ in rows)
    for place, (user, item, time) in enumerate(rows):
        when = rounded(time) if precision == "float32" else float(time)
        by: Any = place if ties == "file" else (int(item) if numbers else item)
        own[user].append((when, by, place, item))
    return {user: [event[-1] for event in sorted(events)] for user, events in own.items()}


def loaded(model: str, name: str, **settings: Any) -> Any:
    config = Config(model, name, config_dict={"state": "ERROR", "MAX_ITEM_LIST_LENGTH": 100, **LOAD, **settings})
    data = create_dataset(config)
    return data, data_preparation(config, data)


def sequences(model: str, name: str, **settings: Any) -> dict[str, list[str]]:
    """Every user's items: the test row's history and target."""
    data, (_, _, test) = loaded(model, name, **settings)
    rows = test.dataset[slice(None)]
    found = {}
    for user, history, length, target in zip(
        *(rows[field].tolist() for field in ("user_id", "item_id_list", "item_length", "item_id")), strict=True
    ):
        items = data.id2token("item_id", [*history[:length], target]).tolist()
        found[str(data.id2token("user_id", user))] = items
    return found


def made(kind: str) -> list[Row]:
    """Rows in no order of time, with ties within users and across them."""
    draw = random.Random(kind)
    rows = []
    for user in range(25):
        ids = draw.sample(range(-5, 300), 14)
        for event, number in enumerate(ids):
            item = f"b{number}" if kind == "strings" else str(number)
            time = {
                "one second": 1_760_000_000 + draw.randrange(6),  # steps that float32 has not
                "coarse": 978_300_000 + 60 * draw.randrange(4),
                "fractions": 1_760_000_000 + draw.randrange(8) / 4,
                "negative": draw.randrange(-40_000_000, -39_999_990),
                "beyond float32": 2**53 - draw.randrange(4),
                "milliseconds": 1_396_720_544_263 + draw.randrange(5),
                "strings": 1_760_000_000 + 100 * draw.randrange(5),
                "small": draw.randrange(3),
            }[kind]
            rows.append((f"u{user}", item, str(time)))
            if event % 7 == 6:  # the same item again, at the same time
                rows.append(rows[-1])
    draw.shuffle(rows)
    return rows


KINDS = ("one second", "coarse", "fractions", "negative", "beyond float32", "milliseconds", "strings", "small")


@pytest.mark.parametrize("model", ["RecMamba", "SASRec", "FEARec"])  # ours; RecBole's, with our rows and with its own
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("ties", "precision"), [("file", "float64"), ("item", "float64"), ("item", "float32")])
def test_sequences(kind: str, model: str, ties: str, precision: str, write_dataset: Callable[..., str]) -> None:
    rows = made(kind)
    found = sequences(model, write_dataset(rows), ties=ties, time_precision=precision)
    assert found == expected(rows, ties, precision)


@pytest.mark.parametrize("kind", KINDS)
def test_float32_in_the_files_order_is_recboles(kind: str, write_dataset: Callable[..., str]) -> None:
    rows = made(kind)
    name = write_dataset(rows)
    found = sequences("RecMamba", name, time_precision="float32")
    assert found == expected(rows, "file", "float32")
    settings = {"state": "ERROR", "train_neg_sample_args": None, "MAX_ITEM_LIST_LENGTH": 100, **LOAD}
    theirs = recbole_create_dataset(RecBoleConfig("SASRec", name, config_dict=settings))
    last = theirs.build()[2]
    test = last[slice(None)]
    for user, history, length, target in zip(
        *(test[field] for field in ("user_id", "item_id_list", "item_length", "item_id")), strict=True
    ):
        items = theirs.id2token("item_id", [*history[:length].tolist(), int(target)]).tolist()
        assert found[str(theirs.id2token("user_id", int(user)))] == items


def test_precision_matters_only_where_times_are_close(write_dataset: Callable[..., str]) -> None:
    for kind, same in (("one second", False), ("coarse", False), ("small", True), ("negative", False)):
        name = write_dataset(made(kind), kind.replace(" ", "-"))
        assert (sequences("SASRec", name) == sequences("SASRec", name, time_precision="float32")) is same, kind


def test_random_ties_are_permuted_within_their_groups_and_by_the_seed(write_dataset: Callable[..., str]) -> None:
    rows = made("coarse")
    name = write_dataset(rows)
    time = {(user, item): float(t) for user, item, t in rows}
    in_file, drawn = (sequences("RecMamba", name, ties=ties, seed=3) for ties in ("file", "random"))
    assert drawn != in_file
    assert drawn == sequences("SASRec", name, ties="random", seed=3)
    assert drawn != sequences("RecMamba", name, ties="random", seed=4)
    for user, items in drawn.items():
        times = [time[user, item] for item in items]
        assert times == sorted(times) == [time[user, item] for item in in_file[user]]
        assert sorted(items) == sorted(in_file[user])
    groups = [[in_file[user].index(item) for item in items] for user, items in drawn.items()]
    assert np.mean(np.diff(np.concatenate(groups)) == 1) < 0.5  # more than here and there


def test_ids_are_numbers_where_all_are() -> None:
    assert id_ranks(["10", "9", "-3", "100"]).tolist() == [2, 1, 0, 3]
    assert id_ranks(["10", "9", "x", "100"]).tolist() == [0, 2, 3, 1]
    assert id_ranks(["7", "007", "07", "6"]).tolist() == [3, 1, 2, 0]  # one number, three items
    assert id_ranks(["1" + "0" * 30, "2", "1" + "0" * 29]).tolist() == [2, 0, 1]
    assert id_ranks(["é", "z", "Z", "1.5", "²"]).tolist() == [4, 2, 1, 0, 3]


# ---------------------------------------------------------------------- models of other kinds, and other splits
@pytest.mark.parametrize("ties", ["file", "item"])
def test_general_models_too_split_by_the_order(ties: str, write_dataset: Callable[..., str]) -> None:
    rows = made("coarse")
    eval_args = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"}
    data, (_, _, test) = loaded("BPR", write_dataset(rows), ties=ties, eval_args=eval_args)
    last = {
        str(data.id2token("user_id", user)): str(data.id2token("item_id", item))
        for user, item in zip(*(test.dataset.inter_feat[f].tolist() for f in ("user_id", "item_id")), strict=True)
    }
    assert last == {user: items[-1] for user, items in expected(rows, ties).items()}
    assert data.order_of_time == counted(rows, ties)


@pytest.mark.parametrize("model", ["RecMamba", "SASRec", "FEARec"])
def test_a_split_at_one_moment_is_exact(model: str, write_dataset: Callable[..., str]) -> None:
    """RecBole sorts all users' rows by float32 times, so that some of an earlier part lie after some of a later."""
    draw = random.Random(0)
    times = {}
    for user in range(40):
        for event in range(25):
            times[f"u{user}", f"{event:02d}"] = 1_760_000_000 + draw.randrange(3600)
    rows = [(user, item, str(time)) for (user, item), time in times.items()]
    name = write_dataset(rows)
    eval_args = {"split": {"RS": [0.8, 0.1, 0.1]}, "order": "TO", "group_by": "none", "mode": "full"}

    def parts(**settings: Any) -> list[list[int]]:
        data, loaders = loaded(model, name, eval_args=eval_args, train_on="prefixes", **settings)
        whole = []
        for loader in loaders:
            fields = (loader.dataset.inter_feat[field].tolist() for field in ("user_id", "item_id"))
            tokens = (data.id2token(f, ids) for f, ids in zip(("user_id", "item_id"), fields, strict=True))
            whole.append([times[user, item] for user, item in zip(*tokens, strict=True)])
        return whole

    train, valid, test = parts()
    assert max(train) <= min(valid) <= max(valid) <= min(test)
    rounded_train, rounded_valid, _ = parts(time_precision="float32")
    assert max(rounded_train) > min(rounded_valid)  # RecBole's fault, for comparison with it


@pytest.mark.parametrize("keep", ["first", "last"])
@pytest.mark.parametrize("ties", ["file", "item"])
def test_repeats_are_removed_and_ties_stay(keep: str, ties: str, write_dataset: Callable[..., str]) -> None:
    draw = random.Random(1)
    rows = [
        (f"u{user}", str(item), str(draw.randrange(4)))
        for user in range(60)
        for item in draw.choices(range(40), k=30)  # some twice, at the same time or another
    ]
    name = write_dataset(rows)
    kept: dict[tuple[str, str], tuple[float, int]] = {}
    for place, (user, item, time) in enumerate(rows):
        at = (float(time), place)
        kept[user, item] = (min if keep == "first" else max)(at, kept.get((user, item), at))
    places = sorted(place for _, place in kept.values())
    found = sequences("SASRec", name, rm_dup_inter=keep, ties=ties)
    assert found == expected([rows[place] for place in places], ties)


def test_without_repeats_nothing_changes(write_dataset: Callable[..., str]) -> None:
    rows = list(dict.fromkeys(made("coarse")))
    name = write_dataset(rows)
    assert sequences("SASRec", name, rm_dup_inter="first") == sequences("SASRec", name) == expected(rows, "file")


# ---------------------------------------------------------------------- what is said of it
def counted(rows: Sequence[Row], ties: str, precision: str = "float64") -> tuple[str, str, int, int]:
    own: dict[str, list[float]] = defaultdict(list)
    for user, _, time in rows:
        own[user].append(rounded(time) if precision == "float32" else float(time))
    tied = [[a == b for a, b in zip(sorted(t), sorted(t)[1:], strict=False)] for t in own.values()]
    return ties, precision, sum(map(sum, tied)), sum(one[-1] for one in tied if one)


@pytest.mark.parametrize("kind", ["coarse", "one second", "fractions"])
@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_ties_are_counted_and_said(
    kind: str, precision: str, write_dataset: Callable[..., str], caplog: pytest.LogCaptureFixture
) -> None:
    rows = [*made(kind), ("alone", "1", "1")]
    with caplog.at_level(logging.INFO):
        data, (train, _, test) = loaded("RecMamba", write_dataset(rows), time_precision=precision, ties="item")
    assert data.order_of_time == train.dataset.order_of_time == test.dataset.order_of_time
    _, _, tied, ending = counted(rows, "item", precision)
    assert data.order_of_time == ("item", precision, tied, ending)
    said = [record.getMessage() for record in caplog.records if record.getMessage().startswith("order of time: ")]
    assert said == [
        f"order of time: {tied:,} of {len(rows):,} events have the time of their user's event before, and "
        f"{ending:,} of 26 users end in such a tie. Ties are in the order of item ids as numbers (ties: item), "
        f"times in {precision} (time_precision)."
    ]


@pytest.mark.parametrize("model", ["RecMamba", "SASRec", "BPR"])
def test_the_report_has_it(model: str, write_dataset: Callable[..., str], tiny: dict[str, Any]) -> None:
    rows = [(f"u{u}", f"i{(u + t) % 9}", str(t // 2)) for u in range(12) for t in range(7 + u % 2)]
    report = run(model, write_dataset(rows), config_dict={**tiny, "epochs": 1})["report"]
    written = json.loads(Path(report["checkpoint"]).with_suffix(".json").read_text())
    known = {"ties": "file", "time_precision": "float64", "tied_events": 42, "users_ending_in_a_tie": 6}
    assert written["order_of_time"] == report["order_of_time"] == (None if model == "BPR" else known)


@pytest.mark.parametrize(("field", "value"), [("ties", "files"), ("time_precision", "float16"), ("ties", None)])
def test_bad_settings_name_the_field(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=f"^{field}: {value!r}"):
        Config("SASRec", "any", config_dict={field: value})


def test_a_time_that_is_a_token_has_no_order(write_dataset: Callable[..., str]) -> None:
    name = write_dataset(made("small"), header="user_id:token\titem_id:token\ttimestamp:token")
    with pytest.raises(DataError, match=r"TIME_FIELD: the column 'timestamp' .* type token.*timestamp:float"):
        loaded("SASRec", name)


def test_saved_data_of_another_order_are_made_anew(write_dataset: Callable[..., str]) -> None:
    rows = made("coarse")
    name = write_dataset(rows)
    saved = {"save_dataset": True, "checkpoint_dir": "kept", "save_dataloaders": True}
    sequences("SASRec", name, **saved)
    again = {"dataset_save_path": f"kept/{name}-PrefixDataset.pth"}
    again["dataloaders_save_path"] = f"kept/{name}-for-SASRec-dataloader.pth"
    assert all(Path(path).is_file() for path in again.values())
    assert sequences("SASRec", name, **again, ties="item") == expected(rows, "item") != expected(rows, "file")
    assert sequences("SASRec", name, **again) == expected(rows, "file")


# ---------------------------------------------------------------------- data sets that nobody wrote a yaml for
@pytest.mark.parametrize("model", ["RecMamba", "SASRec"])
@pytest.mark.parametrize(
    ("header", "settings"),
    [
        ("user_id:token\titem_id:token\ttimestamp:float", {}),
        ("user_id:token\titem_id:token\trating_timestamp:float", {}),
        ("user_id:token\titem_id:token\tTs:float", {}),
        ("who:token\twhat:token\tDate:float", {"USER_ID_FIELD": "who", "ITEM_ID_FIELD": "what"}),
        ("user_id:token\titem_id:token\tsince:float", {"TIME_FIELD": "since"}),
    ],
    ids=lambda value: value.split("\t")[-1] if isinstance(value, str) else "",
)
def test_the_time_that_is_there_is_loaded(
    model: str,
    header: str,
    settings: dict[str, Any],
    write_dataset: Callable[..., str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    rows = made("coarse")
    name = write_dataset(rows, header=header)
    user, item, time = (column.split(":")[0] for column in header.split("\t"))
    with caplog.at_level(logging.WARNING):
        config = Config(model, name, config_dict={"state": "ERROR", "MAX_ITEM_LIST_LENGTH": 100, **settings})
    assert (f"{time!r} is read as the time" in caplog.text) == (time not in ("timestamp", "since"))
    assert config["load_col"] == {"inter": [user, item, time]}
    assert config["TIME_FIELD"] == config.given["TIME_FIELD"] == time
    data = create_dataset(config)
    test = data_preparation(config, data)[2].dataset
    last = {
        str(data.id2token(user, u)): str(data.id2token(item, i))
        for u, i in zip(test.inter_feat[user].tolist(), test.inter_feat[item].tolist(), strict=True)
    }
    assert last == {u: items[-1] for u, items in expected(rows, "file").items()}


@pytest.mark.parametrize(
    ("header", "settings", "message"),
    [
        (
            "user_id:token\titem_id:token\tx:float",
            {},
            r"TIME_FIELD: .*no column .timestamp.*user_id, item_id, x.*load_col",
        ),
        ("user_id:token\titem_id:token\tplay_time_ms:float", {}, "TIME_FIELD: .*none that looks like one"),
        ("user_id:token\ttime:float\tdate:float", {"ITEM_ID_FIELD": "user_id"}, r"several .*\(time, date\)"),
        ("user_id:token\titem_id:token\ttime:float", {"TIME_FIELD": "tme"}, "TIME_FIELD: .* no column 'tme'.*time"),
        ("uid:token\titem_id:token\ttime:float", {}, "USER_ID_FIELD: .*no column 'user_id'.*uid, item_id, time"),
        ("user_id:token\tiid:token\ttime:float", {}, "ITEM_ID_FIELD: .*no column 'item_id'"),
    ],
)
def test_a_header_that_says_too_little(
    header: str, settings: dict[str, Any], message: str, write_dataset: Callable[..., str]
) -> None:
    name = write_dataset([], header=header)
    with pytest.raises(DataError, match=message):
        Config("SASRec", name, config_dict=settings)


def test_columns_that_were_given_are_left_alone(write_dataset: Callable[..., str]) -> None:
    name = write_dataset([], header="user_id:token\titem_id:token\ttime:float")
    given = {"inter": ["user_id", "item_id", "x"]}
    assert Config("SASRec", name, config_dict={"load_col": given})["load_col"] == given
    assert Config("SASRec", name, config_dict={"load_col": None})["load_col"] is None
    assert Config("BPR", name)["load_col"] == {"inter": ["user_id", "item_id"]}  # in no order of time


@pytest.mark.parametrize("discretization", [None, {"timestamp": {"method": "LD"}}])
def test_a_time_that_is_read_as_a_number_too(discretization: Any, write_dataset: Callable[..., str]) -> None:
    rows = made("coarse")
    settings = {"numerical_features": ["timestamp"], "discretization": discretization}
    assert sequences("SASRec", write_dataset(rows), ties="item", **settings) == expected(rows, "item")


@pytest.mark.parametrize("model", ["RecMamba", "GRU4Rec"])
@pytest.mark.parametrize("ids", [("user_id", "item_id"), ("customer", "article")])
def test_the_command_on_a_new_data_set(
    ids: tuple[str, str], model: str, write_dataset: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [(f"u{u}", f"i{(u + t) % 9}", str(1_700_000_000 + 60 * t)) for u in range(12) for t in range(7)]
    name = write_dataset(rows, "new", header="{}:token\t{}:token\ttime:float".format(*ids))
    named = [f"--USER_ID_FIELD={ids[0]}", f"--ITEM_ID_FIELD={ids[1]}"] if ids[0] != "user_id" else []
    small = [*named, "--epochs=1", "--topk=[3]", "--valid_metric=NDCG@3", "--hidden_size=8", "--embedding_size=8"]
    assert not main([f"--model={model}", f"--dataset={name}", *small])
    said = capsys.readouterr()
    assert "checkpoint: " in said.out
    model_file = next(line for line in said.out.splitlines() if line.startswith("checkpoint: ")).split()[1]
    config, _, data, *_ = load_data_and_model(model_file)
    assert config["TIME_FIELD"] == "time"
    assert data.order_of_time == ("file", "float64", 0, 0)
