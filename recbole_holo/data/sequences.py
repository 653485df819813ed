"""Sequences held once: every event a single time in memory, rows gathered for each batch."""

from __future__ import annotations

from collections import Counter
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
import torch
from recbole.data.dataset import SequentialDataset
from recbole.data.interaction import Interaction
from recbole.utils.enum_type import FeatureSource, FeatureType
from scipy.sparse import spmatrix
from torch import Tensor

from recbole_holo.data import GAPS, TARGETS_SUFFIX
from recbole_holo.data.attributes import ItemAttribute, item_attribute, shuffled
from recbole_holo.data.event_time import GapBuckets, Gaps, event_time
from recbole_holo.data.histories import EventBatch, Events, Histories
from recbole_holo.data.repairs import RepairedDataset
from recbole_holo.errors import ConfigError, DataError

HISTORY_START = "_history_start"  # row of a history's first event among all events
TARGETS_FROM = "_targets_from"  # row of the first event that is a target of a training window


class PrefixDataset(RepairedDataset, SequentialDataset):
    """RecBole's sequential data set, one row a prefix, in memory linear in the number of events.

    RecBole copies every prefix into a padded row: ML-1M at length 200 takes 1.5 GiB per field. Here a row is two
    numbers, where its history starts and how long it is, and the padded lists are gathered when a batch is asked for.
    Rows, splits, samplers and batches equal RecBole's, value for value.
    """

    _events: Interaction

    def data_augmentation(self) -> None:
        """One row for every event but a user's first: its target is that event, its history the (at most
        MAX_ITEM_LIST_LENGTH) events before it."""
        self._aug_presets()
        self._check_field("uid_field", "time_field")
        self.sort(by=[self.uid_field, self.time_field], ascending=True)
        users = self.inter_feat[self.uid_field].numpy()
        is_first = np.r_[True, users[1:] != users[:-1]]
        first_of_user = np.maximum.accumulate(np.where(is_first, np.arange(len(users)), 0))
        target = np.flatnonzero(~is_first)
        start = np.maximum(first_of_user[target], target - self.max_item_list_len)

        self._events = self.inter_feat
        self._list_fields = [field for field in self._events if field != self.uid_field]
        rows = {field: values[torch.from_numpy(target)] for field, values in self._events.interaction.items()}
        rows[self.item_list_length_field] = torch.from_numpy(target - start)
        rows[HISTORY_START] = torch.from_numpy(start)
        self.inter_feat = Interaction(rows)
        self.set_field_property(HISTORY_START, FeatureType.TOKEN, FeatureSource.INTERACTION, 1)
        self.events  # noqa: B018  once, for all splits and their data workers

    @cached_property
    def events(self) -> Events:
        """All events, in the order that rows refer to."""
        users = self._events[self.uid_field]
        is_first = torch.cat([torch.ones(1, dtype=torch.bool), users[1:] != users[:-1]])
        first = torch.where(is_first, torch.arange(len(users)), 0).cummax(0).values
        return Events(self._events[self.iid_field], first, self.item_num)

    @property
    def is_augmented(self) -> bool:
        """Whether rows are gathered from events; with benchmark files they are as the files give them."""
        return "_events" in self.__dict__

    def __getitem__(self, index: Any, join: bool = True) -> Interaction:
        if not self.is_augmented or isinstance(index, str):
            return super().__getitem__(index, join)
        rows = self._rows(index)
        events, valid = history_events(rows[HISTORY_START], rows[self.item_list_length_field], self.max_item_list_len)
        for field in self._list_fields:
            rows[getattr(self, f"{field}_list_field")] = padded(self._events[field], events, valid)
        del rows[HISTORY_START]
        return self.join(rows) if join else rows

    def _rows(self, index: Any) -> Interaction:
        if not isinstance(index, slice):
            index = torch.as_tensor(index)
        return Interaction({field: values[index] for field, values in self.inter_feat.interaction.items()})

    def inter_matrix(self, form: str = "coo", value_field: str | None = None) -> spmatrix:
        if not self.is_augmented:
            return super().inter_matrix(form, value_field)
        # The events that are no row's target: the first of each user, which precedes a history of length one.
        first = self.inter_feat[HISTORY_START][self.inter_feat[self.item_list_length_field] == 1]
        events = {
            field: torch.cat([self.inter_feat[field], values[first]])
            for field, values in self._events.interaction.items()
        }
        return self._create_sparse_matrix(Interaction(events), self.uid_field, self.iid_field, form, value_field)


class SequenceDataset(PrefixDataset):
    """Whole sequences for training: one row a user (or window), a target at every position.

    ``u: i1 i2 i3 i4`` with i4 held out becomes one training row::

        item_id_list    i1 i2 0 …
        item_id_target  i2 i3 0 …      0 = not a training target

    which holds the same (history, target) pairs as RecBole's rows ``i1 → i2`` and ``i1 i2 → i3``. Validation and test
    rows are RecBole's. The splits are RecBole's own, computed on its rows, so no validation or test item can be a
    training target.

    Users longer than MAX_ITEM_LIST_LENGTH (L): ``train_windows: all`` covers every training event as a target exactly
    once, in windows of L inputs that start ``window_stride`` apart (so that a target has at least L - stride events
    before it, where the user has them); ``last`` keeps the last window only.

    Nothing of the *target's* attributes is joined into a batch: they would tell the model what to predict.

    ``shuffle_ties``: the order of a user's events with equal times is arbitrary, so training may see another one in
    every epoch (:meth:`with_ties_shuffled`).

    Attributes:
        item_attributes: the fields of ``item_attributes:`` by name; see :class:`ItemAttribute`.
        following: of every event, the item of the next where that is a training target, else 0 ``[n_events]``; in the
            training split of whole sequences only.
        gap_buckets: of the time between events, where ``event_time`` asks for it.
        gap_numbers: of every event ``[n_events]``, what a model reads of the time; likewise. Batches have it as
            ``gap_list [B, L]``: also a window's first event has its own, and nothing in it is later than the event
            unless ``event_time: request`` says so.
        event_times: of every event, in float64; likewise, and not of benchmark files.
    """

    item_feat: Any
    item_attributes: dict[str, ItemAttribute]
    following: Tensor | None = None
    gap_buckets: GapBuckets | None = None
    gap_numbers: Tensor | None = None
    event_times: np.ndarray | None = None
    _gaps: Gaps | None = None

    def __init__(self, config) -> None:
        _check(config)
        super().__init__(config)

    def build(self) -> list[SequenceDataset]:
        datasets = super().build()
        names, buckets = self.config["item_attributes"] or [], self.config["attribute_buckets"]
        attributes = {name: item_attribute(self, name, buckets) for name in names}
        if self.config["attribute_shuffle"]:
            attributes = shuffled(attributes, self.config["seed"])
        for name, attribute in attributes.items():
            without = int((attribute.index.reshape(self.item_num, -1)[1:] == 0).all(-1).sum())
            if without:
                items = f"{without:,} of {self.item_num - 1:,} items"
                self.logger.info(f"item_attributes: {items} have no {name}; they get the zero vector")
        for dataset in datasets:
            dataset.item_attributes = attributes
        if self._gaps is not None:
            self._find_buckets(self._gaps, datasets)
        if self.config["train_on"] == "sequences" and self.is_augmented and len(datasets[0]):
            datasets[0] = datasets[0].whole_sequences()
        return datasets

    # ------------------------------------------------------------------ the time between events
    def _dataframe_to_interaction(self, data: Any) -> Interaction:
        if data is self.inter_feat and event_time(self.config):  # in order by now, and times still in float64
            self._gaps = self._read_gaps(data)
        return super()._dataframe_to_interaction(data)

    def _read_gaps(self, events: pd.DataFrame) -> Gaps:
        if self.config["benchmark_filename"] is None:
            self.event_times = self._times.astype(np.float64)
            return Gaps.between(self.event_times, events[self.uid_field].to_numpy())
        lists = f"{self.time_field}{self.config['LIST_SUFFIX']}"
        for field in (self.time_field, lists):
            if field not in events:
                remedy = f"the files of benchmark_filename were loaded without a column {field!r}: add it, or use ~"
                raise ConfigError("event_time", self.config["event_time"], remedy)
        normalized = self.config["normalize_field"] or []
        if self.config["normalize_all"] or not {self.time_field, lists}.isdisjoint(normalized):
            remedy = "normalize_all and normalize_field put the times of rows and those of their lists on two scales"
            raise ConfigError(
                "event_time", self.config["event_time"], f"{remedy}: leave the times as they are, or use ~"
            )
        times = [own[: self.field2seqlen[lists]] for own in events[lists]]
        return Gaps.of_rows(times, events[self.time_field].to_numpy(np.float64), max(map(len, times)))

    def _find_buckets(self, gaps: Gaps, datasets: list[SequenceDataset]) -> None:
        """Buckets by what the training split (the first of ``datasets``) shows, for all of them."""
        kind = event_time(self.config)
        assert kind is not None
        if self.is_augmented:
            rows = datasets[0].inter_feat
            shown = gaps.before[rows[HISTORY_START] + rows[self.item_list_length_field]]
        else:
            shown = gaps.before[: len(datasets[0])]
        buckets = GapBuckets.of(shown, self.config["event_time_buckets"])
        numbers = buckets.numbers(gaps, kind)
        self.logger.info(f"event_time: {buckets}")
        ends = np.cumsum([len(dataset) for dataset in datasets])
        for dataset, end in zip(datasets, ends, strict=True):
            dataset.gap_buckets = buckets
            if self.is_augmented:
                dataset.gap_numbers = numbers
            else:
                dataset.inter_feat[GAPS] = numbers[end - len(dataset) : end]

    def _data_filtering(self) -> None:
        super()._data_filtering()
        if self.item_feat is None or self.config["keep_unseen_items"]:
            return
        seen = self.item_feat[self.iid_field].isin(self.inter_feat[self.iid_field])
        if not seen.all():
            self.logger.info(
                f"{(~seen).sum():,} items of {self.dataset_name}.item never occur in an interaction and are left out "
                "of the catalogue; keep_unseen_items: True keeps them."
            )
            self.item_feat = self.item_feat[seen].reset_index(drop=True)

    def whole_sequences(self) -> SequenceDataset:
        """This split's rows (one a prefix) as one row a window, with the same targets."""
        rows = self.inter_feat
        target = (rows[HISTORY_START] + rows[self.item_list_length_field]).numpy()
        following = torch.zeros(len(self._events), dtype=torch.long)
        following[target - 1] = self._events[self.iid_field][target]

        recent = recent_events(self.config)
        stride = self.config["window_stride"] or recent or max(self.max_item_list_len // 2, 1)
        if self.config["train_windows"] == "last":
            stride = None
        users = self._events[self.uid_field].numpy()
        start, end, first_target = training_windows(
            users, np.sort(target), self.max_item_list_len, stride, latest_only=recent is not None
        )

        windows = {field: values[torch.from_numpy(end)] for field, values in self._events.interaction.items()}
        windows[self.item_list_length_field] = torch.from_numpy(end - start)
        windows[HISTORY_START] = torch.from_numpy(start)
        windows[TARGETS_FROM] = torch.from_numpy(first_target)
        sequences = self.copy(Interaction(windows))
        sequences.following = following
        return sequences

    def __getitem__(self, index: Any, join: bool = True) -> Interaction:
        if not self.is_augmented or isinstance(index, str):
            return super().__getitem__(index, join)
        rows = self._rows(index)
        lengths = rows[self.item_list_length_field]
        width = self.max_item_list_len if self.config["pad_to"] == "max" else max(int(lengths.max()), 1)
        histories = Histories(self.events, rows[HISTORY_START])
        rows = self.with_histories(rows, width, self.events.items, self.following, self.gap_numbers)
        return EventBatch((self.join(rows) if join else rows).interaction, histories)

    def with_histories(
        self, rows: Interaction, width: int, items: Tensor, following: Tensor | None, gaps: Tensor | None = None
    ) -> Interaction:
        """``rows`` with padded lists in the place of where they are found.

        Args:
            rows: columns of ``inter_feat`` ``[B]``, on any device.
            width: padded length, at least that of the longest history.
            items: of every event ``[n_events]``, on the device of the rows.
            following: of every event the next one's item, 0 where that is no training target; None for histories.
            gaps: of every event what models read of the time; None where they do not.
        """
        events, valid = history_events(rows[HISTORY_START], rows[self.item_list_length_field], width)
        rows[getattr(self, f"{self.iid_field}_list_field")] = padded(items, events, valid)
        if gaps is not None:
            rows[GAPS] = padded(gaps, events, valid)
        if following is not None:
            owned = valid & (events >= rows[TARGETS_FROM].unsqueeze(-1) - 1)
            rows[self.iid_field + TARGETS_SUFFIX] = padded(following, events, owned)
            del rows[TARGETS_FROM]
        del rows[HISTORY_START]
        return rows

    def targets_per_row(self) -> np.ndarray:
        """How many training targets each window has: ``[n_rows]``."""
        if self.following is None:
            raise DataError(f"{self.dataset_name!r}: only the training split of whole sequences has windows")
        rows = self.inter_feat
        before = np.r_[0, np.cumsum(self.following.numpy() > 0)]  # targets after earlier events
        end = (rows[HISTORY_START] + rows[self.item_list_length_field]).numpy()
        return before[end] - before[rows[TARGETS_FROM].numpy() - 1]

    def with_ties_shuffled(self, generator: torch.Generator) -> tuple[Events, Tensor]:
        """The events, and :attr:`following`, with the items of training targets of one user and time in a new order.

        Items move and places stay: which events are targets, and when each was, is as before. What is no training
        target does not move, a user's first event among it; so the targets remain the same, and nothing of a tie that
        goes on into validation or test gets into training. Sorts the tied targets, n log n of their number.

        Args:
            generator: drawn from once.
        """
        assert self.following is not None
        events, tie = self._tied_targets
        draw = torch.randint(1 << 32, tie.shape, generator=generator)
        drawn = events[((tie << 32) + draw).sort(stable=True).indices]
        items = self.events.items.clone()
        items[events] = items[drawn]
        following = items.roll(-1).masked_fill_(self.following == 0, 0)
        return Events(items, self.events.first, self.events.n_items), following

    @cached_property
    def _tied_targets(self) -> tuple[Tensor, Tensor]:
        """The training targets that share their time with the training target before or after: their event numbers,
        ascending, and the number of the tie of each ``[M]``."""
        assert self.tied is not None
        is_target = self._is_target
        joins = self.tied & is_target & is_target.roll(1)
        events = (joins | joins.roll(-1)).nonzero()[:, 0]
        return events, (~joins[events]).cumsum(0)

    @property
    def _is_target(self) -> Tensor:
        """Which events are training targets ``[n_events]``, bool; the first of all events is none."""
        assert self.following is not None
        return (self.following > 0).roll(1)

    def counter(self, field: str) -> Counter:
        """As RecBole's; of whole sequences, too, a user or item counts once a training target."""
        if self.following is None or field not in (self.uid_field, self.iid_field):
            return super().counter(field)
        return Counter(self._events[field][self._is_target].numpy())

    def join(self, df: Interaction) -> Interaction:
        return df

    def inter_matrix(self, form: str = "coo", value_field: str | None = None) -> spmatrix:
        if self.following is None:
            return super().inter_matrix(form, value_field)
        # The first event of a user is no target, but it is known: the inputs and targets of the split together.
        precedes, is_target = self.following > 0, self._is_target
        users = self._events[self.uid_field]
        first = torch.cat([torch.ones(1, dtype=torch.bool), users[1:] != users[:-1]])
        known = is_target | (first & precedes)
        events = Interaction({field: values[known] for field, values in self._events.interaction.items()})
        return self._create_sparse_matrix(events, self.uid_field, self.iid_field, form, value_field)


def history_events(start: Tensor, length: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Event numbers of the padded histories ``start .. start + length - 1``, and which of them are not padding.

    ``[B]``, ``[B]`` → ``[B, width]`` each, on the same device. Nothing here waits for a GPU.
    """
    step = torch.arange(width, device=start.device)
    valid = step < length.unsqueeze(-1)
    return torch.where(valid, start.unsqueeze(-1) + step, 0), valid


def padded(values: Tensor, events: Tensor, valid: Tensor) -> Tensor:
    """``values [n_events, ...]`` of ``events [B, L]`` where they are valid, else zero: ``[B, L, ...]``."""
    return values[events].masked_fill(~valid.view(valid.shape + (1,) * (values.dim() - 1)), 0)


def training_windows(
    users: np.ndarray, target: np.ndarray, max_len: int, stride: int | None, latest_only: bool = False
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Windows over each user's events that make every target a target once.

    Args:
        users: user of each event ``[n_events]``, each user's events together and in time order.
        target: event numbers of the targets, ascending.
        max_len: inputs of a window, at most.
        stride: new targets of each further window (from the last backwards); None = only the last window of a user.
        latest_only: a user's earliest window, too, has its last ``stride`` targets only, and more windows those before.

    Returns:
        start, end, first_target: a window reads events ``start..end-1``; event ``t+1`` is a target after event ``t``
        when it is a target at all and ``t+1 >= first_target``. Users in order, windows of a user from last to first.
    """
    is_first = np.r_[True, users[1:] != users[:-1]]
    first_of_user = np.maximum.accumulate(np.where(is_first, np.arange(len(users)), 0))[target]
    last_of_group = np.r_[first_of_user[1:] != first_of_user[:-1], True]
    windows: list[tuple[int, int, int]] = []
    for first, end in zip(first_of_user[last_of_group].tolist(), target[last_of_group].tolist(), strict=True):
        while True:
            start = max(first, end - max_len)
            if stride is None or (end - stride <= first if latest_only else start == first):
                windows.append((start, end, start + 1))
                break
            windows.append((start, end, end - stride + 1))
            end -= stride
    start, end, first_target = np.array(windows, dtype=np.int64).reshape(-1, 3).T
    return start, end, first_target


def recent_events(config) -> int | None:
    """How many of the latest events are never bundled: ``bundle_recent``, ~ = a quarter of MAX_ITEM_LIST_LENGTH; None
    without bundles.

    Raises:
        ConfigError: not an integer from 1 to MAX_ITEM_LIST_LENGTH.
    """
    if (config["bundle_size"] or 1) == 1:
        return None
    length, recent = config["MAX_ITEM_LIST_LENGTH"], config["bundle_recent"]
    if recent is None:
        return max(length // 4, 1)
    if type(recent) is not int or not 1 <= recent <= length:
        raise ConfigError(
            "bundle_recent", recent, f"use a whole number from 1 to MAX_ITEM_LIST_LENGTH ({length}), or ~"
        )
    return recent


def _check(config) -> None:
    length, stride, tokens = config["MAX_ITEM_LIST_LENGTH"], config["window_stride"], config["train_batch_tokens"]
    if stride is not None and not (isinstance(stride, int) and 1 <= stride <= length):
        raise ConfigError(
            "window_stride", stride, f"use a whole number from 1 to MAX_ITEM_LIST_LENGTH ({length}), or ~"
        )
    recent = recent_events(config)
    if recent is not None and stride is not None and stride > recent:
        remedy = (
            f"only the latest {recent} events of a window (bundle_recent) have states of their own: use at most that"
        )
        raise ConfigError("window_stride", stride, remedy)
    if tokens is not None:
        if type(tokens) is not int or tokens < length:
            raise ConfigError(
                "train_batch_tokens",
                tokens,
                f"use a whole number of at least MAX_ITEM_LIST_LENGTH ({length}), or ~ for train_batch_size windows",
            )
        if config["train_on"] != "sequences":
            raise ConfigError("train_batch_tokens", tokens, "it is for train_on: sequences; use train_batch_size")
    event_time(config)
