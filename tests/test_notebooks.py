"""The notebooks run from a clean start, with few epochs, and end where they say."""

from __future__ import annotations

from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")

NOTEBOOKS = Path(__file__).resolve().parent.parent / "docs" / "notebooks"


def printed(name: str, folder: Path) -> str:
    """What a notebook prints when it is run in ``folder``."""
    notebook = nbformat.read(NOTEBOOKS / name, 4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source = cell.source.replace('"epochs": 5', '"epochs": 1, "train_windows": "last"')
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}})
    client.execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    return "\n".join(output.get("text") or output.get("data", {}).get("text/plain", "") for output in outputs)


def test_ml_100k(tmp_path: Path) -> None:
    found = printed("ml-100k.ipynb", tmp_path)
    for text in ("ndcg@10 (unseen)", "SequenceSASRec", "Toy Story", "release_year", "Star Wars"):
        assert text in found


def test_own_table(tmp_path: Path) -> None:
    found = printed("own-table.ipynb", tmp_path)
    assert (tmp_path / "dataset" / "shop" / "shop.inter").is_file()
    for text in ("customer:token", "tea", "skipped: unknown item"):
        assert text in found
