"""Checkpoints: whole or not at all, and never code."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.sparse import lil_matrix

from recbole_holo.bridge import checkpoint


class Exploit:
    def __reduce__(self):
        return os.system, ("touch exploited",)


def test_round_trip_of_plain_values(tmp_path: Path) -> None:
    state = {
        "epoch": 3,
        "score": np.float64(0.5),
        "weights": {"a": torch.arange(3.0)},
        "betas": (0.9, 0.98),
        "array": np.arange(4),
        "device": torch.device("cpu"),
        "nested": {1: [None, True, "x"]},
    }
    checkpoint.save(state, tmp_path / "c.pth")
    back = torch.load(tmp_path / "c.pth", weights_only=True)  # PyTorch's own safe loading, no help of ours
    assert back["format"] == checkpoint.FORMAT
    assert (back["epoch"], back["score"], back["betas"]) == (3, 0.5, (0.9, 0.98))
    assert torch.equal(back["weights"]["a"], torch.arange(3.0))
    assert torch.equal(back["array"], torch.arange(4))
    assert back["device"] == "cpu"
    assert back["nested"] == {1: [None, True, "x"]}


def test_other_parameters_keep_their_kind(tmp_path: Path) -> None:
    matrix = lil_matrix(np.array([[0.0, 2.0], [0.0, 0.0], [1.5, 0.0]]))
    given = {"counts": np.arange(3), "similarity": matrix, "n": 4, "layer": torch.nn.Linear(1, 1), "seen": {"a": [1]}}
    checkpoint.save({"other": checkpoint.pack(given)}, tmp_path / "c.pth")
    back = checkpoint.unpack(checkpoint.load(tmp_path / "c.pth")["other"])
    assert back.keys() == given.keys() - {"layer"}
    assert isinstance(back["counts"], np.ndarray)
    assert back["counts"].tolist() == [0, 1, 2]
    assert back["similarity"].format == "lil"
    assert (back["similarity"].toarray() == matrix.toarray()).all()
    assert (back["n"], back["seen"]) == (4, {"a": [1]})
    assert checkpoint.unpack(None) == {}


def test_pickles_are_refused_unless_trusted(tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    torch.save({"config": Exploit()}, path, pickle_protocol=4)
    with pytest.raises(checkpoint.CheckpointError, match="trust_checkpoint"):
        checkpoint.load(path)
    assert not Path("exploited").exists()
    with pytest.warns(UserWarning, match="can run code"):
        checkpoint.load(path, trust_checkpoint=True)
    assert Path("exploited").exists()


@pytest.mark.parametrize("content", [b"", b"not a checkpoint", pickle.dumps([1, 2])[:-1]])
def test_broken_files_get_a_clear_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "broken.pth"
    path.write_bytes(content)
    with pytest.raises(checkpoint.CheckpointError, match=r"broken\.pth"):
        checkpoint.load(path)
    with pytest.raises(FileNotFoundError, match=r"absent\.pth"):
        checkpoint.load(tmp_path / "absent.pth")


def test_truncated_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "c.pth"
    checkpoint.save({"w": torch.zeros(1000)}, path)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(checkpoint.CheckpointError, match="broken"):
        checkpoint.load(path)


def test_a_crash_while_saving_keeps_the_good_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "c.pth"
    checkpoint.save({"epoch": 1}, path)

    def crash(state, file):
        file.write(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", crash)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save({"epoch": 2}, path)
    monkeypatch.undo()
    assert checkpoint.load(path)["epoch"] == 1
    assert os.listdir(tmp_path) == ["c.pth"]


def test_a_file_of_another_kind_is_no_pickle(tmp_path: Path) -> None:
    path = tmp_path / "notes.md"
    path.write_text("# Notes")
    with pytest.raises(checkpoint.CheckpointError, match=r"notes.md' is not a checkpoint"):
        checkpoint.load(path)
