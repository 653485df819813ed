"""The collector and evaluator against RecBole's own, bit by bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from recbole.data.dataloader import FullSortEvalDataLoader
from recbole.evaluator import metric_types, metrics
from recbole.evaluator.collector import Collector, DataStruct
from recbole.evaluator.evaluator import Evaluator
from recbole.trainer import Trainer
from recbole.utils import EvaluatorType

from recbole_holo.bridge import registry
from recbole_holo.bridge.config import Config, overridden
from recbole_holo.bridge.metric_names import UNSEEN
from recbole_holo.data.batches import SequenceEvalLoader
from recbole_holo.data.loader import create_dataset, data_preparation
from recbole_holo.data.seen import KnownItems
from recbole_holo.training import evaluation
from recbole_holo.training.evaluation import ArrayCollector, ArrayEvaluator
from recbole_holo.training.trainer import HoloTrainer

RANKING = sorted(name for name, kind in metric_types.items() if kind is EvaluatorType.RANKING)
WITHOUT_COUNTS = ["Hit", "MRR", "MAP", "NDCG", "Recall", "Precision", "GAUC"]  # RecBole's trainer fails on the others
N_ITEMS = 60


@pytest.fixture
def config() -> Config:
    settings = {"metrics": RANKING, "topk": [1, 4, 9], "valid_metric": "NDCG@4", "metric_decimal_place": 15}
    return Config("RecMamba", "ml-100k", config_dict={**settings, "state": "ERROR", "tail_ratio": 0.3})


def batches(seed: int, n_values: int, sizes: tuple[int, ...] = (7, 1, 16)) -> list[tuple[torch.Tensor, ...]]:
    """Scores of few values (ties) with pads and known items at -inf, and one to five positives a row, some twice."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for rows in sizes:
        scores = torch.randint(0, n_values, (rows, N_ITEMS), generator=generator) / 4 - 2
        known = torch.rand(rows, N_ITEMS, generator=generator) < 0.1
        known[:, :8] = False
        scores[known] = -torch.inf
        scores[:, 0] = -torch.inf
        positive_u = torch.arange(rows).repeat_interleave(torch.randint(1, 6, (rows,), generator=generator))
        positive_i = torch.randint(1, 8, positive_u.shape, generator=generator)
        found.append((scores, positive_u, positive_i))
    return found


def with_counts(struct: DataStruct) -> DataStruct:
    struct.set("data.num_items", N_ITEMS)
    struct.set("data.count_items", {np.int64(item): int(item * 7 % 11) + 1 for item in range(1, N_ITEMS, 2)})
    return struct


@pytest.mark.parametrize("n_values", [2, 12, 10_000], ids=["mostly ties", "ties", "no ties"])
@pytest.mark.parametrize("seed", range(3))
def test_every_ranking_metric_equals_recboles(seed: int, n_values: int, config: Config) -> None:
    theirs, ours = Collector(config), ArrayCollector(config)
    for scores, positive_u, positive_i in batches(seed, n_values):
        theirs.eval_batch_collect(scores.clone(), None, positive_u, positive_i)
        shuffled = torch.randperm(len(positive_u))
        ours.eval_batch_collect(scores.clone(), None, positive_u[shuffled], positive_i[shuffled])
    expected, found = with_counts(theirs.data_struct), with_counts(ours.get_data_struct())
    expected.set("data.num_items", N_ITEMS - 1)  # RecBole's metrics would count the pad
    for name in ("rec.items", "rec.topk", "rec.meanrank"):
        assert found[name].dtype == expected[name].dtype, name
        assert torch.equal(found[name], expected[name]), name
    assert ArrayEvaluator(config).evaluate(found) == Evaluator(config).evaluate(expected)
    assert "rec.topk" not in ours.get_data_struct()  # an evaluation does not see the rows of the one before


@pytest.mark.parametrize("tail_ratio", [0.01, 0.4, 5])
def test_tails_equal_recboles(tail_ratio: float, config: Config) -> None:
    with overridden(config, tail_ratio=tail_ratio):
        ours, theirs = evaluation.TailPercentage(config), metrics.TailPercentage(config)
    struct = with_counts(DataStruct())
    struct.set("rec.items", torch.randint(1, N_ITEMS, (40, 9), generator=torch.Generator().manual_seed(0)))
    assert ours.calculate_metric(struct) == theirs.calculate_metric(struct)


def test_the_pad_is_no_item_of_the_catalogue(config: Config) -> None:
    # RecBole's coverage ends below 1 and its Gini index above 0 where all items are recommended alike.
    struct = with_counts(DataStruct())
    everything = torch.arange(1, N_ITEMS).reshape(-1, 1)
    struct.set("rec.items", everything.repeat(3, 9))
    for metric, best in ((evaluation.ItemCoverage, 1), (evaluation.GiniIndex, 0)):
        assert set(metric(config).calculate_metric(struct).values()) == {best}
    struct.set("rec.items", everything[:10].repeat(3, 9))
    coverage, gini = (
        metric(config).calculate_metric(struct) for metric in (evaluation.ItemCoverage, evaluation.GiniIndex)
    )
    assert list(coverage.values()) == pytest.approx([10 / 59] * 3)
    assert list(gini.values()) == pytest.approx([49 / 59] * 3)


def test_where_less_is_left_than_k_nothing_counts_as_recommended(config: Config) -> None:
    # Two users have seen all but two items: the places behind these would be filled with what they have seen.
    collector = ArrayCollector(config)
    seen = torch.arange(3, N_ITEMS).repeat(2)
    ends = torch.tensor([len(seen) // 2, len(seen)])
    length = ends - torch.tensor([0, len(seen) // 2])
    collector.start(KnownItems(seen, ends - length, length, np.r_[0, ends.numpy()]))
    scores = torch.rand(2, N_ITEMS, generator=torch.Generator().manual_seed(0))
    scores[:, 0] = -torch.inf
    collector.eval_batch_collect(scores, None, torch.arange(2), torch.tensor([1, 2]))
    result = ArrayEvaluator(config).evaluate(with_counts(collector.get_data_struct()))
    assert result["itemcoverage@9" + UNSEEN] == pytest.approx(2 / 59)
    assert result["giniindex@9" + UNSEEN] == pytest.approx(57 / 59)  # two of 59 alike, the others never
    assert result["shannonentropy@9" + UNSEEN] == pytest.approx(np.log(2) / 2)  # RecBole's is divided by the items
    assert result["itemcoverage@9"] > 2 / 59


@pytest.mark.parametrize("eval_args", [{"LS": "valid_and_test"}, {"RS": [0.5, 0.2, 0.3]}])
def test_items_are_as_popular_in_whole_sequences_as_in_prefixes(
    eval_args: dict, cyclic_dataset: str, tiny: dict
) -> None:
    # Popularity and tails are of the training targets; a window's row names the item after its end only.
    counted = []
    for train_on in ("sequences", "prefixes"):
        split = {"split": eval_args, "order": "TO", "group_by": "user", "mode": "full"}
        config = Config("RecMamba", cyclic_dataset, config_dict={**tiny, "train_on": train_on, "eval_args": split})
        train, _, _ = data_preparation(config, create_dataset(config))
        collector = ArrayCollector(Config("RecMamba", cyclic_dataset, config_dict={**tiny, "metrics": RANKING}))
        collector.data_collect(train)
        counted.append((collector.data_struct["data.count_items"], train.dataset.user_counter))
    assert counted[0] == counted[1]
    assert sum(counted[0][0].values()) > 40


def test_users_without_a_positive_count_as_recbole_counts_them(config: Config) -> None:
    rng = np.random.default_rng(0)
    positives = rng.integers(0, 14, size=50)
    hits = (rng.random((50, 9)) < 0.2) & (positives > 0)[:, None]
    for ours, theirs in ((evaluation.MAP, metrics.MAP), (evaluation.NDCG, metrics.NDCG)):
        expected = theirs(config).metric_info(hits, positives)
        assert np.array_equal(ours(config).metric_info(hits, positives), expected)


def test_rows_are_put_back_in_place(config: Config) -> None:
    scores, positive_u, positive_i = batches(0, 12, sizes=(9,))[0]
    as_they_come, sorted_rows = ArrayCollector(config), ArrayCollector(config)
    as_they_come.eval_batch_collect(scores, None, positive_u, positive_i)
    sorted_rows.order = np.array([4, 2, 8, 0, 1, 3, 7, 6, 5])
    for rows in (sorted_rows.order[:5], sorted_rows.order[5:]):
        place = {int(row): at for at, row in enumerate(rows)}
        mine = torch.tensor([int(u) in place for u in positive_u])
        moved = torch.tensor([place[int(u)] for u in positive_u[mine]])
        sorted_rows.eval_batch_collect(scores[rows], None, moved, positive_i[mine])
    expected, found = as_they_come.get_data_struct(), sorted_rows.get_data_struct()
    for name in ("rec.items", "rec.topk", "rec.meanrank"):
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("max_elements", [None, 40_000])
def test_evaluation_of_a_model_equals_recbole_trainers(max_elements: int | None, sorted_ml100k: str) -> None:
    settings: dict[str, Any] = {
        "metrics": WITHOUT_COUNTS,
        "topk": [5, 10],
        "hidden_size": 16,
        "MAX_ITEM_LIST_LENGTH": 30,
        "eval_batch_size": 100,
        "eval_max_elements": max_elements,
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        "state": "ERROR",
    }
    config = Config("RecMamba", sorted_ml100k, config_dict=settings)
    train, _, test = data_preparation(config, create_dataset(config))
    assert isinstance(test, SequenceEvalLoader)
    sizes = [len(batch[0]) for batch in test]
    assert sum(sizes) == len(test.dataset) == 943
    assert max(sizes) == (100 if max_elements is None else 40_000 // test.dataset.item_num)
    torch.manual_seed(0)
    model = registry.get_model_class("RecMamba")(config, train.dataset)
    ours = HoloTrainer(config, model).evaluate(test, load_best_model=False)
    theirs = Trainer(config, model).evaluate(FullSortEvalDataLoader(config, test.dataset, None), load_best_model=False)
    assert ours is not None
    assert theirs is not None
    assert ours.keys() == {name + kind for name in theirs for kind in ("", UNSEEN)}
    assert {name: ours[name] for name in theirs} == theirs
    assert ours["hit@10"] > 0
