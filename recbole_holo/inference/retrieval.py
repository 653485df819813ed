"""The best items of a catalogue for hidden states: exactly, or through an index of faiss for large catalogues."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from recbole_holo.errors import ConfigError, MissingExtra

SCORES = 2**24  # that exist at a time


def top_items(
    model: Any, hidden: Tensor, k: int, excluded: Sequence[np.ndarray], index: FaissIndex | None = None
) -> list[tuple[list[int], list[float]]]:
    """The k best items for each hidden state ``[B, d]``, without the pad and those ``excluded`` of it: items, scores.

    Exact without ``index``: all scores, and a selection of k of them that sorts no more than these.
    """
    if index is not None:
        return index.top(model, hidden, k, excluded)
    found = []
    rows = max(SCORES // model.n_items, 1)
    for start in range(0, len(hidden), rows):
        scores = model.score_all(hidden[start : start + rows])
        _exclude(scores, excluded[start : start + rows])
        best = scores.topk(min(k, scores.shape[1] - 1))
        found += [_kept(*pair) for pair in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
    return found


def _exclude(scores: Tensor, excluded: Sequence[np.ndarray]) -> None:
    """-inf for the pad and what is excluded, in place."""
    scores[:, 0] = -torch.inf
    if scores.device.type == "cpu" and scores.dtype == torch.float32:  # numpy's indexing starts ten times as fast
        for row, gone in zip(scores.numpy(), excluded, strict=True):
            row[gone] = -np.inf
        return
    for number, gone in enumerate(excluded):
        if len(gone):
            scores[number, torch.from_numpy(gone.astype(np.int64)).to(scores.device)] = -torch.inf


def best_of(model: Any, hidden: Tensor, k: int, items: Tensor) -> tuple[list[int], list[float]]:
    """The k best of ``items [C]`` for one hidden state ``[d]``."""
    scores = model.score_pairs(hidden.expand(len(items), -1), items)
    best = scores.topk(min(k, len(items)))
    return items[best.indices].tolist(), best.values.tolist()


def _kept(items: list[int], scores: list[float]) -> tuple[list[int], list[float]]:
    """Without what was excluded."""
    count = sum(score > -torch.inf for score in scores)
    return items[:count], scores[:count]


class FaissIndex:
    """Approximate neighbours of all items' vectors (``pip install 'recbole-holo[faiss]'``).

    Args:
        kind: as ``faiss.index_factory`` names it; ``HNSW32`` and ``IVF1024,Flat`` are good ones, the second trains.
        effort: how much of the index a search visits: HNSW's ``efSearch``, IVF's ``nprobe``; None = faiss's own.

    Raises:
        MissingExtra: faiss is not installed.
        ConfigError: faiss knows no such index.
    """

    def __init__(self, model: Any, kind: str = "HNSW32", effort: int | None = None) -> None:
        try:
            import faiss
        except ImportError as error:
            raise MissingExtra("an index needs faiss: pip install 'recbole-holo[faiss]'") from error
        with torch.no_grad():
            table = model.scored_table()[1:].detach()
            if model.item_bias is not None:  # as one dimension more, where every query has a 1
                table = torch.cat([table, model.item_bias[1:, None]], 1)
        vectors = table.float().cpu().numpy()
        try:
            self._index = faiss.index_factory(vectors.shape[1], kind, faiss.METRIC_INNER_PRODUCT)
        except RuntimeError as error:
            raise ConfigError("index", kind, "faiss.index_factory knows no such index: try HNSW32") from error
        if not self._index.is_trained:
            self._index.train(vectors)
        self._index.add(vectors)
        if effort is not None:
            name = "efSearch" if "HNSW" in kind else "nprobe"
            faiss.ParameterSpace().set_index_parameter(self._index, name, effort)

    def top(
        self, model: Any, hidden: Tensor, k: int, excluded: Sequence[np.ndarray]
    ) -> list[tuple[list[int], list[float]]]:
        query = (F.normalize(hidden, dim=-1) if model.cosine else hidden).float().cpu()
        if model.item_bias is not None:
            query = torch.cat([query, torch.ones(len(query), 1)], 1)
        wanted = min(k + max(map(len, excluded), default=0), model.n_items - 1)
        scores, items = self._index.search(query.numpy(), wanted)
        found = []
        for row_scores, row_items, gone in zip(scores, items + 1, excluded, strict=True):
            keep = (row_items > 0) & ~np.isin(row_items, gone)
            found.append((row_items[keep][:k].tolist(), row_scores[keep][:k].tolist()))
        return found
