"""Data that are kept in a file and read again: with what they were made from, so that they are taken for nothing else.

RecBole compares a few settings of a kept data set and takes it, with its old configuration, for any other data set,
split or attributes. Here a file begins with a fingerprint of all settings that the data follow from and of the files
they were read from, and with a checksum of the rest; where one differs, the data are made anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import Any

import recbole_holo
from recbole_holo.bridge.compat import installed_version
from recbole_holo.bridge.settings import MODEL_SETTINGS, SETTINGS

_logger = getLogger("recbole_holo")
MAGIC = b"recbole_holo kept data 1\n"
# Of settings, what data do not follow from; of data sets before they are split into batches, these too.
NOT_DATA = ("run", "training", "model")
NOT_DATA_SET = (*NOT_DATA, "loading")
# What RecBole's configuration makes of settings.
PARTS = {
    **{field: setting.part for field, setting in {**MODEL_SETTINGS, **SETTINGS}.items()},
    **dict.fromkeys(("MODEL_INPUT_TYPE", "eval_type", "valid_neg_sample_args", "test_neg_sample_args"), "loading"),
    **dict.fromkeys(("device", "single_spec", "verbose", "config_files", "config_file"), "run"),
    # What is made says what there is to say of the model; the sources, where they are.
    **dict.fromkeys(("model", "data_path"), "run"),
}


@dataclass(frozen=True)
class Fingerprint:
    """What data were made from.

    Args:
        made: what they are: the class of a data set, or the loaders of a model.
        settings: all that they follow from, as text.
        sources: files of the data set and the sha256 of their content. Content rather than time and size: a copy, a
            checkout or a download changes the times of files that are the same, and an edit of one character may leave
            both; reading 1 GB takes about a second, and RecBole's loading of it minutes.
    """

    made: str
    settings: Mapping[str, str]
    sources: Mapping[str, str]

    @classmethod
    def of(cls, config: Any, made: str, ignored_parts: tuple[str, ...]) -> Fingerprint:
        """That of data to be made by ``config``. A setting that is declared nowhere counts as one of data."""
        counted = {
            field: _as_text(value)
            for field, value in config.final_config_dict.items()
            if PARTS.get(field, "data") not in ignored_parts
        }
        counted["version"] = f"recbole_holo {recbole_holo.__version__}, recbole {installed_version('recbole')}"
        return cls(made, counted, sources_of(config))

    def plain(self) -> dict[str, Any]:
        """As a file holds it."""
        return {"made": self.made, "settings": dict(self.settings), "sources": dict(self.sources)}

    def differences(self, kept: Mapping[str, Any]) -> list[str]:
        """What was otherwise when data with the fingerprint ``kept`` were made; empty where nothing was."""
        found = [] if kept["made"] == self.made else [f"it holds {kept['made']}, not {self.made}"]
        for field in sorted({*kept["settings"], *self.settings}):
            before, now = (side.get(field, "not set") for side in (kept["settings"], self.settings))
            if before != now:
                found.append(f"{field} was {_short(before)} and is {_short(now)}")
        for name in sorted({*kept["sources"], *self.sources}):
            before, now = (side.get(name) for side in (kept["sources"], self.sources))
            if before != now:
                found.append(f"{name} is " + ("new" if before is None else "gone" if now is None else "another file"))
        return found


def sources_of(config: Any) -> dict[str, str]:
    """The files of a configuration's data set and the sha256 of their content."""
    folder = Path(config["data_path"])
    names = sorted(folder.glob(f"{config['dataset']}.*")) if folder.is_dir() else []
    return {path.name: _sha256(path) for path in names if path.is_file()}


def write(path: str | os.PathLike[str], fingerprint: Fingerprint, content: Any) -> None:
    """Keeps ``content``, a pickle, in a file that is there whole or not at all."""
    pickled = pickle.dumps(content, pickle.HIGHEST_PROTOCOL)
    head = json.dumps({**fingerprint.plain(), "sha256": hashlib.sha256(pickled).hexdigest()}).encode()
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(MAGIC + len(head).to_bytes(8, "little") + head)
            file.write(pickled)
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise


def read(path: str | os.PathLike[str], fingerprint: Fingerprint, setting: str) -> Any:
    """What was kept, or None, with one line of the log, where it was made from something else.

    The content is a pickle, which runs code: read only your own. It is unpickled only where all else agrees.

    Args:
        setting: what names the file, for the log.
    """
    if not os.path.exists(path):
        return None
    reason = "it was written by RecBole or an earlier version, and does not say what it was made from"
    with open(path, "rb") as file:
        if file.read(len(MAGIC)) == MAGIC:
            try:
                kept = json.loads(file.read(int.from_bytes(file.read(8), "little")))
                differences = fingerprint.differences(kept)
                pickled = b"" if differences else file.read()
                if hashlib.sha256(pickled).hexdigest() == kept["sha256"]:
                    _logger.info(f"{setting}: the data of {os.fspath(path)} are used")
                    return pickle.loads(pickled)
                reason = "; ".join(differences) or "it is damaged"
            except (ValueError, KeyError, TypeError, AttributeError, OverflowError, MemoryError):
                reason = "its first bytes are damaged"
    _logger.warning(f"{setting}: {os.fspath(path)} is not used, and the data are made anew: {reason}")
    return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def _as_text(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_as_text(own)}" for key, own in sorted(value.items(), key=str)) + "}"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_as_text, value)) + "]"
    return repr(value)


def _short(text: str, most: int = 60) -> str:
    return text if len(text) <= most else f"{text[:most]}…"
