"""The order of a user's events: by time, and those of equal times as ``ties`` says."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

TIES = ("file", "item", "random")
TIME_PRECISIONS = ("float64", "float32")


class OrderOfTime(NamedTuple):
    """In which order a data set's events are, and how much of it their times do not say.

    Attributes:
        ties: order of a user's events with equal times. ``file``: that of the rows; ``item``: by item id;
            ``random``: drawn by ``seed``.
        time_precision: what times are rounded to before they are compared.
        tied_events: events with the time of their user's event before.
        users_ending_in_a_tie: users whose last event is one of these.
    """

    ties: str
    time_precision: str
    tied_events: int
    users_ending_in_a_tie: int


def are_numbers(ids: Sequence[str]) -> bool:
    """Whether all ids are integers."""
    return all(re.fullmatch(r"-?[0-9]+", one) for one in ids)


def id_ranks(ids: Sequence[str]) -> np.ndarray:
    """Of every id its place among all ``[n]``: as numbers where all are integers, else as strings by code point."""
    keys: list = [(int(one), one) for one in ids] if are_numbers(ids) else list(ids)
    ranks = np.empty(len(keys), dtype=np.int64)
    ranks[sorted(range(len(keys)), key=keys.__getitem__)] = np.arange(len(keys))
    return ranks


def time_order(times: np.ndarray, tie_break: np.ndarray | None, users: np.ndarray | None) -> np.ndarray:
    """Row numbers in the order of time ``[n]``, of each user's rows together where ``users [n]`` are given.

    Args:
        times: in the precision that counts ``[n]``.
        tie_break: orders rows of equal times ``[n]``; None, and where it is equal too: as they are.
    """
    return np.lexsort([key for key in (tie_break, times, users) if key is not None])  # stable


def tied_with_the_one_before(users: np.ndarray, times: np.ndarray) -> np.ndarray:
    """Which events have the time of their user's event before: ``[n]``, ``[n]`` → bool ``[n]``, users together."""
    return np.r_[False, (users[1:] == users[:-1]) & (times[1:] == times[:-1])]
