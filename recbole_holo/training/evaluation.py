"""RecBole's collector and evaluator at the speed of arrays: the same numbers without a dense matrix or a loop by user.

What a metric reads (RecBole's ``DataStruct``) and its value are RecBole's own, ties included. RecBole's collector
writes an integer matrix users × items for every batch to learn which of the top k are positives, and sorts the
catalogue for GAUC; several of its metrics loop over users in Python.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from recbole.data.interaction import Interaction
from recbole.evaluator import metrics
from recbole.evaluator.collector import Collector, DataStruct
from recbole.evaluator.evaluator import Evaluator
from torch import Tensor

from recbole_holo.training import distributed


class ArrayCollector(Collector):
    """RecBole's collector from the top k and the scores of the positives.

    Attributes:
        order: row numbers in the order in which the loader gives them; rows are put back in place at the end. None: as
            they come.
        sharded: the rows are one process's share; at the end those of all processes are put together.
    """

    order: np.ndarray | None = None
    sharded = False

    def __init__(self, config) -> None:
        super().__init__(config)
        self._collected: dict[str, list[Tensor]] = {}

    def eval_batch_collect(
        self, scores_tensor: Tensor, interaction: Interaction, positive_u: Tensor, positive_i: Tensor
    ) -> None:
        """Collects a batch.

        Args:
            scores_tensor: ``[B, n_items]``, -inf for what cannot be recommended; ``[B]`` for metrics of single scores.
            interaction: the batch.
            positive_u, positive_i: row and item of every positive ``[P]``, in any order; not read for single scores.
        """
        need = self.register.need
        if need("rec.items") or need("rec.topk") or need("rec.meanrank"):
            rows, items, counts = _distinct(positive_u, positive_i, scores_tensor)
        if need("rec.items") or need("rec.topk"):
            top = torch.topk(scores_tensor, max(self.topk), dim=-1).indices  # [B, k]
        if need("rec.items"):
            self._collect("rec.items", top)
        if need("rec.topk"):
            hits = _contains(rows * scores_tensor.shape[1] + items, top, scores_tensor.shape[1])
            self._collect("rec.topk", torch.cat([hits.long(), counts.unsqueeze(-1)], dim=1))
        if need("rec.meanrank"):
            ranks = _mean_ranks(scores_tensor, rows, items)
            total = scores_tensor.new_zeros(len(scores_tensor)).index_add_(0, rows, ranks)
            ranked = (scores_tensor > scores_tensor.amin(1, keepdim=True)).sum(1)
            self._collect("rec.meanrank", torch.stack([total, ranked.to(total), counts.to(total)], dim=1))
        if need("rec.score"):
            self._collect("rec.score", scores_tensor.detach().clone())
        if need("data.label"):
            self._collect("data.label", interaction[self.config["LABEL_FIELD"]].to(self.device))

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


def _distinct(positive_u: Tensor, positive_i: Tensor, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows and items of the positives, each pair once, ascending: ``[P]`` each; and their number by row ``[B]``."""
    width = scores.shape[1]
    keys = torch.unique(positive_u.to(scores.device) * width + positive_i.to(scores.device))
    rows, items = keys // width, keys % width
    return rows, items, torch.bincount(rows, minlength=len(scores))


def _contains(keys: Tensor, top: Tensor, width: int) -> Tensor:
    """Which of ``top [B, k]`` are among the positives, given as ascending ``keys [P]`` = row · width + item."""
    asked = torch.arange(len(top), device=top.device).unsqueeze(-1) * width + top
    found = torch.searchsorted(keys, asked).clamp_(max=len(keys) - 1)
    return keys[found] == asked


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


FASTER: dict[str, Any] = {
    "mrr": MRR,
    "map": MAP,
    "ndcg": NDCG,
    "averagepopularity": AveragePopularity,
    "tailpercentage": TailPercentage,
}


class ArrayEvaluator(Evaluator):
    """RecBole's evaluator with :data:`FASTER` in the place of the metrics that loop over users.

    Attributes:
        ranks: of the last evaluation, each user's best rank of a positive, from 1; 0 = none within the largest of
            ``topk``. None where no metric reads the top k.
    """

    ranks: np.ndarray | None = None

    def __init__(self, config) -> None:
        super().__init__(config)
        self.metric_class.update({name: FASTER[name](config) for name in self.metrics if name in FASTER})

    def evaluate(self, dataobject: DataStruct) -> dict[str, float]:
        hits = dataobject.get("rec.topk")[:, :-1].numpy() if "rec.topk" in dataobject else None
        self.ranks = None if hits is None else np.where(hits.any(1), hits.argmax(1) + 1, 0)
        return super().evaluate(dataobject)
