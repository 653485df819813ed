"""RecBole's atomic files, looked through before RecBole reads them: one line says what is wrong, where, and what to do.

RecBole and pandas end in a traceback at most of what is refused here, and at the rest they read something else than the
file says: a line that was cut off gets the mean of all times, a quotation mark swallows the lines after it, an item of
the name ``NA`` is dropped.
"""

from __future__ import annotations

import codecs
import csv
import io
import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import pandas as pd
from recbole.utils.enum_type import FeatureType

from recbole_holo.errors import ConfigError, DataError, nearest_names

PART = 1 << 22  # bytes that are looked through at a time
LONGEST_CELL = csv.field_size_limit()  # of the reader that RecBole's pandas uses
LONGEST_LINE = 1 << 26
LARGEST = float(np.finfo(np.float32).max)  # RecBole keeps numbers in float32
UTF8 = "utf-8-sig"  # with or without a byte order mark
STANDS_FOR_SEVERAL = "\x1f"  # one byte in the place of a separator of several
TYPES = tuple(kind.value for kind in FeatureType)

NUMBER = re.compile(r" *[+-]?(\d+\.?\d*|\.\d+|inf|infinity)(e[+-]?\d+)? *", re.ASCII | re.IGNORECASE)
# What pandas takes for a missing value, and RecBole's name of no item.
NO_IDS = (
    *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA"),
    *("NULL", "NaN", "None", "n/a", "nan", "null", "[PAD]"),
)


@dataclass(frozen=True)
class Form:
    """How atomic files are written.

    Args:
        separator: of columns; several characters are read as they are.
        seq_separator: of the values of one cell.
        encoding: :data:`UTF8`, or Python's name of another.
    """

    separator: str = "\t"
    seq_separator: str = " "
    encoding: str = UTF8

    @classmethod
    def of(cls, config: Any) -> Form:
        """That of a configuration."""
        return cls(config["field_separator"], config["seq_separator"], text_encoding(config["encoding"]))


def text_encoding(encoding: str | None) -> str:
    """``encoding`` as files are opened with it: UTF-8, the default, also where a byte order mark comes first.

    Raises:
        ConfigError: no encoding of text.
    """
    if encoding is None:
        return UTF8
    try:
        "".encode(encoding)
        return UTF8 if codecs.lookup(encoding).name == "utf-8" else encoding
    except (LookupError, TypeError, ValueError) as error:
        raise ConfigError("encoding", encoding, "Python knows no such encoding: utf-8, latin-1, utf-16, gbk") from error


def read_header(path: str | os.PathLike[str], form: Form) -> dict[str, str]:
    """Columns of an atomic file and their types, from its first line.

    Raises:
        DataError: it is none.
    """
    for _, part in _parts(os.fspath(path), form):
        return _header(os.fspath(path), _without_carriage_returns(os.fspath(path), part, 1), form)
    raise DataError(f"{os.fspath(path)} is empty: its first line must name the columns, such as user_id:token")


def check_file(
    path: str | os.PathLike[str], form: Form, unread: Collection[str] = (), ids: Collection[str] = (), time: str = ""
) -> dict[str, str]:
    """Looks through an atomic file in one pass, in memory for :data:`PART` bytes.

    Args:
        unread: columns whose values nobody reads; they still must be there in every line.
        ids: columns of ids: of type token, a value in every line.
        time: the column of times: a number in every line.

    Returns:
        The columns and their types, the unread ones too.

    Raises:
        DataError: what cannot be read as it is written, with the first line of the file where that is so.
    """
    name, header, rows = os.fspath(path), None, 0
    for first, part in _parts(name, form):
        part = _without_carriage_returns(name, part, first)
        if header is None:
            header = _header(name, part, form)
            for field in ids:
                if header.get(field, "token") != "token":
                    raise DataError(
                        f"{name}, line 1: the ids {field!r} are of type {header[field]}; make them {field}:token"
                    )
            part, first = part[part.index(b"\n") + 1 :], 2
        rows += _Part(name, form, header, part, first).check(unread, ids, time)
    if header is None:
        return read_header(path, form)
    if not rows:
        raise DataError(f"{name} has a header and no line after it: give it data, or remove the file")
    return header


def read_rows(path: str | os.PathLike[str], form: Form) -> Iterator[list[str]]:
    """The cells of every line after the header, as RecBole's pandas reads them; of a file that was looked through."""
    started = False
    for first, part in _parts(os.fspath(path), form):
        lines = _without_carriage_returns(os.fspath(path), part, first)[:-1].decode().split("\n")
        for line in lines if started else lines[1:]:
            if '"' in line and len(form.separator) == 1:
                yield next(csv.reader([line], delimiter=form.separator))
            else:
                yield line.split(form.separator)
        started = True


class _Part:
    """Whole lines of a file: ``text`` with one byte between columns and no line without columns.

    ``lines``: numbers of the lines in the file ``[n]``; ``starts`` and ``ends``: of every cell ``[n, columns]``.
    """

    def __init__(self, path: str, form: Form, header: Mapping[str, str], text: bytes, first: int) -> None:
        self.path, self.form, self.header = path, form, header
        separator = form.separator.encode()
        if len(separator) > 1:
            separator, text = STANDS_FOR_SEVERAL.encode(), text.replace(separator, STANDS_FOR_SEVERAL.encode())
        elif b'"' in text:
            text = self._unquoted(text, first)
        self.separator = separator
        self.lines = np.arange(first, first + text.count(b"\n"))
        if text.startswith(b"\n") or b"\n\n" in text or b" \n" in text or b"\t\n" in text:
            all_lines = text[:-1].split(b"\n")
            kept = [number for number, line in enumerate(all_lines) if separator in line or line.strip()]
            self.lines = self.lines[kept]
            text = b"".join(all_lines[number] + b"\n" for number in kept)
        self.text = text
        self.bytes = np.frombuffer(text, np.uint8)
        ends = np.flatnonzero(self.bytes == ord("\n"))
        between = np.flatnonzero(self.bytes == separator[0])
        counts = np.diff(np.searchsorted(between, ends), prepend=0)
        wrong = np.flatnonzero(counts != len(header) - 1)
        if len(wrong):
            row = int(wrong[0])
            line = text[ends[row - 1] + 1 if row else 0 : ends[row]].decode()
            few = (
                "it was cut off, or written with another field_separator"
                if counts[row] < len(header) - 1
                else ("a value holds the separator, or there is one at the end")
            )
            raise DataError(
                f"{path}, line {self.lines[row]}: {_shown(line)} has {counts[row] + 1} columns, and the header "
                f"{len(header)} ({', '.join(header)}); {few}"
            )
        inner = between.reshape(len(ends), len(header) - 1)
        self.starts = np.c_[np.r_[0, ends[:-1] + 1][: len(ends)], inner + 1]
        self.ends = np.c_[inner, ends]

    def _unquoted(self, text: bytes, first: int) -> bytes:
        """Lines with quotation marks as a reader of csv files takes them, without separators in their values."""
        separator, lines = self.form.separator, text[:-1].split(b"\n")
        for number, line in enumerate(lines):
            if b'"' in line:
                after = "the next line"
                try:
                    cells, *others = csv.reader([line.decode() + "\n", after], delimiter=separator)
                except csv.Error as error:
                    raise DataError(f"{self.path}, line {first + number}: it cannot be read ({error})") from error
                if not others:
                    column = list(self.header)[min(len(cells), len(self.header)) - 1]
                    _refuse(
                        self.path,
                        first + number,
                        column,
                        line.decode().split(separator)[len(cells) - 1],
                        "opens a quotation mark and does not close it: remove or double it",
                    )
                lines[number] = separator.join(cell.replace(separator, " ") for cell in cells).encode()
        return b"\n".join(lines) + b"\n"

    def check(self, unread: Collection[str], ids: Collection[str], time: str) -> int:
        """How many lines there are, all of them right."""
        long = np.argwhere(self.ends - self.starts > LONGEST_CELL)
        if len(long):
            row, column = map(int, long[0])
            self._refuse(row, column, f"is longer than {LONGEST_CELL:,} bytes, the most that pandas reads")
        floats = []
        for column, (name, kind) in enumerate(self.header.items()):
            if name in unread or not len(self.lines):
                continue
            if name in ids:
                self._check_ids(column)
            elif kind == "float":
                floats.append(column)
            elif kind == "float_seq":
                self._check_lists(column)
        if floats:
            self._check_numbers(floats, time)
        return len(self.lines)

    def _check_ids(self, column: int) -> None:
        starts, lengths = self.starts[:, column], self.ends[:, column] - self.starts[:, column]
        longest = max(map(len, NO_IDS))
        like_none = np.zeros((256, longest + 2), dtype=bool)  # by first byte and length
        like_none[[ord(value[0]) for value in NO_IDS if value], [len(value) for value in NO_IDS if value]] = True
        suspects = (lengths == 0) | like_none[self.bytes[starts], np.minimum(lengths, longest + 1)]
        for row in map(int, np.flatnonzero(suspects)):
            value = self._cell(row, column)
            if not value:
                self._refuse(row, column, "is empty: an id is missing; remove the line, or give it one")
            if value in NO_IDS:
                self._refuse(row, column, "is read as no id at all (a missing value): give it another name")

    def _check_numbers(self, columns: list[int], time: str) -> None:
        try:
            values = self._read(columns, np.float64)
        except (ValueError, TypeError) as error:
            texts = self._read(columns, str)
            for column in columns:
                unlike = texts[column].str.fullmatch(NUMBER).eq(False)
                unread = texts[column].notna() & pd.to_numeric(texts[column], errors="coerce").isna()
                wrong = np.flatnonzero(unlike | unread)
                if len(wrong):
                    self._refuse(int(wrong[0]), column, "is no number; write numbers with a point, or nothing")
            first, last = self.lines[0], self.lines[-1]
            raise DataError(f"{self.path}, one of the lines {first} to {last}: a number cannot be read") from error
        for column in columns:
            own = values[column].to_numpy()
            wrong = np.flatnonzero(np.abs(own) > LARGEST)
            if len(wrong):
                self._refuse(int(wrong[0]), column, f"is beyond the numbers of float32, {LARGEST:.3g}")
            if list(self.header)[column] == time and np.isnan(own).any():
                self._refuse(int(np.flatnonzero(np.isnan(own))[0]), column, "is no time: every event needs one")

    def _read(self, columns: list[int], kind: type) -> pd.DataFrame:
        return pd.read_csv(
            io.BytesIO(self.text),
            sep=self.separator.decode(),
            header=None,
            names=range(len(self.header)),
            usecols=columns,
            dtype=kind,
            engine="c",
            quoting=csv.QUOTE_NONE,
            index_col=False,
        )

    def _check_lists(self, column: int) -> None:
        for row in range(len(self.lines)):
            for word in filter(None, self._cell(row, column).split(self.form.seq_separator)):
                try:
                    if not abs(float(word)) <= LARGEST:
                        self._refuse(row, column, f"holds {word!r}, which is no number that can be used")
                except ValueError:
                    self._refuse(row, column, f"holds {word!r}, which is no number")

    def _cell(self, row: int, column: int) -> str:
        return self.text[self.starts[row, column] : self.ends[row, column]].decode()

    def _refuse(self, row: int, column: int, what: str) -> NoReturn:
        _refuse(self.path, int(self.lines[row]), list(self.header)[column], self._cell(row, column), what)


def _refuse(path: str, line: int, column: str, value: str, what: str) -> NoReturn:
    raise DataError(f"{path}, line {line}, column {column!r}: {_shown(value)} {what}")


def _shown(text: str, most: int = 60) -> str:
    return repr(text if len(text) <= most else text[:most] + "…")


# ---------------------------------------------------------------------------------------------------------------------
# From bytes to lines


def _parts(path: str, form: Form) -> Iterator[tuple[int, bytes]]:
    """The file in parts of whole lines, in UTF-8, each with the number of its first line."""
    recoded = form.encoding != UTF8
    decoder = codecs.getincrementaldecoder(form.encoding)()
    rest, line = b"", 1
    try:
        with open(path, "rb") as file:
            while True:
                raw = file.read(PART)
                if line == 1 and not rest:
                    _check_start(path, raw, form)
                try:
                    part = rest + (decoder.decode(raw, final=not raw).encode() if recoded else raw)
                except UnicodeError as error:
                    _refuse_encoding(path, error, rest, line, form)
                if not recoded and line == 1 and not rest:
                    part = part.removeprefix(codecs.BOM_UTF8)
                if not raw and part:
                    part += b"\n"
                cut = part.rfind(b"\n") + 1
                part, rest = part[:cut], part[cut:]
                if len(rest) > LONGEST_LINE:
                    raise DataError(f"{path}, line {line}: no line ends within {LONGEST_LINE:,} bytes; is it text?")
                if part:
                    yield line, _checked_text(path, part, line, form)
                    line += part.count(b"\n")
                if not raw:
                    return
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error


def _check_start(path: str, start: bytes, form: Form) -> None:
    wide = start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    if wide and not form.encoding.lower().replace("_", "-").startswith(("utf-16", "utf-32")):
        used = form.encoding.removesuffix("-sig")
        raise DataError(f"{path} is UTF-16, not {used}: set encoding: utf-16, or convert the file to UTF-8")


def _checked_text(path: str, part: bytes, line: int, form: Form) -> bytes:
    if b"\0" in part:
        line += part[: part.index(b"\0")].count(b"\n")
        raise DataError(
            f"{path}, line {line}: it holds a NUL byte, which is no text; the file is damaged, or in another encoding"
        )
    if not part.isascii():
        try:
            part.decode()
        except UnicodeDecodeError as error:
            _refuse_encoding(path, error, b"", line, form)
    return part


def _refuse_encoding(path: str, error: UnicodeError, rest: bytes, line: int, form: Form) -> NoReturn:
    if not isinstance(error, UnicodeDecodeError):  # as of UTF-16 without a byte order mark
        raise DataError(f"{path} is not {form.encoding}: {error}") from error
    before, wrong = error.object[: error.start], error.object[error.start : error.start + 1]
    before = rest + before.decode(form.encoding, "ignore").encode()
    column = before[before.rfind(b"\n") + 1 :].count(form.separator.encode()) + 1
    line += before.count(b"\n")
    used, other = form.encoding.removesuffix("-sig"), "latin-1" if form.encoding == UTF8 else "utf-8"
    seen = f" ({wrong.decode('latin-1')!r} in Latin-1)" if form.encoding == UTF8 else ""
    raise DataError(
        f"{path}, line {line}, column {column}: byte 0x{wrong.hex()}{seen} is no {used}; set encoding: {other}, or "
        "convert the file to UTF-8"
    ) from error


def _without_carriage_returns(path: str, part: bytes, line: int) -> bytes:
    if b"\r" not in part:
        return part
    part = part.replace(b"\r\n", b"\n")
    if b"\r" in part:
        line += part[: part.index(b"\r")].count(b"\n")
        raise DataError(
            f"{path}, line {line}: a carriage return (\\r) is inside of it; lines end in \\n or \\r\\n, and no value "
            "holds one"
        )
    return part


def _header(path: str, part: bytes, form: Form) -> dict[str, str]:
    line = part[: part.index(b"\n")].decode()
    header: dict[str, str] = {}
    for column in line.split(form.separator):
        name, _, kind = column.partition(":")
        if name in header:
            raise DataError(f"{path}, line 1: the column {name!r} is there twice; rename or remove one")
        if not name or kind not in TYPES or '"' in name:
            remedy = _header_remedy(line, kind, form)
            raise DataError(f"{path}, line 1: {_shown(column)} is no column with its type. {remedy}")
        header[name] = kind
    return header


def _header_remedy(line: str, kind: str, form: Form) -> str:
    others = [one for one in ("\t", ",", ";", "|", " ") if one != form.separator and one in line]
    if ":" in line and others and form.separator not in line:
        return f"Columns seem to be separated by {others[0]!r}: set field_separator to it"
    close = nearest_names(kind.strip(), TYPES, limit=1) if kind else []
    if close:
        return f"Did you mean {close[0]}?"
    return f"The first line must name the columns, such as user_id:token, with one of the types {', '.join(TYPES)}"


# ---------------------------------------------------------------------------------------------------------------------
# Settings that name columns

NUMBERS, TOKENS = ("float", "float_seq"), ("token", "token_seq")
# setting → the types that its columns may have
COLUMN_SETTINGS = {
    "normalize_field": NUMBERS,
    "numerical_features": NUMBERS,
    "discretization": NUMBERS,
    "threshold": ("float",),
    "val_interval": TYPES,
    "preload_weight": TOKENS,
    "alias_of_user_id": TOKENS,
    "alias_of_item_id": TOKENS,
}


def check_column_settings(config: Any, types: Mapping[str, FeatureType]) -> None:
    """Refuses settings that name columns which were not loaded, or are of a type that the setting is not for.

    Raises:
        ConfigError: the first of them.
    """
    for setting, allowed in COLUMN_SETTINGS.items():
        for name in config[setting] or ():
            if name not in types:
                remedy = f"no column {name!r} was loaded (load_col); there are {', '.join(types)}"
                raise ConfigError(setting, config[setting], remedy)
            if types[name].value not in allowed:
                remedy = f"the column {name!r} is of type {types[name].value}; it is for {' and '.join(allowed)}"
                raise ConfigError(setting, config[setting], remedy)
    for name, wanted in (config["val_interval"] or {}).items():
        if (types[name].value in NUMBERS) != isinstance(wanted, str):
            remedy = f"{name}: give numbers as an interval, '[3,inf)', and tokens as a list of those to be kept"
            raise ConfigError("val_interval", config["val_interval"], remedy)
    for name in (config["preload_weight"] or {}).values():
        if name not in types:
            raise ConfigError("preload_weight", config["preload_weight"], f"no column {name!r} was loaded (load_col)")
