"""The unbinding benchmark: the law against counting, and a model that is read before and after training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import unbinding
from recbole_holo.quick_start import run


@pytest.mark.parametrize("algebra", unbinding.ALGEBRAS)
@pytest.mark.parametrize(("d", "n"), [(128, 8), (256, 16), (512, 64)])
def test_the_law_holds_where_noise_is_the_sum_of_many(d: int, n: int, algebra: str) -> None:
    found = unbinding.random_accuracy(d, n, algebra, torch.Generator().manual_seed(0))
    assert found == pytest.approx(unbinding.law(d, n, algebra), abs=0.06)
    assert 0.2 < found < 0.9


def test_unitary_keys_read_more() -> None:
    assert unbinding.law(64, 4, "unitary") > unbinding.law(64, 4, "none") + 0.1


def test_a_model_is_read(cyclic_dataset: str, tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unbinding, "BEHIND", (0, 2))
    monkeypatch.setattr(unbinding, "LEAD", 3)
    monkeypatch.setattr(unbinding, "APART", 1)
    settings = {**tiny, "binding": "role", "binding_algebra": "unitary", "item_attributes": ["genre", "tags"]}
    settings |= {"MAX_ITEM_LIST_LENGTH": 12, "binding_alpha": 5.0}
    checkpoint = run("HoloMambaRec", cyclic_dataset, config_dict=settings)["report"]["checkpoint"]
    cell = unbinding.model_cells(checkpoint, str(Path("dataset").resolve()))
    for when in ("before training", "after training"):
        assert cell["items"][when]["genre"]["accuracy"] > 0.9
        assert cell["items"][when]["genre"]["prior"] == pytest.approx(7 / 20)
        assert set(cell["states"][when][0]) == {"item", "genre", "tags"}
    assert "read from the scan of the first layer" in unbinding.render([], [cell])
