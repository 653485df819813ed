"""Vectors of an item's attributes: one table of values an attribute, read by item."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recbole_holo.data.attributes import ItemAttribute

ATTRIBUTE_VALUES = ("mean", "first")


class AttributeVectors(nn.Module):
    """One vector for each value of an item attribute, and which of them an item has.

    Args:
        attribute: which values the items have.
        width: of the vectors.
        values: what several values of an item become: the ``mean`` of their vectors (ours) or the ``first`` one
            (HoloMambaRec's authors use the first genre).
        std: of the vectors at the start.

    An item without a value, and the pad, get the zero vector.
    """

    index: Tensor  # [n_items], or [n_items, K] of which 0 is no value

    def __init__(self, attribute: ItemAttribute, width: int, values: str = "mean", std: float = 1.0) -> None:
        super().__init__()
        self.name, self.labels = attribute.name, attribute.labels
        index = attribute.index
        if values == "first" and index.dim() == 2:
            index = index[:, 0]
        # The table follows the data set, not the training: it moves with the module and stays out of checkpoints.
        self.register_buffer("index", index, persistent=False)
        self.embedding = nn.Embedding(attribute.n_values, width, padding_idx=0)
        with torch.no_grad():
            self.embedding.weight.mul_(std)

    def forward(self, items: Tensor, table: Tensor | None = None) -> Tensor:
        """``items [...]`` → ``[..., width]``: of the item's values, their rows of ``table [n_values, width]``.

        ``table`` is the vectors themselves unless another is given, made of them; its row 0 must be zero.
        """
        table = self.embedding.weight if table is None else table
        value = self.index[items].long()  # of a compressed model in fewer bits
        if self.index.dim() == 1:
            return F.embedding(value, table, padding_idx=0)
        mean = F.embedding_bag(value.flatten(0, -2), table, mode="mean", padding_idx=0)
        return mean.unflatten(0, items.shape)


class LearnedBuckets(AttributeVectors):
    r"""A number among learned buckets: ``Σ_j softmax_j(-(v - c_j)²/2s²) a_j``, the centres c and the width s learned.

    v is the number's rank among the items that have one, from 0 to 1; the centres start evenly over it, the width at
    half their distance. So a number shares the vectors of its neighbours, and buckets move to where they are needed.
    """

    position: Tensor  # [n_items], -1 = no value

    def __init__(self, attribute: ItemAttribute, width: int, values: str = "mean", std: float = 1.0) -> None:
        super().__init__(attribute, width, values, std)
        if attribute.position is None:
            raise ValueError(f"{attribute.name}: only an attribute of numbers has learned buckets")
        self.register_buffer("position", attribute.position, persistent=False)
        count = attribute.n_values - 1
        self.centres = nn.Parameter((torch.arange(count) + 0.5) / count)
        self.log_width = nn.Parameter(torch.tensor(math.log(0.5 / count)))

    def forward(self, items: Tensor, table: Tensor | None = None) -> Tensor:
        table = self.embedding.weight if table is None else table
        position = self.position[items].unsqueeze(-1)
        share = (-0.5 * ((position - self.centres) / self.log_width.exp()) ** 2).softmax(-1)  # [..., n_values - 1]
        return share.masked_fill(position < 0, 0.0) @ table[1:]
