"""The ``.user`` and ``.item`` files: numbers, raw ids, and columns of a raw table, some rows at a time."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from recbole_holo.data.prepare.lines import MAX_ID
from recbole_holo.errors import DataError

_logger = getLogger("recbole_holo")

CHUNK_ROWS = 50_000

# A tab or line end would break a row, and a double quote at the start of a field would swallow the rows that follow.
_PLAIN = str.maketrans({'"': "'", "\t": " ", "\r": " ", "\n": " "})

Cleaner = Callable[[pd.Series], pd.Series]  # strings of a raw table → strings of an atomic file, where "" is no value


@dataclass(frozen=True)
class Column:
    """A column of a raw table, and the field that it becomes (``"tag:token_seq"``) by way of ``clean``."""

    name: str
    field: str
    clean: Cleaner


@dataclass(frozen=True)
class Table:
    """A raw table of users or items.

    Bytes that are not UTF-8 become �; rows with too many columns or without a readable id are left out and counted in a
    warning; of rows with the same id, the first counts; columns that the file lacks are left out with a warning.

    Args:
        path: the file.
        separator: between columns, one character.
        id: the column of raw ids.
        columns: the columns that are used.
        names: names of the file's columns in order; None = its first line has them.
        quoted: whether fields may be in double quotes; otherwise these are ordinary characters.
    """

    path: Path
    separator: str
    id: str
    columns: tuple[Column, ...]
    names: tuple[str, ...] | None = None
    quoted: bool = True


def write_table(
    table: Table | None,
    path: Path,
    kind: str,
    ids: np.ndarray,
    tokens: np.ndarray,
    bars: Callable[[str, int], tqdm],
    chunk_rows: int = CHUNK_ROWS,
) -> None:
    """Writes an atomic file: a row for every user or item of the events, whether or not the raw table has it.

    Args:
        table: the raw table; None, or one that is not there = raw ids only.
        path: the file to write.
        kind: ``user`` or ``item``; the fields are ``<kind>_id``, ``raw_<kind>_id`` and the table's.
        ids, tokens: raw id, ascending, and number of each, int32 ``[n]``.
        bars: makes the progress bar.
        chunk_rows: rows held at a time.

    Raises:
        DataError: the table has no column of ids.
    """
    if table and not table.path.is_file():
        table = None
    columns = _present(table) if table else []
    written = np.zeros(len(ids), bool)
    with path.open("w", encoding="utf-8", newline="") as file:

        def write(place: np.ndarray, cleaned: dict[str, Any]) -> None:
            frame = pd.DataFrame({"token": tokens[place], "id": ids[place], **cleaned})
            frame.to_csv(file, sep="\t", header=False, index=False, quoting=csv.QUOTE_NONE)

        header = [f"{kind}_id:token", f"raw_{kind}_id:token", *(column.field for column in columns)]
        file.write("\t".join(header) + "\n")
        for raw, chunk in _chunks(table, bars, chunk_rows) if table else ():
            place = np.minimum(np.searchsorted(ids, raw), len(ids) - 1)
            known = (ids[place] == raw) & ~written[place] & ~pd.Series(raw).duplicated().to_numpy()
            place, chunk = place[known], chunk[known]
            written[place] = True
            write(place, {column.field: column.clean(chunk[column.name]).to_numpy() for column in columns})
        missing = np.flatnonzero(~written)
        if table and len(missing):
            _logger.warning(f"{table.path.name} has no row for {len(missing):,} of the {len(ids):,} {kind}s")
        for start in range(0, len(missing), chunk_rows):
            write(missing[start : start + chunk_rows], dict.fromkeys((column.field for column in columns), ""))


# ---------------------------------------------------------------------- cleaners
def token(*missing: str) -> Cleaner:
    """One name; the values ``missing`` mean that there is none."""
    return lambda values: _plain(values).replace(dict.fromkeys(missing, ""))


def number_token(values: pd.Series) -> pd.Series:
    """A whole number that is a name; other programs write it as ``12.0`` where the column has gaps."""
    return _plain(values).str.removesuffix(".0")


def lower_case_token(values: pd.Series) -> pd.Series:
    """One name in lower case: pandas, with which RecBole reads, takes ``NA`` (Namibia) for a missing value."""
    return _plain(values).str.lower()


def token_list(separator: str) -> Cleaner:
    """Several names, for a ``token_seq`` field."""
    return lambda values: words(values.str.replace(separator, " ", regex=False))


def words(values: pd.Series) -> pd.Series:
    """A text as its words, for a ``token_seq`` field."""
    return values.str.translate(_PLAIN).str.split().str.join(" ")


def number(least: float = -np.inf, per: float = 1) -> Cleaner:
    """A number, divided by ``per``; below ``least`` it means that there is none. For a ``float`` field."""

    def clean(values: pd.Series) -> pd.Series:
        numbers = pd.to_numeric(values, errors="coerce")
        return pd.Series(["" if n != n or n < least else f"{n / per:.10g}" for n in numbers.to_numpy(float)])

    return clean


def _plain(values: pd.Series) -> pd.Series:
    return values.str.translate(_PLAIN).str.strip()


# ---------------------------------------------------------------------- reading
class _Counted(io.RawIOBase):
    """A file that counts lines and advances a progress bar as it is read."""

    def __init__(self, path: Path, bar: tqdm) -> None:
        self._file = path.open("rb", buffering=0)
        self._bar = bar
        self.lines = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        size = self._file.readinto(buffer) or 0
        self.lines += bytes(buffer[:size]).count(b"\n")
        self._bar.update(size)
        return size

    def close(self) -> None:
        self._file.close()
        super().close()


def _names(table: Table) -> tuple[str, ...]:
    """The file's columns.

    Raises:
        DataError: none is the column of ids.
    """
    if table.names:
        return table.names
    header = pd.read_csv(table.path, sep=table.separator, nrows=0, encoding="utf-8-sig", encoding_errors="replace")
    names = tuple(str(name).strip() for name in header.columns)
    if table.id not in names:
        raise DataError(f"{table.path}, line 1: no column {table.id!r} among {', '.join(names)}; get the file again.")
    return names


def _present(table: Table) -> list[Column]:
    names = _names(table)
    lacking = [column.name for column in table.columns if column.name not in names]
    if lacking:
        _logger.warning(f"{table.path.name} has no column {', '.join(lacking)}; left out")
    return [column for column in table.columns if column.name in names]


def _chunks(
    table: Table, bars: Callable[[str, int], tqdm], chunk_rows: int
) -> Iterator[tuple[np.ndarray, pd.DataFrame]]:
    """Raw ids and rows, for the rows that have an id."""
    rows, more = 0, "more"
    with bars(f"reading {table.path.name}", table.path.stat().st_size) as bar, _Counted(table.path, bar) as counted:
        text = io.TextIOWrapper(io.BufferedReader(counted, 1 << 20), encoding="utf-8-sig", errors="replace", newline="")
        with pd.read_csv(
            text,
            sep=table.separator,
            names=[*_names(table), more],
            header=None,
            skiprows=0 if table.names else 1,
            index_col=False,
            dtype=str,
            na_filter=False,
            quoting=csv.QUOTE_MINIMAL if table.quoted else csv.QUOTE_NONE,
            lineterminator="\n",
            on_bad_lines="skip",  # those with two columns too many; one too many would shift nothing, but is broken too
            chunksize=chunk_rows,
        ) as reader:
            for chunk in reader:
                raw = pd.to_numeric(chunk[table.id], errors="coerce").to_numpy(float)
                readable = (raw >= 0) & (raw <= MAX_ID) & (raw % 1 == 0) & (chunk[more] == "").to_numpy()
                rows += int(readable.sum())
                yield raw[readable].astype(np.int32), chunk[readable]
    broken = counted.lines - (table.names is None) - rows
    if broken > 0:
        _logger.warning(f"{table.path.name}: {broken:,} of {counted.lines:,} lines are broken and left out")
