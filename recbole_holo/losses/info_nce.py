"""InfoNCE: a softmax over the target and negatives that the batch shares."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from recbole_holo.losses.base import Loss, Positions
from recbole_holo.losses.negatives import negative_sampler
from recbole_holo.ops import losses


class InfoNCE(Loss):
    """:func:`recbole_holo.ops.losses.info_nce` with negatives by ``num_negatives``, ``negative_distribution`` and
    ``popularity_exponent``; with ``logq_correction`` an estimate of CE."""

    corrects = False  # where logq_correction says nothing

    def __init__(self, config: Any, dataset: Any, item_field: str, rivals: Tensor | None) -> None:
        super().__init__(config, dataset, item_field, rivals)
        self.sampler = negative_sampler(config, dataset, item_field, rivals, self.corrects)

    def forward(self, positions: Positions) -> Tensor:
        negatives, log_counts = self.sampler(positions.targets)
        left_out = None if positions.seen is None else positions.seen.among(negatives)
        vectors, sparse = positions.vectors_for(len(positions.targets) + self.sampler.num_negatives)
        return losses.info_nce(
            positions.hidden,
            positions.targets,
            vectors,
            negatives,
            positions.bias,
            positions.divisor,
            positions.cosine,
            log_counts,
            sparse,
            left_out,
        )
