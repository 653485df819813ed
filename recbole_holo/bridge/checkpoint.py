"""Checkpoints that load without running code, and that a crash while saving cannot break."""

from __future__ import annotations

import os
import pickle
import tempfile
import warnings
from typing import Any

import numpy as np
import torch
from scipy.sparse import csr_matrix, issparse

FORMAT = "recbole_holo/1"
_KIND = "__kind__"


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read, and what to do."""


def plain(value: Any) -> Any:
    """``value`` as numbers, strings, tensors, lists and dicts only, so that it can be read back without unpickling."""
    if isinstance(value, np.generic):  # before float: np.float64 is one, and pickles as an object
        return value.item()
    if value is None or type(value) in (str, int, float, bool) or isinstance(value, torch.Tensor):
        return value
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value) if value.dtype.kind in "biuf" else value.tolist()
    if isinstance(value, dict):
        return {key if isinstance(key, (int, str)) else str(key): plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(plain(item) for item in value)
    if isinstance(value, (list, set, frozenset)):
        return [plain(item) for item in value]
    return str(value)


def pack(parameters: dict[str, Any]) -> dict[str, Any]:
    """A model's ``other_parameter()`` for :func:`save`; :func:`unpack` gives it back.

    NumPy arrays and SciPy's sparse matrices keep their kind. Modules among them (RecBole lists some) are left out:
    their parameters are in the state dict already.
    """
    return {name: _pack(value) for name, value in parameters.items() if not isinstance(value, torch.nn.Module)}


def _pack(value: Any) -> Any:
    if issparse(value):
        rows = value.tocsr()
        parts = {name: _pack(getattr(rows, name)) for name in ("data", "indices", "indptr")}
        return {_KIND: value.format, "shape": tuple(map(int, rows.shape)), **parts}
    if isinstance(value, np.ndarray):
        return {_KIND: "array", "values": torch.from_numpy(np.array(value))}
    return value


def unpack(parameters: dict[str, Any] | None) -> dict[str, Any]:
    """The inverse of :func:`pack`."""
    return {name: _unpack(value) for name, value in (parameters or {}).items()}


def _unpack(value: Any) -> Any:
    kind = value.get(_KIND) if isinstance(value, dict) else None
    if kind is None:
        return value
    if kind == "array":
        return value["values"].cpu().numpy()
    parts = tuple(_unpack(value[name]) for name in ("data", "indices", "indptr"))
    return csr_matrix(parts, shape=value["shape"]).asformat(kind)


def save(state: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes ``state`` whole or not at all: to a file beside ``path``, flushed to disk, then moved over it."""
    folder = os.path.dirname(os.path.abspath(path))
    descriptor, unfinished = tempfile.mkstemp(prefix=".saving-", suffix=".pth", dir=folder)
    try:
        with os.fdopen(descriptor, "wb") as file:
            torch.save({"format": FORMAT, **plain(state)}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except BaseException:
        os.unlink(unfinished)
        raise


def load(path: str | os.PathLike[str], map_location: Any = "cpu", trust_checkpoint: bool = False) -> dict[str, Any]:
    """Reads a checkpoint of this package, or, if trusted, one of RecBole's.

    Args:
        trust_checkpoint: RecBole's own checkpoints are pickles of Python objects, and loading one runs whatever code
            its author put there. They are refused unless this is set.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: not a checkpoint, a broken one, or a pickle that is not trusted.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"checkpoint: no file {os.fspath(path)!r}")
    try:
        return torch.load(path, map_location=map_location, weights_only=True)
    except pickle.UnpicklingError as error:
        if not _is_pickle(path):
            raise CheckpointError(f"checkpoint: {os.fspath(path)!r} is not a checkpoint") from error
        if not trust_checkpoint:
            raise CheckpointError(
                f"checkpoint: {os.fspath(path)!r} holds pickled Python objects, and loading them can run any code. If "
                "you made it yourself, with RecBole, pass trust_checkpoint=True (--trust_checkpoint=True)."
            ) from error
    except (RuntimeError, EOFError, KeyError, OSError) as error:
        raise CheckpointError(f"checkpoint: {os.fspath(path)!r} is broken or not a checkpoint ({error})") from error
    warnings.warn(f"unpickling {os.fspath(path)!r}, which can run code: trust_checkpoint is set", stacklevel=2)
    try:
        return torch.load(path, map_location=map_location, weights_only=False)
    except Exception as error:  # an untrusted format has no fixed set of errors
        raise CheckpointError(f"checkpoint: {os.fspath(path)!r} could not be unpickled ({error})") from error


def _is_pickle(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins as torch.save's do: an archive, or before that a pickle."""
    with open(path, "rb") as file:
        return file.read(2) in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
