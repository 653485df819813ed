"""The row from outside: what its lists are worth by our metrics."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest

from benchmarks.rectools_sasrec import ndcg, ranks_in


def test_the_rank_is_that_in_the_users_own_list() -> None:
    lists = pd.DataFrame({"user_id": [7, 7, 9, 9], "item_id": [1, 2, 2, 1], "rank": [1, 2, 1, 2]})
    targets = pd.Series({9: "1", 7: "1", 8: "2", 6: "3"})  # no list of user 8 and 6
    ranks = ranks_in(lists, targets)
    np.testing.assert_array_equal(ranks, [2, 1, 0, 0])
    assert ndcg(ranks) == pytest.approx((1 / math.log2(3) + 1) / 4)
