r"""Binary cross-entropy over a sample of the negatives, with the confidence that the sample takes away given back."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor

from recbole_holo.errors import ConfigError
from recbole_holo.losses.base import Loss, Positions
from recbole_holo.losses.negatives import NegativeSampler
from recbole_holo.model.settings import positive_int
from recbole_holo.ops.losses import sample_scores


class gBCE(Loss):
    r"""``-(β log σ(s⁺) + Σ_k log(1 - σ(s⁻_k))) / (K + 1)`` (gSASRec, Petrov and Macdonald 2023, equation 7).

    ``β = α (t (1 - 1/α) + 1/α)`` with ``α = K / (n - 1)``, the part of the other items that is drawn: with ``gbce_t``
    t = 0 it is plain BCE with K negatives, whose probabilities come out the higher the fewer are drawn; with t = 1 they
    are those of BCE over all items. The paper's t is 0.75. Negatives are uniform, and shared by the batch (ours; the
    paper draws for each position); a target's own is left out, and with ``seen_items: excluded`` what was seen.
    """

    def __init__(self, config: Any, dataset: Any, item_field: str, rivals: Tensor | None) -> None:
        super().__init__(config, dataset, item_field, rivals)
        t = 0.75 if config["gbce_t"] is None else config["gbce_t"]
        if isinstance(t, bool) or not isinstance(t, (int, float)) or not 0 <= t <= 1:
            raise ConfigError("gbce_t", t, "use a number from 0 (plain BCE) to 1 (that over all items)")
        n_items = dataset.num(item_field) if rivals is None else len(rivals)
        self.sampler = NegativeSampler("uniform", positive_int("num_negatives", config["num_negatives"]), n_items)
        drawn = min(self.sampler.num_negatives / max(n_items - 2, 1), 1.0)  # α: of the items but the pad and the target
        self.beta = drawn * (t * (1 - 1 / drawn) + 1 / drawn)

    def forward(self, positions: Positions) -> Tensor:
        negatives, _ = self.sampler(positions.targets)
        vectors, sparse = positions.vectors_for(len(positions.targets) + len(negatives))
        left_out = None if positions.seen is None else positions.seen.among(negatives)
        positive, negative, is_none = sample_scores(
            positions.hidden,
            positions.targets,
            vectors,
            negatives,
            positions.bias,
            positions.divisor,
            positions.cosine,
            sparse=sparse,
            left_out=left_out,
        )
        rejected = F.softplus(negative).masked_fill(is_none, 0.0).sum(-1)
        return ((self.beta * F.softplus(-positive) + rejected) / (len(negatives) + 1)).mean()
