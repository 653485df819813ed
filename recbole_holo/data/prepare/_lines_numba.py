"""Numbers out of lines of text and back, compiled by numba on first use (some seconds, then cached)."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

# Any: numba's own types do not follow a function through its decorators.
compiled: Any = numba.njit(cache=True, nogil=True)

MISSING = -1  # the value of an empty field
LINE_BYTES = 10 + 1 + 10 + 1 + 19 + 1  # of a written line at most: two int32, one int64

FINE, WRONG_COUNT, NOT_A_NUMBER, EMPTY, NEGATIVE, TOO_LARGE = range(6)

_NEWLINE, _RETURN, _MINUS, _POINT, _ZERO, _NINE = (ord(c) for c in "\n\r-.09")
_MAX_DIGITS = 18  # of an int64


@compiled
def parse(text: Any, separator: int, slots: Any, required: Any, limits: Any, values: Any) -> tuple[int, int, int, int]:
    """Reads whole numbers out of lines; blank lines are passed over.

    Args:
        text: bytes, uint8; the last one is a line end.
        separator: the byte between columns.
        slots: row of ``values`` of each column of the text, -1 = not read, ``[columns]``.
        required: whether the number must be there and not be negative, ``[rows of values]``.
        limits: largest allowed number, ``[rows of values]``.
        values: where the numbers go, int64 ``[wanted, at least the number of lines]``.

    Returns:
        lines read; what is wrong with the next one (``FINE``: nothing), its column, and where in the text it starts.
    """
    columns = len(slots)
    position, lines = 0, 0
    while position < len(text):
        start = position
        if text[position] == _NEWLINE:
            position += 1
            continue
        if text[position] == _RETURN and text[position + 1] == _NEWLINE:
            position += 2
            continue
        for column in range(columns):
            slot = slots[column]
            if slot < 0:
                while text[position] != separator and text[position] != _NEWLINE:
                    position += 1
            else:
                negative = text[position] == _MINUS
                position += negative
                number, digits = np.int64(0), 0
                while _ZERO <= text[position] <= _NINE and digits < _MAX_DIGITS:
                    number = number * 10 + (text[position] - _ZERO)
                    digits += 1
                    position += 1
                if digits and text[position] == _POINT:  # a whole number that another program wrote as 1.0
                    position += 1
                    while text[position] == _ZERO:
                        position += 1
                if text[position] == _RETURN:
                    position += 1
                if text[position] != separator and text[position] != _NEWLINE:
                    return lines, NOT_A_NUMBER, column, start
                if digits == 0:
                    if negative:
                        return lines, NOT_A_NUMBER, column, start
                    number = np.int64(MISSING)
                elif negative:
                    number = -number
                if required[slot] and number < 0:
                    return lines, EMPTY if digits == 0 else NEGATIVE, column, start
                if number > limits[slot]:
                    return lines, TOO_LARGE, column, start
                values[slot, lines] = number
            if (text[position] == _NEWLINE) != (column == columns - 1):
                return lines, WRONG_COUNT, column, start
            position += 1
        lines += 1
    return lines, FINE, 0, 0


@compiled
def format_lines(user: Any, item: Any, time: Any, text: Any) -> int:
    """Writes ``user<tab>item<tab>time`` lines into ``text`` (uint8) and returns their length in bytes.

    Numbers are not negative. A line takes at most :data:`LINE_BYTES`.
    """
    position = 0
    digits = np.empty(20, np.uint8)
    for line in range(len(user)):
        for column in range(3):
            number = np.int64(user[line] if column == 0 else item[line] if column == 1 else time[line])
            count = 0
            while count == 0 or number > 0:
                digits[count] = _ZERO + number % 10
                number //= 10
                count += 1
            while count > 0:
                count -= 1
                text[position] = digits[count]
                position += 1
            text[position] = 10 if column == 2 else 9
            position += 1
    return position


@compiled
def count(ids: Any, counts: Any) -> None:
    """Adds one to ``counts[i]`` for every ``i`` of ``ids``."""
    for number in ids:
        counts[number] += 1
