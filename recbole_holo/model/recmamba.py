"""RecMamba: Mamba in place of the Transformer layer, for lifelong sequences (arXiv 2403.16371)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recbole_holo.errors import ConfigError
from recbole_holo.layers import Dropout, Mamba
from recbole_holo.layers.carried import Carried, through
from recbole_holo.layers.feed_forward import FeedForward, SwiGLU, gated_width
from recbole_holo.layers.prenorm import prenorm
from recbole_holo.model.settings import one_of, positive_int, positive_number, probability
from recbole_holo.model.state_space import StateSpaceRecommender

NORMS = ("none", "pre", "post")
POSITIONS = ("none", "learned")
EMBEDDING_INITS = ("normal", "xavier")
ACTIVATIONS = ("gelu", "swiglu")


class RecMamba(StateSpaceRecommender):
    r"""``x_t = Dropout(√d·E[i_t] + P[t])``, then Mamba layers, then a tied dot product.

    The authors' model is one bare Mamba: no residual, no norm, no feed-forward, and a learned position table
    (RecMamba_paper.yaml). The parts of a Transformer layer that it leaves out are settings here. With ``norm: pre`` the
    last layer is followed by a LayerNorm, as in every pre-norm stack; position 0 is the first item of the window, where
    the authors pad on the left and so count from the end of the window.

    A learned position table has MAX_ITEM_LIST_LENGTH rows. A longer sequence is an error, never a clipped position;
    with ``position_embedding: none`` any length is accepted. In stepping, where a history has no end, the events beyond
    the table all have its last position, which no training has shown the model: leave positions out of what is stepped.

    Config keys: ``hidden_size``, ``num_layers``, ``d_state``, ``d_conv``, ``expand``, ``ssm_init``, ``residual``,
    ``norm`` (none | pre | post), ``ffn``, ``inner_size`` (~ = 4·hidden_size), ``hidden_act`` (gelu | swiglu: gated, as
    many parameters by :func:`~recbole_holo.layers.feed_forward.gated_width`), ``position_embedding`` (none | learned),
    ``scale_embedding``, ``embedding_init`` (normal | xavier), ``initializer_range`` (normal), ``dropout_prob``,
    ``layer_dropout_prob``.
    """

    def __init__(self, config, dataset) -> None:
        super().__init__(config, dataset)
        d = positive_int("hidden_size", config["hidden_size"])
        xavier = one_of("embedding_init", config["embedding_init"], EMBEDDING_INITS) == "xavier"
        std = None if xavier else positive_number("initializer_range", config["initializer_range"])

        self.make_items(config, dataset, d, std)
        self.scale = d**0.5 if config["scale_embedding"] else 1.0
        self.position_embedding: nn.Parameter | None = None
        if one_of("position_embedding", config["position_embedding"], POSITIONS) == "learned":
            rows = positive_int("MAX_ITEM_LIST_LENGTH", config["MAX_ITEM_LIST_LENGTH"])
            table = torch.empty(rows, d)
            self.position_embedding = nn.Parameter(
                nn.init.xavier_normal_(table) if std is None else nn.init.normal_(table, std=std)
            )
        self.dropout = Dropout(probability("dropout_prob", config["dropout_prob"]))
        self.layers = nn.ModuleList(
            RecMambaLayer(config) for _ in range(positive_int("num_layers", config["num_layers"]))
        )
        self.final_norm = nn.LayerNorm(d) if config["norm"] == "pre" else nn.Identity()

    def embed(self, x: Tensor, start: int | Tensor = 0) -> Tensor:
        """``[B, L, d]`` at positions ``start``…, of all rows or of each ``[B]``, → scaled, with positions."""
        x = self.scale * x
        if self.position_embedding is None:
            return x
        rows = self.position_embedding.shape[0]
        if isinstance(start, Tensor):
            position = start.unsqueeze(-1) + torch.arange(x.shape[1], device=x.device)
            return x + F.embedding(position.clamp(max=rows - 1), self.position_embedding)
        end = start + x.shape[1]
        if end > rows:
            remedy = (
                f"a sequence of {end} has positions beyond the learned table: raise it, or position_embedding: none"
            )
            raise ConfigError("MAX_ITEM_LIST_LENGTH", rows, remedy)
        return x + self.position_embedding[start:end]

    def encode_vectors(self, x: Tensor, carried: Carried | None = None) -> Tensor:
        h = self.dropout(self.embed(x, carried.position if carried else 0))  # [B, L, d]
        for layer in self.layers:
            h = layer(h, carried)
        return self.final_norm(h)


class RecMambaLayer(nn.Module):
    """Mamba and, if wanted, a feed-forward; each with the residual and the norm that the settings ask for."""

    def __init__(self, config) -> None:
        super().__init__()
        d, dropout = config["hidden_size"], probability("layer_dropout_prob", config["layer_dropout_prob"])
        inner = 4 * d if config["inner_size"] is None else positive_int("inner_size", config["inner_size"])
        self.residual = bool(config["residual"])
        self.norm_place = one_of("norm", config["norm"], NORMS)
        self.mamba = Mamba(
            d,
            d_state=config["d_state"],
            d_conv=config["d_conv"],
            expand=config["expand"],
            ssm_init=config["ssm_init"],
        )
        self.mamba_norm = nn.Identity() if self.norm_place == "none" else nn.LayerNorm(d)
        self.dropout = Dropout(dropout)
        gated = one_of("hidden_act", config["hidden_act"] or "gelu", ACTIVATIONS) == "swiglu"
        self.ffn: nn.Module | None = None
        if config["ffn"]:
            self.ffn = SwiGLU(d, gated_width(inner), dropout, dropout) if gated else FeedForward(d, inner, dropout)
        self.ffn_norm = nn.LayerNorm(d) if config["ffn"] and self.norm_place != "none" else nn.Identity()

    def forward(self, h: Tensor, carried: Carried | None = None) -> Tensor:
        """``[B, L, d]`` → ``[B, L, d]``."""
        h = self._around(h, lambda x: self.dropout(through(self.mamba, x, carried)), self.mamba_norm)
        return h if self.ffn is None else self._around(h, self.ffn, self.ffn_norm)

    def _around(self, h: Tensor, branch: Callable[[Tensor], Tensor], norm: nn.Module) -> Tensor:
        """none: ``[h +] f(h)``; pre: ``[h +] f(norm(h))``; post: ``norm([h +] f(h))``."""
        out = prenorm(norm, branch, h) if self.norm_place == "pre" else branch(h)
        if self.residual:
            out = h + out
        return norm(out) if self.norm_place == "post" else out
