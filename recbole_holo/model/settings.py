"""Checks of settings: each gives the value, or an error that names the field and says what to use."""

from __future__ import annotations

from recbole_holo.errors import ConfigError, nearest


def one_of(field: str, value: str, allowed: tuple[str, ...]) -> str:
    """``value`` if it is allowed, else an error that names ``field``."""
    if value not in allowed:
        raise ConfigError(field, value, nearest(value, allowed))
    return value


def positive_int(field: str, value: int) -> int:
    """``value`` if it is an integer above 0, else an error that names ``field``."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ConfigError(field, value, "use an integer above 0")
    return value


def positive_number(field: str, value: float) -> float:
    """``value`` if it is a number above 0, else an error that names ``field``."""
    if not isinstance(value, (int, float)) or not value > 0:
        raise ConfigError(field, value, "use a number above 0")
    return float(value)


def probability(field: str, value: float) -> float:
    """``value`` if it is in [0, 1), else an error that names ``field``."""
    if not isinstance(value, (int, float)) or not 0 <= value < 1:
        raise ConfigError(field, value, "use a number from 0 up to, not including, 1")
    return float(value)
