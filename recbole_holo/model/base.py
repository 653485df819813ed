"""What every model of the package shares: the loss at every position, scoring, and what a position means."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from recbole.data.interaction import Interaction
from recbole.model.abstract_recommender import SequentialRecommender
from recbole.utils import InputType
from torch import Tensor, nn

from recbole_holo.data import TARGETS_SUFFIX
from recbole_holo.errors import ConfigError, nearest
from recbole_holo.ops import losses

LOSSES = ("CE", "BPR", "BCE", "InfoNCE")
SIMILARITIES = ("dot", "cosine")


class SequenceRecommender(SequentialRecommender):
    """A causal encoder of item sequences with one scoring rule and one loss at every position.

    A model gives two things, and nothing else is needed of it:

    * :meth:`encode`: ``item_seq [B, L]`` → hidden states ``[B, L, d]``; position ``t`` sees items ``0..t`` only;
    * :meth:`item_vectors`: the table ``[n_items, d]`` that hidden states are scored against.

    **Positions.** A history fills positions ``0..len-1`` and pads (id 0) follow on the right, in whole-sequence
    training, in last-position evaluation and in prefix training alike. Since encoders are causal, the hidden state at
    ``len-1`` is the same in all three, and pads cannot change it.

    **Training.** A batch of whole sequences carries ``<item>_target [B, L]``: the next item where that event is a
    training target, 0 elsewhere; the loss is the mean over all targets of the batch. A batch of prefixes (RecBole's
    form, ``train_on: prefixes``) carries one target a row, and the loss is taken at the last position.

    Config keys: ``loss_type`` (CE | BPR | BCE | InfoNCE), ``similarity`` (dot | cosine), ``temperature`` (float),
    ``learn_temperature`` (bool), ``num_negatives`` (int, InfoNCE: shared by the batch).
    """

    input_type = InputType.POINTWISE  # negatives, where a loss needs them, are drawn by the model
    item_bias: Tensor | None = None

    def __init__(self, config, dataset) -> None:
        super().__init__(config, dataset)
        self.loss_type = one_of("loss_type", config["loss_type"], LOSSES)
        self.cosine = one_of("similarity", config["similarity"] or "dot", SIMILARITIES) == "cosine"
        self.num_negatives = config["num_negatives"]
        self.ITEM_TARGETS = self.ITEM_ID + TARGETS_SUFFIX

        temperature = 1.0 if config["temperature"] is None else float(config["temperature"])
        if not temperature > 0:
            raise ConfigError("temperature", temperature, "use a number above 0, such as 0.05")
        log_temperature = torch.tensor(temperature).log()
        if config["learn_temperature"]:
            self.log_temperature = nn.Parameter(log_temperature)
        else:
            self.register_buffer("log_temperature", log_temperature, persistent=False)
        if self.loss_type == "InfoNCE" and not (isinstance(self.num_negatives, int) and self.num_negatives > 0):
            raise ConfigError("num_negatives", self.num_negatives, "InfoNCE needs a positive integer, such as 512")

    # ------------------------------------------------------------------ what a model gives
    def encode(self, item_seq: Tensor) -> Tensor:
        """Hidden states at every position: ``item_seq [B, L]`` (0 = pad, on the right) → ``[B, L, d]``."""
        raise NotImplementedError

    def item_vectors(self) -> Tensor:
        """The table ``[n_items, d]`` that hidden states are scored against."""
        raise NotImplementedError

    # ------------------------------------------------------------------ RecBole's interface
    def forward(self, item_seq: Tensor, item_seq_len: Tensor) -> Tensor:
        """The hidden state after the last item of each history: ``[B, L]``, ``[B]`` → ``[B, d]``."""
        return self.gather_indexes(self.encode(item_seq), item_seq_len - 1)

    def calculate_loss(self, interaction: Interaction) -> Tensor:
        item_seq = interaction[self.ITEM_SEQ]
        if self.ITEM_TARGETS in interaction:
            targets = interaction[self.ITEM_TARGETS]  # [B, L]
            supervised = targets > 0
            return self.loss(self.encode(item_seq)[supervised], targets[supervised])
        return self.loss(self.forward(item_seq, interaction[self.ITEM_SEQ_LEN]), interaction[self.POS_ITEM_ID])

    def predict(self, interaction: Interaction) -> Tensor:
        hidden = self.forward(interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN])
        return self.score_pairs(hidden, interaction[self.ITEM_ID])

    def full_sort_predict(self, interaction: Interaction) -> Tensor:
        return self.score_all(self.forward(interaction[self.ITEM_SEQ], interaction[self.ITEM_SEQ_LEN]))

    # ------------------------------------------------------------------ scoring and loss
    def _query(self, hidden: Tensor) -> Tensor:
        return F.normalize(hidden, dim=-1) if self.cosine else hidden

    def _table(self) -> Tensor:
        table = self.item_vectors()
        return F.normalize(table, dim=-1) if self.cosine else table

    def score_all(self, hidden: Tensor) -> Tensor:
        """Scores of every item: ``[B, d]`` → ``[B, n_items]``. The temperature is left out: it orders nothing."""
        return F.linear(self._query(hidden), self._table(), self.item_bias)

    def score_pairs(self, hidden: Tensor, items: Tensor) -> Tensor:
        """Score of one item a row: ``[B, d]``, ``[B]`` → ``[B]``."""
        scores = (self._query(hidden) * self._table()[items]).sum(-1)
        return scores if self.item_bias is None else scores + self.item_bias[items]

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Mean loss over supervised positions: ``hidden [M, d]``, ``targets [M]`` → scalar."""
        if targets.numel() == 0:
            return hidden.sum() * 0.0
        temperature = self.log_temperature.exp()
        if self.loss_type == "InfoNCE":
            negatives = losses.sample_negatives((self.num_negatives,), self.n_items, targets.device)
            table = self.item_vectors()
            return losses.info_nce(hidden, targets, table, negatives, self.item_bias, temperature, self.cosine)
        query, table = self._query(hidden) / temperature, self._table()
        if self.loss_type == "CE":
            # The pad is never a target; as a rival it would train its row away from zero.
            return losses.cross_entropy(query, targets, table, self.item_bias, exclude_pad=True)
        negatives = losses.sample_negatives(targets.shape, self.n_items, targets.device, exclude=targets)
        pairwise = losses.bpr if self.loss_type == "BPR" else losses.bce
        return pairwise(query, targets, negatives, table, self.item_bias)


def one_of(field: str, value: str, allowed: tuple[str, ...]) -> str:
    """``value`` if it is allowed, else an error that names ``field``."""
    if value not in allowed:
        raise ConfigError(field, value, nearest(value, allowed))
    return value


def positive_int(field: str, value: int) -> int:
    """``value`` if it is an integer above 0, else an error that names ``field``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(field, value, "use an integer above 0")
    return value


def positive_number(field: str, value: float) -> float:
    """``value`` if it is a number above 0, else an error that names ``field``."""
    if not isinstance(value, (int, float)) or not value > 0:
        raise ConfigError(field, value, "use a number above 0")
    return float(value)


def probability(field: str, value: float) -> float:
    """``value`` if it is in [0, 1), else an error that names ``field``."""
    if not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ConfigError(field, value, "use a number from 0 up to, not including, 1")
    return float(value)


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
