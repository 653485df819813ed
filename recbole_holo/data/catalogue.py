"""The items of a data set under their own ids: what a model needs to be served without its data."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from logging import getLogger
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recbole_holo.data.atomic_files import Form, read_header, read_rows
from recbole_holo.data.attributes import ItemAttribute
from recbole_holo.data.event_time import GapBuckets
from recbole_holo.errors import DataError, nearest_names

_logger = getLogger("recbole_holo")
TITLES = ("title", "movie_title", "name")  # columns of an .item file that people read items by


@dataclass(frozen=True)
class Catalogue:
    """Items as people and files name them. Stands in for a data set where a model is built to be served.

    Args:
        dataset_name: whose items these are.
        iid_field: RecBole's name of the field of items.
        tokens: id of each item in the data set's files; ``tokens[0]`` is the pad's.
        titles: of each item, "" where there is none.
        popularity: of each item, the users who have it in the training split, ``[n_items]``.
        item_attributes: as the model binds them.
        repeats: part of the training targets whose user had met the item before, 0 to 1; None: not known.
        gap_buckets: as the model reads the time between events; None where it does not.
    """

    dataset_name: str
    iid_field: str
    tokens: list[str]
    titles: list[str]
    popularity: Tensor
    item_attributes: dict[str, ItemAttribute] = field(default_factory=dict)
    repeats: float | None = None
    gap_buckets: GapBuckets | None = None

    @classmethod
    def of(cls, dataset: Any) -> Catalogue:
        """Of a data set, best its training split: the popularity is counted in it."""
        if isinstance(dataset, cls):
            return dataset
        tokens = [str(token) for token in dataset.field2id_token[dataset.iid_field]]
        titles = item_titles(dataset)
        counts = torch.from_numpy(dataset.inter_matrix("csr").getnnz(0)).long()
        return cls(
            dataset.dataset_name,
            dataset.iid_field,
            tokens,
            [titles.get(token, "") for token in tokens],
            counts,
            dict(getattr(dataset, "item_attributes", {})),
            repeats_of(dataset),
            getattr(dataset, "gap_buckets", None),
        )

    # ------------------------------------------------------------------ in a checkpoint
    def plain(self) -> dict[str, Any]:
        """As a checkpoint holds it, whole numbers in as few bytes as they need."""
        fields = {name: getattr(self, name) for name in self.__dataclass_fields__}
        attributes = {n: {**vars(one), "index": _narrow(one.index)} for n, one in self.item_attributes.items()}
        buckets = None if self.gap_buckets is None else asdict(self.gap_buckets)
        return fields | {
            "popularity": _narrow(self.popularity),
            "item_attributes": attributes,
            "gap_buckets": buckets,
        }

    @classmethod
    def from_plain(cls, saved: Mapping[str, Any]) -> Catalogue:
        """The inverse of :meth:`plain`."""
        given = {name: saved[name] for name in cls.__dataclass_fields__ if name in saved}  # older ones lack some
        attributes = given["item_attributes"].items()
        given["item_attributes"] = {n: ItemAttribute(**{**a, "index": a["index"].long()}) for n, a in attributes}
        if given.get("gap_buckets") is not None:
            given["gap_buckets"] = GapBuckets(**given["gap_buckets"])
        return cls(**{**given, "popularity": given["popularity"].long()})

    # ------------------------------------------------------------------ what a model reads of a data set
    def num(self, field_name: str) -> int:
        """Of items, the pad among them."""
        if field_name != self.iid_field:
            raise DataError(f"{field_name}: a catalogue knows only {self.iid_field}")
        return len(self.tokens)

    # ------------------------------------------------------------------ ids
    @cached_property
    def numbers(self) -> dict[str, int]:
        """Item id in the data set's files → the model's number of it."""
        return {token: number for number, token in enumerate(self.tokens) if number}

    def number(self, token: str) -> int:
        """The model's number of an item.

        Raises:
            DataError: no such item; the nearest ids are offered.
        """
        found = self.numbers.get(token)
        if found is None:
            close = nearest_names(token, list(self.numbers))
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise DataError(f"{self.iid_field}: {self.dataset_name!r} has no item {token!r}{hint}")
        return found

    def find(self, text: str) -> int:
        """An item by its id or by its title, whatever the title's case.

        A text that is an item's id is that item. The year in brackets behind a title may be left out, and may be given
        where the data set's titles have none.

        Raises:
            DataError: neither, and the nearest titles are offered; or the title of several items, and their ids are.
        """
        if text in self.numbers:
            return self.numbers[text]
        asked = text.casefold()
        found = self._by_title.get(asked) or self._without_year.get(asked) or self._by_title.get(_bare(asked))
        if found is None:
            close = nearest_names(text, [*self._by_title, *self.numbers])
            offered = [self.named(number) for name in close for number in self._by_title.get(name, ())]
            offered += [self.named(self.numbers[name]) for name in close if name in self.numbers]
            hint = f"; did you mean {' or '.join(map(repr, offered[:5]))}?" if offered else ""
            raise DataError(f"{self.dataset_name!r} has no item with the id or title {text!r}{hint}")
        if len(found) > 1:
            each = ", ".join(f"{self.named(n)} of {int(self.popularity[n])} users" for n in found)
            raise DataError(f"{text!r} is the title of {len(found)} items of {self.dataset_name!r}: {each}; give an id")
        return found[0]

    @cached_property
    def _by_title(self) -> dict[str, list[int]]:
        return _gathered((title.casefold(), number) for number, title in enumerate(self.titles) if title)

    @cached_property
    def _without_year(self) -> dict[str, list[int]]:
        return _gathered((_bare(title), n) for title, own in self._by_title.items() for n in own)

    def named(self, number: int) -> str:
        """An item's title and id, since several items may have one title."""
        return f"{self.titles[number]} [{self.tokens[number]}]" if self.titles[number] else self.tokens[number]


def _bare(title: str) -> str:
    return re.sub(r"\s*\(\d{4}\)$", "", title)


def _gathered(pairs: Iterable[tuple[str, int]]) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for name, number in pairs:
        found.setdefault(name, []).append(number)
    return found


def repeats_of(dataset: Any) -> float | None:
    """Part of a training split's targets whose user had met the item before; None where it holds no whole sequences."""
    following = getattr(dataset, "following", None)
    if following is None:
        return None
    target = (following > 0).nonzero().flatten() + 1
    events = dataset.events
    met = events.first_time(events.first[target], events.items[target]) < target
    return float(met.double().mean())


def _narrow(numbers: Tensor) -> Tensor:
    """Whole numbers from 0 on in the smallest type that holds them."""
    largest = int(numbers.max()) if numbers.numel() else 0
    fitting = (t for t in (torch.uint8, torch.int16, torch.int32) if largest <= torch.iinfo(t).max)
    return numbers.to(next(fitting, torch.int64))


def item_titles(dataset: Any) -> dict[str, str]:
    """Item id → title, from the data set's ``.item`` file; empty where it has no column of titles."""
    path = Path(dataset.dataset_path) / f"{dataset.dataset_name}.item"
    if not path.exists():
        return {}
    form = Form.of(dataset.config)
    try:
        header = list(read_header(path, form))
        title = next((header.index(name) for name in TITLES if name in header), None)
        if title is None or dataset.iid_field not in header:
            return {}
        key = header.index(dataset.iid_field)
        return {row[key]: row[title] for row in read_rows(path, form) if len(row) == len(header)}
    except DataError as error:  # of a file that load_col leaves out
        _logger.warning(f"items have no titles: {error}")
        return {}
