"""The time between a user's events, in buckets, as models read it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from recbole_holo.errors import ConfigError, nearest

EVENT_TIMES = {
    "gap": "gap: the time since the event before is an input, of past events only",
    "request": "request: THE TIME OF THE EVENT TO BE PREDICTED IS AN INPUT",
}
UNKNOWN, TIE = 0, 1  # buckets: nothing is known of the time before; no later than the event before


@dataclass(frozen=True)
class GapBuckets:
    """Logarithmic buckets of the time between two events (ours).

    ``0``: there is no event before, or a time is unknown; ``1``: less than a ``unit`` has passed, as between events of
    one time; ``2 + floor(log2(gap / unit) / octaves)``: longer, ``count - 1`` at most.

    The unit is the smallest gap above 0 of the training events, whatever times are counted in: a second of Unix
    seconds, a day of days, 1 of numbers that say the order only. A bucket is an octave wide, or where the largest gap
    of the training events would lie beyond the last bucket (milliseconds, few buckets) as wide as it must be.

    Args:
        count: of buckets, the two first included.
        unit: in the data's own unit of time.
        octaves: width of a bucket.

    >>> GapBuckets(32)(np.array([np.nan, 0.0, 1.0, 2.0, 3.0, 4.0, 86400.0, 1e12])).tolist()
    [0, 1, 2, 3, 3, 4, 18, 31]
    """

    count: int
    unit: float = 1.0
    octaves: float = 1.0

    @classmethod
    def of(cls, gaps: np.ndarray, count: int) -> GapBuckets:
        """``count`` buckets for gaps like these ``[n]``; nan and what is not above 0 tell nothing."""
        gaps = gaps[gaps > 0]
        if not len(gaps):
            return cls(count)
        unit = float(gaps.min())
        return cls(count, unit, max(1.0, float(np.floor(np.log2(gaps.max() / unit)) + 1) / (count - 2)))

    def __call__(self, gaps: np.ndarray) -> np.ndarray:
        """Buckets (int64) of gaps of any shape, float64; nan = unknown."""
        buckets = TIE + np.searchsorted(self._edges, gaps, side="right")
        return np.where(np.isnan(gaps), UNKNOWN, buckets)

    @cached_property
    def _edges(self) -> np.ndarray:
        return np.array([self.unit * 2.0 ** (self.octaves * i) for i in range(self.count - 2)])

    def numbers(self, gaps: Gaps, kind: str) -> Tensor:
        """What a model reads: the bucket before; with ``event_time: request`` that and the one after as one number."""
        before = self(gaps.before)
        return torch.from_numpy(before + self.count * self(gaps.after) if kind == "request" else before)


def event_time(config: Any) -> str | None:
    """``event_time`` of a configuration.

    Raises:
        ConfigError: it, or the number of buckets, cannot be used.
    """
    kind, count = config["event_time"], config["event_time_buckets"]
    if kind is None:
        return None
    if kind not in EVENT_TIMES:
        raise ConfigError("event_time", kind, nearest(kind, EVENT_TIMES))
    if type(count) is not int or count < 3:
        raise ConfigError("event_time_buckets", count, "use a whole number of at least 3")
    return kind


class Gaps(NamedTuple):
    """The times around events, of any shape: float64, since float32 has a grid of 128 s in Unix seconds."""

    before: np.ndarray  # since the user's event before; nan where there is none
    after: np.ndarray  # until the user's next; nan where there is none

    @classmethod
    def between(cls, times: np.ndarray, users: np.ndarray) -> Gaps:
        """Of events ``[n]``, each user's together and in order."""
        gaps = np.diff(times)
        gaps[users[1:] != users[:-1]] = np.nan
        return cls(np.r_[np.nan, gaps], np.r_[gaps, np.nan])

    @classmethod
    def of_rows(cls, times: Sequence[np.ndarray], targets: np.ndarray, width: int) -> Gaps:
        """Of histories with ``times`` each, whose next events are at ``targets [n]``: ``[n, width]``."""
        gaps = np.full((len(times), width + 1), np.nan)
        for row, own, target in zip(gaps, times, targets, strict=True):
            row[1 : len(own) + 1] = np.diff(np.r_[own, target])
        before = gaps[:, :-1].copy()
        before[np.arange(width) >= np.array([len(own) for own in times])[:, None]] = np.nan
        return cls(before, gaps[:, 1:])
