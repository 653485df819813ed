"""The column without seen items against a slow calculation from the raw events; selection by it; what is reported."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from recbole.data.interaction import Interaction
from recbole.evaluator.collector import Collector
from recbole.evaluator.evaluator import Evaluator

from recbole_holo.bridge import registry
from recbole_holo.bridge.config import Config, overridden
from recbole_holo.bridge.metric_names import UNSEEN
from recbole_holo.data.loader import create_dataset, data_preparation
from recbole_holo.data.seen import KnownItems
from recbole_holo.quick_start import load_data_and_model, run
from recbole_holo.training.evaluation import ArrayCollector, ArrayEvaluator
from recbole_holo.training.trainer import HoloTrainer, get_trainer_class

LENGTH, K = 4, 5
LEAVE_ONE_OUT = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"}
BY_TIME = {"split": {"RS": [0.6, 0.2, 0.2]}, "order": "TO", "group_by": "none", "mode": "full"}
SIZES = {"hidden_size": 8, "inner_size": 8, "embedding_size": 8, "num_layers": 1, "n_layers": 1, "d_state": 4}


@pytest.fixture
def events() -> list[tuple[str, str, int]]:
    """Of 30 users, mixed in time; histories of 3 to 20 events over 25 items, many of them repeated."""
    rng = np.random.default_rng(0)
    users = rng.permutation(np.repeat(np.arange(30), rng.integers(3, 21, size=30)))
    favourites = rng.integers(25, size=(30, 6))
    items = np.where(rng.random(len(users)) < 0.4, favourites[users, rng.integers(6, size=len(users))], -1)
    items = np.where(items < 0, rng.integers(25, size=len(users)), items)
    return [(f"u{user}", f"i{item}", 10 * time) for time, (user, item) in enumerate(zip(users, items, strict=True))]


@pytest.fixture
def dataset(events: list[tuple[str, str, int]], write_dataset: Callable[..., str]) -> str:
    return write_dataset(events, "repeats")


def prepared(model: str, dataset: str, **settings: Any) -> tuple[Config, Any, Any, Any]:
    """Configuration, trainer with a new model, validation and test loader."""
    base = {"MAX_ITEM_LIST_LENGTH": LENGTH, "topk": [2, K], "metrics": ["Hit", "NDCG", "MRR"], "valid_metric": "NDCG@5"}
    load = {"load_col": {"inter": ["user_id", "item_id", "timestamp"]}, "metric_decimal_place": 12, "state": "ERROR"}
    config = Config(model, dataset, config_dict={**base, **load, **SIZES, "eval_batch_size": 16, **settings})
    train, valid, test = data_preparation(config, create_dataset(config))
    torch.manual_seed(3)
    net = registry.get_model_class(model)(config, train.dataset).to(config["device"]).eval()
    with torch.no_grad():  # a model that likes to repeat, so that the columns differ
        for parameter in net.parameters():
            parameter.mul_(3)
    return config, get_trainer_class(config)(config, net), valid, test


def own_scores(net: Any, history: list[int]) -> torch.Tensor:
    """A model's scores of all items after a history."""
    shown = history[-LENGTH:]
    row = {
        "item_id_list": torch.tensor([shown + [0] * (LENGTH - len(shown))]),
        "item_length": torch.tensor([len(shown)]),
    }
    with torch.no_grad():
        return net.full_sort_predict(Interaction(row)).flatten()


def metrics_of(rankings: list[tuple[list[int], int]]) -> dict[str, float]:
    """From ordered lists and targets."""
    found: dict[str, list[float]] = {}
    for ranked, target in rankings:
        rank = ranked.index(target) + 1 if target in ranked else 10**9
        for k in (2, K):
            hit = rank <= k
            values = {"hit": 1.0, "ndcg": 1 / np.log2(rank + 1), "mrr": 1 / rank}
            for name, value in values.items():
                found.setdefault(f"{name}@{k}", []).append(value if hit else 0.0)
    return {name: float(np.mean(values)) for name, values in found.items()}


def histories_before(config: Any, loader: Any, events: list[tuple[str, str, int]]) -> list[tuple[list[int], int, int]]:
    """Of every row of a split: the ids of all that its user did before, from the raw events; the target; the user."""
    dataset = loader._dataset
    rows = dataset.inter_feat
    found = []
    for user, item, time in zip(*(rows[name].tolist() for name in ("user_id", "item_id", "timestamp")), strict=True):
        name = dataset.id2token("user_id", user)
        before = [dataset.token2id("item_id", i) for u, i, t in events if u == name and t < time]
        found.append((before, item, user))
    return found


def excluding(history: list[int], last: int | None) -> set[int]:
    return set(history if last is None else history[-last:])


@pytest.mark.parametrize("last", [None, 2, 7])
@pytest.mark.parametrize("eval_args", [LEAVE_ONE_OUT, BY_TIME], ids=["leave one out", "by time"])
@pytest.mark.parametrize("model", ["RecMamba", "GRU4Rec"])
def test_full_ranking(
    model: str, eval_args: dict[str, Any], last: int | None, dataset: str, events: list[tuple[str, str, int]]
) -> None:
    config, trainer, valid, test = prepared(model, dataset, eval_args=eval_args, exclude_last=last)
    for split, loader in (("valid", valid), ("test", test)):
        kept, unseen, repeats = [], [], 0
        rows = histories_before(config, loader, events)
        assert max(len(history) for history, _, _ in rows) > 2 * LENGTH
        for history, target, _ in rows:
            scores = own_scores(trainer.model, history)
            ranked = [item for item in scores.argsort(descending=True).tolist() if item > 0]
            kept.append((ranked, target))
            unseen.append(([item for item in ranked if item not in excluding(history, last)], target))
            repeats += target in history
        expected = metrics_of(kept) | {name + UNSEEN: value for name, value in metrics_of(unseen).items()}
        assert last == 2 or expected["ndcg@5"] != expected["ndcg@5" + UNSEEN]
        result = trainer.evaluate(loader, load_best_model=False)
        assert result == pytest.approx(expected, abs=1e-9)
        assert trainer.repeats[split] == (repeats, len(rows))
        assert 0 < repeats < len(rows)
        for ranks, rankings in ((trainer.evaluator.ranks, kept), (trainer.evaluator.ranks_unseen, unseen)):
            places = [ranked.index(target) + 1 if target in ranked else 0 for ranked, target in rankings]
            assert ranks.tolist() == [place if place <= K else 0 for place in places]


@pytest.mark.parametrize("metrics", [["Hit", "ItemCoverage"], ["GAUC", "Hit"]], ids=["items", "mean ranks"])
def test_metrics_that_need_more_than_the_place_of_the_target(
    metrics: list[str], dataset: str, events: list[tuple[str, str, int]]
) -> None:
    config, trainer, _, test = prepared("RecMamba", dataset, metrics=metrics, valid_metric="Hit@5", topk=[K])
    trainer.eval_collector.data_collect(test)
    result = trainer.evaluate(test, load_best_model=False)
    shown, hits, areas = set(), [], []
    for history, target, _ in histories_before(config, test, events):
        scores = own_scores(trainer.model, history)
        ranked = [item for item in scores.argsort(descending=True).tolist() if item > 0 and item not in history]
        shown |= set(ranked[:K])
        hits.append(target in ranked[:K])
        below = len(ranked) - 1 - ranked.index(target) if target in ranked else 0
        areas.append(below / (len(ranked) - (target in ranked)))
    assert result["hit@5" + UNSEEN] == pytest.approx(np.mean(hits))
    if "GAUC" in metrics:
        assert result["gauc" + UNSEEN] == pytest.approx(np.mean(areas), abs=1e-6)
    else:
        assert result["itemcoverage@5" + UNSEEN] == pytest.approx(len(shown) / (test._dataset.item_num - 1))


@pytest.mark.parametrize("eval_args", [LEAVE_ONE_OUT, BY_TIME], ids=["leave one out", "by time"])
@pytest.mark.parametrize("model", ["RecMamba", "GRU4Rec"])
def test_among_sampled_candidates(
    model: str, eval_args: dict[str, Any], dataset: str, events: list[tuple[str, str, int]]
) -> None:
    """A user's targets are ranked together, as RecBole does; known is what lies before the first of them."""
    config, trainer, _, test = prepared(model, dataset, eval_args={**eval_args, "mode": "uni8"})
    result = trainer.evaluate(test, load_best_model=False)
    drawn: list[tuple[int, int]] = []  # ranking, candidate; in the order of the rows, a ranking's targets first
    rankings = 0
    with trainer._same_draws(test):
        for histories, index, positive_u, _ in test:
            numbers, items = (index[0], index[2]) if isinstance(index, tuple) else (index, histories["item_id"])
            drawn += [(rankings + int(number), int(item)) for number, item in zip(numbers, items, strict=True)]
            rankings += int(positive_u[-1]) + 1

    by_user: dict[int, list[tuple[list[int], int]]] = {}
    for history, target, user in histories_before(config, test, events):
        by_user.setdefault(user, []).append((history, target))
    assert rankings == len(by_user)
    shares = []
    for number, rows in enumerate(by_user.values()):
        candidates = [item for at, item in drawn if at == number]
        scores = {}
        for place, item in enumerate(candidates):
            scores[item] = float(own_scores(trainer.model, rows[place % len(rows)][0])[item])
        known = set(min((history for history, _ in rows), key=len))
        ranked = [item for item in sorted(scores, key=lambda one: -scores[one]) if item not in known]
        targets = {target for _, target in rows}
        shares.append(float(any(item in targets for item in ranked[:2])))
    assert result["hit@2" + UNSEEN] == pytest.approx(np.mean(shares))
    assert result["hit@2" + UNSEEN] != result["hit@2"]


def test_rows_of_files_show_their_history(write_dataset: Callable[..., str], tiny: dict[str, Any]) -> None:
    rows = {split: [("u", "a b c", "d")] * 3 + [("v", "b d", "b")] for split in ("train", "valid", "test")}
    head = "user_id:token\titem_id_list:token_seq\titem_id:token"
    files = {f"{split}.inter": (head, found) for split, found in rows.items()}
    name = write_dataset([], "files", unused=(head, []), **files)
    settings = {"benchmark_filename": list(rows), "alias_of_item_id": ["item_id_list"], "load_col": None}
    config = Config("RecMamba", name, config_dict={**tiny, **settings, "topk": [1], "valid_metric": "NDCG@1"})
    train, _, test = data_preparation(config, create_dataset(config))
    assert test.repeats == {"test": (1, 4)}
    trainer = HoloTrainer(config, registry.get_model_class("RecMamba")(config, train.dataset))
    result = trainer.evaluate(test, load_best_model=False)
    assert result["hit@1" + UNSEEN] == 0.75  # of four items, d alone is new to u; v's b was seen


@pytest.mark.parametrize("metrics", [["Hit", "NDCG"], ["Hit", "NDCG", "GAUC", "MAP"]])
@pytest.mark.parametrize("n_values", [2, 5, 40, 10_000], ids=["mostly ties", "ties", "few ties", "no ties"])
@pytest.mark.parametrize("positives", ["one", "several"])
def test_ties_are_broken_as_by_a_second_top_k(positives: str, n_values: int, metrics: list[str]) -> None:
    settings = {"metrics": metrics, "topk": [1, 4, 9], "valid_metric": "NDCG@4", "metric_decimal_place": 15}
    config = Config("RecMamba", "ml-100k", config_dict={**settings, "state": "ERROR"})
    generator = torch.Generator().manual_seed(n_values)
    rows, width = 300, 60
    scores = torch.randint(0, n_values, (rows, width), generator=generator) / 4 - 2
    scores[:, 0] = -torch.inf
    length = torch.randint(0, 30, (rows,), generator=generator)
    items = torch.randint(8, width, (int(length.sum()),), generator=generator)  # some twice
    before = np.r_[0, np.cumsum(length.numpy())]
    known = KnownItems(items, torch.from_numpy(before[:-1]), length, before)
    each = torch.ones(rows) if positives == "one" else torch.randint(1, 4, (rows,), generator=generator)
    positive_u = torch.arange(rows).repeat_interleave(each.long())
    positive_i = torch.randint(1, 8, positive_u.shape, generator=generator)

    masked = scores.clone()
    for row, (start, end) in enumerate(pairwise(before)):
        masked[row, items[start:end]] = -torch.inf
    theirs = Collector(config)
    theirs.eval_batch_collect(masked, None, positive_u, positive_i)
    ours = ArrayCollector(config)
    ours.start(known)
    for part in (slice(0, 120), slice(120, rows)):
        mine = (positive_u >= part.start) & (positive_u < part.stop)
        ours.eval_batch_collect(scores[part].clone(), None, positive_u[mine] - part.start, positive_i[mine])
    found = ours.get_data_struct()
    assert torch.equal(found["rec.topk" + UNSEEN], theirs.data_struct["rec.topk"])
    result = ArrayEvaluator(config).evaluate(found)
    expected = Evaluator(config).evaluate(theirs.data_struct)
    assert {name: result[name + UNSEEN] for name in expected} == expected


def test_a_general_model_is_chosen_by_what_its_users_have_not_seen(dataset: str, caplog: Any) -> None:
    """As RecBole does it; the plain name means the same as for all models."""
    with caplog.at_level(logging.INFO):
        config, trainer, _, test = prepared("BPR", dataset, valid_metric="ndcg@5", state="INFO")
    assert config["valid_metric"] == "ndcg@5" + UNSEEN
    assert trainer.valid_metric == "ndcg@5" + UNSEEN
    assert "selected without what users have seen" in caplog.text
    hits, unseen = [], []
    for user, known, targets in zip(
        test.uid_list,
        test.uid2history_item[test.uid_list.numpy()],
        test.uid2positive_item[test.uid_list.numpy()],
        strict=True,
    ):
        scores = trainer.model.full_sort_predict(Interaction({"user_id": user.unsqueeze(0)})).detach()
        ranked = [item for item in scores.argsort(descending=True).tolist() if item > 0]
        new = [item for item in ranked if item not in set(known.tolist())]
        hits.append(bool(set(targets.tolist()) & set(ranked[:K])))
        unseen.append(bool(set(targets.tolist()) & set(new[:K])))
    result = trainer.evaluate(test, load_best_model=False)
    assert result["hit@5"] == pytest.approx(np.mean(hits))
    assert result["hit@5" + UNSEEN] == pytest.approx(np.mean(unseen))
    assert np.mean(hits) != np.mean(unseen)


def test_targets_of_a_general_model_that_repeat(dataset: str, events: list[tuple[str, str, int]]) -> None:
    _, trainer, _, test = prepared("BPR", dataset, eval_args=LEAVE_ONE_OUT)
    trainer.evaluate(test, load_best_model=False)
    repeats = 0
    for user in {user for user, _, _ in events}:
        items = [item for who, item, _ in events if who == user]
        repeats += items[-1] in items[:-1]
    assert trainer.repeats["test"] == (repeats, 30)


@pytest.mark.parametrize("chosen", ["NDCG@5", "ndcg @5(unseen)"])
def test_early_stopping_and_the_best_epoch_follow_the_metric(
    chosen: str, dataset: str, tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plain metric falls from epoch to epoch, that without seen items rises until the third."""
    epochs: list[int] = []
    courses = {"ndcg@5": [0.5, 0.4, 0.3, 0.2, 0.1], "ndcg@5 (unseen)": [0.1, 0.2, 0.3, 0.2, 0.1]}

    def evaluate(self: HoloTrainer, data: Any, **others: Any) -> dict[str, float]:
        epochs.append(len(epochs))
        return {name: course[epochs[-1]] for name, course in courses.items()}

    monkeypatch.setattr(HoloTrainer, "evaluate", evaluate)
    settings = {**tiny, "epochs": 5, "stopping_step": 1, "valid_metric": chosen}
    result = run("RecMamba", dataset, config_dict=settings, test=False)
    unseen = "unseen" in chosen
    course = courses["ndcg@5 (unseen)" if unseen else "ndcg@5"]
    assert result["best_valid_score"] == max(course)
    assert result["best_valid_result"] == {name: c[2 if unseen else 0] for name, c in courses.items()}
    assert result["report"]["valid_scores"] == course[: 5 if unseen else 3]
    assert result["report"]["valid_metric"] == ("ndcg@5 (unseen)" if unseen else "ndcg@5")


def test_report_table_and_reloading_have_both_columns(
    dataset: str, tiny: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    result = run("RecMamba", dataset, config_dict={**tiny, "valid_metric": "NDCG@5 (Unseen)"})
    report = json.loads(Path(result["report"]["checkpoint"]).with_suffix(".json").read_text())
    assert report["test"] == result["test_result"]
    assert result["best_valid_score"] == report["valid"]["ndcg@5 (unseen)"]
    assert report["repeats"]["test"]["targets"] == len(result["test_ranks"]) == 30
    assert report["repeats"]["valid"]["targets"] == 26  # histories of three events have no validation target
    repeats = report["repeats"]["test"]["repeats"]
    assert repeats > 0
    for ranks, kind in ((result["test_ranks"], ""), (result["test_ranks_unseen"], UNSEEN)):
        assert np.mean((ranks > 0) & (ranks <= 5)) == pytest.approx(report["test"]["hit@5" + kind], abs=1e-4)
    printed = capsys.readouterr().out
    assert re.search(r"metric +validation +validation \(unseen\) +test +test \(unseen\)\n", printed)
    values = [report[split]["ndcg@5" + kind] for split in ("valid", "test") for kind in ("", UNSEEN)]
    line = re.search(r"ndcg@5 (.*)\n", printed)
    assert line is not None
    assert [float(value) for value in line.group(1).split()] == pytest.approx(values, abs=1e-6)
    assert f"test: {repeats} of 30 targets" in printed
    assert "part of the answer here" in printed

    config, net, _, _, _, test = load_data_and_model(report["checkpoint"])
    assert get_trainer_class(config)(config, net).evaluate(test, load_best_model=False) == report["test"]
    with overridden(config, exclude_last=1):
        assert get_trainer_class(config)(config, net).evaluate(test, load_best_model=False) != report["test"]


def test_where_items_do_not_repeat_the_advice_is_the_other(
    cyclic_dataset: str, tiny: dict[str, Any], capsys: Any
) -> None:
    run("RecMamba", cyclic_dataset, config_dict={**tiny, "epochs": 1})
    printed = capsys.readouterr().out
    assert "test: 0 of 40 targets (0.0%) were" in printed
    assert "read and select by the (unseen) metrics" in printed


def test_rows_that_show_their_history_may_call_items_otherwise(events: Any, write_dataset: Callable[..., str]) -> None:
    """FEARec reads RecBole's own rows."""
    found = []
    for item in ("item_id", "article"):
        name = write_dataset(events, item, header=f"user_id:token\t{item}:token\ttimestamp:float")
        load = {"load_col": {"inter": ["user_id", item, "timestamp"]}}
        _, trainer, _, test = prepared("FEARec", name, ITEM_ID_FIELD=item, **load, n_layers=2)
        known = KnownItems.of(test, trainer.device)
        found.append((test.repeats, [tensor.tolist() for tensor in known.pairs(0, 20)]))
    assert found[0] == found[1]
    assert found[0][0]["test"].repeats > 0


def test_of_single_scores_nothing_is_advised(write_dataset: Callable[..., str], caplog: Any) -> None:
    rows = [(f"u{i % 7}", f"i{i % 5}", i, i % 2) for i in range(100)]
    name = write_dataset(rows, "clicks", header="user_id:token\titem_id:token\ttimestamp:float\tlabel:float")
    columns = {"load_col": {"inter": ["user_id", "item_id", "timestamp", "label"]}, "LABEL_FIELD": "label"}
    labelled = {"eval_args": {**BY_TIME, "mode": "labeled"}, "train_neg_sample_args": None}
    with caplog.at_level(logging.INFO):
        _, trainer, _, test = prepared(
            "FM", name, **columns, **labelled, metrics=["AUC"], valid_metric="AUC", state="INFO"
        )
        assert list(trainer.evaluate(test, load_best_model=False)) == ["auc"]
    assert "(unseen)" not in caplog.text
    assert trainer.repeats == {}


@pytest.mark.parametrize(
    ("model", "metric", "known"),
    [("RecMamba", "NDCG@5", True), ("RecMamba", "MRR@2", True), ("BPR", "NDCG@2", True), ("RecMamba", "Hit@3", False)],
)
def test_a_run_that_goes_on_by_another_metric_compares_like_with_like(
    model: str, metric: str, known: bool, dataset: str, caplog: Any
) -> None:
    """A score of one column is not to be beaten by one of the other."""
    _, trainer, valid, _ = prepared(model, dataset, valid_metric="NDCG@5 (unseen)", train_batch_size=8)
    _, trainer.best_valid_result = trainer._valid_epoch(valid)
    trainer.best_valid_score, trainer.cur_step = trainer.best_valid_result["ndcg@5 (unseen)"], 2
    trainer._save_checkpoint(0, verbose=False)
    topk = [3] if metric == "Hit@3" else [2, K]
    _, other, _, _ = prepared(model, dataset, valid_metric=metric, topk=topk)
    other.resume_checkpoint(trainer.saved_model_file)
    wanted = trainer.best_valid_result[other.valid_metric] if known else -np.inf
    assert other.best_valid_score == wanted != trainer.best_valid_score
    assert other.cur_step == 0
    assert "valid_metric" in caplog.text

    _, same, _, _ = prepared(model, dataset, valid_metric="ndcg@5(unseen)")
    same.resume_checkpoint(trainer.saved_model_file)
    assert (same.best_valid_score, same.cur_step) == (trainer.best_valid_score, 2)


def test_a_general_models_score_from_before_two_columns_is_that_of_the_second(dataset: str, caplog: Any) -> None:
    _, trainer, _, _ = prepared("BPR", dataset, valid_metric="NDCG@5")
    trainer._valid_result, trainer.best_valid_score, trainer.cur_step = {"ndcg@5": 0.25}, 0.25, 2
    trainer._save_checkpoint(0, verbose=False)
    _, other, _, _ = prepared("BPR", dataset, valid_metric="NDCG@5")
    other.resume_checkpoint(trainer.saved_model_file)
    assert (other.best_valid_score, other.cur_step) == (0.25, 2)
    assert "valid_metric" not in caplog.text
