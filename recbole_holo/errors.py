"""Errors that name the field, its value, and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any


class ConfigError(ValueError):
    """A setting that cannot be used: ``field: value`` and the remedy."""

    def __init__(self, field: str, value: object, remedy: str) -> None:
        super().__init__(f"{field}: {value!r} cannot be used: {remedy}")
        self.field, self.value, self.remedy = field, value, remedy

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.field, self.value, self.remedy)  # from one process to another


class DataError(ValueError):
    """Data that cannot be used: what is wrong with it, and what to do."""


class NonFiniteLoss(ValueError):
    """The training loss became nan or infinite; the message has the step and the last good checkpoint."""


class ProcessDied(RuntimeError):
    """One of several processes ended before its work was done: which, and how."""


class TrialsFailed(RuntimeError):
    """A search of which no trial came to a score: the reasons."""


class MissingExtra(ImportError):
    """An optional dependency that is not installed: what it is for, and the command that installs it."""


def nearest(value: object, allowed: Iterable[str], limit: int = 3) -> str:
    """A remedy that offers what was probably meant, and all that is allowed when that is short."""
    names = sorted(allowed)
    close = nearest_names(value, names, limit)
    offer = f"did you mean {' or '.join(close)}? " if close else ""
    return offer + (f"allowed: {', '.join(names)}" if len(names) <= 20 else f"{len(names)} values are allowed")


def nearest_names(value: object, names: Iterable[str], limit: int = 3) -> list[str]:
    """Up to ``limit`` of ``names`` that look like ``value``, best first, whatever their case."""
    by_lower = {name.lower(): name for name in names}
    return [by_lower[m] for m in difflib.get_close_matches(str(value).lower(), by_lower, n=limit, cutoff=0.6)]
