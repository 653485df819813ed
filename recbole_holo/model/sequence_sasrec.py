"""SequenceSASRec: RecBole's SASRec on fused attention and trained on whole sequences, as the other models are."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recbole_holo.errors import ConfigError
from recbole_holo.layers import Dropout
from recbole_holo.layers.feed_forward import SwiGLU, gated_width
from recbole_holo.model.base import SequenceRecommender
from recbole_holo.model.settings import one_of, positive_int, positive_number, probability
from recbole_holo.ops.feed_forward import FeedForwardWeights, feed_forward

NORMS = ("post", "pre")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "relu": F.relu,
    "swish": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
}
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class SequenceSASRec(SequenceRecommender):
    r"""``h_t = Dropout(LayerNorm(E[i_t] + P[t]))``, then causal Transformer layers, then a tied dot product.

    The architecture of RecBole's ``SASRec`` (Kang and McAuley, ICDM 2018, in BERT's post-norm form), parameter for
    parameter: a state dict of one loads into the other (``norm: post``), and the hidden state at every position is what
    RecBole's model gives for the prefix that ends there. What differs is ours:

    * training: one row a user with a loss at every position, instead of one row a prefix, and this package's losses,
      in which the pad is no rival of the target; RecBole's model lets it compete;
    * attention: ``scaled_dot_product_attention`` with a causal flag, instead of a matrix of scores and masks. Pads
      follow on the right, so causality alone hides them;
    * the pad row of the item embedding stays zero; RecBole draws it like the others. No real position reads it.

    With ``norm: pre`` each branch is normalised at its input and a LayerNorm follows the last layer, as in the authors'
    own code; that code also adds the branch to the *normalised* input and scales embeddings by √d, which is in neither
    form here. On a CPU the fused kernel takes no dropout: ``attn_dropout_prob`` above 0 trains on the plain form there.

    Config keys: ``n_layers``, ``n_heads``, ``hidden_size``, ``inner_size``, ``hidden_dropout_prob``,
    ``attn_dropout_prob``, ``hidden_act`` (gelu | relu | swish | tanh | sigmoid | swiglu: gated, without biases, as many
    parameters by :func:`~recbole_holo.layers.feed_forward.gated_width`), ``layer_norm_eps``, ``initializer_range``,
    ``norm`` (post | pre). ``MAX_ITEM_LIST_LENGTH`` positions are learned; a longer sequence is an error.
    """

    binds_attributes = True
    reads_event_time = True

    def __init__(self, config, dataset) -> None:
        super().__init__(config, dataset)
        d = positive_int("hidden_size", config["hidden_size"])
        std = positive_number("initializer_range", config["initializer_range"])
        eps = positive_number("layer_norm_eps", config["layer_norm_eps"])
        pre = one_of("norm", config["norm"], NORMS) == "pre"

        self.make_items(config, dataset, d, std)
        self.position_embedding = nn.Embedding(positive_int("MAX_ITEM_LIST_LENGTH", self.max_seq_length), d)
        self.LayerNorm = nn.LayerNorm(d, eps=eps)
        self.dropout = Dropout(probability("hidden_dropout_prob", config["hidden_dropout_prob"]))
        self.trm_encoder = TransformerEncoder(config)
        self.final_norm = nn.LayerNorm(d, eps=eps) if pre else nn.Identity()

        nn.init.normal_(self.position_embedding.weight, std=std)
        for module in self.trm_encoder.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=std)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        self._set_attention(config)

    def _set_attention(self, config) -> None:
        """Reads the settings of :meth:`attend`."""
        self.attn_dropout_prob = probability("attn_dropout_prob", config["attn_dropout_prob"])

    def attend(self, q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
        """Causal softmax attention: ``[B, L, heads, width]`` each, ``valid [B, L]`` (False = pad) → like ``q``."""
        dropout = self.attn_dropout_prob if self.training else 0.0
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True).transpose(1, 2)

    def embed(self, item_seq: Tensor, gaps: Tensor | None = None) -> Tensor:
        """``[B, L]`` → ``[B, L, d]``."""
        length = item_seq.shape[1]
        if length > self.max_seq_length:
            remedy = f"a sequence of {length} has positions beyond the learned table: raise it"
            raise ConfigError("MAX_ITEM_LIST_LENGTH", self.max_seq_length, remedy)
        positions = self.position_embedding(torch.arange(length, device=item_seq.device))
        return self.embed_events(item_seq, gaps) + positions

    def hidden_states(self, item_seq: Tensor, gaps: Tensor | None = None) -> Tensor:
        valid = item_seq > 0
        h = self.dropout(self.LayerNorm(self.embed(item_seq, gaps)))  # [B, L, d]
        h = self.trm_encoder(h, lambda q, k, v: self.attend(q, k, v, valid))
        return self.final_norm(h)


class TransformerEncoder(nn.Module):
    """``n_layers`` layers, one after the other."""

    def __init__(self, config) -> None:
        super().__init__()
        self.layer = nn.ModuleList(
            TransformerLayer(config) for _ in range(positive_int("n_layers", config["n_layers"]))
        )

    def forward(self, h: Tensor, attend: Attend) -> Tensor:
        """``[B, L, d]`` → ``[B, L, d]``; ``attend`` maps queries, keys and values ``[B, L, heads, width]``."""
        for layer in self.layer:
            h = layer(h, attend)
        return h


class TransformerLayer(nn.Module):
    """Attention, then feed-forward, each with its residual and norm."""

    def __init__(self, config) -> None:
        super().__init__()
        self.multi_head_attention = MultiHeadAttention(config)
        self.feed_forward = FeedForward(config)

    def forward(self, h: Tensor, attend: Attend) -> Tensor:
        return self.feed_forward(self.multi_head_attention(h, attend))


class MultiHeadAttention(nn.Module):
    """post: ``LayerNorm(h + Dropout(W_o attend(h)))``; pre: ``h + Dropout(W_o attend(LayerNorm(h)))``."""

    def __init__(self, config) -> None:
        super().__init__()
        d, self.n_heads = config["hidden_size"], positive_int("n_heads", config["n_heads"])
        if d % self.n_heads:
            raise ConfigError("n_heads", self.n_heads, f"it must divide hidden_size, {d}")
        self.pre = config["norm"] == "pre"
        self.query = nn.Linear(d, d)
        self.key = nn.Linear(d, d)
        self.value = nn.Linear(d, d)
        self.dense = nn.Linear(d, d)
        self.LayerNorm = nn.LayerNorm(d, eps=config["layer_norm_eps"])
        self.out_dropout = Dropout(config["hidden_dropout_prob"])

    def forward(self, h: Tensor, attend: Attend) -> Tensor:
        x = self.LayerNorm(h) if self.pre else h
        q, k, v = (project(x).unflatten(-1, (self.n_heads, -1)) for project in (self.query, self.key, self.value))
        h = h + self.out_dropout(self.dense(attend(q, k, v).flatten(-2)))
        return h if self.pre else self.LayerNorm(h)


class FeedForward(nn.Module):
    """post: ``LayerNorm(h + Dropout(W_2 act(W_1 h)))``; pre: ``h + Dropout(W_2 act(W_1 LayerNorm(h)))``.

    ``hidden_act: swiglu`` has a :class:`~recbole_holo.layers.feed_forward.SwiGLU` in the place of ``W_2 act(W_1 ·)``.
    """

    def __init__(self, config) -> None:
        super().__init__()
        d, inner = config["hidden_size"], positive_int("inner_size", config["inner_size"])
        self.pre = config["norm"] == "pre"
        self.hidden_act = one_of("hidden_act", config["hidden_act"], (*ACTIVATIONS, "swiglu"))
        if self.hidden_act == "swiglu":
            self.gated = SwiGLU(d, gated_width(inner))
        else:
            self.dense_1 = nn.Linear(d, inner)
            self.dense_2 = nn.Linear(inner, d)
        self.LayerNorm = nn.LayerNorm(d, eps=config["layer_norm_eps"])
        self.dropout = Dropout(config["hidden_dropout_prob"])

    def forward(self, h: Tensor) -> Tensor:
        """``[B, L, d]`` → ``[B, L, d]``."""
        x = self.LayerNorm(h) if self.pre else h
        h = h + self.dropout(self._inside(x))
        return h if self.pre else self.LayerNorm(h)

    def _inside(self, x: Tensor) -> Tensor:
        if self.hidden_act == "swiglu":
            return self.gated(x)
        up, down = self.dense_1, self.dense_2
        if self.hidden_act == "gelu":
            return feed_forward(x, FeedForwardWeights(up.weight, up.bias, down.weight, down.bias))
        return down(ACTIVATIONS[self.hidden_act](up(x)))
