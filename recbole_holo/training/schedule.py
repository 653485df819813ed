"""How the learning rate goes over a run, and an average of the weights along it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from recbole_holo.errors import ConfigError, nearest

KINDS = ("linear", "cosine", "onecycle")
ONECYCLE_START = 1 / 25  # of the learning rate; PyTorch's div_factor


@dataclass(frozen=True)
class LearningRate:
    """The learning rate as a multiple of ``learning_rate``, by how much of the run (``epochs``) is done.

    ==========  ========================================================================================================
    linear      linear up from 0 during the warm-up, linear down after it
    cosine      linear up from 0 during the warm-up, half a cosine down after it (Loshchilov & Hutter 2017, no restarts)
    onecycle    half a cosine up from 1/25, half a cosine down (Smith & Topin 2018 as PyTorch has it, without its cycle
                of the momentum)
    ==========  ========================================================================================================

    It depends on nothing but the step, so a resumed run continues as it would have, if ``epochs`` stays as it was.
    Early stopping cuts it off.

    Args:
        kind: one of :data:`KINDS`.
        warmup_ratio: part of the run during which the rate rises, 0 to below 1.
        final_ratio: multiple that the last step has, 0 to 1.
    """

    kind: str
    warmup_ratio: float
    final_ratio: float

    @classmethod
    def from_config(cls, config) -> LearningRate | None:
        """By ``lr_scheduler`` (~ = None: constant), ``warmup_ratio`` and ``lr_final_ratio``."""
        kind, warmup, final = config["lr_scheduler"], config["warmup_ratio"], config["lr_final_ratio"]
        if kind is None:
            return None
        if kind not in KINDS:
            raise ConfigError("lr_scheduler", kind, nearest(kind, KINDS) + ", or ~ for a constant rate")
        if not isinstance(warmup, (int, float)) or not 0 <= warmup < 1:
            raise ConfigError("warmup_ratio", warmup, "use a number from 0 up to, not including, 1")
        if not isinstance(final, (int, float)) or not 0 <= final <= 1:
            raise ConfigError("lr_final_ratio", final, "use a number from 0 to 1")
        return cls(kind, float(warmup), float(final))

    def factor(self, done: float) -> float:
        """The multiple when the part ``done`` of the run, in (0, 1], will be done after this step."""
        if done < self.warmup_ratio:
            part = done / self.warmup_ratio
            return ONECYCLE_START + (1 - ONECYCLE_START) * _cosine(part) if self.kind == "onecycle" else part
        part = (done - self.warmup_ratio) / (1 - self.warmup_ratio)
        return 1 - (1 - self.final_ratio) * (part if self.kind == "linear" else _cosine(part))


def _cosine(part: float) -> float:
    """From 0 to 1 along half a cosine."""
    return (1 - math.cos(math.pi * part)) / 2


class WeightAverage:
    """An exponential moving average of a model's parameters: ``a ← a + (1 - decay)(w - a)`` after every step.

    The decay starts lower, ``(1 + n) / (10 + n)`` at update n, as TensorFlow's does: else the average of a short run
    would mostly be the initial weights. Buffers are not averaged. A step costs a pass over all parameters, whatever
    ``sparse_embedding`` says.

    Args:
        model: whose parameters, as they are now, the average starts from.
        decay: 0 to below 1.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self.decay, self.updates = decay, 0
        self._weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._average = {name: p.detach().clone() for name, p in self._weights.items()}

    @staticmethod
    def decay_of(config) -> float | None:
        """``ema_decay``; None = no average."""
        decay = config["ema_decay"]
        if decay is not None and (not isinstance(decay, (int, float)) or not 0 <= decay < 1):
            raise ConfigError("ema_decay", decay, "use a number from 0 up to, not including, 1, such as 0.999, or ~")
        return None if decay is None else float(decay)

    @torch.no_grad()
    def update(self) -> None:
        """After a step of the optimizer."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        get_ema_multi_avg_fn(decay)(list(self._average.values()), list(self._weights.values()), None)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """The model has the averaged weights inside the block. Values are copied: a CUDA graph knows addresses."""
        weights = {name: p.detach().clone() for name, p in self._weights.items()}
        self.keep()
        try:
            yield
        finally:
            _copy(weights, self._weights)

    def keep(self) -> None:
        """The model gets the averaged weights for good."""
        _copy(self._average, self._weights)

    def state_dict(self) -> dict[str, Any]:
        """What continuing needs besides the averaged weights: the weights that are trained, and the updates so far."""
        return {"updates": self.updates, "weights": {name: p.detach().clone() for name, p in self._weights.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """The inverse, while the model has the averaged weights; it gets those that are trained."""
        self.updates = state["updates"]
        _copy(self._weights, self._average)
        _copy(state["weights"], self._weights)


@torch.no_grad()
def _copy(source: Mapping[str, Tensor], target: Mapping[str, Tensor]) -> None:
    for name, values in target.items():
        values.copy_(source[name])
