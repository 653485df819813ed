"""The items of a model: their vectors, what their attributes add, and which of them are trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recbole_holo.data.event_time import UNKNOWN, event_time
from recbole_holo.errors import ConfigError
from recbole_holo.layers.attributes import ATTRIBUTE_VALUES
from recbole_holo.layers.carried import Watched
from recbole_holo.layers.event_time import FORMS as EVENT_TIME_FORMS
from recbole_holo.layers.event_time import EventTime
from recbole_holo.layers.holographic import ALGEBRAS, FLOATS, FORMS, WITHOUT_ITEM, AttributeBinding
from recbole_holo.model.settings import one_of, positive_int, positive_number
from recbole_holo.ops.circular_convolution import SCALES

COLD_ITEMS = ("train", "attributes")
ROWS = 2**16  # of a bound table that are computed at a time


class BoundItems:
    """What a model's items have in common: :class:`~recbole_holo.model.base.SequenceRecommender` says what for.

    Attributes:
        head: a table of its own to score against; None = the items'.
        bind_output: whether that table is bound with attributes.
        scored_products: whether it is bound as what the encoder reads is, products with the item included.
        trained_items: the ids that take part in training, the pad first; None = all.
        trained_number: of each id, its place among these.
        served: compressed tables in the place of all these (:mod:`recbole_holo.inference.compression`).
        event_time: what the time between events adds to items that are read; None = nothing.
    """

    n_items: int
    hidden_size: int
    training: bool
    register_buffer: Any
    sparse_embedding: bool
    item_embedding: nn.Embedding
    binding: AttributeBinding | None
    head: nn.Linear | None
    bind_output: bool
    scored_products: bool
    served: Any
    event_time: EventTime | None
    trained_items: Tensor | None
    trained_number: Tensor

    def make_items(self, config, dataset, d: int, std: float | None, tied: bool = True) -> None:
        """The item table ``[n_items, d]`` drawn from N(0, std²), its attributes, and unless ``tied`` a head."""
        self.hidden_size = d
        self.item_embedding = item_table(self.n_items, d, std)
        self.binding, self.head = None, None if tied else nn.Linear(d, self.n_items, bias=False)
        attributes = list(getattr(dataset, "item_attributes", {}).values()) if config["binding"] else []
        if attributes:
            self.binding = attribute_binding(config, attributes, d, _item_std(self.n_items, d, std))
        self.bind_output, self.scored_products = self._output(config["bind_output"])
        if self.trained_items is not None:
            self._forget_cold_items(self.trained_items)
        kind = event_time(config)
        if kind is not None:
            form = one_of("event_time_form", config["event_time_form"] or "add", EVENT_TIME_FORMS)
            self.event_time = EventTime(d, config["event_time_buckets"], _item_std(self.n_items, d, std), kind, form)

    def _output(self, wanted: bool | str | None) -> tuple[bool, bool]:
        if wanted not in (None, False, True, "added"):
            raise ConfigError("bind_output", wanted, "use False, True or added")
        if self.binding is None or not wanted:
            return False, False
        if self.binding.form == "both":
            return True, wanted != "added"
        bound = wanted != "added" or self.binding.form in WITHOUT_ITEM
        return bound, bound

    def find_trained_items(self, config, dataset) -> None:
        """With ``cold_items: attributes``, which items occur in the training split, as input or as target."""
        trained = number = None
        if one_of("cold_items", config["cold_items"] or "train", COLD_ITEMS) == "attributes":
            occurs = torch.from_numpy(dataset.inter_matrix("csr").getnnz(0)) > 0
            occurs[0] = True
            trained, number = occurs.nonzero().flatten(), torch.where(occurs, occurs.cumsum(0) - 1, 0)
        # Both follow the data set, not the training: they stay out of checkpoints.
        self.register_buffer("trained_items", trained, persistent=False)
        self.register_buffer("trained_number", number, persistent=False)

    def _forget_cold_items(self, trained_items: Tensor) -> None:
        if not (self.bind_output and self.binding is not None and self.binding.form in WITHOUT_ITEM):
            remedy = f"it needs item_attributes, bind_output and binding: {' or '.join(WITHOUT_ITEM)}"
            raise ConfigError("cold_items", "attributes", remedy)
        trained = torch.zeros(self.n_items, 1).index_fill_(0, trained_items, 1.0)
        with torch.no_grad():
            self.item_embedding.weight.mul_(trained)
            if self.head is not None:
                self.head.weight.mul_(trained)

    def embed_items(self, items: Tensor) -> Tensor:
        """Item ids ``[...]`` → the vectors that the encoder reads ``[..., d]``."""
        if self.served is not None:
            return self.served.read(items)
        if self.binding is None:
            return self.item_embedding(items)
        if torch.is_grad_enabled() or self.training:
            return self.binding(self.item_embedding(items), items)
        return F.embedding(items, self._bound(self.item_embedding.weight, products=True))

    def embed_events(self, items: Tensor, gaps: Tensor | None = None) -> Tensor:
        """:meth:`embed_items` with what their times add: ``[..., d]``.

        ``gaps [...]`` are a batch's; None = nothing is known of any time. A model without ``event_time`` reads none.
        """
        x = self.embed_items(items)
        return x if self.event_time is None else x + self.embed_gaps(known(gaps, items))

    def embed_gaps(self, gaps: Tensor) -> Tensor:
        """What times add: ``[...]`` → ``[..., d]``."""
        part = self.event_time
        assert part is not None
        if torch.is_grad_enabled() or self.training:
            return part(gaps)
        return F.embedding(gaps, self.folded("event time", part.table, part))

    def item_vectors(self) -> Tensor:
        """The table ``[n_items, d]`` that hidden states are scored against."""
        if self.served is not None:
            return self.served.scored(torch.arange(self.n_items, device=self.served.scored.codes.device))
        table = self.item_embedding.weight if self.head is None else self.head.weight
        if not self.bind_output or self.binding is None:
            return table
        if torch.is_grad_enabled() or self.training:
            return self.binding(table, torch.arange(self.n_items, device=table.device), self.scored_products)
        return self._bound(table, self.scored_products)

    def item_rows(self, items: Tensor) -> Tensor:
        """:meth:`item_vectors` of ``items [...]`` alone, ``[..., d]``, for training."""
        if self.bind_output and self.binding is not None:
            table = self.item_embedding.weight if self.head is None else self.head.weight
            rows = F.embedding(items, table, sparse=self.sparse_embedding)
            return self.binding(rows, items, self.scored_products)
        table = self.item_vectors()
        return F.embedding(items, table, sparse=self.sparse_embedding and table.is_leaf)

    def _bound(self, table: Tensor, products: bool) -> Tensor:
        """``table`` bound with its items' attributes."""
        assert self.binding is not None
        binding = self.binding
        owner: nn.Module = self.item_embedding
        if self.head is not None and table is self.head.weight:
            owner = self.head

        def bound() -> Tensor:
            rows = torch.arange(len(table), device=table.device).split(ROWS)
            return torch.cat([binding(table[part], part, products) for part in rows])

        name = f"{'head' if owner is self.head else 'item'}, {'all' if products else 'roles'}"
        return self.folded(name, bound, owner, binding)

    def folded(self, name: str, make: Callable[[], Tensor], *modules: nn.Module) -> Tensor:
        """A table made of the parameters of ``modules``, kept until one of these changes or the mode is set.

        For evaluation mode only: PyTorch's fused optimizers change parameters without counting it as a change.
        """
        kept: dict[str, tuple[Watched, object, Tensor]] = self.__dict__.setdefault("_folded", {})
        known = kept.get(name)
        if known is None or known[1] != known[0].stamp():
            watched = Watched(*modules)
            known = kept[name] = watched, watched.stamp(), make()
        return known[2]

    def unfold(self) -> None:
        """Forgets the bound tables."""
        self.__dict__.pop("_folded", None)

    def attribute_report(self) -> dict[str, dict[str, float]]:
        """Of each bound attribute its weights and its share of an item's vector; see
        :meth:`~recbole_holo.layers.holographic.AttributeBinding.report`."""
        if self.binding is None:
            return {}
        items = torch.arange(1, self.n_items, device=self.item_embedding.weight.device)
        return self.binding.report(self.item_embedding.weight[1:], items)


def attribute_binding(config, attributes: list, d: int, item_std: float) -> AttributeBinding:
    """The binding that the settings ask for."""
    form = one_of("binding", config["binding"], FORMS)
    settings = {
        "algebra": one_of("binding_algebra", config["binding_algebra"] or "none", ALGEBRAS),
        # The paper's form as printed, which learns more so (results/initialisation.md); the others as its code does.
        "scale": one_of("binding_scale", config["binding_scale"] or ("none" if form == "item" else "ortho"), SCALES),
        "values": one_of("attribute_values", config["attribute_values"] or "mean", ATTRIBUTE_VALUES),
        "floats": one_of("attribute_floats", config["attribute_floats"] or "quantile", FLOATS),
    }
    alpha, std, width = (config[field] for field in ("binding_alpha", "attribute_range", "attribute_size"))
    if form == "concat" and settings["algebra"] == "unitary":
        raise ConfigError("binding_algebra", "unitary", "binding: concat binds nothing: use none, or another binding")
    if alpha is None:
        alpha = 0.5
    if not isinstance(alpha, (int, float)):
        raise ConfigError("binding_alpha", alpha, "use a number")
    if std is not None:
        std = positive_number("attribute_range", std)
    if width is not None:
        width = positive_int("attribute_size", width)
        if form != "concat":
            raise ConfigError("attribute_size", width, "only binding: concat has attributes of another width: use ~")
    return AttributeBinding(attributes, d, item_std, form, alpha=float(alpha), std=std, width=width, **settings)


def known(gaps: Tensor | None, items: Tensor) -> Tensor:
    """``gaps``, or those of ``items [...]`` of whose times nothing is known."""
    return torch.full_like(items, UNKNOWN) if gaps is None else gaps


def _item_std(n_items: int, d: int, std: float | None) -> float:
    """Standard deviation of items' vectors at the start: ``std``, None = that of :func:`item_table`'s Xavier."""
    return std or (2 / (n_items + d)) ** 0.5


def item_table(n_items: int, d: int, std: float | None) -> nn.Embedding:
    """Item embeddings drawn from N(0, std²), or Xavier-normal where std is None; the row of the pad is zero.

    No gradient ever reaches the pad row, so whatever is drawn over it would stay there.
    """
    table = nn.Embedding(n_items, d, padding_idx=0)
    if std is None:
        nn.init.xavier_normal_(table.weight)
    else:
        nn.init.normal_(table.weight, std=std)
    with torch.no_grad():
        table.weight[0].zero_()
    return table
