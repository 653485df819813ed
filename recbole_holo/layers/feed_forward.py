"""Position-wise feed-forward layers: the gated one of Hydra, and the plain one of the Transformer-like models."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recbole_holo.layers.dropout import Dropout
from recbole_holo.ops.feed_forward import FeedForwardWeights, feed_forward, is_small


def gated_width(inner: int) -> int:
    """The width inside a :class:`SwiGLU` with the parameters of a plain layer of width ``inner``.

    Its three matrices are two thirds as wide as the plain layer's two (Shazeer, arXiv 2002.05202), here to the nearest
    multiple of 16, at least 16, which fills the vectors of every processor: 256 gives 176, whose parameters are 2 %
    more than those of the plain layer with its biases.
    """
    return max(round(inner / 24), 1) * 16


class SwiGLU(nn.Module):
    """``Dropout(W_down(SiLU(W_gate x) ⊙ W_up x))`` without biases (Shazeer, arXiv 2002.05202).

    Args:
        d: width of input and output.
        inner: width between the projections.
        dropout: on the output.
        inner_dropout: in front of W_down.
    """

    def __init__(self, d: int, inner: int, dropout: float = 0.0, inner_dropout: float = 0.0) -> None:
        super().__init__()
        self.gate = nn.Linear(d, inner, bias=False)
        self.up = nn.Linear(d, inner, bias=False)
        self.down = nn.Linear(inner, d, bias=False)
        self.dropout, self.inner_dropout = Dropout(dropout), Dropout(inner_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., d]`` → ``[..., d]``."""
        if is_small(x):
            return self.dropout(self.down(self.inner_dropout(F.silu(self.gate(x)) * self.up(x))))
        weights = FeedForwardWeights(torch.cat([self.gate.weight, self.up.weight]), None, self.down.weight, None)
        p = self.inner_dropout.p if self.training else 0.0
        return self.dropout(feed_forward(x, weights, gated=True, p=p))


class FeedForward(nn.Module):
    """``Dropout(W_2 Dropout(GELU(W_1 x)))`` with biases.

    Args:
        d: width of input and output.
        inner: width between the projections.
        dropout: after the activation and on the output.
        std: draw the weights from N(0, std²) and start the biases at zero; None keeps PyTorch's initialisation.
    """

    def __init__(self, d: int, inner: int, dropout: float = 0.0, std: float | None = None) -> None:
        super().__init__()
        self.w_1 = nn.Linear(d, inner)
        self.w_2 = nn.Linear(inner, d)
        self.dropout = Dropout(dropout)
        if std is not None:
            for linear in (self.w_1, self.w_2):
                nn.init.normal_(linear.weight, std=std)
                nn.init.zeros_(linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., d]`` → ``[..., d]``."""
        weights = FeedForwardWeights(self.w_1.weight, self.w_1.bias, self.w_2.weight, self.w_2.bias)
        return self.dropout(feed_forward(x, weights, p=self.dropout.p if self.training else 0.0))
