"""Histories, targets and batches: RecBole's own, event by event, without its memory and its silent faults."""

from __future__ import annotations

import logging
import os
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recbole.config import Config as RecBoleConfig
from recbole.data import create_dataset as recbole_create_dataset
from recbole.data import data_preparation as recbole_data_preparation

from recbole_holo.bridge import registry
from recbole_holo.bridge.config import Config
from recbole_holo.data.loader import create_dataset, data_preparation
from recbole_holo.data.sequences import training_windows
from recbole_holo.errors import ConfigError, DataError
from recbole_holo.layers.attributes import AttributeVectors

LEAVE_ONE_OUT = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"}
RATIO = {"split": {"RS": [0.8, 0.1, 0.1]}, "order": "TO", "group_by": "user", "mode": "full"}

ML100K = {"load_col": {"inter": ["user_id", "item_id", "rating", "timestamp"]}, "normalize_all": True}


def ours(model: str, dataset: str, **settings: Any) -> tuple[Any, ...]:
    config = Config(model, dataset, config_dict={"state": "ERROR", "topk": [3], "valid_metric": "NDCG@3", **settings})
    data = create_dataset(config)
    return (config, data, *data_preparation(config, data))


def recboles(model: str, dataset: str, **settings: Any) -> tuple[Any, ...]:
    config = RecBoleConfig(model, dataset, config_dict={"state": "ERROR", "train_neg_sample_args": None, **settings})
    data = recbole_create_dataset(config)
    return (config, data, *recbole_data_preparation(config, data))


def assert_same_interaction(left: Any, right: Any) -> None:
    assert set(left.columns) == set(right.columns)
    for column in left.columns:
        assert left[column].dtype == right[column].dtype, column
        assert torch.equal(left[column], right[column]), column


# ---------------------------------------------------------------------- equality with RecBole on ml-100k
@pytest.mark.parametrize("eval_args", [LEAVE_ONE_OUT, RATIO], ids=["leave-one-out", "ratio"])
def test_prefix_rows_equal_recboles_on_ml100k(eval_args: dict[str, Any], sorted_ml100k: str) -> None:
    settings = {"MAX_ITEM_LIST_LENGTH": 20, "eval_args": eval_args, **ML100K}
    theirs = recboles("SASRec", sorted_ml100k, **settings)
    mine = ours("SASRec", sorted_ml100k, **settings)
    for their_loader, my_loader in zip(theirs[2:], mine[2:], strict=True):
        assert len(their_loader.dataset) == len(my_loader.dataset)
        rows = np.arange(len(my_loader.dataset))
        assert_same_interaction(my_loader.dataset[rows], their_loader.dataset[rows])
    for _, my_batch, their_batch in zip(range(3), mine[2], theirs[2], strict=False):  # same order of batches
        assert_same_interaction(my_batch, their_batch)


@pytest.mark.parametrize("eval_args", [LEAVE_ONE_OUT, RATIO], ids=["leave-one-out", "ratio"])
def test_whole_sequences_hold_recboles_targets_and_histories(eval_args: dict[str, Any], sorted_ml100k: str) -> None:
    settings = {"MAX_ITEM_LIST_LENGTH": 20, "eval_args": eval_args, **ML100K}
    theirs = recboles("SASRec", sorted_ml100k, **settings)
    rows = theirs[2].dataset[slice(None)]
    expected = Counter(
        (int(user), int(target), tuple(history[max(0, length - 10) : length].tolist()))
        for user, target, history, length in zip(
            rows["user_id"], rows["item_id"], rows["item_id_list"], rows["item_length"], strict=True
        )
    )
    _, _, train, valid, test = ours("RecMamba", sorted_ml100k, window_stride=10, **settings)
    found: Counter[tuple[int, int, tuple[int, ...]]] = Counter()
    for batch in train:
        for user, items, targets in zip(
            batch["user_id"].tolist(), batch["item_id_list"].tolist(), batch["item_id_target"].tolist(), strict=True
        ):
            for t, target in enumerate(targets):
                if target:  # L 20, stride 10: the ten events before a target are always in its window
                    found[(user, target, tuple(items[max(0, t - 9) : t + 1]))] += 1
    assert found == expected

    for their_loader, my_loader in zip(theirs[3:], (valid, test), strict=True):
        mine, their = my_loader.dataset[slice(None)], their_loader.dataset[slice(None)]
        for column in ("user_id", "item_id", "item_id_list", "item_length"):
            assert torch.equal(mine[column], their[column]), column


@pytest.mark.parametrize("mode", ["uni20", "pop20"])
def test_candidates_equal_recboles(mode: str, sorted_ml100k: str) -> None:
    settings = {"MAX_ITEM_LIST_LENGTH": 10, "eval_args": {**LEAVE_ONE_OUT, "mode": mode}, "eval_batch_size": 2000}
    theirs = recboles("SASRec", sorted_ml100k, **settings, **ML100K)
    mine = ours("RecMamba", sorted_ml100k, **settings, **ML100K)
    for phase in (3, 4):
        np.random.seed(5)
        their_batches = list(theirs[phase])
        np.random.seed(5)
        my_batches = list(mine[phase])
        assert len(their_batches) == len(my_batches)
        for (full, row, pos_u, pos_i), (histories, (user_row, history, item), my_u, my_i) in zip(
            their_batches, my_batches, strict=True
        ):
            assert torch.equal(full["item_id"], item)
            assert torch.equal(row, user_row)
            assert torch.equal(pos_u, my_u)
            assert torch.equal(pos_i, my_i)
            width = histories["item_id_list"].shape[1]
            assert torch.equal(full["item_id_list"][:, :width], histories["item_id_list"][history])
            assert len(histories) == len(pos_i)  # one encoding a history


# ---------------------------------------------------------------------- windows
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(("max_len", "stride"), [(1, 1), (5, 1), (5, 3), (5, 5), (50, 25), (7, None)])
def test_windows_cover_every_target_once(seed: int, max_len: int, stride: int | None) -> None:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 40, size=12)
    users = np.repeat(np.arange(12), lengths)
    first = np.r_[0, np.cumsum(lengths)[:-1]]
    target = np.concatenate([np.arange(f + 1, f + n - min(2, n - 1)) for f, n in zip(first, lengths, strict=True)])
    seen: Counter[int] = Counter()
    for start, end, first_target in zip(*training_windows(users, target, max_len, stride), strict=True):
        assert 1 <= end - start <= max_len
        assert users[start] == users[end]
        for event in range(max(first_target, start + 1), end + 1):
            seen[event] += 1
            available = event - first[users[event]]
            assert event - start >= min(available, max_len - (stride or max_len) + 1)
    if stride is not None:
        assert seen == Counter(target.tolist())
    else:  # the last max_len targets of each user
        last = Counter(t for u in range(12) for t in target[users[target] == u][-max_len:].tolist())
        assert seen == last


@pytest.mark.parametrize(("max_len", "stride"), [(1, 1), (9, 2), (9, 9), (50, 7)])
def test_windows_with_the_latest_targets_only(max_len: int, stride: int) -> None:
    """Every target once, among the last of its window, with all the history there is room for before it."""
    lengths = np.random.default_rng(0).integers(1, 40, size=12)
    users, first = np.repeat(np.arange(12), lengths), np.r_[0, np.cumsum(lengths)[:-1]]
    target = np.concatenate([np.arange(f + 1, f + n) for f, n in zip(first, lengths, strict=True)])
    seen: Counter[int] = Counter()
    windows = training_windows(users, target, max_len, stride, latest_only=True)
    for start, end, first_target in zip(*windows, strict=True):
        assert start == max(first[users[end]], end - max_len)
        seen.update(range(max(first_target, end - stride + 1), end + 1))
        assert first_target >= end - stride + 1 or first_target == start + 1 > end - stride
    assert seen == Counter(target.tolist())


def test_bundled_training_has_every_target_among_the_latest(cyclic_dataset: str, tiny: dict[str, Any]) -> None:
    settings = {**tiny, "bundle_size": 2, "bundle_recent": 3}
    plain = sum(int((batch["item_id_target"] > 0).sum()) for batch in ours("RecMamba", cyclic_dataset, **tiny)[2])
    found = 0
    for batch in ours("RecMamba", cyclic_dataset, **settings)[2]:
        behind = batch["item_length"].unsqueeze(1) - 1 - torch.arange(batch["item_id_list"].shape[1])
        assert not batch["item_id_target"][behind >= 3].any()
        found += int((batch["item_id_target"] > 0).sum())
    assert found == plain
    with pytest.raises(ConfigError, match=r"window_stride: 4.*only the latest 3 events"):
        ours("RecMamba", cyclic_dataset, **settings, window_stride=4)


def test_batches_are_padded_to_their_own_longest(cyclic_dataset: str, tiny: dict[str, Any]) -> None:
    _, _, train, _, test = ours("RecMamba", cyclic_dataset, **tiny)
    for batch in [*train, *(b[0] for b in test)]:
        assert batch["item_id_list"].shape[1] == batch["item_length"].max()
        positions = torch.arange(batch["item_id_list"].shape[1])
        assert torch.equal(batch["item_id_list"] > 0, positions < batch["item_length"].unsqueeze(1))
    _, _, train, _, _ = ours("RecMamba", cyclic_dataset, **tiny, pad_to="max")
    assert all(batch["item_id_list"].shape[1] == 10 for batch in train)


def test_memory_is_linear_in_events(write_dataset: Any) -> None:
    rng = np.random.default_rng(0)
    name = write_dataset([(u, rng.integers(500), t) for u in range(20) for t in range(1000)])
    load = {"load_col": {"inter": ["user_id", "item_id", "timestamp"]}}
    for model in ("SASRec", "RecMamba"):
        _, data, train, _, _ = ours(model, name, MAX_ITEM_LIST_LENGTH=1000, **load)
        held = [*data._events.interaction.values(), *train.dataset.inter_feat.interaction.values()]
        assert sum(t.numel() * t.element_size() for t in held) < 20_000 * 80  # RecBole: 20_000 rows × 1000 × 8 B each


def test_benchmark_files(write_dataset: Any) -> None:
    head = "user_id:token\titem_id:token\titem_id_list:token_seq"
    splits = {
        "train.inter": (head, [("a", "3", "1 2"), ("b", "2", "1")]),
        "valid.inter": (head, [("a", "4", "1 2 3")]),
        "test.inter": (head, [("a", "5", "1 2 3 4")]),
    }
    name = write_dataset([], **splits)
    settings = {
        "benchmark_filename": ["train", "valid", "test"],
        "alias_of_item_id": ["item_id_list"],
        "load_col": {"inter": ["user_id", "item_id", "item_id_list"]},
    }
    _, data, train, valid, test = ours("RecMamba", name, **settings)
    assert [len(loader.dataset) for loader in (train, valid, test)] == [2, 1, 1]
    row = test.dataset[np.array([0])]
    assert data.id2token("item_id", row["item_id_list"][0].tolist()).tolist() == ["1", "2", "3", "4"]
    assert row["item_length"].tolist() == [4]


# ---------------------------------------------------------------------- RecBole's silent faults
def _close_events(rng: np.random.Generator) -> list[tuple[str, str, int]]:
    """Users with events 5-40 s apart at today's epoch seconds, in a shuffled file; items are numbered in time order."""
    events = []
    for user in range(20):
        times = 1_760_000_000 + np.cumsum(rng.integers(5, 40, size=20))
        events += [(f"u{user}", f"{t:02d}", int(time)) for t, time in enumerate(times)]
    return [events[i] for i in rng.permutation(len(events))]


@pytest.mark.parametrize("model", ["SASRec", "RecMamba"])
def test_histories_are_in_float64_time_order(model: str, write_dataset: Any) -> None:
    name = write_dataset(_close_events(np.random.default_rng(0)))
    settings = {"load_col": {"inter": ["user_id", "item_id", "timestamp"]}}
    _, data, _, _, test = ours(model, name, **settings)
    rows = test.dataset[slice(None)]
    assert set(data.id2token("item_id", rows["item_id"].tolist())) == {"19"}
    assert data.id2token("item_id", rows["item_id_list"][0][:19].tolist()).tolist() == [f"{t:02d}" for t in range(19)]

    _, data, _, _, test = recboles("SASRec", name, **settings)  # the fault is there without the repair
    tokens = data.id2token("item_id", test.dataset[slice(None)]["item_id"].tolist())
    assert (tokens != "19").mean() > 0.3


def test_general_models_too_get_time_order(write_dataset: Any) -> None:
    name = write_dataset([*_close_events(np.random.default_rng(0)), ("v", "unseen by the others", 1)])
    load = {"load_col": {"inter": ["user_id", "item_id", "timestamp"]}}
    _, data, _, _, test = ours("BPR", name, eval_args=LEAVE_ONE_OUT, **load)
    assert set(data.id2token("item_id", test.dataset.inter_feat["item_id"].tolist())) == {"19"}


def test_pad_row_of_attributes_is_zero(cyclic_dataset: str, tiny: dict[str, Any]) -> None:
    load = {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "genre", "tags", "price"]}
    _, _, train, _, _ = ours("SASRec", cyclic_dataset, **{**tiny, "load_col": load})
    feat = train.dataset.get_item_feature()
    for field in ("genre", "tags", "price"):
        assert not feat[field][0].any(), field
        assert feat[field][1:].any(), field


def test_dropped_interactions_are_reported(write_dataset: Any, caplog: pytest.LogCaptureFixture) -> None:
    inter = [(f"u{u}", f"i{i}", i) for u in range(5) for i in range(6)]
    name = write_dataset(inter, item=("item_id:token\tgenre:token", [(f"i{i}", "g") for i in range(4)]))
    load = {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "genre"]}
    with caplog.at_level(logging.WARNING):
        ours("SASRec", name, load_col=load)
    assert "10 of 30 interactions are dropped" in caplog.text
    assert "filter_inter_by_user_or_item" in caplog.text


# ---------------------------------------------------------------------- attributes
def test_attributes_of_every_type(write_dataset: Any, caplog: pytest.LogCaptureFixture) -> None:
    inter = [(f"u{u}", f"i{(u + t) % 8}", t) for u in range(6) for t in range(6)]
    items = [(f"i{i}", f"g{i % 3}", "" if i == 2 else f"a{i % 2} b", "" if i == 5 else i) for i in range(10)]
    name = write_dataset(inter, item=("item_id:token\tgenre:token\ttags:token_seq\tprice:float", items))
    settings = {"item_attributes": ["genre", "tags", "price"], "attribute_buckets": 4}
    load = {"load_col": {"inter": ["user_id", "item_id", "timestamp"]}}
    with caplog.at_level(logging.INFO):
        _, data, train, _, _ = ours("HoloMambaRec", name, **settings, **load)
    assert "1 of 8 items have no tags" in caplog.text
    assert "1 of 8 items have no price" in caplog.text
    genre, tags, price = (train.dataset.item_attributes[field] for field in settings["item_attributes"])
    assert data.item_num == 9  # i8 and i9 occur in no interaction

    ids = {token: data.token2id("item_id", token) for token in ("i0", "i2", "i5", "i7")}
    assert genre.labels[genre.index[ids["i7"]]] == "g1"
    assert [tags.labels[v] for v in tags.index[ids["i0"]].tolist()] == ["a0", "b"]
    assert tags.index[ids["i2"]].tolist() == [0, 0]
    assert price.index[ids["i5"]] == 0  # missing, although RecBole filled in the mean
    assert price.index[ids["i0"]] == 1
    assert price.index[ids["i7"]] == price.n_values - 1 == 4
    for attribute in (genre, tags, price):
        assert not attribute.index[0].any()
        assert len(attribute.labels) == attribute.n_values
    _, data, *_ = ours("HoloMambaRec", name, **settings, **load, keep_unseen_items=True)
    assert data.item_num == 11


def test_missing_column_and_file_are_named(cyclic_dataset: str, write_dataset: Any, tiny: dict[str, Any]) -> None:
    with pytest.raises(DataError, match=r"no column 'gnre'.*did you mean genre.*tags"):
        ours("HoloMambaRec", cyclic_dataset, **tiny, item_attributes=["gnre"])
    bare = write_dataset([("u", f"i{t}", t) for t in range(6)], "bare")
    with pytest.raises(DataError, match=r"needs the file bare.item"):
        ours("HoloMambaRec", bare, **tiny, item_attributes=["genre"])


def test_no_batch_carries_attributes_of_the_target(cyclic_dataset: str, tiny: dict[str, Any]) -> None:
    _, _, train, valid, test = ours("HoloMambaRec", cyclic_dataset, **tiny, item_attributes=["genre"])
    for batch in (next(iter(train)), next(iter(valid))[0], next(iter(test))[0]):
        assert not {"genre", "tags", "price"} & set(batch.columns)


# ---------------------------------------------------------------------- bad data
def test_bad_data_gets_a_clear_error(write_dataset: Any, tiny: dict[str, Any]) -> None:
    single = write_dataset([(f"u{u}", f"i{u}", 1) for u in range(5)], "single")
    with pytest.raises(DataError, match="every user of 'single' has a single event"):
        ours("RecMamba", single, **tiny)
    short = write_dataset([(f"u{u}", f"i{t}", t) for u in range(5) for t in range(4)], "short")
    with pytest.raises(DataError, match=r"no interaction of 'short' is left.*user_inter_num_interval"):
        ours("RecMamba", short, **tiny, user_inter_num_interval="[9,inf)")
    load = {"inter": ["user_id", "item_id", "when"]}
    with pytest.raises(DataError, match=r"no column 'when'.*timestamp"):
        ours("RecMamba", short, **{**tiny, "load_col": load, "TIME_FIELD": "when"})
    pairs = write_dataset([(f"u{u}", f"i{t}", t) for u in range(5) for t in range(2)], "pairs")
    with pytest.raises(DataError, match="leaves no test"):
        ours("RecMamba", pairs, **tiny)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("train_on", "sequence"),
        ("train_windows", "first"),
        ("pad_to", "x"),
        ("window_stride", 99),
        ("window_stride", 0),
    ],
)
def test_bad_settings_name_the_field(field: str, value: Any, cyclic_dataset: str, tiny: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"{field}: {value!r}"):
        ours("RecMamba", cyclic_dataset, **tiny, **{field: value})


def test_missing_dataset_says_where_files_go(tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"'ml-1n' is not on disk.*did you mean .*ml-1m.*put ml-1n.inter"):
        ours("RecMamba", "ml-1n", **tiny)

    def offline(*args: Any) -> bool:
        raise OSError("no network")

    monkeypatch.setattr("recbole_holo.data.repairs.decide_download", offline)
    with pytest.raises(DataError, match=r"could not be downloaded \(no network\).*put .*ml-20m.inter"):
        ours("RecMamba", "ml-20m", **tiny)
    assert os.listdir("dataset") == []  # no half-made folder that the next run would take for the data


def test_a_model_that_peeks_at_the_target_gets_nothing(cyclic_dataset: str, tiny: dict[str, Any]) -> None:
    """The leak, planted: RecBole joins the attributes of the target into every batch."""
    load = {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "genre"]}
    batch = recboles("SASRec", cyclic_dataset, **{**tiny, "load_col": load})[4].dataset[slice(None)]
    genre = recboles("SASRec", cyclic_dataset, **{**tiny, "load_col": load})[1].item_feat["genre"]
    assert torch.equal(batch["genre"], genre[batch["item_id"]])  # the leak is real in RecBole

    config, _, train, _, test = ours("HoloMambaRec", cyclic_dataset, **tiny, item_attributes=["genre"])
    model = registry.get_model_class("HoloMambaRec")(config, train.dataset).eval()

    def peeking(interaction: Any) -> torch.Tensor:
        return model.full_sort_predict(interaction) + interaction["genre"].unsqueeze(1)

    rows = test.dataset[slice(None)]
    with pytest.raises(KeyError):
        peeking(rows)
    scores = model.full_sort_predict(rows)
    rows["item_id"] = rows["item_id"].flip(0)  # other targets, same histories
    assert torch.equal(model.full_sort_predict(rows), scores)

    history = next(iter(train))["item_id_list"][:1, :4]
    elsewhere = torch.tensor(sorted(set(range(1, model.n_items)) - set(history.flatten().tolist())))
    hidden = model.hidden_states(history)
    model.binding.attributes[0].index[elsewhere] = 1  # what items outside the history are like
    assert torch.equal(model.hidden_states(history), hidden)
    model.binding.attributes[0].index[history] = 2
    assert not torch.equal(model.hidden_states(history), hidden)


def test_the_interaction_matrix_equals_recboles(sorted_ml100k: str) -> None:
    settings = {"MAX_ITEM_LIST_LENGTH": 20, **ML100K}
    theirs, mine = recboles("SASRec", sorted_ml100k, **settings), ours("SASRec", sorted_ml100k, **settings)
    for phase in (2, 3):
        assert (theirs[phase].dataset.inter_matrix("csr") != mine[phase].dataset.inter_matrix("csr")).nnz == 0
    windows = ours("RecMamba", sorted_ml100k, **settings)
    assert (theirs[2].dataset.inter_matrix("csr") != windows[2].dataset.inter_matrix("csr")).nnz == 0
    valued = mine[2].dataset.inter_matrix(value_field="rating")
    assert valued.sum() == theirs[2].dataset.inter_matrix(value_field="rating").sum()


def test_attribute_vectors(cyclic_dataset: str, tiny: dict[str, Any]) -> None:
    """One value: its vector. Several: their mean, or the first. None, and the pad: zero."""
    _, data, train, _, _ = ours("HoloMambaRec", cyclic_dataset, **tiny, item_attributes=["genre", "tags"])
    genre, tags = train.dataset.item_attributes.values()
    items = torch.tensor([0, data.token2id("item_id", "i1")])
    one = AttributeVectors(genre, 8)
    assert not one(items)[0].any()
    assert torch.equal(one(items)[1], one.embedding.weight[genre.labels.index("g1")])
    mean, first = AttributeVectors(tags, 8), AttributeVectors(tags, 8, values="first")
    a1, b1 = tags.labels.index("a1"), tags.labels.index("b1")
    torch.testing.assert_close(mean(items)[1], (mean.embedding.weight[a1] + mean.embedding.weight[b1]) / 2)
    assert torch.equal(first(items)[1], first.embedding.weight[a1])
    assert not mean(items)[0].any()


def test_shuffled_attributes_keep_their_values_and_lose_their_items(cyclic_dataset: str, tiny: dict[str, Any]) -> None:
    settings = {**tiny, "item_attributes": ["genre", "tags"]}
    plain = ours("HoloMambaRec", cyclic_dataset, **settings)[2].dataset.item_attributes
    mixed = ours("HoloMambaRec", cyclic_dataset, **settings, attribute_shuffle=True)[2].dataset.item_attributes
    pairs = [torch.cat([a["genre"].index.unsqueeze(1), a["tags"].index], 1) for a in (plain, mixed)]
    assert not torch.equal(*pairs)
    assert not pairs[1][0].any()
    assert sorted(pairs[0].tolist()) == sorted(pairs[1].tolist())  # together from one item, each as often


@pytest.mark.parametrize(
    ("header", "value", "message"),
    [("emb:float_seq", "1 2", "type float_seq"), ("price:float", "", "no item has a value of 'price'")],
)
def test_attributes_that_cannot_be_used(
    header: str, value: str, message: str, write_dataset: Any, tiny: dict[str, Any]
) -> None:
    inter = [(f"u{u}", f"i{(u + t) % 8}", t) for u in range(6) for t in range(6)]
    name = write_dataset(inter, item=(f"item_id:token\t{header}", [(f"i{i}", value) for i in range(8)]))
    with pytest.raises(DataError, match=message):
        ours("HoloMambaRec", name, **tiny, item_attributes=[header.split(":")[0]])


def test_a_download_is_whole_or_nothing(tiny: dict[str, Any], tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = "user_id:token\titem_id:token\ttimestamp:float\n" + "".join(
        f"u{u}\ti{(u + t) % 9}\t{t}\n" for u in range(6) for t in range(6)
    )

    def download(url: str, folder: str) -> str:
        assert url.endswith(".zip")
        archive = f"{folder}/ml-20m-original.zip"
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr("ml-20m-original.inter", rows)
        return archive

    monkeypatch.setattr("recbole_holo.data.repairs.decide_download", lambda url: True)
    monkeypatch.setattr("recbole_holo.data.repairs.download_url", download)
    _, data, *_ = ours("RecMamba", "ml-20m", **tiny)
    assert data.user_num == 7
    assert sorted(p.name for p in (tmp_path / "dataset").iterdir()) == ["ml-20m"]
    assert [p.name for p in (tmp_path / "dataset" / "ml-20m").iterdir()] == ["ml-20m.inter"]

    monkeypatch.setattr("recbole_holo.data.repairs.decide_download", lambda url: False)
    with pytest.raises(DataError, match="declined"):
        ours("RecMamba", "ml-10m", **tiny)


def test_optional_columns_that_are_missing_are_only_warned_of(
    write_dataset: Any, tiny: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    name = write_dataset([(f"u{u}", f"i{(u + t) % 9}", t) for u in range(6) for t in range(6)])
    tiny["load_col"] = {"inter": ["user_id", "item_id", "timestamp", "ratng"]}
    with caplog.at_level(logging.WARNING):
        ours("RecMamba", name, **tiny)
    assert "no column 'ratng'" in caplog.text
    tiny["load_col"] = {"inter": ["user_id", "item_id"]}
    with pytest.raises(DataError, match=r"TIME_FIELD: .* without a column 'timestamp'"):
        ours("RecMamba", name, **tiny)
    (Path("dataset") / name / f"{name}.inter").unlink()
    with pytest.raises(DataError, match=r"needs the file .*toy\.inter, which is not there"):
        ours("RecMamba", name, **tiny)
