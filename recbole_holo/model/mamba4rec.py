"""Mamba4Rec: the published Mamba recommender that this package measures against (arXiv 2403.03900)."""

from __future__ import annotations

from torch import Tensor, nn

from recbole_holo.layers import Dropout, Mamba
from recbole_holo.layers.carried import Carried, through
from recbole_holo.layers.feed_forward import FeedForward
from recbole_holo.model.settings import positive_int, positive_number, probability
from recbole_holo.model.state_space import StateSpaceRecommender


class Mamba4Rec(StateSpaceRecommender):
    r"""``H = LayerNorm(Dropout(E[ids]))``, then Mamba layers with post-norm feed-forward, then a tied dot product.

    Structure, sizes and norms are those of the published code. It then draws every Linear and Embedding weight from
    N(0, 0.02²) and zeroes every Linear bias, the Δ bias of the Mamba block included. Here ``initializer_range`` does
    that for the item embedding and the feed-forward, and ``ssm_init`` says what becomes of the Mamba block: ``recbole``
    as published, ``official`` as mamba-ssm means it. One difference is kept: the pad row of the embedding stays zero.

    Config keys: ``hidden_size``, ``num_layers``, ``d_state``, ``d_conv``, ``expand``, ``ssm_init``, ``dropout_prob``,
    ``initializer_range``.
    """

    def __init__(self, config, dataset) -> None:
        super().__init__(config, dataset)
        d = positive_int("hidden_size", config["hidden_size"])

        self.make_items(config, dataset, d, positive_number("initializer_range", config["initializer_range"]))
        self.dropout = Dropout(probability("dropout_prob", config["dropout_prob"]))
        self.norm = nn.LayerNorm(d, eps=1e-12)
        self.layers = nn.ModuleList(
            Mamba4RecLayer(config) for _ in range(positive_int("num_layers", config["num_layers"]))
        )

    def encode_vectors(self, x: Tensor, carried: Carried | None = None) -> Tensor:
        h = self.norm(self.dropout(x))  # [B, L, d]
        for layer in self.layers:
            h = layer(h, carried)
        return h


class Mamba4RecLayer(nn.Module):
    """``h = LayerNorm(Dropout(Mamba(x)) [+ x])``, then ``LayerNorm(FFN(h) + h)``.

    The first residual is there in a stack of several layers only, as in the paper.
    """

    def __init__(self, config) -> None:
        super().__init__()
        d = config["hidden_size"]
        self.residual = config["num_layers"] > 1
        self.mamba = Mamba(
            d,
            d_state=config["d_state"],
            d_conv=config["d_conv"],
            expand=config["expand"],
            ssm_init=config["ssm_init"],
        )
        self.dropout = Dropout(config["dropout_prob"])
        self.mamba_norm = nn.LayerNorm(d, eps=1e-12)
        self.ffn = FeedForward(d, 4 * d, config["dropout_prob"], std=config["initializer_range"])
        self.ffn_norm = nn.LayerNorm(d, eps=1e-12)

    def forward(self, x: Tensor, carried: Carried | None = None) -> Tensor:
        h = self.dropout(through(self.mamba, x, carried))  # [B, L, d]
        h = self.mamba_norm(h + x if self.residual else h)
        return self.ffn_norm(self.ffn(h) + h)
