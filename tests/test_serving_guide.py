"""The guide to serving works as it stands, on ml-100k."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

GUIDE = (Path(__file__).resolve().parent.parent / "docs" / "serving.md").read_text(encoding="utf-8")


def test_the_guide_from_the_checkpoint_to_the_step(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", GUIDE, re.S)
    assert len(blocks) == 6
    names: dict = {}
    for block in blocks:
        exec(block.replace('"epochs": 20', '"epochs": 2, "train_batch_size": 64, "show_progress": False'), names)
    printed = capsys.readouterr().out
    assert "Counter({'applied': 2, 'skipped: unknown item': 1})" in printed
    assert re.search(r"item +title +score", printed)
    assert "now.1.ssm: 128 x 16" in printed
    assert Path("small.pth").stat().st_size < Path(names["checkpoint"]).stat().st_size / 4
    assert sorted(names["recommender"].store) == ["ann", "bob"]
