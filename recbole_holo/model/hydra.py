"""Hydra: parallel latent Mamba-2 heads behind a rotary gate (arXiv 2504.07398)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import silu

from recbole_holo.errors import ConfigError
from recbole_holo.layers import Dropout, LatentMamba2
from recbole_holo.layers.carried import Carried, through
from recbole_holo.layers.feed_forward import SwiGLU
from recbole_holo.layers.prenorm import prenorm
from recbole_holo.layers.rope import Rotary
from recbole_holo.model.settings import positive_int, positive_number, probability
from recbole_holo.model.state_space import StateSpaceRecommender


class Hydra(StateSpaceRecommender):
    r"""``H¹ = RMSNorm(Dropout(E[ids]))``, then blocks of latent interaction and gated feed-forward, then a tied head.

    Every block splits one projection of its input into ``v`` latent heads of width ``d_c``, runs an independent
    Mamba-2 over each, and gates the result by a second projection that carries the position::

        X = SiLU(W_X H)  in v heads          Z = RoPE(SiLU(W_Z H))
        Y = concat_i Mamba2_i(X_i)           H ← H + W_O(Y ⊙ Z)
                                             H ← H + SwiGLU(RMSNorm(H))

    The cost is ``O(n·v·d_c²)``; it is below that of one wide head while ``v·d_c² < d²``. The paper advises
    ``d_c = d/4``, so up to 15 heads are cheaper.

    The paper (there is no official code) gives H¹, X, Z, Y, the gate ``Y ⊙ Z`` and a gated SiLU feed-forward, InfoNCE
    with one positive, 512 negatives and a temperature. Ours are: W_O and both residuals, the RMSNorm in front of X and
    Z of every block, dropout on the two branches, the final RMSNorm, RoPE turning each head's d_c coordinates, all
    sizes of Mamba-2, cosine similarity and its temperature 0.05, and the tied head.

    The gate carries *absolute* positions: the first item of the window has position 0 in training and evaluation.

    Config keys: ``hidden_size``, ``num_layers``, ``latent_heads`` (v), ``head_dim`` (d_c; ~ = hidden_size/4),
    ``d_state``, ``d_conv``, ``expand``, ``headdim``, ``chunk_size``, ``ssm_init``, ``rope_base``, ``inner_size``
    (~ = 2·hidden_size), ``dropout_prob``, ``final_norm``, ``initializer_range``.
    """

    def __init__(self, config, dataset) -> None:
        super().__init__(config, dataset)
        d = positive_int("hidden_size", config["hidden_size"])

        self.make_items(config, dataset, d, positive_number("initializer_range", config["initializer_range"]))
        self.dropout = Dropout(probability("dropout_prob", config["dropout_prob"]))
        self.norm = nn.RMSNorm(d, eps=1e-6)
        self.layers = nn.ModuleList(HydraBlock(config) for _ in range(positive_int("num_layers", config["num_layers"])))
        self.final_norm = nn.RMSNorm(d, eps=1e-6) if config["final_norm"] else nn.Identity()

    def encode_vectors(self, x: Tensor, carried: Carried | None = None) -> Tensor:
        h = self.norm(self.dropout(x))  # [B, L, d]
        for layer in self.layers:
            h = layer(h, carried)
        return self.final_norm(h)


class HydraBlock(nn.Module):
    """``H + Latent(RMSNorm(H))``, then ``H + SwiGLU(RMSNorm(H))``."""

    def __init__(self, config) -> None:
        super().__init__()
        d = config["hidden_size"]
        inner = 2 * d if config["inner_size"] is None else positive_int("inner_size", config["inner_size"])
        self.latent_norm = nn.RMSNorm(d, eps=1e-6)
        self.latent = LatentInteraction(config)
        self.ffn_norm = nn.RMSNorm(d, eps=1e-6)
        self.ffn = SwiGLU(d, inner, config["dropout_prob"])
        self.dropout = Dropout(config["dropout_prob"])

    def forward(self, h: Tensor, carried: Carried | None = None) -> Tensor:
        h = h + self.dropout(prenorm(self.latent_norm, lambda x: self.latent(x, carried), h))
        return h + prenorm(self.ffn_norm, self.ffn, h)


class LatentInteraction(nn.Module):
    """``W_O(concat_i Mamba2_i(SiLU(W_X H)_i) ⊙ RoPE(SiLU(W_Z H)))``, v heads of width d_c."""

    def __init__(self, config) -> None:
        super().__init__()
        d = config["hidden_size"]
        v, d_c = _head_sizes(config)
        self.heads = (v, d_c)
        self.rotary = Rotary(v, positive_number("rope_base", config["rope_base"]))
        self.w_x = nn.Linear(d, v * d_c, bias=False)
        self.w_z = nn.Linear(d, v * d_c, bias=False)
        self.mamba = LatentMamba2(
            v,
            d_c,
            d_state=config["d_state"],
            d_conv=config["d_conv"],
            expand=config["expand"],
            headdim=config["headdim"],
            chunk_size=config["chunk_size"],
            ssm_init=config["ssm_init"],
        )
        self.w_o = nn.Linear(v * d_c, d, bias=False)

    def forward(self, h: Tensor, carried: Carried | None = None) -> Tensor:
        """``[B, L, d]`` → ``[B, L, d]``."""
        x = silu(self.w_x(h)).unflatten(-1, self.heads)  # [B, L, v, d_c]
        z = silu(self.w_z(h)).unflatten(-1, self.heads)
        z = self.rotary(z, carried.position if carried else 0)
        y = through(self.mamba, x, carried)  # [B, L, v, d_c]
        return self.w_o((y * z).flatten(-2))


def _head_sizes(config) -> tuple[int, int]:
    """``(v, d_c)`` of the settings, or an error that names the setting which does not fit the others."""
    v, d, headdim = positive_int("latent_heads", config["latent_heads"]), config["hidden_size"], config["headdim"]
    if config["head_dim"] is None and d % 4:
        raise ConfigError("hidden_size", d, "head_dim defaults to a quarter of it: use a multiple of 4 or set head_dim")
    d_c = d // 4 if config["head_dim"] is None else positive_int("head_dim", config["head_dim"])
    if d_c % 2:
        raise ConfigError("head_dim", d_c, "RoPE turns pairs of coordinates: use an even width")
    inner = positive_int("expand", config["expand"]) * d_c
    if headdim is not None and inner % positive_int("headdim", headdim):
        raise ConfigError("headdim", headdim, f"it must divide expand * head_dim = {inner}")
    return v, d_c
