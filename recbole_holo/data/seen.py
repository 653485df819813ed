"""What the rankings of an evaluation leave out, and how many of its targets their users knew already.

**Known history** of a target: all events of its user before it, also those beyond MAX_ITEM_LIST_LENGTH, and never one
that lies after it. Of RecBole's sequential models on data of :class:`PrefixDataset` the same is known; where a data set
is made of rows (benchmark files, the models with a data set class of RecBole's own), a history is what the row shows.
A user's several targets in one uniN or popN ranking, as RecBole ranks them, have that before the first of them.

RecBole's general models, which rank all of a user's targets at once, leave out what RecBole leaves out for them: the
items of the splits before, without the targets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from logging import getLogger
from typing import Any, NamedTuple

import numpy as np
import torch
from recbole.data.dataloader import FullSortEvalDataLoader
from recbole.data.dataset import SequentialDataset
from torch import Tensor

from recbole_holo.data.sequences import HISTORY_START, PrefixDataset

_logger = getLogger("recbole_holo")
MANY_REPEATS = 0.05  # part of the targets from which on a ranking without what was seen is the wrong one


@dataclass(frozen=True)
class KnownItems:
    """Ranking ``i`` of an evaluation, in the order in which its loader gives them, is of a user who knows
    ``items[start[i] : end[i]]``.

    Attributes:
        items: ``[n]``, on the device; an item may be there several times.
        start, length: ``[n_rankings]``, on the device.
        before: how many known items the rankings before have ``[n_rankings + 1]``; on the host, so that nothing waits.
    """

    items: Tensor
    start: Tensor
    length: Tensor
    before: np.ndarray

    @classmethod
    def of(cls, loader: Any, device: torch.device, exclude_last: int | None = None) -> KnownItems:
        """Of the rankings that ``loader``, of a validation or test split, gives.

        Args:
            exclude_last: only the last so many events of each history; None: all of them.
        """
        dataset, full = loader._dataset, isinstance(loader, FullSortEvalDataLoader)
        if isinstance(dataset, SequentialDataset):
            items, start, end = row_histories(dataset)
            order = getattr(loader, "order", None)
            if order is not None:
                start, end = start[order], end[order]
            if not full:
                users = dataset.inter_feat[dataset.uid_field].numpy()  # sorted, as RecBole's loader has done
                firsts = np.flatnonzero(np.r_[True, users[1:] != users[:-1]])
                start, end = np.minimum.reduceat(start, firsts), np.minimum.reduceat(end, firsts)
        elif full:
            histories = loader.uid2history_item[loader.uid_list.numpy()]
            items = torch.cat(list(histories))
            end = np.cumsum([len(history) for history in histories])
            start = np.r_[0, end[:-1]]
        else:  # RecBole draws what a general model ranks among what the user has not seen
            items, start = torch.zeros(0, dtype=torch.long), np.zeros(len(loader.uid_list), dtype=np.int64)
            end = start
        if exclude_last is not None:
            start = np.maximum(start, end - exclude_last)
        before = np.r_[0, np.cumsum(end - start)]
        return cls(
            items.to(device), torch.from_numpy(start).to(device), torch.from_numpy(end - start).to(device), before
        )

    def pairs(self, first: int, count: int) -> tuple[Tensor, Tensor]:
        """Known items of ``count`` rankings from ``first`` on: the ranking, from 0, and the item ``[n_pairs]`` each."""
        rankings = slice(first, first + count)
        length, n_pairs = self.length[rankings], int(self.before[first + count] - self.before[first])
        device = self.items.device
        row = torch.arange(count, device=device).repeat_interleave(length, output_size=n_pairs)
        skipped = self.start[rankings] - (length.cumsum(0) - length)
        return row, self.items[torch.arange(n_pairs, device=device) + skipped[row]]


def row_histories(dataset: SequentialDataset) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """Of every row of a sequential split: items, start, end; the row's user knows ``items[start : end]``."""
    rows = dataset.inter_feat
    length = rows[dataset.item_list_length_field].numpy()
    if isinstance(dataset, PrefixDataset) and dataset.is_augmented:
        events, begin = dataset.events, rows[HISTORY_START]
        return events.items, events.first[begin].numpy(), begin.numpy() + length
    shown = _shown(dataset)
    start = np.arange(len(rows)) * shown.shape[1]
    return shown.flatten(), start, start + length


def _shown(dataset: SequentialDataset) -> Tensor:
    """The items that rows show, pads on the right: ``[n_rows, L]``."""
    return dataset.inter_feat[getattr(dataset, f"{dataset.iid_field}_list_field")]


class Repeats(NamedTuple):
    """How many of a split's targets were in their user's known history already."""

    repeats: int
    targets: int

    @property
    def share(self) -> float:
        return self.repeats / max(self.targets, 1)

    def advice(self) -> str:
        """Which column to read."""
        if self.share > MANY_REPEATS:
            return "what users have seen is part of the answer here: read and select by the metrics that keep it"
        return "a service would not show again what users have seen: read and select by the (unseen) metrics"

    def sentence(self, split: str) -> str:
        return (
            f"{split}: {self.repeats:,} of {self.targets:,} targets ({self.share:.1%}) were in their user's history "
            "already"
        )


def repeats_of(splits: Mapping[str, Any]) -> dict[str, Repeats]:
    """Of the validation and the test split, from the data sets of ``train``, ``valid`` and ``test``; logged.

    A general model's target is a user's item, however often it is in the split; its history the splits before.
    """
    found: dict[str, Repeats] = {}
    earlier: list[Any] = []
    for split, dataset in splits.items():
        if split != "train" and len(dataset):
            sequential = isinstance(dataset, SequentialDataset)
            found[split] = _sequential_repeats(dataset) if sequential else _general_repeats(dataset, earlier)
            _logger.info(f"{found[split].sentence(split)}: {found[split].advice()}.")
        earlier.append(dataset)
    return found


def _sequential_repeats(dataset: SequentialDataset) -> Repeats:
    rows = dataset.inter_feat
    target, length = rows[dataset.iid_field], rows[dataset.item_list_length_field]
    if isinstance(dataset, PrefixDataset) and dataset.is_augmented:
        begin = rows[HISTORY_START]
        seen = dataset.events.first_time(dataset.events.first[begin], target) < begin + length
    else:  # zeros, the pads, are no target
        seen = (_shown(dataset) == target.unsqueeze(-1)).any(-1)
    return Repeats(int(seen.sum()), len(target))


def _general_repeats(dataset: Any, earlier: list[Any]) -> Repeats:
    def pairs(split: Any) -> np.ndarray:
        users, items = (split.inter_feat[field].numpy() for field in (dataset.uid_field, dataset.iid_field))
        return np.unique(users * dataset.item_num + items)

    targets = pairs(dataset)
    known = np.concatenate([pairs(split) for split in earlier])
    return Repeats(int(np.isin(targets, known).sum()), len(targets))
