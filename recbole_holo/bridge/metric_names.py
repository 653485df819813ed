"""Names of metrics: RecBole's, and the same with what users have seen left out of the ranking."""

from __future__ import annotations

import re
from collections.abc import Sequence

from recbole.evaluator import metric_types
from recbole.utils import EvaluatorType

from recbole_holo.errors import ConfigError, nearest

UNSEEN = " (unseen)"  # after the name of a metric whose ranking leaves out what its user has seen


def kept_name(name: str) -> str:
    """``ndcg@10 (unseen)`` → ``ndcg@10``; a name without the addition stays as it is."""
    return name.removesuffix(UNSEEN)


def two_columns(metrics: Sequence[str]) -> bool:
    """Whether these metrics are of rankings, which are reported twice; those of single scores are not."""
    return all(metric_types[metric.lower()] is EvaluatorType.RANKING for metric in metrics)


def valid_metric(text: object, metrics: Sequence[str], topk: Sequence[int]) -> str:
    """The metric that an epoch is chosen by, spelled as in results but for its letters' case: ``NDCG@10 (unseen)``.

    Args:
        text: as the user wrote it; case and spaces are free, and so are the brackets.
        metrics, topk: what is evaluated.

    Raises:
        ConfigError: it is not evaluated.
    """
    places = [f"{m}@{k}" for m in metrics if _has_places(m) for k in topk] + [m for m in metrics if not _has_places(m)]
    found = re.fullmatch(r"\s*(\w+?)\s*(?:@\s*(\d+))?\s*(\(?\s*unseen\s*\)?)?\s*", str(text), re.IGNORECASE)
    name, k, unseen = found.groups() if found else (str(text), None, None)
    name = name if k is None else f"{name}@{k}"
    if name.lower() not in (place.lower() for place in places):
        also = f", each also with{UNSEEN}" if two_columns(metrics) else ""
        raise ConfigError("valid_metric", text, f"it must be among metrics and topk: {nearest(name, places)}{also}")
    if unseen and not two_columns(metrics):
        raise ConfigError("valid_metric", text, f"{name} is of single scores, not of a ranking: use it without{UNSEEN}")
    return f"{name}{UNSEEN if unseen else ''}"


def _has_places(metric: str) -> bool:
    return metric.lower() != "gauc" and metric_types[metric.lower()] is EvaluatorType.RANKING
