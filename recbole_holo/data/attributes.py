"""Item attributes as index tables, read through RecBole's own loading."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise
from logging import getLogger
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from recbole.utils.enum_type import FeatureType
from torch import Tensor

from recbole_holo.errors import DataError, listed, nearest_names

if TYPE_CHECKING:
    from recbole.data.dataset import Dataset

_logger = getLogger("recbole_holo")


@dataclass(frozen=True)
class ItemAttribute:
    """One attribute of all items.

    Args:
        name: the field's name in the ``.item`` file.
        index: value ids by item id, ``[n_items]``, or ``[n_items, K]`` for an attribute with several values; long.
            0 is the pad, the value of item 0 and of items without a value.
        n_values: number of value ids, the pad included.
        labels: readable name of each value id, ``labels[0] == "[PAD]"``.
        position: of a number, its rank among the items that have one, from 0 to 1; -1 = no value; ``[n_items]``.
        among: of a number, the values that buckets and positions were made of, sorted, float64 ``[n]``.
    """

    name: str
    index: Tensor
    n_values: int
    labels: list[str]
    position: Tensor | None = None
    among: Tensor | None = None


def item_attribute(
    dataset: Dataset, name: str, buckets: int = 10, trained: ItemAttribute | None = None
) -> ItemAttribute:
    """Reads one attribute from a built data set.

    Tokens keep RecBole's ids; floats become the number, from 1, of their quantile bucket among the items that have a
    value (equal values share a bucket, so there may be fewer than ``buckets``).

    Args:
        trained: as a checkpoint's model reads it, which knows its values by their numbers there; the data set's items
            have that model's numbers (:class:`~recbole_holo.data.numbering.Numbering`). A value that is not among its
            is none, and the log says so; numbers come into its buckets.

    Raises:
        DataError: no ``.item`` file, no such column, or a type that has no index (float_seq).
    """
    feat = dataset.item_feat
    if feat is None:
        raise DataError(
            f"item_attributes: [{name}] needs the file {dataset.dataset_name}.item in {dataset.dataset_path}, "
            "which was not found. Add the file, or set item_attributes to [] to train without attributes."
        )
    if name not in feat:
        columns = [c for c in feat if c != dataset.iid_field]
        close = nearest_names(name, columns)
        raise DataError(
            f"item_attributes: {dataset.dataset_name}.item has no column {name!r}"
            + (f"; did you mean {' or '.join(close)}?" if close else "")
            + f" Loaded columns: {', '.join(columns) or 'none'}."
        )
    ftype = dataset.field2type[name]
    if ftype in (FeatureType.TOKEN, FeatureType.TOKEN_SEQ):
        labels, index = [str(label) for label in dataset.field2id_token[name]], feat[name].long()
        if trained is not None and len(labels) > trained.n_values:
            new = labels[trained.n_values :]
            _logger.warning(f"{name}: the checkpoint does not know {listed(new)}; to its model they are no value")
            labels, index = labels[: trained.n_values], index.where(index < trained.n_values, 0)
        return ItemAttribute(name, index, len(labels), labels)
    if ftype is FeatureType.FLOAT:
        among = None if trained is None or trained.among is None else trained.among.numpy()
        return _bucketed(name, feat[name], dataset.missing_values.get(name), buckets, among)
    raise DataError(f"item_attributes: {name!r} is of type {ftype.value}; token, token_seq and float can be used.")


def kept_of(attribute: ItemAttribute, trained: ItemAttribute, items: np.ndarray) -> ItemAttribute:
    """``attribute`` with what ``trained`` has of some ``items``, by their numbers ``[n]``."""
    index, old = attribute.index.clone(), trained.index
    if index.dim() == 2:  # as many places as the longer one has
        width = max(index.shape[1], old.shape[1])
        index, old = (F.pad(of, (0, width - of.shape[1])) for of in (index, old))
    index[items] = old[items]
    position = attribute.position
    if position is not None and trained.position is not None:
        position = position.clone()
        position[items] = trained.position[items]
    return replace(attribute, index=index, position=position)


def shuffled(attributes: dict[str, ItemAttribute], seed: int) -> dict[str, ItemAttribute]:
    """Every item with all the attributes of another, drawn by ``seed``: the same values as often, saying nothing."""
    n_items = len(next(iter(attributes.values())).index) if attributes else 1
    other = torch.randperm(n_items - 1, generator=torch.Generator().manual_seed(seed or 0)) + 1
    other = torch.cat([torch.zeros(1, dtype=torch.long), other])

    def exchanged(one: ItemAttribute) -> ItemAttribute:
        position = None if one.position is None else one.position[other]
        return replace(one, index=one.index[other], position=position)

    return {name: exchanged(one) for name, one in attributes.items()}


def _bucketed(
    name: str, values: Tensor, missing: np.ndarray | None, buckets: int, among: np.ndarray | None
) -> ItemAttribute:
    value = values.reshape(len(values), -1)[:, 0].double().numpy()
    known = np.ones(len(value), dtype=bool) if missing is None else ~missing
    known[0] = False  # the pad
    if not known.any():
        raise DataError(f"item_attributes: no item has a value of {name!r}; drop it from the list.")
    among = np.sort(value[known]) if among is None else among
    edges = np.unique(np.quantile(among, np.linspace(0, 1, buckets + 1)[1:-1]))
    bucket = np.searchsorted(edges, value, side="right") + 1
    index = torch.from_numpy(np.where(known, bucket, 0)).long()
    bounds = ["-inf", *(f"{e:g}" for e in edges), "inf"]
    labels = ["[PAD]", *(f"{name} in [{lo}, {hi})" for lo, hi in pairwise(bounds))]
    # The mean of the places that equal values have among the sorted ones; of new values between their neighbours'.
    ranks, last = _places(among, value[known]), _places(among, among[-1:])[0]
    position = torch.full((len(value),), -1.0)
    position[torch.from_numpy(known)] = torch.from_numpy(np.clip(ranks / max(last, 1), 0, 1)).float()
    return ItemAttribute(name, index, len(labels), labels, position, torch.from_numpy(among))


def _places(among: np.ndarray, values: np.ndarray) -> np.ndarray:
    return (np.searchsorted(among, values, "left") + np.searchsorted(among, values, "right") - 1) / 2
