"""What an item's vector, or a history's, holds of the items' attributes: read back by unbinding.

``python -m recbole_holo.explain --checkpoint F --item 50`` (or ``--history "50|172|181"``) prints a table; ids are
those of the data set's files.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from tabulate import tabulate
from torch import Tensor

from recbole_holo.bridge.checkpoint import CheckpointError
from recbole_holo.data.catalogue import Catalogue
from recbole_holo.data.event_time import since_latest
from recbole_holo.data.ids import as_count, as_id, as_ids, as_list, as_time, numbers_in
from recbole_holo.errors import ConfigError, DataError
from recbole_holo.ops.circular_convolution import unbind
from recbole_holo.ops.cleanup import cleanup


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
    own: float = 0.0


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
    model: Any,
    dataset: Any,
    item: str | None = None,
    history: Iterable[str] | None = None,
    k: int = 3,
    timestamps: Iterable[Any] | None = None,
) -> Explanation:
    """Which values of each attribute the vector of an item or of a history holds most strongly.

    An item's vector is unbound with the key of each attribute
    (:meth:`~recbole_holo.layers.holographic.AttributeBinding.keys`), and compared with the vectors of that attribute's
    values. A history's vector is what the model expects next, as an item: its hidden state where the output is bound as
    the input is (``bind_output: True``), else the mean of all items' vectors, weighted by the model's chances of each;
    it is unbound with the roles or, where they are bound with items, with the mean item, which is a rougher key.

    Args:
        model: of this package, with a ``binding``.
        dataset: the one it was trained on, or its :class:`~recbole_holo.data.catalogue.Catalogue`.
        item: id in the data set's files; or
        history: such ids, oldest first.
        k: values an attribute.
        timestamps: of the history's events, in the data set's own unit, for a model with ``event_time``; None: nothing
            is known of them. Of the time of the next event nothing is known.

    Raises:
        ConfigError: a model that binds no attributes; what is no id, no list of ids, no number or no time.
        DataError: an item that the data set does not have.
    """
    binding = _checked_binding(model)
    if (item is None) == (history is None):
        raise ConfigError("item, history", (item, history), "give one of the two")
    model.eval()
    items = Catalogue.of(dataset)
    k = as_count(k, "k", of="values")
    given = [as_id(item, "item")] if item is not None else as_ids(history, "history", ordered=True)
    if not given:
        raise DataError(f"{items.iid_field}: an empty history says nothing; give at least one item")
    ids = torch.tensor([items.number(token) for token in given], device=model.item_embedding.weight.device)
    of = " | ".join(items.named(number) for number in ids.tolist())
    if item is not None:
        readings = _read(model, model.embed_items(ids[0]), model.item_embedding.weight[ids[0]], k)
    else:
        lengths = torch.tensor([len(ids)], device=ids.device)
        gaps = _gaps(items, timestamps, ids) if timestamps is not None and model.event_time is not None else None
        times = {} if gaps is None else {"gaps": gaps}  # models that read none need not take any
        hidden = model.forward(ids.unsqueeze(0), lengths, **times)[0]
        readings = readings_of(model, hidden, k)
    shares = {vectors.name: vectors.index[ids].reshape(len(ids), -1) for vectors in binding.attributes}
    numbers = {vectors.name: {label: n for n, label in enumerate(vectors.labels)} for vectors in binding.attributes}

    def share(reading: Reading) -> float:
        number = numbers[reading.attribute][reading.value]
        return (shares[reading.attribute] == number).any(-1).double().mean().item()

    return Explanation(of, [replace(reading, own=share(reading)) for reading in readings], item is not None)


def _gaps(items: Catalogue, timestamps: Iterable[Any], ids: Tensor) -> Tensor:
    """What the model reads of a history's times ``[1, L]``."""
    given = [as_time(time) for time in as_list(timestamps, "timestamps", ordered=True)]
    if len(given) != len(ids):
        raise ConfigError("timestamps", len(given), f"give one for each of the {len(ids)} items")
    if items.gap_buckets is None:
        raise ConfigError("dataset", items.dataset_name, "pass the training split or a checkpoint's catalogue")
    times = np.array([np.nan if time is None else time for time in given])
    return torch.from_numpy(items.gap_buckets(since_latest(times))).unsqueeze(0).to(ids.device)


def readings_of(model: Any, hidden: Tensor, k: int = 3) -> list[Reading]:
    """The values of each attribute that a hidden state ``[d]`` holds most strongly (see :func:`explain`), without
    what they are compared with."""
    return _read(model, *_expected(model, hidden), k)


def _checked_binding(model: Any) -> Any:
    binding = getattr(model, "binding", None)
    if binding is None or binding.form == "concat":
        remedy = "only vectors that attributes are bound into can be read back: train with item_attributes and binding"
        raise ConfigError("binding", getattr(binding, "form", None), remedy)
    return binding


def _read(model: Any, vector: Tensor, own: Tensor, k: int) -> list[Reading]:
    """From a bound vector ``[d]``, and the item's own part of it."""
    binding, readings = model.binding, []
    values = binding.roles_and_values()[1]
    for vectors, key, known in zip(binding.attributes, binding.keys(own), values, strict=True):
        cosines, numbers = cleanup(unbind(vector, key, binding.scale), known[1:], k)
        labels = (vectors.labels[number + 1] for number in numbers.tolist())
        readings += [
            Reading(vectors.name, label, cosine) for label, cosine in zip(labels, cosines.tolist(), strict=True)
        ]
    return readings


def _expected(model: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Of a hidden state: what is expected next as a bound vector, and the item's own part of it, ``[d]`` each."""
    chances = (model.score_all(hidden.unsqueeze(0))[0] / model.log_temperature.exp())[1:].softmax(-1)
    every = torch.arange(1, model.n_items, device=hidden.device)
    own = chances @ model.item_embedding.weight[1:]
    as_read = model.scored_products and model.head is None
    return hidden if as_read else chances @ model.embed_items(every), own


def main(argv: Sequence[str] | None = None) -> int:
    """The command; exit status 2 for input that cannot be used."""
    from recbole_holo.quick_start import load_model

    flags = argparse.ArgumentParser(prog="python -m recbole_holo.explain", description=(__doc__ or "").split("\n")[0])
    flags.add_argument("--checkpoint", required=True, help="file written by a run")
    flags.add_argument("--item", help="an item's id in the data set's files")
    flags.add_argument("--history", help='such ids, oldest first: "50|172|181"')
    flags.add_argument("--times", help="of the history's events, for a model that reads them: 978300019|978300055")
    flags.add_argument("--k", type=int, default=3, help="values an attribute")
    args = flags.parse_args(argv)
    try:
        model, items = load_model(args.checkpoint)
        history = None if args.history is None else args.history.split("|")
        times = None if args.times is None else numbers_in(args.times, "times")
        print(explain(model, items, args.item, history, args.k, times))
    except (ConfigError, DataError, CheckpointError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
