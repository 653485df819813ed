"""HoloMambaRec: holographic item-attribute binding in front of a stack of Mamba blocks (arXiv 2601.08360)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recbole_holo.layers import Dropout, Mamba
from recbole_holo.layers.carried import Carried, through
from recbole_holo.layers.prenorm import prenorm
from recbole_holo.model.settings import positive_int, probability
from recbole_holo.model.state_space import StateSpaceRecommender


class HoloMambaRec(StateSpaceRecommender):
    r"""``x_t = LayerNorm(e_item + Σ_m α_m·(e_item ⊛ e_attr,m))``, then pre-norm residual Mamba blocks, a linear head.

    The paper binds one attribute (eq. 1); here any number of them, in this form (``binding: item``) or in another
    (:class:`~recbole_holo.layers.holographic.AttributeBinding`). By default (ours) the encoder also reads the
    attributes bound with roles, ``x_t = LayerNorm(e_item + Σ_m α_m·(e_item ⊛ e_attr,m) + β_m·(r_m ⊛ e_attr,m))``, and
    items are scored with these terms and without the products with ``e_item``. A data set without ``item_attributes``
    trains the same model without binding.

    Where the paper and its code leave a choice: the head is untied without bias in the code and may be tied here; the
    code draws embeddings from N(0, 1), which with the orthonormal convolution keeps the bound term at unit variance and
    which a tied head cannot start from; dropout (none in the code) is ours.

    Config keys: ``hidden_size``, ``num_layers``, ``d_state``, ``d_conv``, ``expand``, ``ssm_init``, ``dropout_prob``,
    ``final_norm``, ``tie_weights``, ``initializer_range``, ``bundle_roles``, and those of attributes.
    """

    def __init__(self, config, dataset) -> None:
        super().__init__(config, dataset)
        d = positive_int("hidden_size", config["hidden_size"])
        layers = positive_int("num_layers", config["num_layers"])
        dropout = probability("dropout_prob", config["dropout_prob"])

        self.make_items(config, dataset, d, config["initializer_range"], bool(config["tie_weights"]))
        if config["bundle_roles"]:
            # The authors allocate roles for temporal bundling and never train them; kept for equal parameter counts.
            self.bundle_roles = nn.Parameter(torch.randn(config["bundle_roles"], d))
        self.norm = nn.LayerNorm(d)
        self.dropout = Dropout(dropout)
        self.layers = nn.ModuleList(PreNormMamba(config) for _ in range(layers))
        self.final_norm = nn.LayerNorm(d) if config["final_norm"] else nn.Identity()

    def encode_vectors(self, x: Tensor, carried: Carried | None = None) -> Tensor:
        h = self.dropout(self.norm(x))  # [B, L, d]
        for layer in self.layers:
            h = layer(h, carried)
        return self.final_norm(h)


class PreNormMamba(nn.Module):
    """``h + Dropout(Mamba(LayerNorm(h)))``."""

    def __init__(self, config) -> None:
        super().__init__()
        d = config["hidden_size"]
        self.norm = nn.LayerNorm(d)
        self.mamba = Mamba(
            d,
            d_state=config["d_state"],
            d_conv=config["d_conv"],
            expand=config["expand"],
            ssm_init=config["ssm_init"],
        )
        self.dropout = Dropout(config["dropout_prob"])

    def forward(self, h: Tensor, carried: Carried | None = None) -> Tensor:
        return h + self.dropout(prenorm(self.norm, lambda x: through(self.mamba, x, carried), h))
