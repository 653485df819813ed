"""How the C++ kernels come to be: compiled once, kept, and never half-written."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest
import torch

from recbole_holo.ops import native


@pytest.fixture
def cache(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(native.tempfile, "gettempdir", lambda: str(tmp_path / "temporary"))
    return tmp_path / "recbole_holo"


@pytest.fixture
def compilations(monkeypatch) -> list[Path]:
    made: list[Path] = []

    def compile_(compiler, attempts, sources, target):
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
