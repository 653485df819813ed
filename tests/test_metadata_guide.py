"""The guide to metadata works as it stands, on ml-100k."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from recbole_holo.bridge import resources

GUIDE = (Path(__file__).resolve().parent.parent / "docs" / "metadata.md").read_text(encoding="utf-8")


def test_the_guide_from_the_file_to_the_explanation(capsys: pytest.CaptureFixture[str]) -> None:
    blocks = re.findall(r"```python\n(.*?)```", GUIDE, re.S)
    assert len(blocks) == 3
    names: dict = {}
    for block in blocks:
        exec(block.replace('"epochs": 20', '"epochs": 2, "train_batch_size": 64, "show_progress": False'), names)
    report = names["result"]["report"]
    assert set(report["attributes"]) == {"class", "release_year"}
    printed = capsys.readouterr().out
    assert re.search(r"attribute +alpha +beta +share", printed)
    assert "Toy Story [1]\n" in printed
    assert "Toy Story [1] | Star Wars [50] | Empire Strikes Back, The [172]" in printed
    explanation = names["explain"](names["model"], names["dataset"], item="1", k=1)
    assert [reading.attribute for reading in explanation.readings] == ["class", "release_year"]


def test_the_guide_names_settings_that_exist() -> None:
    defined = set(re.findall(r"^(\w+):", resources.properties("overall.yaml").read_text(), re.M))
    wanted = set(re.findall(r"`((?:binding|bind|attribute|cold|keep)_\w+)", GUIDE))
    assert wanted <= defined
    assert {"attribute_shuffle", "bind_output", "cold_items"} <= wanted | set(re.findall(r"^(\w+):", GUIDE, re.M))
