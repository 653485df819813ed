"""The doctor finds what is there, names what is missing, and its exit status says whether the package can be used."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from recbole_holo import __version__, doctor
from recbole_holo.bridge import compat

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_kernels", lambda: {"mamba-ssm": "2.3.0", "causal-conv1d": "not installed"})


def run_module(*flags: str, before: str = "") -> subprocess.CompletedProcess[str]:
    """``python -m recbole_holo.doctor``, after code that changes the environment it will see."""
    if before:
        (Path.cwd() / "sitecustomize.py").write_text(before, encoding="utf-8")
    path = [str(Path.cwd()), str(ROOT), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, "-m", "recbole_holo.doctor", *flags],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path))},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def test_as_a_command() -> None:
    done = run_module("--json")
    found = json.loads(done.stdout)
    assert done.returncode == 0, found["problems"]
    assert found["versions"]["recbole_holo"] == __version__
    assert found["versions"]["recbole"] == compat.installed_version("recbole")
    assert found["kernels"]
    assert found["shims"].keys() == compat.SHIMS.keys()
    assert found["problems"] == []


def test_pandas_3_is_told_where_the_import_is_refused() -> None:
    done = run_module(
        before="import importlib.metadata\n"
        "real = importlib.metadata.version\n"
        "importlib.metadata.version = lambda name: '3.1.1' if name == 'pandas' else real(name)\n"
    )
    assert done.returncode == 1, done.stderr
    assert "pandas 3.1.1 was found" in done.stdout
    assert "Versions" in done.stdout


@pytest.mark.usefixtures("_kernels")
def test_report_and_table() -> None:
    found = doctor.report()
    json.dumps(found)
    assert found["cpu"]["cores"] == os.cpu_count()
    assert found["cpu"]["model"]
    assert Path(found["folders"]["properties"], "overall.yaml").is_file()
    assert found["optional"].keys() == doctor.OPTIONAL.keys()
    table = doctor.render(found)
    for part in (*doctor.REQUIRED, *doctor.OPTIONAL, *compat.SHIMS, "causal-conv1d", "not installed", "properties"):
        assert part in table
    assert max(map(len, table.splitlines())) <= 120


@pytest.mark.usefixtures("_kernels")
def test_exit_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.main([]) == 0
    assert "Problems\nnone" in capsys.readouterr().out
    monkeypatch.setattr(compat, "problems", lambda: ["pandas 3.1.1 was found"])
    assert doctor.main(["--json"]) == 1
    assert json.loads(capsys.readouterr().out)["problems"] == ["pandas 3.1.1 was found"]


def test_what_cannot_be_examined_is_a_problem(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken() -> None:
        raise OSError("libcuda.so is damaged")

    for probe in ("_cpu", "_cuda", "_kernels"):
        monkeypatch.setattr(doctor, probe, broken)
    monkeypatch.setattr(doctor.resources, "folder", lambda name: Path("nowhere") / name)
    assert doctor.main([]) == 1
    out = capsys.readouterr().out
    assert out.count("libcuda.so is damaged") >= 3
    assert "reinstall recbole-holo" in out


def test_optional_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"optuna": "3.6.1", "hyperopt": "0.3.0"}
    monkeypatch.setattr(compat, "installed_version", versions.get)
    assert doctor._optional_line(doctor._optional("hyperopt")) == "0.3.0"
    assert doctor._optional_line(doctor._optional("optuna")).startswith("3.6.1, too old; for recbole_holo.tuning")
    assert 'pip install "recbole-holo[tune]"' in doctor._optional_line(doctor._optional("optuna"))
    assert doctor._optional_line(doctor._optional("wandb")).startswith("not installed; for log_wandb")


def test_cuda_devices_are_listed() -> None:
    devices = [{"name": "H200", "memory": "139 GiB", "capability": "9.0"}]
    found = doctor.report() | {"cuda": {"built_for": "13.0", "devices": devices}}
    assert "H200, 139 GiB, 9.0" in doctor.render(found)
    assert "no device" in doctor._without_devices({"built_for": "13.0"})
    assert "without" in doctor._without_devices({"built_for": None})
