"""Reading attributes back out of vectors: the operation, the function, the command."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from recbole_holo.data.catalogue import item_titles
from recbole_holo.errors import ConfigError, DataError
from recbole_holo.explain import explain, main
from recbole_holo.ops import cleanup
from recbole_holo.quick_start import load_data_and_model, run

READABLE = {"binding": "role", "binding_algebra": "unitary", "item_attributes": ["genre", "tags"], "hidden_size": 64}


def test_cleanup_is_the_nearest_by_cosine() -> None:
    known = torch.tensor([[10.0, 0.0], [0.0, 0.1], [1.0, 1.0], [0.0, 0.0]])
    noisy = torch.tensor([[[1.0, 0.9], [0.0, 3.0]], [[-1.0, 0.1], [5.0, 0.2]]])
    cosines, rows = cleanup(noisy, known, k=2)
    assert rows[..., 0].tolist() == [[2, 1], [1, 0]]
    expected = torch.cosine_similarity(noisy.unsqueeze(-2), known, dim=-1).topk(2, -1)
    torch.testing.assert_close(cosines, expected.values)
    assert cleanup(noisy, known, k=9)[0].shape == (2, 2, 4)


def trained(dataset: str, tiny: dict[str, Any], **settings: Any) -> tuple[str, Any, Any]:
    report = run("HoloMambaRec", dataset, config_dict={**tiny, **READABLE, **settings})["report"]
    _, model, data, *_ = load_data_and_model(report["checkpoint"])
    return report["checkpoint"], model, data


@pytest.mark.parametrize("binding", ["item", "role", "both", "triple", "add"])
def test_an_items_own_values_are_found(cyclic_dataset: str, tiny: dict[str, Any], binding: str) -> None:
    """The items' own vectors are kept small, as noise that the reading must look through."""
    _, model, data = trained(cyclic_dataset, tiny, binding=binding, epochs=1, binding_alpha=1.0)
    with torch.no_grad():
        model.binding.alpha.fill_(3.0)
        if binding == "both":
            model.binding.beta.fill_(3.0)
        if binding in ("role", "add"):
            model.item_embedding.weight.mul_(0.01)
    found = [explain(model, data, item=f"i{i}", k=1) for i in range(20)]
    own = [reading.own for one in found for reading in one.readings]
    assert len(own) == 40
    assert sum(own) >= 36


@pytest.mark.parametrize("settings", [{"bind_output": False}, {"bind_output": "added", "binding": "both"}])
def test_a_history_is_read_by_what_is_expected_next(
    cyclic_dataset: str, tiny: dict[str, Any], settings: dict[str, Any]
) -> None:
    """After i4 comes i5, of genre g2: the walk makes the next genre certain."""
    _, model, data = trained(cyclic_dataset, tiny, epochs=40, learning_rate=0.01, **settings)
    right = 0
    for start in range(15):
        history = [f"i{start + t}" for t in range(4)]
        readings = explain(model, data, history=history, k=1).readings
        right += readings[0].value == f"g{(start + 4) % 20 % 3}"
    assert right >= 12


def test_the_command_prints_titles_values_and_errors(
    cyclic_dataset: str, tiny: dict[str, Any], capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    path = tmp_path / "dataset" / cyclic_dataset / f"{cyclic_dataset}.item"
    lines = path.read_text().splitlines()
    titled = [lines[0] + "\ttitle:token_seq", *(f"{line}\tThe {i}th Film" for i, line in enumerate(lines[1:]))]
    path.write_text("\n".join(titled) + "\n")
    checkpoint, _, data = trained(cyclic_dataset, tiny, epochs=1)
    assert item_titles(data)["i3"] == "The 3th Film"
    capsys.readouterr()
    assert main(["--checkpoint", checkpoint, "--item", "i3"]) == 0
    printed = capsys.readouterr().out
    assert "The 3th Film" in printed
    assert "g0" in printed
    assert main(["--checkpoint", checkpoint, "--history", "i3|i4", "--k", "1"]) == 0
    assert "The 3th Film [i3] | The 4th Film [i4]" in capsys.readouterr().out
    assert main(["--checkpoint", checkpoint, "--item", "i33"]) == 2
    assert "no item 'i33'; did you mean i3" in capsys.readouterr().err


def test_what_cannot_be_read_is_named(cyclic_dataset: str, tiny: dict[str, Any]) -> None:
    _, model, data = trained(cyclic_dataset, tiny, epochs=1, binding=None)
    with pytest.raises(ConfigError, match="train with item_attributes and binding"):
        explain(model, data, item="i1")
    _, model, data = trained(cyclic_dataset, tiny, epochs=1)
    with pytest.raises(ConfigError, match="give one of the two"):
        explain(model, data)
    with pytest.raises(DataError, match="empty history"):
        explain(model, data, history=[])


def test_ids_are_as_everywhere(cyclic_dataset: str, tiny: dict[str, Any]) -> None:
    """A history "50" was read as the items 5 and 0."""
    _, model, data = trained(cyclic_dataset, tiny, epochs=1)
    for wrong in ("i1", 5, {"i1"}, [None]):
        with pytest.raises(ConfigError, match="history"):
            explain(model, data, history=wrong)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"item: 5\.0"):
        explain(model, data, item=5.0)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"k: 2\.5"):
        explain(model, data, item="i1", k=2.5)  # type: ignore[arg-type]
    assert explain(model, data, history=iter(["i1", "i2"])) == explain(model, data, history=["i1", "i2"])
