"""Checkpoints that load without running code, that a crash while saving cannot break, and that tell when they are
damaged."""

from __future__ import annotations

import fcntl
import hashlib
import os
import pickle
import struct
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from scipy.sparse import csr_matrix, issparse

FORMAT = "recbole_holo/2"  # /1 had no checksum of its own
_KIND = "__kind__"
_SPARSE = ("bsr", "coo", "csc", "csr", "dia", "dok", "lil")  # SciPy's formats
_UNFINISHED = ".saving-"  # what a save is called until it is whole
# The archive's comment, its last bytes: a mark and the checksum of all bytes before the checksum.
_MARK = b"recbole_holo blake2b "
_DIGEST = 16
_COMMENT = len(_MARK) + _DIGEST
_CHUNK = 2**20


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read, or written, and what to do."""


class NotWritten(CheckpointError):
    """A checkpoint that could not be written; the one that was there before still is."""


def plain(value: Any) -> Any:
    """``value`` as numbers, strings, tensors, lists and dicts only, so that it can be read back without unpickling."""
    if isinstance(value, np.generic):  # before float: np.float64 is one, and pickles as an object
        return value.item()
    if value is None or type(value) in (str, int, float, bool) or isinstance(value, torch.Tensor):
        return value
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value) if value.dtype.kind in "biuf" else value.tolist()
    if isinstance(value, dict):
        return {plain(key) if isinstance(key, (int, str)) else str(key): plain(item) for key, item in value.items()}
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
    if kind not in _SPARSE:
        raise CheckpointError(f"checkpoint: it holds a value of the unknown kind {kind!r}")
    parts = tuple(_unpack(value[name]) for name in ("data", "indices", "indptr"))
    return csr_matrix(parts, shape=value["shape"]).asformat(kind)


def save(state: dict[str, Any], path: str | os.PathLike[str]) -> None:
    """Writes ``state`` whole or not at all: to a file beside ``path``, flushed to disk, then moved over it.

    The file is an archive of PyTorch's (``torch.load`` reads it) whose comment is a checksum of all that precedes.

    Raises:
        NotWritten: a full disk, say; what was at ``path`` before is still there.
    """
    try:
        with _unfinished(os.path.dirname(os.path.abspath(path))) as (file, name):
            with _causes_shown(file) as writer:
                torch.save({"format": FORMAT, **plain(state)}, writer)
            _seal(file)
            file.flush()
            os.fsync(file.fileno())
            os.replace(name, path)
    except OSError as error:
        raise NotWritten(f"checkpoint: {os.fspath(path)!r} could not be written: {error.strerror}") from error


class _Writer:
    """A file that remembers what went wrong."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file, self.flush = file, file.flush
        self.error: BaseException | None = None

    def write(self, data: Any) -> int:
        try:
            return self._file.write(data)
        except BaseException as error:
            self.error = error
            raise


@contextmanager
def _causes_shown(file: IO[bytes]) -> Iterator[Any]:
    """What stops writing (a full disk, a signal) is raised as it is: PyTorch makes a RuntimeError of it."""
    writer = _Writer(file)
    try:
        yield writer
    except RuntimeError:
        if writer.error is None:
            raise
        raise writer.error from None


@contextmanager
def _unfinished(folder: str) -> Iterator[tuple[IO[bytes], str]]:
    """A new file in ``folder`` and its name, locked as long as it is open; if it still has that name then, it goes."""
    while True:
        descriptor, name = tempfile.mkstemp(prefix=_UNFINISHED, suffix=".pth", dir=folder)
        file = os.fdopen(descriptor, "w+b")
        with suppress(OSError):  # file systems without locks
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            break
        file.close()  # another process took it for a leftover before it was locked
    try:
        with file:
            yield file, name
    finally:
        with suppress(FileNotFoundError):
            os.unlink(name)


def remove_leftovers(folder: str | os.PathLike[str]) -> list[str]:
    """Deletes what killed saves have left in ``folder``, and nothing that a living process writes; their names."""
    removed = []
    for path in sorted(Path(folder).glob(f"{_UNFINISHED}*.pth")):
        with suppress(OSError), open(path, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
            removed.append(path.name)
    return removed


def _seal(file: IO[bytes]) -> None:
    """Puts the comment to the archive in ``file``."""
    file.seek(-2, os.SEEK_END)  # the length of the comment, 0, is what an archive ends with
    file.write(struct.pack("<H", _COMMENT) + _MARK)
    file.seek(0)
    digest = hashlib.blake2b(digest_size=_DIGEST)
    while part := file.read(_CHUNK):
        digest.update(part)
    file.write(digest.digest())


def _check_whole(path: str | os.PathLike[str]) -> bool:
    """Whether a file has a checksum of this package's, which it then agrees with.

    Of other archives (older ones, RecBole's) the checksums that each has of its members are compared.

    Raises:
        CheckpointError: what is there is not what was written.
    """
    broken = CheckpointError(f"checkpoint: {os.fspath(path)!r} is damaged: its checksum is another. Use a copy of it.")
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - _COMMENT, 0))
        end = file.read()
        file.seek(0)
        if not end.startswith(_MARK):
            if not zipfile.is_zipfile(file):
                return False
            try:
                with zipfile.ZipFile(file) as archive:
                    sound = archive.testzip() is None
            except (zipfile.BadZipFile, RuntimeError, NotImplementedError, OSError, ValueError, EOFError, struct.error):
                sound = False
            if not sound:
                raise broken
            return False
        digest, left = hashlib.blake2b(digest_size=_DIGEST), size - _DIGEST
        while left and (part := file.read(min(left, _CHUNK))):
            digest.update(part)
            left -= len(part)
    if digest.digest() != end[len(_MARK) :]:
        raise broken
    return True


def load(path: str | os.PathLike[str], map_location: Any = "cpu", trust_checkpoint: bool = False) -> dict[str, Any]:
    """Reads a checkpoint of this package, or, if trusted, one of RecBole's.

    Args:
        trust_checkpoint: RecBole's own checkpoints are pickles of Python objects, and loading one runs whatever code
            its author put there. They are refused unless this is set.

    Raises:
        FileNotFoundError: no such file.
        CheckpointError: not a checkpoint, a damaged one, or a pickle that is not trusted.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f"checkpoint: no file {os.fspath(path)!r}")
    sealed = _check_whole(path)
    try:
        return _checked(torch.load(path, map_location=map_location, weights_only=True), sealed, path)
    except pickle.UnpicklingError as error:
        if not _is_pickle(path):
            raise CheckpointError(f"checkpoint: {os.fspath(path)!r} is not a checkpoint") from error
        if not trust_checkpoint:
            raise CheckpointError(
                f"checkpoint: {os.fspath(path)!r} holds pickled Python objects, and loading them can run any code. If "
                "you made it yourself, with RecBole, pass trust_checkpoint=True (--trust_checkpoint=True)."
            ) from error
    except CheckpointError:
        raise
    except Exception as error:  # of what is no checkpoint the unpickler raises anything
        raise CheckpointError(f"checkpoint: {os.fspath(path)!r} is broken or not a checkpoint ({error})") from error
    warnings.warn(f"unpickling {os.fspath(path)!r}, which can run code: trust_checkpoint is set", stacklevel=2)
    try:
        return _checked(torch.load(path, map_location=map_location, weights_only=False), sealed, path)
    except CheckpointError:
        raise
    except Exception as error:  # an untrusted format has no fixed set of errors
        raise CheckpointError(f"checkpoint: {os.fspath(path)!r} could not be unpickled ({error})") from error


def _checked(state: Any, sealed: bool, path: str | os.PathLike[str]) -> dict[str, Any]:
    if not isinstance(state, dict):
        raise CheckpointError(f"checkpoint: {os.fspath(path)!r} is not a checkpoint: it holds a {type(state).__name__}")
    if state.get("format") == FORMAT and not sealed:
        raise CheckpointError(f"checkpoint: {os.fspath(path)!r} is damaged: its checksum is gone. Use a copy of it.")
    return state


def _is_pickle(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins as torch.save's do: an archive, or before that a pickle."""
    with open(path, "rb") as file:
        return file.read(2) in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
