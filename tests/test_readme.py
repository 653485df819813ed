"""What the README shows works."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from recbole_holo.bridge import registry, resources
from recbole_holo.quick_start import load_data_and_model, run

README = (Path(__file__).resolve().parent.parent / "README.md").read_text(encoding="utf-8")


def test_the_model_of_ones_own(
    cyclic_dataset: str, tiny: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = next(block for block in re.findall(r"```python\n(.*?)```", README, re.S) if "class AverageRec" in block)
    (tmp_path / "averagerec.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(registry, "MODELS", dict(registry.MODELS))
    monkeypatch.setattr(registry, "PROPERTIES", {})
    defaults = next(block for block in re.findall(r"```yaml\n(.*?)```", README, re.S) if "hidden_size" in block)
    (tmp_path / "averagerec.yaml").write_text(defaults)
    registry.register_model("AverageRec", "averagerec", properties="averagerec.yaml")
    del tiny["hidden_size"]
    report = run("AverageRec", cyclic_dataset, config_dict=tiny)["report"]
    assert report["parameters"] == 21 * 64
    names = {"hit@3", "hit@5", "ndcg@3", "ndcg@5", "mrr@3", "mrr@5"}
    assert report["test"].keys() == names | {f"{name} (unseen)" for name in names}
    assert load_data_and_model(report["checkpoint"])[1].__class__.__name__ == "AverageRec"


def test_settings_and_presets_that_are_named_exist() -> None:
    table = README[README.index("## Settings") : README.index("Precedence, lowest first")]
    documented = set(
        re.findall(r"`([a-z_]+)`", "\n".join(line.split("|")[1] for line in table.splitlines() if "|" in line))
    )
    text = resources.properties("overall.yaml").read_text() + resources.properties("model", "Hydra.yaml").read_text()
    defined = set(re.findall(r"^(\w+):", text, re.M))
    assert documented <= defined
    overall = set(re.findall(r"^(\w+):", resources.properties("overall.yaml").read_text(), re.M))
    assert overall <= documented
    for name in re.findall(r"`(\w+_paper)`", README):
        assert name in resources.presets()
