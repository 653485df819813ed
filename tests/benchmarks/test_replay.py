"""Replaying a data set gives the ranking of the offline test."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import replay
from recbole_holo.quick_start import run


@pytest.mark.parametrize(("longest", "event_time"), [(30, None), (6, None), (30, "gap")])
def test_streamed_is_offline_where_the_history_fits(
    longest: int,
    event_time: str | None,
    cyclic_dataset: str,
    tiny: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings = {**tiny, "MAX_ITEM_LIST_LENGTH": longest, "topk": [10], "valid_metric": "NDCG@10", "epochs": 4}
    settings["event_time"] = event_time
    checkpoint = run("RecMamba", cyclic_dataset, config_dict=settings)["report"]["checkpoint"]
    monkeypatch.setattr(replay, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["replay", checkpoint, "--storages", "float32", "int8"])
    replay.main()
    page = (tmp_path / f"replay-RecMamba-{cyclic_dataset}-{longest}.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("|")]
    offline, streamed = rows[2], rows[3]
    assert streamed[0] == "streamed, states in float32"
    assert streamed[2] == "0"
    assert streamed[4] == offline[4] != ""
    assert ("40 users that fit" in rows[0][2]) == (longest == 30)
