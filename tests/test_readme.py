"""What the README says is true, and short."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")


def test_it_is_short() -> None:
    assert len(README.split()) <= 1500


def test_the_two_commands() -> None:
    commands = [line for block in re.findall(r"```bash\n(.*?)```", README, re.S) for line in block.splitlines()]
    assert commands[:2] == [
        "pip install . && python run_recbole_holo.py",
        'pip install ".[test]" && python -m pytest',  # the line that .ci/run takes
    ]


def test_the_ten_lines_run(capsys: pytest.CaptureFixture[str]) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README, re.S)
    assert len([line for line in code.splitlines() if line]) <= 10
    names: dict = {}
    few = '"epochs": 1, "train_windows": "last", "MAX_ITEM_LIST_LENGTH": 20, "show_progress": False'
    exec(code.replace('"epochs": 5', few), names)
    printed = capsys.readouterr().out
    kept, unseen = (names["result"]["test_result"][name] for name in ("ndcg@10", "ndcg@10 (unseen)"))
    assert f"{kept} {unseen}" in printed
    assert len(names["recommender"].recommend("ann", k=5).items) == 5
    assert names["model"].__class__.__name__ == "Hydra"
