"""How the C++ kernels come to be: compiled once, kept, and never half-written."""

from __future__ import annotations

import ctypes
import os
import stat
import subprocess
import time
from pathlib import Path

import pytest
import torch

from recbole_holo.ops import native


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Path:
    monkeypatch.delenv("RECBOLE_HOLO_SANITIZE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    return tmp_path / "recbole_holo"


@pytest.fixture
def compilations(monkeypatch) -> list[Path]:
    made: list[Path] = []

    def compile_(compiler, attempts, sources, target, until):
        target.write_bytes(b"library")
        made.append(target)

    monkeypatch.setattr(native, "_compile", compile_)
    return made


def test_compiled_once(cache, compilations):
    first = native.build()
    assert first.parent == cache
    assert native.build() == first
    assert len(compilations) == 1
    assert [path.name for path in cache.iterdir()] == [first.name]


def test_another_compiler_or_processor_compiles_anew(cache, compilations, monkeypatch):
    paths = {native.build()}
    monkeypatch.setattr(native, "_processor", lambda: "another")
    paths.add(native.build())
    monkeypatch.setattr(native, "_compiler", lambda: "/bin/true")
    paths.add(native.build())
    assert len(paths) == len(compilations) == 3


def test_unwritable_cache(cache, compilations, monkeypatch):
    cache.parent.joinpath("recbole_holo").write_text("a file, where a folder should be")
    assert native.build().parent.parent == cache.parent / "temporary"


@pytest.mark.parametrize("damage", ["half of it", "an end of zeros", "one bit", "nothing at all"])
def test_a_damaged_file_is_compiled_anew(cache, damage, tmp_path):
    """Loading half a library ends the process, at every start."""
    source = tmp_path / "answer.cpp"
    source.write_text('extern "C" int answer() { return 42; }')
    path = native.build([source], "answer")
    whole = path.read_bytes()
    damaged = {
        "half of it": whole[: len(whole) // 2],
        "an end of zeros": whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2),
        "one bit": whole[:500] + bytes([whole[500] ^ 1]) + whole[501:],
        "nothing at all": b"",
    }
    path.write_bytes(damaged[damage])
    assert native.build([source], "answer") == path
    assert path.read_bytes() == whole
    assert ctypes.CDLL(str(path)).answer() == 42


def given_to_another_user(path: Path, monkeypatch) -> None:
    if os.geteuid() == 0:
        os.chown(path, 1234, 1234, follow_symlinks=False)
    else:
        another = os.geteuid() + 1
        monkeypatch.setattr(native.os, "geteuid", lambda: another)


@pytest.mark.parametrize("what", ["the folder", "the file", "a link"])
def test_what_another_user_may_have_put_there_is_not_loaded(cache, compilations, monkeypatch, caplog, what):
    path = native.build()
    if what == "a link":
        cache.rename(cache.with_name("elsewhere"))
        cache.symlink_to(cache.with_name("elsewhere"))
    given_to_another_user(path if what == "the file" else cache, monkeypatch)
    second = native.build()
    assert second.parent == native._cache_folders()[1]
    assert "belongs to another user" in caplog.text
    assert stat.S_IMODE(second.parent.stat().st_mode) == 0o700
    given_to_another_user(second.parent, monkeypatch)
    with pytest.raises(native.NativeError, match=r"no folder to keep them in: .*; .* belongs to another user"):
        native.build()


@pytest.mark.parametrize("what", ["the folder", "the file"])
def test_what_others_may_write_to_is_not_loaded(cache, compilations, what):
    path = native.build()
    (path if what == "the file" else cache).chmod(0o775)
    assert native.build().parent == native._cache_folders()[1]
    (path if what == "the file" else cache).chmod(0o755)
    assert native.build() == path


def test_a_compiler_that_hangs_is_ended(cache, monkeypatch, tmp_path):
    """With what it has started, which else holds its output open."""
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exit\nsleep 60 &\nwait\n')
    compiler.chmod(0o700)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.setattr(native, "SECONDS", 1)
    start = time.monotonic()
    with pytest.raises(native.NativeError, match="had not ended"):
        native.build()
    assert time.monotonic() - start < 20
    assert list(cache.iterdir()) == []


def test_sanitizers_are_another_build_and_want_to_come_first(cache, compilations, monkeypatch):
    plain = native.build()
    monkeypatch.setenv("RECBOLE_HOLO_SANITIZE", "1")
    assert native.build() != plain
    monkeypatch.setattr(native.ctypes, "CDLL", lambda name: None)  # a process without the checks
    with pytest.raises(native.NativeError, match="LD_PRELOAD"):
        native.library.__wrapped__()


def test_failure_leaves_nothing_and_says_why(cache, monkeypatch, tmp_path):
    compiler = tmp_path / "c++"
    compiler.write_text("#!/bin/sh\necho 'error: no such luck' >&2\nexit 1\n")
    compiler.chmod(compiler.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("CXX", str(compiler))
    with pytest.raises(native.NativeError, match="no such luck"):
        native.build()
    assert list(cache.iterdir()) == []


def test_no_compiler(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(native.NativeError, match=r"no C\+\+ compiler found"):
        native.build()


def test_packing_is_undone_by_unpacking():
    states = torch.randn(3, 2 * native.lanes(), 5)
    packed = native.pack(states)
    assert packed.shape == (3, 2, 5, native.lanes())
    assert packed[1, 1, 4, 2] == states[1, native.lanes() + 2, 4]
    torch.testing.assert_close(native.unpack(packed), states, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("processor", "instructions"), [("cooperlake", ["vdpbf16ps"]), ("sapphirerapids", ["tdpbf16ps", "ldtilecfg"])]
)
@pytest.mark.parametrize("compiler", ["g++", "clang++"])
def test_compiles_with_the_instructions(compiler, processor, instructions, tmp_path):
    target = tmp_path / "assembly.s"
    flags = ["-std=c++17", "-O0", f"-march={processor}", "-S", "-o", str(target)]
    try:
        known = subprocess.run([compiler, *flags, "-x", "c++", os.devnull], capture_output=True)
    except FileNotFoundError:
        pytest.skip(f"no {compiler}")
    if known.returncode:
        pytest.skip(f"{compiler} does not know this processor: {known.stderr.decode()[-200:]}")
    subprocess.run([compiler, *flags, str(Path(native.__file__).parent / "cross_entropy_half.cpp")], check=True)
    assert all(instruction in target.read_text() for instruction in instructions)
