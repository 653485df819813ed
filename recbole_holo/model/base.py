"""What every model of the package shares: the loss at every position, scoring, and what a position means."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import SequentialRecommender
from recbole.utils import InputType
from torch import Tensor, nn

from recbole_holo.data import GAPS, TARGETS_SUFFIX
from recbole_holo.data.event_time import event_time
from recbole_holo.data.histories import Seen, check_padding, histories_of
from recbole_holo.errors import ConfigError
from recbole_holo.layers.bundling import Layout
from recbole_holo.layers.carried import Carried
from recbole_holo.losses import make_loss
from recbole_holo.losses.base import Positions, SeenRivals
from recbole_holo.model.items import BoundItems
from recbole_holo.model.settings import one_of, positive_int
from recbole_holo.ops.losses import ItemVectors
from recbole_holo.ops.rows import select_rows

SIMILARITIES = ("dot", "cosine")
SEEN_ITEMS = ("kept", "excluded")
PREFIX_GROUPS = 8  # parts of a batch of prefixes, each of nearly one length


class SequenceRecommender(BoundItems, SequentialRecommender):
    """A causal encoder of item sequences with one scoring rule and one loss at every position.

    A model gives two things, and nothing else is needed of it:

    * :meth:`hidden_states`: ``item_seq [B, L]`` → hidden states ``[B, L, d]``; position ``t`` sees items ``0..t`` only;
    * :meth:`item_vectors`: the table ``[n_items, d]`` that hidden states are scored against; of a model that makes its
      items by :meth:`make_items`, that is given.

    A model whose layers carry a state says so with ``carries_state = True`` and takes it as a second argument of
    ``hidden_states``: it then reads a history in parts (:class:`~recbole_holo.layers.carried.Carried`,
    ``train_steps_at_once``).

    **Positions.** A history fills positions ``0..len-1`` and pads (id 0) follow on the right, in whole-sequence
    training, in last-position evaluation and in prefix training alike. Since encoders are causal, the hidden state at
    ``len-1`` is the same in all three, and pads cannot change it.

    **Training.** A batch of whole sequences carries ``<item>_target [B, L]``: the next item where that event is a
    training target, 0 elsewhere; the loss is the mean over all targets of the batch. A batch of prefixes (RecBole's
    form, ``train_on: prefixes``) carries one target a row, and the loss is taken at the last position.

    **Seen items.** With ``seen_items: excluded`` the loss at a position is about what the user has not met yet: the
    items of the user's history up to and with that position, also those before the window, are no rivals of the target
    (ours), neither in the softmax nor as sampled negatives; a target that was itself seen stays the target. The model
    then learns the ranking that a service shows, and nothing about repeats.

    **Losses.** ``loss_type`` names a file of :mod:`recbole_holo.losses`; another is added by ``register_loss``.

    **Large catalogues.** ``SampledCE`` estimates CE from ``num_negatives`` items; it is InfoNCE with the log-q
    correction on, and both read the settings of negatives. ``sparse_embedding`` makes the gradients of the item tables
    sparse (in training mode, for a lookup of any table of n_items rows and for the loss), so that a step costs what
    the items of its batch cost; an optimizer must know what to do with them (:mod:`recbole_holo.training.sparse`).

    **Item bias.** ``item_bias`` adds a learned number an item to its scores, ``s = query · item + b``, wherever there
    are scores; where the loss divides these by a temperature it divides b, too. It starts at 0, is not decayed, and
    stays 0 for the pad and, with ``cold_items: attributes``, for items without a part in training. Its gradient is
    dense, whatever ``sparse_embedding`` says.

    **Attributes.** A model that makes its items by :meth:`make_items` and reads them by :meth:`embed_items` has, where
    the setting ``binding`` says so, items bound with their attributes
    (:class:`~recbole_holo.layers.holographic.AttributeBinding`). In evaluation the bound vectors of all items are one
    table, computed once. ``bind_output`` binds the table of :meth:`item_vectors` too, with the same attributes
    (``added``: with the terms that the item is no factor of; products with it are the encoder's alone), so that items
    without events of their own are scored by what is known of them: with ``cold_items: attributes`` the items that
    never occur in training have no vector of their own, and no part in the loss.

    **Times.** With ``event_time`` the encoder reads, beside each item, when its event came: a batch has ``gap_list [B,
    L]``, and ``hidden_states`` takes it as the keyword ``gaps``
    (:class:`~recbole_holo.layers.event_time.EventTime`). A model that does so says ``reads_event_time = True``, and one
    that reads its items by :meth:`embed_events` has no more to do.

    Config keys: ``loss_type`` (CE | BPR | BCE | gBCE | InfoNCE | SampledCE), ``similarity`` (dot | cosine),
    ``temperature`` (float), ``learn_temperature`` (bool), ``item_bias`` (bool), ``seen_items`` (kept | excluded),
    ``sparse_embedding`` (bool), and those of the loss. Of attributes: ``binding`` (~ | item | role | both | triple |
    add | concat), ``binding_algebra`` (none | unitary), ``binding_scale`` (ortho | none | ~), ``binding_alpha``
    (float), ``bind_output`` (bool | added), ``cold_items`` (train | attributes), ``attribute_values`` (mean | first),
    ``attribute_floats`` (quantile | learned), ``attribute_range`` (float), ``attribute_size`` (int). Of times:
    ``event_time`` (~ | gap | request), ``event_time_form`` (add | role), ``event_time_buckets`` (int).
    """

    input_type = InputType.POINTWISE  # negatives, where a loss needs them, are drawn by the model
    carries_state = False  # whether hidden_states takes what is carried from one part of a sequence to the next
    binds_attributes = False  # whether it reads item attributes where the setting ``binding`` says how
    bundles_events = False  # whether it knows the setting ``bundle_size``
    reads_event_time = False  # whether hidden_states takes what ``event_time`` asks for

    def __init__(self, config, dataset) -> None:
        super().__init__(config, dataset)
        self.cosine = one_of("similarity", config["similarity"] or "dot", SIMILARITIES) == "cosine"
        self.excludes_seen = one_of("seen_items", config["seen_items"] or "kept", SEEN_ITEMS) == "excluded"
        self.ITEM_TARGETS = self.ITEM_ID + TARGETS_SUFFIX

        temperature = 1.0 if config["temperature"] is None else float(config["temperature"])
        if not temperature > 0:
            raise ConfigError("temperature", temperature, "use a number above 0, such as 0.05")
        log_temperature = torch.tensor(temperature).log()
        if config["learn_temperature"]:
            self.log_temperature = nn.Parameter(log_temperature)
            self.log_temperature._no_weight_decay = True  # type: ignore[attr-defined]
        else:
            self.register_buffer("log_temperature", log_temperature, persistent=False)
        self.tempered = bool(config["learn_temperature"]) or temperature != 1
        self.item_bias: nn.Parameter | None = None
        if config["item_bias"] not in (None, False, True):
            raise ConfigError("item_bias", config["item_bias"], "use True or False")
        if config["item_bias"]:
            self.item_bias = nn.Parameter(torch.zeros(self.n_items))
            self.item_bias._no_weight_decay = True  # type: ignore[attr-defined]
        self.served = self.event_time = self.binding = self.head = None
        self.bind_output = self.scored_products = False
        if event_time(config) and not self.reads_event_time:
            remedy = f"{type(self).__name__} reads no times: leave it at ~"
            raise ConfigError("event_time", config["event_time"], remedy)
        self.find_trained_items(config, dataset)
        self.criterion = make_loss(config, dataset, self.ITEM_ID, self.trained_items)
        if config["train_steps_at_once"] is not None:
            positive_int("train_steps_at_once", config["train_steps_at_once"])
            if not self.carries_state:
                remedy = f"{type(self).__name__} sees a whole history at once and carries no state: leave it at ~"
                raise ConfigError("train_steps_at_once", config["train_steps_at_once"], remedy)
        if (config["bundle_size"] or 1) != 1 and not self.bundles_events:
            raise ConfigError("bundle_size", config["bundle_size"], f"{type(self).__name__} bundles no events: use 1")
        self.sparse_embedding = bool(config["sparse_embedding"])
        if self.sparse_embedding and self.criterion.reads_whole_table:
            remedy = (
                f"{config['loss_type']} gives every item a gradient; with loss_type SampledCE only a batch's have one"
            )
            raise ConfigError("sparse_embedding", True, remedy)

    def train(self, mode: bool = True) -> SequenceRecommender:
        """As of any module; the item tables' lookups get the kind of gradient that ``sparse_embedding`` says."""
        self.unfold()
        for module in self.modules():
            if isinstance(module, nn.Embedding) and module.num_embeddings == self.n_items:
                module.sparse = self.sparse_embedding
        return super().train(mode)

    # ------------------------------------------------------------------ what a model gives
    def hidden_states(self, item_seq: Tensor) -> Tensor:
        """Hidden states at every position: ``item_seq [B, L]`` (0 = pad, on the right) → ``[B, L, d]``."""
        raise NotImplementedError

    def token_states(self, item_seq: Tensor, gaps: Tensor | None = None) -> tuple[Tensor, Layout | None]:
        """The hidden states there are ``[B, T, d]``, and where the positions' are among them (None: in their places).

        :meth:`hidden_states` without the copies for positions that nobody asks for, where T is less than L.
        """
        times = {} if gaps is None else {"gaps": gaps}  # models without event_time need not take any
        return self.hidden_states(item_seq, **times), None

    def times_of(self, interaction: Interaction) -> dict[str, Tensor]:
        """What :meth:`hidden_states` reads of a batch beside its items: ``gaps [B, L]``, or nothing."""
        return {} if self.event_time is None else {"gaps": interaction[GAPS]}

    # ------------------------------------------------------------------ RecBole's interface
    def forward(self, item_seq: Tensor, item_seq_len: Tensor, gaps: Tensor | None = None) -> Tensor:
        """The hidden state after the last item of each history: ``[B, L]``, ``[B]`` → ``[B, d]``."""
        hidden, layout = self.token_states(item_seq, gaps)
        last = item_seq_len - 1
        return self.gather_indexes(hidden, last if layout is None else layout.token_of.gather(1, last[:, None])[:, 0])

    def item_seq_of(self, interaction: Interaction) -> Tensor:
        """The histories of a batch ``[B, L]``. What does not come from this package's data sets is looked at first.

        Raises:
            DataError: they are padded on the left, or not as long as the batch says.
        """
        item_seq = interaction[self.ITEM_SEQ]
        if getattr(interaction, "histories", None) is None:
            known = self.ITEM_SEQ_LEN in interaction
            lengths = interaction[self.ITEM_SEQ_LEN] if known else None
            check_padding(item_seq, lengths, (self.ITEM_SEQ, self.ITEM_SEQ_LEN))
        return item_seq

    def calculate_loss(self, interaction: Interaction) -> Tensor:
        item_seq, times = self.item_seq_of(interaction), self.times_of(interaction)
        if self.ITEM_TARGETS in interaction:
            targets = interaction[self.ITEM_TARGETS].flatten()  # [B·L]
            n_targets = getattr(interaction, "n_targets", None)  # known to the loader of whole sequences
            hidden, layout = self.token_states(item_seq, **times)
            if layout is None and n_targets == len(targets):  # full windows: nothing to select, and no copy to keep
                where = torch.arange(n_targets, device=targets.device)
                return self.loss(hidden.flatten(0, 1), targets, self._seen(interaction, where))
            where = positions_of(targets > 0, n_targets)
            states = select_rows(hidden.flatten(0, 1), where) if layout is None else layout.select(hidden, where)
            return self.loss(states, targets.index_select(0, where), self._seen(interaction, where))
        # Prefixes have all lengths, and a pad costs as much as an item: the loss of the rows, in order of length.
        lengths, order = interaction[self.ITEM_SEQ_LEN].sort()
        size = -(-len(order) // PREFIX_GROUPS)
        groups = zip(order.split(size), lengths.split(size), strict=True)
        parts = []
        for rows, own in groups:
            part = {name: values[rows, : int(own[-1])] for name, values in times.items()}
            parts.append(self.forward(item_seq[rows, : int(own[-1])], own, **part))
        hidden = torch.cat(parts)
        seen = self._seen(interaction, order * item_seq.shape[1] + lengths - 1)
        return self.loss(hidden, interaction[self.POS_ITEM_ID][order], seen)

    def _seen(self, interaction: Interaction, where: Tensor) -> Seen | None:
        """What the loss leaves out at the places ``where [M]`` = row · L + position of a batch; None: nothing."""
        if not self.excludes_seen:
            return None
        item_seq = interaction[self.ITEM_SEQ]
        width = item_seq.shape[1]
        return histories_of(interaction, item_seq, self.n_items).at(where // width, where % width)

    def losses_in_parts(self, interaction: Interaction, steps: int) -> Iterator[Tensor]:
        """:meth:`calculate_loss` in terms that add up to it, each over the next ``steps`` positions of the batch.

        The layers carry their state from part to part, so the hidden states are those of the whole; no gradient passes
        from a part to the one before: truncated back-propagation through time. Differentiated one by one, the terms
        need the memory of one part, however long the histories are.
        """
        item_seq, targets = self.item_seq_of(interaction), interaction[self.ITEM_TARGETS]
        parts = targets.split(steps, 1)
        counts = torch.stack([(part > 0).sum() for part in parts]).tolist()  # a GPU is waited for once a batch
        carried, width, times = Carried(), item_seq.shape[1], self.times_of(interaction)
        for i, (items, wanted, count) in enumerate(zip(item_seq.split(steps, 1), parts, counts, strict=True)):
            part = {name: values[:, i * steps : (i + 1) * steps] for name, values in times.items()}
            with torch.set_grad_enabled(count > 0):
                hidden = self.hidden_states(items, carried, **part)  # type: ignore[call-arg]
            if count:
                where = positions_of(wanted.flatten() > 0, count)
                row, step = where // items.shape[1], where % items.shape[1]
                seen = self._seen(interaction, row * width + carried.position + step)
                states, targets = select_rows(hidden.flatten(0, 1), where), wanted.flatten().index_select(0, where)
                yield self.loss(states, targets, seen) * (count / sum(counts))
            carried.position += items.shape[1]

    def last_states(self, interaction: Interaction) -> Tensor:
        """:meth:`forward` of a batch: ``[B, d]``."""
        times = self.times_of(interaction)
        return self.forward(self.item_seq_of(interaction), interaction[self.ITEM_SEQ_LEN], **times)

    def predict(self, interaction: Interaction) -> Tensor:
        return self.score_pairs(self.last_states(interaction), interaction[self.ITEM_ID])

    def full_sort_predict(self, interaction: Interaction) -> Tensor:
        return self.score_all(self.last_states(interaction))

    # ------------------------------------------------------------------ scoring and loss
    def _query(self, hidden: Tensor) -> Tensor:
        return F.normalize(hidden, dim=-1) if self.cosine else hidden

    def _table(self, vectors: Tensor) -> Tensor:
        return F.normalize(vectors, dim=-1) if self.cosine else vectors

    def scored_table(self) -> Tensor:
        """:meth:`item_vectors` as scores take them: of length 1 where they are cosines."""
        if not self.cosine or self.training or torch.is_grad_enabled():
            return self._table(self.item_vectors())
        return self.folded("cosine", lambda: self._table(self.item_vectors()), self)

    def score_all(self, hidden: Tensor) -> Tensor:
        """Scores of every item: ``[B, d]`` → ``[B, n_items]``. The temperature is left out: it orders nothing."""
        if self.served is not None:
            return self.served.scored.scores(self._query(hidden), self.item_bias)
        return F.linear(self._query(hidden), self.scored_table(), self.item_bias)

    def score_pairs(self, hidden: Tensor, items: Tensor) -> Tensor:
        """Score of one item a row: ``[B, d]``, ``[B]`` → ``[B]``."""
        vectors = self.scored_table()[items] if self.served is None else self.served.scored(items)
        scores = (self._query(hidden) * vectors).sum(-1)
        return scores if self.item_bias is None else scores + self.item_bias[items]

    def loss(self, hidden: Tensor, targets: Tensor, seen: Seen | None = None) -> Tensor:
        """Mean loss over supervised positions: ``hidden [M, d]``, ``targets [M]`` → scalar.

        Args:
            seen: what the user of each position had seen, in the same order; it is left out of what the target is
                compared with. None: nothing is left out.
        """
        known = self.trained_items
        bias: Tensor | None = self.item_bias
        if known is not None:  # nobody knows the others yet
            targets, bias = self.trained_number[targets], None if bias is None else bias[known]
        if targets.numel() == 0:  # with a gradient of the table, so that processes agree on what they average
            return (hidden.sum() + self.item_rows(targets).sum()) * 0.0
        positions = Positions(
            hidden,
            targets,
            n_rivals=self.n_items if known is None else len(known),
            cosine=self.cosine,
            temperature=self.log_temperature.exp() if self.tempered else None,
            bias=bias,
            seen=None if seen is None else SeenRivals(seen, known, None if known is None else self.trained_number),
            table=lambda: self._table(self._trained_vectors()),
            vectors_for=self._vectors_for,
        )
        return self.criterion(positions)

    def _trained_vectors(self) -> Tensor:
        """:meth:`item_vectors` of the trained items alone, numbered as in the loss."""
        table = self.item_vectors()
        return table if self.trained_items is None else table.index_select(0, self.trained_items)

    def _vectors_for(self, wanted: int) -> tuple[ItemVectors, bool]:
        """What a loss takes the vectors of ``wanted`` items from, the trained items numbered as in the loss, and
        whether the gradient is sparse: the table, or where it is bound and large, what binds these items alone."""
        known = self.trained_items
        if self.bind_output and wanted < (self.n_items if known is None else len(known)):
            return lambda items: self.item_rows(items if known is None else known[items]), False
        table = self._trained_vectors()
        return table, self.sparse_embedding and table.is_leaf  # where a table is computed, its gradient is passed on


def positions_of(mask: Tensor, count: int | None) -> Tensor:
    """Where ``mask [n]`` is True: ``[count]``, ascending; as nonzero, but a known ``count`` is not asked of a GPU."""
    up_to = mask.cumsum(0)
    count = int(up_to[-1]) if count is None else count
    return torch.searchsorted(up_to, torch.arange(1, count + 1, device=mask.device))
