"""Evaluation: every ranking read twice from one pass, with the items kept that its user has seen and without them; and
RecBole's collector and evaluator at the speed of arrays: the same numbers without a dense matrix or a loop by user.

**Two columns.** ``ndcg@10`` is of the ranking of all items, whatever the model: RecBole masks what a user has seen for
its general models and not for its sequential ones. ``ndcg@10 (unseen)`` is of the same ranking without the items of the
user's known history (:mod:`recbole_holo.data.seen`), or without its last events (``exclude_last``); a target that was
seen itself is missed there. Ties are broken in it as ``torch.topk`` breaks them in the scores that are left.

What a metric reads (RecBole's ``DataStruct``) and its value are RecBole's own, ties included, but that the pad is no
item: RecBole's item coverage and Gini index count it in the catalogue, and where less than k is left to recommend it is
no recommendation. RecBole's collector writes an integer matrix users × items for every batch to learn which of the top
k are positives, and sorts the catalogue for GAUC; several of its metrics loop over users in Python.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from recbole.data.interaction import Interaction
from recbole.evaluator import metrics
from recbole.evaluator.collector import Collector, DataStruct
from recbole.evaluator.evaluator import Evaluator
from recbole.trainer import Trainer
from torch import Tensor

from recbole_holo.bridge.metric_names import UNSEEN, two_columns
from recbole_holo.data.seen import KnownItems, Repeats
from recbole_holo.training import distributed

COUNTED_AT_ONCE = 2**18  # scores, while counting those above a target on a CPU: they stay in the cache


class ArrayCollector(Collector):
    """RecBole's collector from the top k and the scores of the positives.

    Attributes:
        order: row numbers in the order in which the loader gives them; rows are put back in place at the end. None: as
            they come.
        sharded: the rows are one process's share; at the end those of all processes are put together.
        known: what the users of the rankings to come know; then everything is collected a second time, under its name
            with ``(unseen)``, without these items. None: one column.
    """

    order: np.ndarray | None = None
    sharded = False
    known: KnownItems | None = None

    def __init__(self, config) -> None:
        super().__init__(config)
        self._collected: dict[str, list[Tensor]] = {}
        self._n_rankings = 0  # so far

    def start(self, known: KnownItems | None) -> None:
        """An evaluation begins, whose rankings are of users who know ``known``."""
        self.known, self._n_rankings, self._collected = known, 0, {}

    def eval_batch_collect(
        self, scores_tensor: Tensor, interaction: Interaction, positive_u: Tensor, positive_i: Tensor
    ) -> None:
        """Collects a batch.

        Args:
            scores_tensor: ``[B, n_items]``, -inf for what cannot be recommended; ``[B]`` for metrics of single scores.
                With ``known`` it has -inf for known items, too, afterwards.
            interaction: the batch.
            positive_u, positive_i: row and item of every positive ``[P]``, in any order; not read for single scores.
        """
        need = self.register.need
        if need("rec.score"):
            self._collect("rec.score", scores_tensor.detach().clone())
        if need("data.label"):
            self._collect("data.label", interaction[self.config["LABEL_FIELD"]].to(self.device))
        if not (need("rec.items") or need("rec.topk") or need("rec.meanrank")):
            return
        positives = Positives.of(positive_u, positive_i, scores_tensor)
        found = self._ranking(scores_tensor, positives)
        for name, rows in found.items():
            self._collect(name, rows)
        if self.known is None:
            return
        row, item = self.known.pairs(self._n_rankings, len(scores_tensor))
        self._n_rankings += len(scores_tensor)
        if len(row):
            scores_tensor.index_put_((row, item), scores_tensor.new_tensor(-torch.inf))
            found = self._unseen_ranking(scores_tensor, positives)
        for name, rows in found.items():
            self._collect(name + UNSEEN, rows)

    def _ranking(self, scores: Tensor, positives: Positives) -> dict[str, Tensor]:
        """What metrics need of ``scores [B, n_items]``."""
        found, need = {}, self.register.need
        if need("rec.items") or need("rec.topk"):
            top = torch.topk(scores, max(self.topk), dim=-1).indices  # [B, k]
        if need("rec.items"):
            found["rec.items"] = top
        if need("rec.topk"):
            found["rec.topk"] = positives.with_counts(positives.among(top))
        if need("rec.meanrank"):
            found["rec.meanrank"] = positives.mean_ranks(scores)
        return found

    def _unseen_ranking(self, scores: Tensor, positives: Positives) -> dict[str, Tensor]:
        """The same where seen items have -inf: a positive among them is in no top k, and last of all ranks."""
        found, need, k = {}, self.register.need, max(self.topk)
        if need("rec.items") or (need("rec.topk") and not positives.can_be_counted):
            values, top = torch.topk(scores, k, dim=-1)
        if need("rec.items"):
            found["rec.items"] = top.masked_fill(values == -torch.inf, 0)  # nothing is left to recommend
        if need("rec.topk"):
            if positives.can_be_counted and not need("rec.items"):
                hits = torch.arange(k) == _places(scores, positives.items, k).unsqueeze(-1)
            else:
                hits = positives.among(top) & (values > -torch.inf)
            found["rec.topk"] = positives.with_counts(hits)
        if need("rec.meanrank"):
            own = scores[positives.rows, positives.items].clamp(min=torch.finfo(scores.dtype).min)
            found["rec.meanrank"] = positives.mean_ranks(scores.index_put_((positives.rows, positives.items), own))
        return found

    def get_data_struct(self) -> DataStruct:
        """What was collected since the last call, on the host, with what :meth:`data_collect` found.

        (RecBole's fails on the counts that coverage, popularity and diversity metrics need: they are no tensors.)
        """
        struct = DataStruct()
        for name, value in self.data_struct._data_dict.items():
            struct.set(name, value)
        for name, batches in self._collected.items():
            rows = torch.cat(batches).cpu()
            if self.order is not None:
                rows = torch.empty_like(rows).index_copy_(0, torch.from_numpy(self.order), rows)
            struct.set(name, distributed.gather_rows(rows) if self.sharded else rows)
        self._collected = {}
        return struct

    def _collect(self, name: str, rows: Tensor) -> None:
        self._collected.setdefault(name, []).append(rows)


class Positives(NamedTuple):
    """The items to be found in ``B`` rankings, each once, ascending."""

    rows: Tensor  # [P]
    items: Tensor  # [P]
    counts: Tensor  # [B]
    width: int  # items in a ranking
    one_each: bool  # row i has items[i] and no other

    @classmethod
    def of(cls, positive_u: Tensor, positive_i: Tensor, scores: Tensor) -> Positives:
        """From rows and items in any order, some perhaps twice, of ``scores [B, n_items]``."""
        size, width = scores.shape
        if positive_u.device.type == "cpu" and torch.equal(positive_u, torch.arange(size)):
            rows = torch.arange(size, device=scores.device)
            return cls(rows, positive_i.to(scores.device), torch.ones_like(rows), width, True)
        keys = torch.unique(positive_u.to(scores.device) * width + positive_i.to(scores.device))
        rows, items = keys // width, keys % width
        return cls(rows, items, torch.bincount(rows, minlength=size), width, False)

    @property
    def can_be_counted(self) -> bool:
        """Whether the scores above a target say all: elsewhere it is the second top k that is quicker, or that needs
        no waiting for the device."""
        return self.one_each and self.rows.device.type == "cpu"

    def among(self, top: Tensor) -> Tensor:
        """Which of ``top [B, k]`` are positives."""
        if self.one_each:
            return top == self.items.unsqueeze(-1)
        asked = torch.arange(len(top), device=top.device).unsqueeze(-1) * self.width + top
        keys = self.rows * self.width + self.items
        found = torch.searchsorted(keys, asked).clamp_(max=len(keys) - 1)
        return keys[found] == asked

    def with_counts(self, hits: Tensor) -> Tensor:
        """``rec.topk``: hits and number of positives ``[B, k + 1]``."""
        return torch.cat([hits.long(), self.counts.unsqueeze(-1)], dim=1)

    def mean_ranks(self, scores: Tensor) -> Tensor:
        """``rec.meanrank``: of ``scores [B, n_items]``, the sum of the positives' ranks, how many items are ranked, and
        how many are positives ``[B, 3]``."""
        ranks = _mean_ranks(scores, self.rows, self.items)
        total = scores.new_zeros(len(scores)).index_add_(0, self.rows, ranks)
        ranked = (scores > scores.amin(1, keepdim=True)).sum(1)
        return torch.stack([total, ranked.to(total), self.counts.to(total)], dim=1)


def _places(scores: Tensor, items: Tensor, k: int) -> Tensor:
    """Place from 0 of row i's ``items[i]`` in its top k of ``scores [B, n_items]``, k or more where it is not in it or
    has -inf: ``[B]``, on a CPU. It is the number of scores above, and where others equal it what the top k says."""
    own = scores.gather(1, items.unsqueeze(-1))
    size = max(COUNTED_AT_ONCE // scores.shape[1], 1)
    ones = scores.new_empty((size, scores.shape[1]), dtype=torch.float32)
    above = [
        torch.gt(part, mine, out=ones[: len(part)]).sum(1)
        for part, mine in zip(scores.split(size), own.split(size), strict=True)
    ]
    place = torch.cat(above).long()
    near = (place < k).nonzero().squeeze(-1)
    tied = near[(scores[near] == own[near]).sum(1) != 1]
    if len(tied):
        found = torch.topk(scores[tied], k, dim=-1).indices == items[tied].unsqueeze(-1)
        place[tied] = torch.where(found.any(1), found.long().argmax(1), k)
    return place.masked_fill_(own.squeeze(-1) == -torch.inf, k)


def _mean_ranks(scores: Tensor, rows: Tensor, items: Tensor) -> Tensor:
    """Rank from 1 of every positive in its row of ``scores [B, n_items]``, the mean of its ties': ``[P]``."""
    ranks = []
    for row, item in zip(rows.split(len(scores)), items.split(len(scores)), strict=True):  # memory as of the scores
        own = scores[row, item].unsqueeze(-1)
        above, tied = (scores[row] > own).sum(1), (scores[row] == own).sum(1)
        ranks.append(above + (tied + 1).to(scores.dtype) / 2)
    return torch.cat(ranks)


# ---------------------------------------------------------------------- metrics without a loop over users
class MRR(metrics.MRR):
    def metric_info(self, pos_index: np.ndarray) -> np.ndarray:
        first = pos_index.argmax(axis=1, keepdims=True)
        found = pos_index.any(axis=1, keepdims=True) & (np.arange(pos_index.shape[1]) >= first)
        return np.where(found, 1 / (first + 1), 0.0)


class MAP(metrics.MAP):
    def metric_info(self, pos_index: np.ndarray, pos_len: np.ndarray) -> np.ndarray:
        k = pos_index.shape[1]
        place = np.arange(1, k + 1)
        summed = np.cumsum(pos_index.cumsum(axis=1) / place * pos_index.astype(np.float64), axis=1)
        return summed / np.minimum(place, _at_most(pos_len, k)[:, None])


class NDCG(metrics.NDCG):
    def metric_info(self, pos_index: np.ndarray, pos_len: np.ndarray) -> np.ndarray:
        k = pos_index.shape[1]
        gain = 1.0 / np.log2(np.arange(1, k + 1) + 1.0)
        ideal = np.cumsum(gain)[np.minimum(np.arange(k), _at_most(pos_len, k)[:, None] - 1)]
        return np.cumsum(np.where(pos_index, gain, 0), axis=1) / ideal


def _at_most(pos_len: np.ndarray, k: int) -> np.ndarray:
    """Positives of each user, k at most; k for a user without any, who has no hits, as RecBole divides by something."""
    return np.where(pos_len == 0, k, np.minimum(pos_len, k))


class AveragePopularity(metrics.AveragePopularity):
    def get_pop(self, item_matrix: np.ndarray, item_count: dict[int, int]) -> np.ndarray:
        count = np.zeros(max(item_matrix.max(), max(item_count, default=0)) + 1, dtype=item_matrix.dtype)
        count[list(item_count)] = list(item_count.values())
        return count[item_matrix]


class TailPercentage(metrics.TailPercentage):
    def get_tail(self, item_matrix: np.ndarray, count_items: dict[int, int]) -> np.ndarray:
        if self.tail > 1:
            tail = [item for item, count in count_items.items() if count <= self.tail]
        else:
            rarest_first = sorted(count_items, key=lambda item: (count_items[item], item))
            tail = rarest_first[: max(int(len(count_items) * self.tail), 1)]
        return np.isin(item_matrix, tail).astype(item_matrix.dtype)


# ---------------------------------------------------------------------- metrics of what is recommended at all
class ItemCoverage(metrics.ItemCoverage):
    def get_coverage(self, item_matrix: np.ndarray, num_items: int) -> float:
        return int(np.count_nonzero(np.unique(item_matrix))) / (num_items - 1)  # RecBole's counts the pad


class GiniIndex(metrics.GiniIndex):
    def get_gini(self, item_matrix: np.ndarray, num_items: int) -> float:
        return super().get_gini(_recommended(item_matrix), num_items - 1)


class ShannonEntropy(metrics.ShannonEntropy):
    def get_entropy(self, item_matrix: np.ndarray) -> float:
        return super().get_entropy(_recommended(item_matrix))


def _recommended(item_matrix: np.ndarray) -> np.ndarray:
    """The items of rankings ``[B, k]`` without the pads of users for whom there are fewer than k: ``[n, 1]``."""
    return item_matrix[item_matrix > 0][:, None]


OURS: dict[str, Any] = {
    "mrr": MRR,
    "map": MAP,
    "ndcg": NDCG,
    "averagepopularity": AveragePopularity,
    "tailpercentage": TailPercentage,
    "itemcoverage": ItemCoverage,
    "giniindex": GiniIndex,
    "shannonentropy": ShannonEntropy,
}


class ArrayEvaluator(Evaluator):
    """RecBole's evaluator with :data:`OURS` in the place of the metrics that loop over users or count the pad as an
    item, and every metric a second time where rankings without seen items were collected.

    Attributes:
        ranks: of the last evaluation, each user's best rank of a positive, from 1; 0 = none within the largest of
            ``topk``. None where no metric reads the top k.
        ranks_unseen: the same where seen items are left out; None also where there is one column.
    """

    ranks: np.ndarray | None = None
    ranks_unseen: np.ndarray | None = None

    def __init__(self, config) -> None:
        super().__init__(config)
        self.metric_class.update({name: OURS[name](config) for name in self.metrics if name in OURS})

    def evaluate(self, dataobject: DataStruct) -> dict[str, float]:
        unseen = DataStruct()
        for name, value in dataobject._data_dict.items():
            if name.endswith(UNSEEN) or name + UNSEEN not in dataobject:
                unseen.set(name.removesuffix(UNSEEN), value)
        self.ranks = _best_ranks(dataobject)
        result = super().evaluate(dataobject)
        self.ranks_unseen = None
        if any(name.endswith(UNSEEN) for name in dataobject._data_dict):
            self.ranks_unseen = _best_ranks(unseen)
            result.update({name + UNSEEN: value for name, value in super().evaluate(unseen).items()})
        return result


def _best_ranks(struct: DataStruct) -> np.ndarray | None:
    if "rec.topk" not in struct:
        return None
    hits = struct.get("rec.topk")[:, :-1].numpy()
    return np.where(hits.any(1), hits.argmax(1) + 1, 0)


class TwoColumns(Trainer):
    """RecBole's trainer whose evaluations have the two columns, for this package's models and RecBole's.

    Attributes:
        columns: 2; 1 = without the second column.
        repeats: by split (``valid``, ``test``), of those that were evaluated; empty for data that were split elsewhere.
    """

    eval_collector: ArrayCollector
    evaluator: ArrayEvaluator
    columns = 2

    def __init__(self, config, model) -> None:
        super().__init__(config, model)
        self.eval_collector = ArrayCollector(config)
        self.evaluator = ArrayEvaluator(config)
        self.repeats: dict[str, Repeats] = {}
        if config.ranks_general and two_columns(config["metrics"]):
            self.logger.info(
                f"valid_metric: {config['valid_metric']}. Models that are none of sequences are selected without what "
                "users have seen, as RecBole does; a metric's plain name is of the ranking with it, as for all models."
            )

    @torch.no_grad()
    def evaluate(self, eval_data: Any, *args: Any, **kwargs: Any) -> dict[str, float] | None:
        if not eval_data:
            return None
        config, collector = self.config, self.eval_collector
        collector.sharded = getattr(eval_data, "is_sharded", False)
        collector.order = getattr(eval_data, "order", None)
        twice = self.columns == 2 and two_columns(config["metrics"])
        collector.start(KnownItems.of(eval_data, self.device, config["exclude_last"]) if twice else None)
        self.repeats |= getattr(eval_data, "repeats", {})
        return super().evaluate(eval_data, *args, **kwargs)

    def _full_sort_batch_eval(self, batched_data: Any) -> tuple[Interaction, Tensor, Tensor, Tensor]:
        interaction, _, positive_u, positive_i = batched_data  # what users know is left out by the collector
        return super()._full_sort_batch_eval((interaction, None, positive_u, positive_i))
