"""What an id, a time, a number of items and a list of ids may be where a program gives them, and the error if not.

The rules are the same wherever ids come in, whatever keeps them: docs/serving.md has them as a table.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Set
from datetime import datetime, timedelta, timezone
from numbers import Integral, Real
from typing import Any

import numpy as np

from recbole_holo.errors import ConfigError

EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
UNITS = {"D": 86400.0, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}  # in seconds
IDS = "use a string or a whole number"


def as_id(value: Any, field: str) -> str:
    """An id as the string that it is in the data set's files: 5, numpy's 5 and ``"5"`` are one.

    Raises:
        ConfigError: not an id: None, nan and other fractions, True, bytes, an empty string, one that is no Unicode.
    """
    if type(value) is not str:
        if isinstance(value, Integral) and not isinstance(value, bool):
            return str(int(value))
        if isinstance(value, bytes):
            raise ConfigError(field, value, "bytes are no id: decode them")
        if not isinstance(value, str):
            raise ConfigError(field, value, f"it is no id: {IDS}")
        value = str.__str__(value)  # of numpy, or an enumeration
    if not value:
        raise ConfigError(field, value, f"an empty string is no id: {IDS}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise ConfigError(
                field, value, f"it has half of a surrogate pair, which no store keeps ({error})"
            ) from None
    return value


def as_ids(values: Any, field: str, ordered: bool = False) -> list[str]:
    """A list of ids, from anything that goes through them once; :func:`as_id` of each.

    Raises:
        ConfigError: one id instead of a list, or where ``ordered`` a set.
    """
    return [as_id(value, field) for value in as_list(values, field, ordered)]


def as_list(values: Any, field: str, ordered: bool = False) -> list[Any]:
    """The values, from anything that goes through them once.

    Raises:
        ConfigError: one value instead of a list, or where ``ordered`` a set.
    """
    if isinstance(values, (str, bytes)) or not isinstance(values, Iterable):
        raise ConfigError(field, values, f"it is one value, not a list of them: [{values!r}]")
    if isinstance(values, Mapping) or (ordered and isinstance(values, Set)):
        raise ConfigError(field, values, "it has no order: use a list")
    return list(values)


def as_time(value: Any, unit: str = "s", field: str = "timestamp") -> float | None:
    """A time in the data set's own ``unit``: a number as it is, a datetime as what has passed since 1970.

    A datetime must say its time zone: Python takes one without for local time, numpy and pandas for UTC. Numpy's
    ``datetime64`` never says one, and is UTC. None: not known.

    Raises:
        ConfigError: not a time: nan, an infinity, a number beyond float64, a string, a datetime without a time zone.
    """
    if value is None:
        return None
    if isinstance(value, datetime) and value == value:  # pandas' NaT is a datetime, too
        if value.utcoffset() is None:
            raise ConfigError(field, value, "it says no time zone: use value.replace(tzinfo=timezone.utc), or its own")
        return (value - EPOCH) / timedelta(seconds=1) / UNITS[unit]
    if isinstance(value, np.datetime64) and not np.isnat(value):
        return float((value - np.datetime64(0, "s")) / np.timedelta64(1, "s")) / UNITS[unit]
    if not isinstance(value, Real) or isinstance(value, bool):
        raise ConfigError(field, value, "it is no time: use a number, a datetime, or None where nothing is known")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ConfigError(field, value, "use a finite number, or None where nothing is known")
    return number


def as_count(value: Any, field: str, least: int = 1, of: str = "items") -> int:
    """A whole number of something, ``least`` or more.

    Raises:
        ConfigError: not whole, not a number, or less.
    """
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ConfigError(field, value, f"use a whole number of {of}, {least} or more")
    return int(value)


def numbers_in(text: str, field: str) -> list[float]:
    """Times as commands take them: ``978300019|978300055``."""
    try:
        return [float(part) for part in text.split("|")]
    except ValueError:
        raise ConfigError(field, text, "use numbers, such as seconds, with | between them") from None
