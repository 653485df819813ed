"""Checkpoints: whole or not at all, and never code."""

from __future__ import annotations

import io
import os
import pickle
import resource
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix, lil_matrix

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


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> tuple[bytes, dict]:
    """A checkpoint's bytes, and what is in it."""
    path = tmp_path_factory.mktemp("sound") / "c.pth"
    generator = torch.Generator().manual_seed(0)
    weights = {name: torch.randn(40, 8, generator=generator) for name in ("item_embedding.weight", "layers.0.weight")}
    state = {"state_dict": weights, "epoch": 3, "config": {"model": "RecMamba", "given": {"hidden_size": 8}}}
    checkpoint.save(state, path)
    return path.read_bytes(), state


def mutated(data: bytes, kind: int, rng: np.random.Generator) -> bytes:
    """One change to a file, as disks, transfers and hands make them."""
    at, changed = int(rng.integers(len(data))), bytearray(data)
    if kind == 0:
        changed[at] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        changed[at] = int(rng.integers(256))
    elif kind == 2:  # a sector, zeroed or of another file
        start = at // 512 * 512
        size = min(512, len(data) - start)
        changed[start : start + size] = bytes(size) if rng.integers(2) else rng.bytes(size)
    elif kind == 3:
        del changed[at:]
    elif kind == 4:
        changed += rng.bytes(int(rng.integers(1, 600)))
    elif kind == 5:  # a piece is lost, or written twice
        size = int(rng.integers(1, 600))
        changed[at : at + size] = b"" if rng.integers(2) else changed[at : at + size] * 2
    return bytes(changed)


def with_members_exchanged(data: bytes, rng: np.random.Generator) -> bytes:
    """The same archive, sound, with the content of two of its members exchanged; its comment is kept."""
    source, target = zipfile.ZipFile(io.BytesIO(data)), io.BytesIO()
    names = [name for name in source.namelist() if "/data/" in name]
    first, second = rng.choice(names, 2, replace=False)
    other = {first: second, second: first}
    with zipfile.ZipFile(target, "w") as archive:
        for name in source.namelist():
            archive.writestr(source.getinfo(name).filename, source.read(other.get(name, name)))
        archive.comment = source.comment
    return target.getvalue()


def same(one: object, other: object) -> bool:
    if isinstance(one, dict):
        return isinstance(other, dict) and all(same(value, other.get(key)) for key, value in one.items())
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_a_thousand_damages_are_an_error_or_the_same_model(sound: tuple[bytes, dict], tmp_path: Path) -> None:
    """Every third changed bit made another model, and some ended in tracebacks."""
    data, state = sound
    rng, path, errors = np.random.default_rng(0), tmp_path / "c.pth", 0
    for case in range(1000):
        kind = case % 7
        changed = with_members_exchanged(data, rng) if kind == 6 else mutated(data, kind, rng)
        path.write_bytes(changed)
        try:
            found = checkpoint.load(path)
        except checkpoint.CheckpointError:
            errors += 1
        else:
            assert same(state, found), (case, kind)
    assert errors > 980  # some changes change nothing


@pytest.mark.parametrize("kind", range(6))
def test_damages_of_files_without_a_checksum_of_ours(kind: int, sound: tuple[bytes, dict], tmp_path: Path) -> None:
    """Older checkpoints, and RecBole's, have those of the archive alone."""
    _, state = sound
    path, rng = tmp_path / "c.pth", np.random.default_rng(kind)
    torch.save({"format": "recbole_holo/1", **state}, path)
    data = path.read_bytes()
    assert same(state, checkpoint.load(path))
    for _ in range(40):
        path.write_bytes(mutated(data, kind, rng))
        try:
            found = checkpoint.load(path)
        except checkpoint.CheckpointError:
            continue
        assert same(state, found)


def test_a_checkpoint_whose_checksum_is_cut_off_is_damaged(sound: tuple[bytes, dict], tmp_path: Path) -> None:
    path = tmp_path / "c.pth"
    with zipfile.ZipFile(io.BytesIO(sound[0])) as source, zipfile.ZipFile(path, "w") as archive:
        for name in source.namelist():
            archive.writestr(name, source.read(name))
    with pytest.raises(checkpoint.CheckpointError, match="checksum is gone"):
        checkpoint.load(path)


def test_a_full_disk_is_one_line_and_the_old_file_stays(tmp_path: Path) -> None:
    """It was a traceback out of PyTorch's writer."""
    path = tmp_path / "c.pth"
    checkpoint.save({"epoch": 1}, path)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))
    try:
        with pytest.raises(checkpoint.CheckpointError, match=r"c\.pth' could not be written: File too large$"):
            checkpoint.save({"epoch": 2, "w": torch.zeros(100_000)}, path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert checkpoint.load(path)["epoch"] == 1
    assert os.listdir(tmp_path) == ["c.pth"]


def test_leftovers_of_killed_saves_go_and_what_is_being_written_stays(tmp_path: Path) -> None:
    """They stayed for ever."""
    (tmp_path / ".saving-killed.pth").write_bytes(b"half of it")
    (tmp_path / "mine.pth").write_bytes(b"")
    with checkpoint._unfinished(str(tmp_path)) as (_, name):
        assert checkpoint.remove_leftovers(tmp_path) == [".saving-killed.pth"]
        assert sorted(os.listdir(tmp_path)) == sorted([Path(name).name, "mine.pth"])
    assert os.listdir(tmp_path) == ["mine.pth"]


@pytest.mark.parametrize("kind", ["file", "__class__", "array2"])
def test_values_of_unknown_kinds_are_refused(kind: str, tmp_path: Path) -> None:
    """SciPy looks up the method to convert to a format by the format's name."""
    packed = checkpoint.pack({"w": csr_matrix(np.eye(2))})
    packed["w"]["__kind__"] = kind
    with pytest.raises(checkpoint.CheckpointError, match="unknown kind"):
        checkpoint.unpack(packed)


def test_a_signal_while_saving_is_what_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's writer makes a RuntimeError of what is raised inside it, and the command ended with another status."""
    written, write = [], checkpoint._Writer.write

    class Interrupted:
        def write(self, data: bytes) -> int:
            written.append(data)
            if len(written) == 5:
                raise KeyboardInterrupt
            return len(data)

    def interrupted(self: checkpoint._Writer, data: bytes) -> int:
        self._file = Interrupted()
        return write(self, data)

    monkeypatch.setattr(checkpoint._Writer, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save({"w": torch.zeros(1000)}, tmp_path / "c.pth")
    assert os.listdir(tmp_path) == []
