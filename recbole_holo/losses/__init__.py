"""Losses by their name in ``loss_type``: a file each.

A loss is a subclass of :class:`~recbole_holo.losses.base.Loss`: it says in ``__init__`` what it needs (negatives,
counts, the data's frequencies) and gives the mean over a batch's supervised positions. One of your own is added by
:func:`register_loss`, and then named as those of the package are.
"""

from __future__ import annotations

import importlib
from typing import Any

from recbole_holo.errors import ConfigError, nearest
from recbole_holo.losses.base import Loss

LOSSES = {
    "CE": "recbole_holo.losses.ce",
    "BPR": "recbole_holo.losses.bpr",
    "BCE": "recbole_holo.losses.bce",
    "gBCE": "recbole_holo.losses.gbce",
    "InfoNCE": "recbole_holo.losses.info_nce",
    "SampledCE": "recbole_holo.losses.sampled_ce",
}


def register_loss(name: str, module: str) -> None:
    """Adds a loss.

    Args:
        name: of its class, a subclass of :class:`~recbole_holo.losses.base.Loss`, and of ``loss_type``.
        module: dotted path of the module that holds the class.
    """
    LOSSES[name] = module


def make_loss(config: Any, dataset: Any, item_field: str, rivals: Any) -> Loss:
    """The loss that ``loss_type`` names.

    Args:
        dataset: the training split.
        item_field: its item field.
        rivals: ids of the items that compete ``[n_rivals]``, the pad first; None: all.

    Raises:
        ConfigError: no such loss, or a setting that it cannot have.
    """
    name = config["loss_type"]
    if name not in LOSSES:
        raise ConfigError("loss_type", name, nearest(name, list(LOSSES)))
    return getattr(importlib.import_module(LOSSES[name]), name)(config, dataset, item_field, rivals)
