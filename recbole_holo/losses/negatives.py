"""Negatives of the sampled softmax: where they are drawn from, and how often each was to be expected."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from recbole_holo.data import TARGETS_SUFFIX
from recbole_holo.errors import ConfigError
from recbole_holo.losses.base import Positions
from recbole_holo.model.settings import one_of, positive_int
from recbole_holo.ops import losses

DISTRIBUTIONS = ("uniform", "popularity", "in_batch", "mixed")
REDRAWS = 8  # of a negative that was seen


class NegativeSampler(nn.Module):
    r"""Item ids for :func:`~recbole_holo.ops.losses.info_nce`, shared by a batch, never the pad.

    ================  ==================================================================================================
    ``uniform``       every item alike.
    ``popularity``    by how often an item is a training target, to the power of ``exponent`` (Bengio & Senécal 2008
                      use the unigram, exponent 1). An item that never is one counts as one that is once, so that every
                      item can be drawn and the corrected loss misses none.
    ``in_batch``      the batch's own targets, ``num_negatives`` of them at most, without replacement (Yi et al. 2019).
                      An item that never is a target is never drawn; and in a batch of whole sequences, whose targets
                      are those of a few users, a row's negatives suit its own user better than the frequencies say.
    ``mixed``         half as ``in_batch``, the rest as ``uniform`` (mixed negative sampling, Yang et al. 2020).
    ================  ==================================================================================================

    Drawing takes no host synchronisation, and no work in proportion to the catalogue: ``popularity`` bisects the
    cumulative distribution, log₂ V steps a draw, in float64, since float32 cannot tell the items of a large catalogue
    apart there.

    The expectations of ``in_batch`` are those of the training targets' frequencies, which a batch's targets follow as
    batches are shuffled. Yi et al. estimate them from the stream; here they are counted.

    Why exponent 1 by default, and not word2vec's 0.75, which has no correction to undo it: of a HoloMambaRec trained on
    ml-100k, the corrected loss of 512 negatives missed the full softmax's gradient of the item table by 1.45, 1.15,
    0.99, 0.93 and 0.90 times its norm with exponents 0, 0.25, 0.5, 0.75 and 1, and by as much less with 128 and 2048.

    Args:
        distribution: one of :data:`DISTRIBUTIONS`.
        num_negatives: K.
        n_items: size V of the item table, pad included.
        target_counts: ``[V]``, how often each item is a training target; see :func:`target_counts`. Needed by
            ``popularity``, and by ``in_batch`` and ``mixed`` with the correction.
        exponent: of the counts, for ``popularity``.
        logq_correction: return the expectations, too.
    """

    cumulative: Tensor  # [V] float64, of popularity
    frequency: Tensor  # [V], chance of an item at one draw by popularity or among the batch's targets

    def __init__(
        self,
        distribution: str,
        num_negatives: int,
        n_items: int,
        target_counts: Tensor | None = None,
        exponent: float = 1.0,
        logq_correction: bool = False,
    ) -> None:
        super().__init__()
        self.distribution, self.num_negatives, self.n_items = distribution, num_negatives, n_items
        self.logq_correction = logq_correction
        if target_counts is None:
            return
        weights = target_counts.double()
        if distribution == "popularity":
            weights = weights.clamp(min=1) ** exponent
            weights[0] = 0
            self.register_buffer("cumulative", weights.cumsum(0), persistent=False)
        # Both follow the data set, not the training: they stay out of checkpoints.
        self.register_buffer("frequency", (weights / weights.sum()).float(), persistent=False)

    def extra_repr(self) -> str:
        return f"{self.distribution}, num_negatives={self.num_negatives}"

    def forward(self, targets: Tensor) -> tuple[Tensor, Tensor | None]:
        """Negatives for a batch's ``targets [M]``: ids ``[K]``, and, where they are to be corrected, ``[K]``: the
        logarithm of how often each one's item was to be expected among the K.

        K is ``num_negatives``, or less where ``in_batch`` or ``mixed`` find fewer targets in the batch.
        """
        if self.distribution == "popularity":
            negatives, n_own = self._popular(targets.device), 0
        else:
            wanted = {"uniform": 0, "mixed": self.num_negatives // 2, "in_batch": self.num_negatives}[self.distribution]
            own = targets
            if wanted < len(targets):
                own = targets[torch.randperm(len(targets), device=targets.device)[:wanted]]
            rest = losses.sample_negatives((self.num_negatives - wanted,), self.n_items, targets.device)
            negatives, n_own = torch.cat([own, rest]), len(own)
        return negatives, self._log_counts(negatives, n_own, len(targets)) if self.logq_correction else None

    def _popular(self, device: torch.device) -> Tensor:
        point = torch.rand(self.num_negatives, dtype=torch.float64, device=device) * self.cumulative[-1]
        drawn = torch.searchsorted(self.cumulative, point, right=True)  # the pad's share, [0, 0), is never hit
        return drawn.clamp_(max=self.n_items - 1)  # rounding can take a point up to the very end

    def _log_counts(self, negatives: Tensor, n_own: int, n_targets: int) -> Tensor:
        """With two sources the expectations add up, whichever an item came from: that keeps the sum unbiased."""
        if self.distribution == "popularity":
            return (self.num_negatives * self.frequency[negatives]).log()
        uniform = (len(negatives) - n_own) / (self.n_items - 1)
        expected = torch.full(negatives.shape, uniform, device=negatives.device)
        if n_own:
            # A row's own target is no negative of it: it sees the others. A single one has no other, and no negative;
            # it needs no more than a finite number.
            expected = expected + n_own * max(n_targets - 1, 1) / n_targets * self.frequency[negatives]
        return expected.log()


def target_counts(dataset, item_field: str, rows: int = 4096) -> Tensor:
    """How often each item is a training target: ``[n_items]``, 0 for the pad.

    Args:
        dataset: the training split, of whole sequences or of prefixes; nothing else is counted.
        item_field: its item field.
        rows: sequences that are gathered at one time.
    """
    n_items, targets = dataset.num(item_field), item_field + TARGETS_SUFFIX
    if targets not in dataset[:1]:
        return torch.bincount(dataset.inter_feat[item_field].cpu(), minlength=n_items)
    counts = torch.zeros(n_items, dtype=torch.long)
    for first in range(0, len(dataset), rows):
        batch = dataset[first : first + rows][targets]
        counts += torch.bincount(batch.flatten().cpu(), minlength=n_items)
    counts[0] = 0
    return counts


def negative_sampler(
    config: Any, dataset: Any, item_field: str, rivals: Tensor | None, corrects: bool
) -> NegativeSampler:
    """The sampler that the settings ask for.

    Args:
        dataset: the training split; ``item_field``: its item field.
        rivals: ids of the items that are drawn from ``[n_rivals]``, the pad first; None: all.
        corrects: what ``logq_correction: ~`` stands for.

    Raises:
        ConfigError: a setting out of its range.
    """
    corrected, exponent = config["logq_correction"], config["popularity_exponent"]
    corrected = corrects if corrected is None else bool(corrected)
    distribution = one_of("negative_distribution", config["negative_distribution"] or "uniform", DISTRIBUTIONS)
    exponent = 1.0 if exponent is None else exponent
    if not isinstance(exponent, (int, float)) or not 0 <= exponent <= 1:
        raise ConfigError("popularity_exponent", exponent, "use a number from 0 (uniform) to 1 (the frequencies)")
    counted = distribution == "popularity" or (distribution != "uniform" and corrected)
    counts = target_counts(dataset, item_field) if counted else None
    n_items = dataset.num(item_field)
    if rivals is not None:
        n_items, counts = len(rivals), None if counts is None else counts[rivals]
    n_negatives = positive_int("num_negatives", config["num_negatives"])
    return NegativeSampler(distribution, n_negatives, n_items, counts, exponent, corrected)


def one_negative_each(positions: Positions) -> tuple[Tensor, Tensor | None]:
    """A uniform negative a position ``[M]``, and which of them were seen after all: where a user has seen nearly
    everything, drawing again ends. None: nothing is left out."""
    targets, seen = positions.targets, positions.seen

    def draw() -> Tensor:
        return losses.sample_negatives(targets.shape, positions.n_rivals, targets.device, exclude=targets)

    negatives = draw()
    if seen is None:
        return negatives, None
    for _ in range(REDRAWS):
        negatives = torch.where(seen.contains(negatives), draw(), negatives)
    return negatives, seen.contains(negatives)
