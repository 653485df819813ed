"""Which id has which number: what a model's tables stand on, and what a data set is read with to be that model's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from logging import getLogger
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from recbole_holo.data.attributes import ItemAttribute
from recbole_holo.data.event_time import GapBuckets
from recbole_holo.errors import DataError, listed

_logger = getLogger("recbole_holo")


@dataclass(frozen=True)
class Numbering:
    """Ids by number, as a checkpoint's model knows them.

    RecBole numbers ids as they come in the files. A data set whose configuration carries a numbering (an attribute of
    that name) gives known ids the numbers they have here, and new ones those that follow; ids that are gone keep
    theirs, and no event has them. So a file in another order, or with another item, is read in the model's numbers.

    Args:
        tokens: by field, the ids by number, the pad first.
        users: of a model that knows no users, a hash of each user's id in the order of the numbers: users that are
            known come in that order (of rows, batches and drawn candidates), new ones after them.
        attributes: of the items, as the model reads them.
        gap_buckets: of the time between events, likewise.
    """

    tokens: dict[str, list[str]]
    users: Tensor | None = None
    attributes: dict[str, ItemAttribute] = field(default_factory=dict)
    gap_buckets: GapBuckets | None = None

    # ------------------------------------------------------------------ in a checkpoint
    @classmethod
    def plain_of(cls, dataset: Any, ours: bool) -> dict[str, Any]:
        """What a checkpoint holds of a data set's numbers beside the catalogue, which models of this package have."""
        if ours:
            return {"users": hashes(dataset.field2id_token[dataset.uid_field][1:])}
        seen: dict[int, str] = {}
        for name, ids in dataset.field2id_token.items():  # fields with the same ids share one array
            seen.setdefault(id(ids), name)
        return {"tokens": {name: [str(i) for i in dataset.field2id_token[name]] for name in seen.values()}}

    @classmethod
    def of_checkpoint(cls, saved: Mapping[str, Any], catalogue: Any, uid_field: str) -> Numbering | None:
        """Of a checkpoint with this ``catalogue`` (None: it has none); None of one that says nothing of ids."""
        numbers = saved.get("numbers") or {}
        if catalogue is None:
            return cls(numbers["tokens"]) if "tokens" in numbers else None
        attributes = catalogue.item_attributes
        tokens = {catalogue.iid_field: catalogue.tokens}
        tokens |= {name: one.labels for name, one in attributes.items() if one.position is None}
        return cls(tokens, numbers.get("users"), attributes, catalogue.gap_buckets)

    # ------------------------------------------------------------------ in a data set
    def new_numbers(self, field_name: str, ids: np.ndarray, uid_field: str) -> tuple[np.ndarray, np.ndarray] | None:
        """The numbers of ``ids [n]`` (the pad first), which have 0 to n - 1 now, and all ids by their new numbers; None
        where nothing is said of the field."""
        if field_name in self.tokens:
            known = self.tokens[field_name]
            number = pd.Index(known).get_indexer(pd.Index(ids))
            fresh = number < 0
            number[fresh] = len(known) + np.arange(fresh.sum())
            return number, np.array([*known, *ids[fresh]])
        if field_name != uid_field or self.users is None:
            return None
        place = pd.Index(self.users.numpy()).get_indexer(pd.Index(hashes(ids[1:]).numpy()))
        order = np.argsort(np.where(place < 0, len(self.users), place), kind="stable")
        number = np.zeros(len(ids), dtype=np.int64)
        number[order + 1] = np.arange(1, len(ids))
        return number, ids[np.r_[0, order + 1]]

    def new_ids(self, dataset: Any) -> dict[str, list[str]]:
        """By field, the ids of a data set that are not known here.

        Raises:
            DataError: the data set gives known ids other numbers all the same.
        """
        found = {}
        for name, known in self.tokens.items():
            ids = dataset.field2id_token.get(name)
            if ids is None:
                continue
            if list(ids[: len(known)]) != known:
                remedy = "read it by load_data_and_model() (a knowledge graph that has changed is numbered anew)"
                raise DataError(f"{name}: the data set gives ids other numbers than the checkpoint: {remedy}")
            if len(ids) > len(known):
                found[name] = [str(i) for i in ids[len(known) :]]
        return found

    def say_what_changed(self, dataset: Any, new: Mapping[str, Sequence[str]]) -> None:
        """Logs ids that are new or gone."""
        for name, ids in new.items():
            _logger.warning(f"{name}: the checkpoint does not know {listed(ids)}")
        name = dataset.iid_field
        gone = dataset.gone.get(name, [])
        if len(gone):
            ids = dataset.field2id_token[name][gone]
            _logger.warning(f"{name}: {listed(ids)} of the checkpoint no longer occur; its model knows them still")


def hashes(ids: Sequence[str] | np.ndarray) -> Tensor:
    """64 bits of each id, ``[n]`` int64: which user is which, for one who has the ids already."""
    joined = b"".join(blake2b(str(one).encode("utf-8", "surrogatepass"), digest_size=8).digest() for one in ids)
    return torch.from_numpy(np.frombuffer(joined, dtype="<i8").astype(np.int64))
