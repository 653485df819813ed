"""Which items a row leaves out of its softmax, as index tables: no mask of rows × items is ever held."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class SeenItems(NamedTuple):
    """Row ``i`` has seen ``items[start[i] : end[i]]``; an item may be among them several times, or row ``i``'s target.

    Rows of one history follow one another with ``end`` ascending, so that what a row has seen is what the row before it
    has, and a little more: a kernel that goes through the rows in order does work in proportion to them.
    """

    items: Tensor  # [n], ids; 0 = pad, which is left out in any case
    start: Tensor  # [M]
    end: Tensor  # [M]
