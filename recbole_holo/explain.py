"""What an item's vector, or a history's, holds of the items' attributes: read back by unbinding.

``python -m recbole_holo.explain --checkpoint F --item 50`` (or ``--history "50|172|181"``) prints a table; ids are
those of the data set's files.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor

from recbole_holo.bridge.checkpoint import CheckpointError
from recbole_holo.errors import ConfigError, DataError, nearest_names
from recbole_holo.ops.circular_convolution import unbind
from recbole_holo.ops.cleanup import cleanup

TITLES = ("title", "movie_title", "name")  # columns of an .item file that people read items by


@dataclass(frozen=True)
class Reading:
    """One value that was found.

    Attributes:
        attribute: its name.
        value: the readable value.
        similarity: cosine of what unbinding gave and the value's vector.
        own: of an item, whether it has that value; of a history, the part of its items that have it.
    """

    attribute: str
    value: str
    similarity: float
    own: float


@dataclass(frozen=True)
class Explanation:
    """The values that a vector holds most strongly, by attribute and then by similarity."""

    of: str
    readings: list[Reading]
    is_item: bool

    def __str__(self) -> str:
        rows = [
            [r.attribute, r.value, f"{r.similarity:.3f}", ("yes" if r.own else "") if self.is_item else f"{r.own:.0%}"]
            for r in self.readings
        ]
        head = ["attribute", "value", "similarity", "the item's own" if self.is_item else "of the history's items"]
        return f"{self.of}\n\n{tabulate(rows, headers=head, disable_numparse=True)}"


@torch.no_grad()
def explain(
    model: Any, dataset: Any, item: str | None = None, history: Sequence[str] | None = None, k: int = 3
) -> Explanation:
    """Which values of each attribute the vector of an item or of a history holds most strongly.

    An item's vector is unbound with the key of each attribute
    (:meth:`~recbole_holo.layers.holographic.AttributeBinding.keys`), and compared with the vectors of that attribute's
    values. A history's vector is what the model expects next, as an item: its hidden state where the output is bound
    (``bind_output``), else the mean of all items' vectors, weighted by the model's chances of each; it is unbound with
    the roles or, where they are bound with items, with the mean item, which is a rougher key.

    Args:
        model: of this package, with a ``binding``.
        dataset: the one it was trained on, as :func:`~recbole_holo.quick_start.load_data_and_model` gives it.
        item: id in the data set's files; or
        history: such ids, oldest first.
        k: values an attribute.

    Raises:
        ConfigError: a model that binds no attributes.
        DataError: an item that the data set does not have.
    """
    binding = getattr(model, "binding", None)
    if binding is None or binding.form == "concat":
        remedy = "only vectors that attributes are bound into can be read back: train with item_attributes and binding"
        raise ConfigError("binding", getattr(binding, "form", None), remedy)
    if (item is None) == (history is None):
        raise ConfigError("item, history", (item, history), "give one of the two")
    model.eval()
    ids = _ids(dataset, [item] if item is not None else history or [])
    table = model.item_embedding.weight
    titles = item_titles(dataset)
    if item is not None:
        vector, own = model.embed_items(ids[0]), table[ids[0]]
        of = titles.get(item, item)
    else:
        vector, own = _expected(model, ids)
        of = " | ".join(titles.get(token, token) for token in history or [])
    readings = []
    values = binding.roles_and_values()[1]
    for vectors, key, known in zip(binding.attributes, binding.keys(own), values, strict=True):
        cosines, numbers = cleanup(unbind(vector, key, binding.scale), known[1:], k)
        held = vectors.index[ids].reshape(len(ids), -1)
        for cosine, number in zip(cosines.tolist(), (numbers + 1).tolist(), strict=True):
            share = (held == number).any(-1).double().mean().item()
            readings.append(Reading(vectors.name, vectors.labels[number], cosine, share))
    return Explanation(of, readings, item is not None)


def _expected(model: Any, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Of a history: what is expected next as a bound vector, and the item's own part of it, ``[d]`` each."""
    hidden = model.forward(ids.unsqueeze(0), torch.tensor([len(ids)], device=ids.device))
    chances = (model.score_all(hidden)[0] / model.log_temperature.exp())[1:].softmax(-1)
    every = torch.arange(1, model.n_items, device=ids.device)
    own = chances @ model.item_embedding.weight[1:]
    return hidden[0] if model.bind_output and model.head is None else chances @ model.embed_items(every), own


def _ids(dataset: Any, tokens: Sequence[str]) -> Tensor:
    field = dataset.iid_field
    known = dataset.field2token_id[field]
    for token in tokens:
        if token not in known:
            close = nearest_names(token, list(known))
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise DataError(f"{field}: {dataset.dataset_name!r} has no item {token!r}{hint}")
    if not tokens:
        raise DataError(f"{field}: an empty history says nothing; give at least one item")
    return torch.tensor([known[token] for token in tokens], device=dataset.config["device"])


def item_titles(dataset: Any) -> dict[str, str]:
    """Item id → title, from the data set's ``.item`` file; empty where it has no column of titles."""
    path = Path(dataset.dataset_path) / f"{dataset.dataset_name}.item"
    if not path.exists():
        return {}
    config = dataset.config
    with path.open(encoding=config["encoding"], newline="") as file:
        rows = csv.reader(file, delimiter=config["field_separator"], quoting=csv.QUOTE_NONE)
        header = [column.split(":")[0] for column in next(rows)]
        title = next((header.index(name) for name in TITLES if name in header), None)
        if title is None or dataset.iid_field not in header:
            return {}
        key = header.index(dataset.iid_field)
        return {row[key]: row[title] for row in rows if len(row) == len(header)}


def main(argv: Sequence[str] | None = None) -> int:
    """The command; exit status 2 for input that cannot be used."""
    from recbole_holo.quick_start import load_data_and_model

    flags = argparse.ArgumentParser(prog="python -m recbole_holo.explain", description=(__doc__ or "").split("\n")[0])
    flags.add_argument("--checkpoint", required=True, help="file written by a run")
    flags.add_argument("--item", help="an item's id in the data set's files")
    flags.add_argument("--history", help='such ids, oldest first: "50|172|181"')
    flags.add_argument("--k", type=int, default=3, help="values an attribute")
    args = flags.parse_args(argv)
    try:
        _, model, dataset, *_ = load_data_and_model(args.checkpoint, state="ERROR")
        history = None if args.history is None else args.history.split("|")
        print(explain(model, dataset, args.item, history, args.k))
    except (ConfigError, DataError, CheckpointError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
