"""A checkpoint's content into a model, for a data set that may have changed since."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from recbole_holo.bridge import checkpoint, registry
from recbole_holo.bridge.checkpoint import CheckpointError
from recbole_holo.data.catalogue import Catalogue
from recbole_holo.data.numbering import Numbering
from recbole_holo.errors import DataError, listed


def catalogue_of(saved: Mapping[str, Any], path: str | os.PathLike[str]) -> Catalogue | None:
    """The items of a checkpoint, if it has them.

    Raises:
        CheckpointError: what stands in their place is none.
    """
    if not saved.get("catalogue"):
        return None
    try:
        return Catalogue.from_plain(saved["catalogue"])
    except (KeyError, TypeError, AttributeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"checkpoint: {os.fspath(path)!r} has no usable catalogue ({error!r})") from error


def numbering_of(saved: Mapping[str, Any], path: str | os.PathLike[str], uid_field: str) -> Numbering | None:
    """Which ids its model knows by which numbers; None of a checkpoint that does not say (RecBole's)."""
    return Numbering.of_checkpoint(saved, catalogue_of(saved, path), uid_field)


def numbers_of(dataset: Any, model: str) -> dict[str, Any]:
    """What a checkpoint of ``model`` holds for :func:`numbering_of`, beside the catalogue."""
    return Numbering.plain_of(dataset, registry.is_ours(model))


def check_numbers(numbering: Numbering | None, dataset: Any) -> dict[str, list[str]]:
    """By field, the ids of a data set that the checkpoint's model does not know; logs them and those that are gone.

    Raises:
        DataError: known ids have other numbers in the data set.
    """
    if numbering is None:
        return {}
    new = numbering.new_ids(dataset)
    numbering.say_what_changed(dataset, new)
    return new


def restore(
    model: nn.Module,
    saved: Mapping[str, Any],
    path: str | os.PathLike[str],
    new: Mapping[str, Sequence[str]] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Any:
    """``model`` with what a checkpoint has of it; of a compressed model's, compressed.

    Rows of items that the checkpoint does not know are zero where the model gives such items what their attributes say
    (``cold_items: attributes``).

    Args:
        new: by field, the ids that the checkpoint does not know.
        settings: those that the model was built with, where they may be others than the checkpoint's.

    Raises:
        DataError: the data have ids that the model can have nothing for.
        CheckpointError: weights that the model has not, of another shape, or none.
    """
    state = saved.get("state_dict")
    if not isinstance(state, dict):
        raise CheckpointError(f"checkpoint: {os.fspath(path)!r} has no weights in it (state_dict)")
    misfit = Misfit(path, new or {}, _differing(saved, settings or {}))
    if "compression" in saved:
        from recbole_holo.inference.compression import Compression, restored

        try:
            return restored(model, Compression(**saved["compression"]), state)
        except (RuntimeError, KeyError, TypeError) as error:
            raise misfit(str(error).splitlines()[-1].strip()) from error
    model.load_state_dict(fitted(model, state, misfit))
    return model


def restore_others(model: Any, saved: Mapping[str, Any], new: Mapping[str, Sequence[str]] | None = None) -> None:
    """What a model of RecBole's keeps beside its weights, under the names that it gives itself.

    Raises:
        DataError: the data have ids that such values, which are by number, cannot know.
    """
    found = checkpoint.unpack(saved.get("other_parameter"))
    names = set(getattr(model, "other_parameter_name", ()))
    values = {name: value for name, value in found.items() if name in names and value is not None}
    if values and new:
        raise _unknown(new)
    model.load_other_parameter(values)


class Misfit:
    """Makes the error of a checkpoint that does not fit: what differs, and why it may."""

    def __init__(
        self, path: str | os.PathLike[str], new: Mapping[str, Sequence[str]], differing: Sequence[str] = ()
    ) -> None:
        self.path, self.new, self.differing = path, new, differing

    def __call__(self, what: str) -> Exception:
        if self.new and not self.differing:
            return _unknown(self.new)
        why = f"; settings that differ: {', '.join(self.differing)}" if self.differing else ""
        return CheckpointError(f"checkpoint: {os.fspath(self.path)!r} does not fit the model: {what}{why}")


def fitted(model: nn.Module, state: Mapping[str, Tensor], misfit: Misfit) -> dict[str, Tensor]:
    """A state dict as ``model`` takes it, see :func:`restore`."""
    own = model.state_dict()
    for what, names in (("lacks", own.keys() - state.keys()), ("has", state.keys() - own.keys())):
        if names:
            raise misfit(f"it {what} {listed(sorted(names))}")
    grows = getattr(model, "trained_items", None) is not None
    n_items = getattr(model, "n_items", None)
    return {name: _row_by_row(name, state[name], own[name], n_items if grows else None, misfit) for name in own}


def grown(values: Tensor, like: Tensor, n_items: int | None) -> Tensor | None:
    """``values`` by item with zeros for new items, in the shape of ``like``; None where they do not fit."""
    if values.shape == like.shape:
        return values
    same_rows = values.dim() == like.dim() and values.shape[1:] == like.shape[1:] and values.dim() > 0
    if not same_rows or n_items != len(like) or len(values) > n_items:
        return None
    return torch.cat([values, values.new_zeros(n_items - len(values), *values.shape[1:])])


def rows_for_new_items(model: nn.Module, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Saved parameters with zeros for new items, as :func:`restore` has just done it for the checkpoint's others."""
    own = dict(model.named_parameters())
    n_items = getattr(model, "n_items", None)
    return {name: _row_by_row(name, of, own[name], n_items, Misfit("", {})) for name, of in values.items()}


def _row_by_row(name: str, values: Tensor, like: Tensor, n_items: int | None, misfit: Misfit) -> Tensor:
    found = grown(values, like, n_items)
    if found is None:
        raise misfit(f"{name} is {list(values.shape)} there and {list(like.shape)} here")
    return found


def _differing(saved: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    given = saved["config"]["given"] if isinstance(saved["config"], dict) else {}
    return [
        f"{key} ({given[key]!r} there, {value!r} here)"
        for key, value in settings.items()
        if key in given and given[key] != value
    ]


def _unknown(new: Mapping[str, Sequence[str]]) -> DataError:
    what = "; ".join(f"{name}: the checkpoint does not know {listed(ids)}" for name, ids in new.items())
    return DataError(
        f"{what}, which the data have. Its model learned nothing about them: train on these data, leave their events "
        "out, or use a model with cold_items: attributes, which reads what the attributes of new items say."
    )
