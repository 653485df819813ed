"""Reading logs of any length: blocks of bytes that end with a line, numbers out of them, errors that name the line."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from recbole_holo.data.prepare import _lines_numba as lines_numba
from recbole_holo.errors import DataError, nearest_names

BLOCK_BYTES = 16 << 20
MAX_ID = (1 << 28) - 1  # counts are held in arrays by id: this is 1 GiB of them, of which only touched pages are taken
_BOM = b"\xef\xbb\xbf"
_NOT_TEXT = {
    b"\x1f\x8b": "is compressed by gzip; unpack it first",
    b"PK\x03\x04": "is a zip archive; unpack it first",
    b"BZh": "is compressed by bzip2; unpack it first",
    b"\xff\xfe": "is in UTF-16; save it as UTF-8",
    b"\xfe\xff": "is in UTF-16; save it as UTF-8",
}


@dataclass(frozen=True)
class Log:
    """A file with one event a line.

    Args:
        path: the file.
        kind: which part of the data set it is, for counting.
        separator: between columns, one character.
        columns: names of the columns in their order; None = the first line names them.
    """

    path: Path
    kind: str
    separator: str
    columns: tuple[str, ...] | None = None


def check_logs(logs: Sequence[Log], wanted: Sequence[str]) -> None:
    """Looks at the first line and the last byte of each log, before work starts.

    Raises:
        DataError: an empty, compressed or UTF-16 file, a header that lacks a wanted column, or an unfinished last line.
    """
    for log in logs:
        columns_of(log, wanted)
        with log.path.open("rb") as file:
            file.seek(-1, 2)
            if file.read(1) != b"\n":
                number, line = _last_line(log.path)
                raise DataError(
                    f"{log.path}, line {number:,}: the last line is not finished: {_shown(line)}. The copy is cut "
                    "short: get it again, or, if it is known to be complete, add a line end to it."
                )


def columns_of(log: Log, wanted: Sequence[str]) -> tuple[str, ...]:
    """The names of a log's columns.

    Raises:
        DataError: the file is empty or no text, or its first line lacks one of ``wanted``.
    """
    with log.path.open("rb") as file:
        first = file.readline(1 << 16)
    if not first:
        raise DataError(f"{log.path} is empty; the copy is cut short: get it again.")
    for magic, remedy in _NOT_TEXT.items():
        if first.startswith(magic):
            raise DataError(f"{log.path} {remedy}.")
    if log.columns is not None:
        return log.columns
    names = tuple(first.removeprefix(_BOM).decode("utf-8", "replace").rstrip("\r\n").split(log.separator))
    for name in wanted:
        if name not in names:
            close = nearest_names(name, names)
            hint = f"; is it called {' or '.join(close)}?" if close else ""
            raise DataError(f"{log.path}, line 1: no column {name!r} in {_shown(first)}{hint}")
    return names


def read_numbers(
    log: Log,
    required: Sequence[str],
    optional: Sequence[str],
    limits: Mapping[str, int],
    bar: tqdm,
    block_bytes: int = BLOCK_BYTES,
) -> Iterator[dict[str, np.ndarray]]:
    """The numbers of some columns, a block of lines at a time.

    Args:
        required: columns whose numbers must be there and not be negative.
        optional: columns whose numbers may be missing (then -1) or negative.
        limits: largest allowed numbers, by column.
        bar: advanced by the bytes read.
        block_bytes: about how much text is held at a time; a line is never split.

    Yields:
        ``{column: int64 [lines]}``, in the file's order; valid until the next block.

    Raises:
        DataError: a line with more or fewer columns, no number where one is needed, or a number above its limit.
    """
    wanted = [*required, *optional]
    columns = columns_of(log, wanted)
    slots = np.array([wanted.index(name) if name in wanted else -1 for name in columns])
    must = np.array([name in required for name in wanted])
    largest = np.array([limits.get(name, np.iinfo(np.int64).max) for name in wanted])
    values = np.empty((len(wanted), 0), np.int64)
    for first_line, block in _blocks(log, block_bytes, bar):
        if values.shape[1] < (most := len(block) // len(columns) + 1):  # a line has a separator or end a column
            values = np.empty((len(wanted), most), np.int64)
        text = np.frombuffer(block, np.uint8)
        lines, fault, column, start = lines_numba.parse(text, ord(log.separator), slots, must, largest, values)
        if fault != lines_numba.FINE:
            number = first_line + block.count(b"\n", 0, start)
            line = block[start : block.index(b"\n", start)]
            raise DataError(f"{log.path}, line {number:,}: {_what(fault, columns, column, line, log, largest, slots)}")
        yield {name: values[row, :lines] for row, name in enumerate(wanted)}


def _blocks(log: Log, block_bytes: int, bar: tqdm) -> Iterator[tuple[int, bytes]]:
    """Number of the first line and bytes of each block, the header left out."""
    line = 1
    with log.path.open("rb") as file:
        if file.read(len(_BOM)) == _BOM:
            bar.update(len(_BOM))
        else:
            file.seek(0)
        if log.columns is None:
            bar.update(len(file.readline()))
            line = 2
        while block := file.read(block_bytes):
            block += file.readline()
            yield line, block
            line += block.count(b"\n")
            bar.update(len(block))


def _what(
    fault: int, columns: tuple[str, ...], column: int, line: bytes, log: Log, largest: np.ndarray, slots: np.ndarray
) -> str:
    name = columns[column]
    what = {
        lines_numba.WRONG_COUNT: f"{line.count(log.separator.encode()) + 1} columns instead of {len(columns)} "
        f"({', '.join(columns)})",
        lines_numba.NOT_A_NUMBER: f"{name} is not a whole number",
        lines_numba.EMPTY: f"{name} is missing",
        lines_numba.NEGATIVE: f"{name} is negative",
        lines_numba.TOO_LARGE: f"{name} is above {largest[slots[column]]:,}, larger than any of this data set",
    }[fault]
    return f"{what}: {_shown(line)}. The file is broken there: get it again, or mend or remove the line."


def _last_line(path: Path) -> tuple[int, bytes]:
    number, line = 0, b""
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            number += block.count(b"\n")
            line = (line + block).rpartition(b"\n")[2] if b"\n" in block else line + block
    return number + 1, line


def _shown(line: bytes) -> str:
    text = line.decode("utf-8", "replace").rstrip("\r\n")
    return repr(text if len(text) <= 120 else text[:117] + "...")
