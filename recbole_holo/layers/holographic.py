"""Holographic reduced representations as layers: attribute vectors and their binding to items."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from recbole_holo.data.attributes import ItemAttribute
from recbole_holo.ops.circular_convolution import bind

ATTRIBUTE_VALUES = ("mean", "first")


class AttributeEmbedding(nn.Module):
    """Vectors of one item attribute, looked up by item id.

    Args:
        attribute: index table ``[n_items]`` or, for several values an item, ``[n_items, K]``; 0 = pad or missing.
        d_model: width of the vectors.
        values: what several values become: their ``mean`` (ours) or the ``first`` one (HoloMambaRec's authors use
            the first genre).

    An item without values, and the pad, get the zero vector.
    """

    index: Tensor

    def __init__(self, attribute: ItemAttribute, d_model: int, values: str = "mean") -> None:
        super().__init__()
        index = attribute.index
        if values == "first" and index.dim() == 2:
            index = index[:, 0]
        # The table follows the data set, not the training: it moves with the module and stays out of checkpoints.
        self.register_buffer("index", index, persistent=False)
        self.embedding = nn.Embedding(attribute.n_values, d_model, padding_idx=0)

    def forward(self, items: Tensor) -> Tensor:
        """``items [...]`` → ``[..., d_model]``."""
        value = self.index[items]
        if self.index.dim() == 1:
            return self.embedding(value)
        count = (value > 0).sum(-1, keepdim=True).clamp(min=1)
        return self.embedding(value).sum(-2) / count  # pads of the value list embed to zero


class HolographicBinding(nn.Module):
    r"""``x = e_item + α · (e_item ⊛ e_attr)``, α learnable (HoloMambaRec, eq. 1; α starts at 0.5 in the authors' code).

    Args:
        scale: ``ortho`` scales all three transforms orthonormally, i.e. (1/√d)·convolution, as the authors' code does;
            ``none`` is the formula as printed, whose bound term is √d larger.
    """

    def __init__(self, scale: str = "ortho", alpha: float = 0.5) -> None:
        super().__init__()
        self.scale = scale
        self.alpha = nn.Parameter(torch.tensor(float(alpha)))

    def forward(self, item: Tensor, attribute: Tensor) -> Tensor:
        """``[..., d]``, ``[..., d]`` → ``[..., d]``."""
        return item + self.alpha * bind(item, attribute, scale=self.scale)
