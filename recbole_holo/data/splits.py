"""What ``eval_args`` may say, and splits at moments of time, of all users alike and in exact time.

RecBole splits by user (``LS``, and ``RS`` with ``group_by: user``), all rows in the order of time (``RS`` with
``group_by: none``), or, as ``TS`` (RecBole 1.2.1), test at one moment for all users and what lies before by user. Ours:

* ``split: {time: [t1, t2]}``: what lies before t1 is training, what lies before t2 validation, the rest test;
* ``split: {time_quantiles: [.8, .9]}``: the same at the times that so large a part of the events lies before.

Events of equal times are never split, so that a target of a later part lies after every one of an earlier part.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from recbole_holo.errors import ConfigError, DataError, nearest

MOMENTS = ("time", "time_quantiles")
SPLITS = ("RS", "LS", "TS", *MOMENTS)
LEAVE_ONE_OUT = ("valid_and_test", "valid_only", "test_only")
EVAL_ARGS = ("split", "group_by", "order", "mode")
NO_FILTER = ("[0,inf)", None)
# What files that are split already pass over, each with the values that ask for nothing.
UNSPLIT_ONLY = {
    "ties": ("file",),
    "time_precision": ("float64",),
    "rm_dup_inter": (None,),
    "val_interval": (None,),
    "user_inter_num_interval": NO_FILTER,
    "item_inter_num_interval": NO_FILTER,
}
ORDER_ONLY = ("ties", "time_precision")


def of(config: Any) -> tuple[str, Any]:
    """The split of a configuration: its kind and its numbers."""
    [(kind, value)] = config["eval_args"]["split"].items()
    return kind, value


def is_at_once(config: Any) -> bool:
    """Whether the rows are split in the order of time across users."""
    return of(config)[0] in ("TS", *MOMENTS) or str(config["eval_args"]["group_by"]).lower() == "none"


def with_order(arguments: Any, sequential: bool) -> Any:
    """``eval_args`` that name a split and no order, in the order of time where there is no other; RecBole's is RO."""
    if not isinstance(arguments, Mapping) or "split" not in arguments or "order" in arguments:
        return arguments
    split = arguments["split"]
    in_time = sequential or (isinstance(split, Mapping) and not {"TS", *MOMENTS}.isdisjoint(split))
    return {**arguments, "order": "TO"} if in_time else arguments


def check(settings: Mapping[str, Any], sequential: bool) -> None:
    """Looks at ``eval_args`` before any data are read.

    Args:
        settings: of a configuration.
        sequential: the model is one of sequences.

    Raises:
        ConfigError: order, group_by or split cannot be used.
    """
    if settings.get("benchmark_filename") is not None:
        return  # they are split already
    arguments = settings["eval_args"]
    for key in set(arguments) - set(EVAL_ARGS):
        raise ConfigError("eval_args", key, nearest(key, EVAL_ARGS))
    order, group, split = (arguments.get(key) for key in ("order", "group_by", "split"))

    def refuse(key: str, value: Any, remedy: str) -> ConfigError:
        return ConfigError(f"eval_args: {key}", value, remedy)

    if order not in ("RO", "TO"):
        raise refuse("order", order, "use TO (by time) or RO (random)")
    if sequential and order == "RO":
        raise refuse("order", order, f"{settings['model']} reads events in the order of time: use TO")
    if str(group).lower() not in ("user", "none"):
        raise refuse("group_by", group, "use user or none")
    if not isinstance(split, Mapping) or len(split) != 1:
        raise refuse("split", split, "name one, such as {LS: valid_and_test} or {RS: [0.8, 0.1, 0.1]}")
    [(kind, value)] = split.items()
    if kind not in SPLITS:
        raise refuse("split", kind, nearest(kind, SPLITS))
    if kind == "LS":
        if value not in LEAVE_ONE_OUT:
            raise refuse("split", split, f"LS: {nearest(value, LEAVE_ONE_OUT)}")
        return
    if kind in ("RS", "TS"):
        if not (_numbers(value, 3) and min(value) >= 0 and value[0] > 0):
            raise refuse("split", split, f"give {kind} the parts of training, validation and test: [0.8, 0.1, 0.1]")
    elif not (_numbers(value, 2) and value[0] <= value[1]):
        example = (
            "[0.8, 0.9]" if kind == "time_quantiles" else "[978300000, 978400000], in the unit of the data's times"
        )
        raise refuse("split", split, f"give {kind} where validation and test begin, in that order: {example}")
    elif kind == "time_quantiles" and not 0 < value[0] <= value[1] < 1:
        raise refuse("split", split, "use two parts of the events between 0 and 1: [0.8, 0.9]")
    if kind == "RS":
        return
    if order == "RO":
        raise refuse("order", order, f"a split at moments of time ({kind}) is of events in the order of time: use TO")
    if kind in MOMENTS and settings.get("time_precision") == "float32":
        remedy = (
            f"RecBole has no split {kind!r} to compare with, and one at exact moments needs exact times: use float64"
        )
        raise ConfigError("time_precision", "float32", remedy)


def without_effect(settings: Mapping[str, Any]) -> tuple[str, list[str]]:
    """Why settings about the order and the choice of events have no effect, and which of those that were set."""
    if settings.get("benchmark_filename") is not None:
        why = "the files of benchmark_filename are read as they are"
        return why, [key for key, nothing in UNSPLIT_ONLY.items() if settings.get(key, nothing[0]) not in nothing]
    if settings["eval_args"].get("order") == "RO":
        why = "eval_args: order: RO puts the events in no order of time"
        return why, [key for key in ORDER_ONLY if settings.get(key, UNSPLIT_ONLY[key][0]) not in UNSPLIT_ONLY[key]]
    return "", []


def at_moments(kind: str, value: Sequence[float], all_times: np.ndarray) -> tuple[float, float]:
    """Where validation and test begin: ``value`` itself, or the times of the events that lie at these quantiles.

    Args:
        kind: ``time`` or ``time_quantiles``.
        all_times: of all events, in float64.

    Raises:
        DataError: a moment before or after all events.
    """
    first, last = float(all_times.min()), float(all_times.max())
    if kind == "time_quantiles":
        value = np.quantile(all_times, value, method="higher").tolist()
    if not first < value[0] <= value[1] <= last:
        raise DataError(
            f"eval_args: split {{{kind}: {list(value)}}}: the times of the events go from {first:.15g} to {last:.15g}; "
            "both moments must lie between these, in the same unit, and after the first."
        )
    return value[0], value[1]


def by_moments(times: np.ndarray, moments: tuple[float, float]) -> list[np.ndarray]:
    """Row numbers of training, validation and test: ``times [n]`` before the first moment, before the second, else."""
    part = np.searchsorted(moments, times, side="right")
    return [np.flatnonzero(part == number) for number in range(3)]


def by_recboles_moment(times: np.ndarray, users: Iterable[list[int]], ratios: Sequence[float]) -> list[np.ndarray]:
    """RecBole 1.2.1's ``TS``: test is all that lies after the quantile of the rows' times that leaves the last of
    ``ratios``; what lies before is split *by user* into training and validation.

    Args:
        times: of the rows ``[n]``.
        users: the row numbers of each user, in the order of time.
    """
    ratios = [ratio / sum(ratios) for ratio in ratios]
    early = times <= np.percentile(times, 100 * (1 - ratios[-1]))
    parts: list[list[int]] = [[], [], []]
    for own in users:
        known = [row for row in own if early[row]]
        n_training = int(len(known) * (ratios[0] / (1 - ratios[2])))
        parts[0] += known[:n_training]
        parts[1] += known[n_training:]
        parts[2] += [row for row in own if not early[row]]
    return [np.array(part, dtype=np.int64) for part in parts]


def _numbers(value: Any, count: int) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) == count
        and all(isinstance(x, (int, float)) and not isinstance(x, bool) and np.isfinite(x) for x in value)
    )
