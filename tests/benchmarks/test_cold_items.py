"""The split of the benchmark of new items."""

from __future__ import annotations

import numpy as np
import pandas as pd

from benchmarks.cold_items import BEFORE, split


def test_no_event_of_a_new_item_and_none_after_a_case_is_trained_on() -> None:
    generator = np.random.default_rng(0)
    events = pd.DataFrame(
        {
            "user": np.repeat(np.arange(50), 20),
            "item": generator.integers(0, 60, 1000).astype(str),
            "time": np.tile(np.arange(20), 50),
        }
    )
    kept, cases, cold = split(events, events["item"].unique(), seed=3)
    assert len(cold) == 6
    assert not kept["item"].isin(cold).any()
    assert set(cases.values()) <= cold
    for user, item in cases.items():
        mine, trained = events[events["user"] == user], kept[kept["user"] == user]
        last = mine[mine["item"].isin(cold)].iloc[-1]
        assert last["item"] == item
        assert trained["time"].max() < last["time"]
        assert len(trained) >= BEFORE
    without = set(range(50)) - set(cases)
    for user in without:  # users without a case keep all that is not cold
        mine = events[events["user"] == user]
        assert len(kept[kept["user"] == user]) == (~mine["item"].isin(cold)).sum()
