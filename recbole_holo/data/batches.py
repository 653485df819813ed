"""Batches of whole sequences: planned on the host once an epoch, gathered where the model is.

The items of all events lie on ``device`` once, with where every row's history starts and how long it is. A batch is a
list of row numbers, its padded length and its number of targets, and none of these has to be asked of the device: an
epoch on a GPU waits for the GPU at its end only.

**Lengths.** Rows are shuffled, every 16 batches' worth of them are sorted by length and cut into batches, and the
batches are shuffled again: a batch holds rows of nearly one length, and pads are few, while an epoch mixes as before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from copy import copy
from typing import Any, NamedTuple

import numpy as np
import torch
from recbole.data.dataloader import FullSortEvalDataLoader, NegSampleEvalDataLoader, TrainDataLoader
from recbole.data.interaction import Interaction
from torch import Tensor

from recbole_holo.data import TARGETS_SUFFIX
from recbole_holo.data.histories import EventBatch, Events, Histories
from recbole_holo.data.sequences import HISTORY_START, SequenceDataset
from recbole_holo.errors import ConfigError
from recbole_holo.training import distributed

BATCHES_PER_GROUP = 16  # batches whose rows are sorted by length together; more save few pads and mix less
CACHED_POSITIONS = 2**14  # of an evaluation batch on a CPU


class SequenceBatch(EventBatch):
    """A training batch with what its loader knows of it without asking the device.

    Attributes:
        histories: where its rows lie among all events.
        n_targets: training targets in this process's rows.
        loss_weight: what the mean loss over them must be multiplied by; see :class:`SequenceTrainLoader`.
    """

    def __init__(
        self, interaction: dict[str, Tensor], histories: Histories, n_targets: int, loss_weight: float
    ) -> None:
        super().__init__(interaction, histories)
        self.n_targets, self.loss_weight = n_targets, loss_weight

    def to(self, device: torch.device, selected_field: Any = None) -> SequenceBatch:
        moved = super().to(device, selected_field)
        return SequenceBatch(moved.interaction, moved.histories, self.n_targets, self.loss_weight)


class Plan(NamedTuple):
    """Batches of row numbers, in the order in which they are given."""

    rows: np.ndarray  # [n_rows]
    bounds: np.ndarray  # [n_batches, 2]: batch i is rows[bounds[i, 0] : bounds[i, 1]]


def plan_batches(
    lengths: np.ndarray, fits: Callable[[int], int], group: int, generator: torch.Generator | None = None
) -> Plan:
    """Batches of rows of nearly one length.

    Args:
        lengths: of the rows ``[n_rows]``.
        fits: how many rows a batch holds whose longest is of that length; at least one is taken.
        group: rows that are sorted together.
        generator: shuffles the rows before and the batches after; None: neither.
    """
    n_rows = len(lengths)
    rows = np.arange(n_rows) if generator is None else torch.randperm(n_rows, generator=generator).numpy()
    rows = rows[np.lexsort((-lengths[rows], np.arange(n_rows) // group))]
    starts, at = [], 0
    while at < n_rows:
        starts.append(at)
        group_end = (at // group + 1) * group
        at = min(at + max(fits(int(lengths[rows[at]])), 1), group_end, n_rows)
    bounds = np.stack([starts, [*starts[1:], n_rows]], axis=1)
    if generator is not None:
        bounds = bounds[torch.randperm(len(bounds), generator=generator).numpy()]
    return Plan(rows, bounds)


class DeviceRows:
    """Rows of a split on a device: every event's item once, and a few numbers a row."""

    def __init__(self, dataset: SequenceDataset, device: torch.device) -> None:
        self.dataset = dataset
        self.columns = {name: values.to(device) for name, values in dataset.inter_feat.interaction.items()}
        self.events = dataset.events.to(device)
        self.following = None if dataset.following is None else dataset.following.to(device)
        self.gaps = None if dataset.gap_numbers is None else dataset.gap_numbers.to(device)

    def with_events(self, events: Events, following: Tensor) -> DeviceRows:
        """The same rows of other events."""
        other = copy(self)
        device = self.events.items.device
        other.events, other.following = events.to(device), following.to(device)
        return other

    def gather(self, numbers: Tensor, width: int) -> EventBatch:
        """The batch of the rows ``numbers [B]``, padded to ``width``."""
        rows = Interaction({name: values[numbers] for name, values in self.columns.items()})
        begin = rows[HISTORY_START]
        rows = self.dataset.with_histories(rows, width, self.events.items, self.following, self.gaps)
        return EventBatch(rows.interaction, Histories(self.events, begin))


class SequenceTrainLoader(TrainDataLoader):
    """Batches of windows, see the head of this module, as :class:`SequenceBatch`.

    Settings: ``train_batch_size`` (windows a batch) or ``train_batch_tokens`` (positions a batch, pads included: long
    windows then come a few at a time and short ones many), ``shuffle``, ``pad_to``, ``shuffle_ties`` (items of equal
    times in a new order in every epoch, see :meth:`~recbole_holo.data.sequences.SequenceDataset.with_ties_shuffled`).
    What is drawn comes from ``generator`` at the start of an epoch, two draws for the plan, then one for the ties, so
    its state is all that resuming needs.

    **Weights.** Rows of one length come together, so the number of targets varies from batch to batch; were each
    batch's mean loss to count alike, a target of a user with a short history would count many times as much as one of a
    long history. A batch's loss is therefore multiplied by its number of targets over the epoch's mean of it: the mean
    over the batches is that over all targets of the epoch.

    **Several processes** plan alike, and of every batch each takes every ``world_size``-th row. The mean over processes
    of their weighted losses is the loss of the batch. A process without a row in a short batch gets one with no target.

    Attributes:
        round_width_to: padded lengths are rounded up to a multiple of this (never beyond MAX_ITEM_LIST_LENGTH).
    """

    def __init__(self, config, dataset: SequenceDataset, sampler, shuffle: bool = False) -> None:
        if config["train_neg_sample_args"]["distribution"] != "none":
            raise ConfigError(
                "train_neg_sample_args",
                config["train_neg_sample_args"],
                "a batch of whole sequences has no negatives: use ~ (the model draws what its loss needs), "
                "or train_on: prefixes",
            )
        super().__init__(config, dataset, sampler, shuffle=shuffle)
        self.round_width_to = 1
        self._lengths = dataset.inter_feat[dataset.item_list_length_field].numpy()
        self._targets = dataset.targets_per_row()
        self._on_device: DeviceRows | None = None
        self._plan: Plan | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_on_device": None, "_plan": None}

    def __len__(self) -> int:
        """Batches of the epoch that was started last (with ``train_batch_tokens`` epochs differ a little)."""
        if self._plan is None:
            return len(self._draw(torch.Generator().manual_seed(0)).bounds)
        return len(self._plan.bounds)

    def __iter__(self) -> Iterator[SequenceBatch]:
        self._plan = self._draw(self.generator if self.shuffle else None)
        shuffled = self._dataset.with_ties_shuffled(self.generator) if self.config["shuffle_ties"] else None
        return self._batches(self._plan, shuffled)

    def _draw(self, generator: torch.Generator | None) -> Plan:
        tokens = self.config["train_batch_tokens"]
        if tokens is None:
            return plan_batches(self._lengths, lambda longest: self.step, BATCHES_PER_GROUP * self.step, generator)
        group = BATCHES_PER_GROUP * int(tokens / self._lengths.mean())
        return plan_batches(self._lengths, lambda longest: tokens // self._width(longest), group, generator)

    def _width(self, longest: int) -> int:
        most = self._dataset.max_item_list_len
        if self.config["pad_to"] == "max":
            return most
        return min(-(-longest // self.round_width_to) * self.round_width_to, most)

    def _batches(self, plan: Plan, shuffled: tuple[Events, Tensor] | None) -> Iterator[SequenceBatch]:
        if self._on_device is None:
            self._on_device = DeviceRows(self._dataset, self.config["device"])
        on_device = self._on_device if shuffled is None else self._on_device.with_events(*shuffled)
        numbers = torch.from_numpy(plan.rows).to(self.config["device"])
        rank, size = distributed.world()
        targets_per_batch = self._targets.sum() / len(plan.bounds)
        for first, end in plan.bounds.tolist():
            share = slice(min(first + rank, end - 1), end, size)
            rows = plan.rows[share]
            batch = on_device.gather(numbers[share], self._width(int(self._lengths[rows].max())))
            n_targets = int(self._targets[rows].sum())
            if first + rank >= end:
                targets = self._dataset.iid_field + TARGETS_SUFFIX
                batch[targets], n_targets = torch.zeros_like(batch[targets]), 0
            fields = self.transform(self._dataset, batch).interaction
            yield SequenceBatch(fields, batch.histories, n_targets, n_targets * size / targets_per_batch)


class SequenceEvalLoader(FullSortEvalDataLoader):
    """Full ranking: RecBole's batches with the histories sorted by length, and sized by memory.

    A batch has at most ``eval_batch_size`` histories, and as few as keep both rows × items (the scores) and rows ×
    padded length × ``hidden_size`` (one layer's hidden states) within ``eval_max_elements``; on a CPU, also rows ×
    padded length within 2¹⁴, for the hidden states to stay in the cache.

    Attributes:
        order: row numbers in the order in which they are given ``[n_rows]``.
    """

    def __init__(self, config, dataset: SequenceDataset, sampler, shuffle: bool = False) -> None:
        super().__init__(config, dataset, sampler, shuffle=shuffle)
        self._lengths = dataset.inter_feat[dataset.item_list_length_field].numpy()
        self._on_device: DeviceRows | None = None
        self.order, self._bounds = plan_batches(self._lengths, self._fits, len(self._lengths))

    def _fits(self, longest: int) -> int:
        most = self.config["eval_max_elements"]
        if not most:
            return self.step
        width = self._width(longest)
        rows = min(self.step, most // max(self._dataset.item_num, width * (self.config["hidden_size"] or 1)))
        return min(rows, CACHED_POSITIONS // width) if self.config["device"].type == "cpu" else rows

    def _width(self, longest: int) -> int:
        return self._dataset.max_item_list_len if self.config["pad_to"] == "max" else max(longest, 1)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_on_device": None}

    def __len__(self) -> int:
        return len(self._bounds)

    def __iter__(self) -> Iterator[tuple[Interaction, None, Tensor, Tensor]]:
        if self._on_device is None:
            self._on_device = DeviceRows(self._dataset, self.config["device"])
        numbers = torch.from_numpy(self.order).to(self.config["device"])
        for first, end in self._bounds.tolist():
            histories = self._on_device.gather(numbers[first:end], self._width(int(self._lengths[self.order[first]])))
            histories = EventBatch(self.transform(self._dataset, histories).interaction, histories.histories)
            yield histories, None, torch.arange(end - first), histories[self.iid_field]


class CandidateEvalLoader(NegSampleEvalDataLoader):
    """uniN/popN evaluation that holds each history once.

    RecBole repeats a history for the target and each of its N negatives, and encodes it N + 1 times. Here a batch is
    ``(histories, (user, row, item), positive_u, positive_i)``: candidate ``item[j]`` belongs to history ``row[j]`` of
    the batch's user number ``user[j]``. Order and draws are RecBole's; its sampler draws for one user at a time.
    """

    def collate_fn(self, index: Any) -> tuple[Interaction, tuple[Tensor, Tensor, Tensor], Tensor, Tensor]:
        slices = self.uid2index[self.uid_list[np.array(index)]]
        numbers = np.concatenate([np.arange(rows.start, rows.stop) for rows in slices])
        histories = self.transform(self._dataset, self._dataset[numbers])
        users, items = (self._dataset.inter_feat[field] for field in (self.uid_field, self.iid_field))
        candidates = []
        for rows in slices:  # a user's targets, then as many negatives, N times
            drawn = self._sampler.sample_by_user_ids(users[rows].numpy(), items[rows].numpy(), self.neg_sample_num)
            candidates += [items[rows], drawn]

        targets = torch.tensor([rows.stop - rows.start for rows in slices])  # of each user
        total = targets * self.times
        user = torch.arange(len(slices)).repeat_interleave(total)
        within = torch.arange(len(user)) - (total.cumsum(0) - total)[user]
        row = (targets.cumsum(0) - targets)[user] + within % targets[user]
        positive_u = torch.arange(len(slices)).repeat_interleave(targets)
        return histories, (user, row, torch.cat(candidates)), positive_u, histories[self.iid_field]
