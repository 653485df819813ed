"""Small data sets in RecBole's atomic files, and configurations for them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: small operators collapse on busy cores
os.environ.setdefault("MAMBA_DETERMINISTIC", "1")  # on a GPU: no tuning, 119 compilations for each set of sizes

import numpy as np
import pandas as pd
import pytest
import torch

import recbole_holo  # noqa: F401  the shims come before any RecBole import
from recbole_holo.bridge import host

torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture(autouse=True)
def _in_own_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """RecBole writes ./log and ./saved; every test gets a working directory of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["test"])


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    """What prepares a run without running it sets up the package's logger, for the tests that follow, too."""
    with host._logger_kept():
        yield


@pytest.fixture
def write_dataset(tmp_path: Path) -> Callable[..., str]:
    """Writes an atomic data set under ./dataset/ and returns its name."""

    def write(
        inter: Sequence[Sequence[Any]],
        name: str = "toy",
        header: str = "user_id:token\titem_id:token\ttimestamp:float",
        **others: tuple[str, Sequence[Sequence[Any]]],
    ) -> str:
        folder = tmp_path / "dataset" / name
        folder.mkdir(parents=True, exist_ok=True)
        for suffix, (head, rows) in {"inter": (header, inter), **others}.items():
            lines = [head, *("\t".join(str(value) for value in row) for row in rows)]
            (folder / f"{name}.{suffix}").write_text("\n".join(lines) + "\n", encoding="utf-8")
        return name

    return write


@pytest.fixture
def sorted_ml100k(tmp_path: Path) -> str:
    """ml-100k with its rows in time order on disk.

    RecBole sorts by float32 time, which mixes up 406 of ml-100k's 100,000 events (5 validation and 4 test targets are
    not the true ones). Its sorts are stable, so on a sorted file it keeps the true order, and can be compared with.
    """
    source = files("recbole") / "dataset_example" / "ml-100k"
    folder = tmp_path / "dataset" / "ml-100k-sorted"
    folder.mkdir(parents=True)
    inter = pd.read_csv(str(source / "ml-100k.inter"), sep="\t").sort_values("timestamp:float", kind="stable")
    inter.to_csv(folder / "ml-100k-sorted.inter", sep="\t", index=False)
    (folder / "ml-100k-sorted.item").write_text((source / "ml-100k.item").read_text(encoding="utf-8"), encoding="utf-8")
    return folder.name


@pytest.fixture
def cyclic_dataset(write_dataset: Callable[..., str]) -> str:
    """40 users who walk around 20 items from a random start: the next item follows from the last one."""
    rng = np.random.default_rng(0)
    inter = []
    for user in range(40):
        start, length = int(rng.integers(20)), int(rng.integers(5, 15))
        inter += [(f"u{user}", f"i{(start + t) % 20}", 1_700_000_000 + 10 * t + user) for t in range(length)]
    items = [(f"i{i}", f"g{i % 3}", f"a{i % 2} b{i % 4}", i * 1.5) for i in range(20)]
    return write_dataset(inter, "cycle", item=("item_id:token\tgenre:token\ttags:token_seq\tprice:float", items))


TINY = {
    "hidden_size": 16,
    "num_layers": 1,
    "d_state": 4,
    "latent_heads": 2,
    "head_dim": 8,
    "headdim": 8,
    "epochs": 2,
    "train_batch_size": 8,
    "eval_batch_size": 16,
    "num_negatives": 6,
    "show_progress": False,
    "state": "ERROR",
    "MAX_ITEM_LIST_LENGTH": 10,
    "topk": [3, 5],
    "metrics": ["Hit", "NDCG", "MRR"],
    "valid_metric": "NDCG@5",
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
}


@pytest.fixture
def tiny() -> dict[str, Any]:
    """Settings with which any model of the package trains on the small data sets in a moment."""
    return dict(TINY)
