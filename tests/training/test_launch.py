"""Several processes: they end, whatever dies or grows, and those of torchrun are one group."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from process_work import work

from recbole_holo import cli
from recbole_holo.errors import ConfigError, ProcessDied
from recbole_holo.quick_start import run
from recbole_holo.training import launch

ROOT = Path(__file__).resolve().parents[2]


# More than a pipe holds, 64 KB, was never read: the children waited for that, and the parent for the children.
def test_a_result_of_any_size_comes_back() -> None:
    assert launch.together(partial(work, kind="large"), 2) == {"ranks": bytes(4_000_000), "rank": 0}


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("killed", ProcessDied, r"process 1 of 2 was ended by signal 9 \(Killed\).*memory ran out"),
        ("refused", ConfigError, "^topk: 2000 cannot be used: use fewer$"),
        ("broken", ProcessDied, "(?s)process 1 of 2: Traceback.*KeyError: 'a bug'"),
    ],
)
def test_when_a_process_dies_the_others_end_and_it_is_named(
    kind: str, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launch, "SECONDS_TO_END", 1)
    with pytest.raises(error, match=message):
        launch.together(partial(work, kind=kind), 2)


def torchrun(argv: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command += [str(ROOT / "run_recbole_holo.py"), *argv]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=900, check=False)


# Two processes that knew nothing of each other trained the same model twice.
def test_torchruns_processes_are_one_group(cyclic_dataset: str, tiny: dict[str, Any]) -> None:
    settings = {**tiny, "dropout_prob": 0.0, "layer_dropout_prob": 0.0}
    done = torchrun(["--model=RecMamba", f"--dataset={cyclic_dataset}", *(f"--{k}={v}" for k, v in settings.items())])
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("RecMamba on cycle") == 1
    (report,) = Path("saved").glob("*.json")
    assert len(list(Path("saved").glob("*.pth"))) == 1
    found = json.loads(report.read_text())
    assert found["test"] == run("RecMamba", cyclic_dataset, config_dict=settings)["test_result"]


@pytest.mark.parametrize(
    ("changed", "argv", "message"),
    [
        ({"LOCAL_RANK": ""}, [], "environment: LOCAL_RANK: '' cannot be used: a group's process needs RANK"),
        ({"MASTER_PORT": "here"}, [], "environment: MASTER_PORT: 'here'"),
        ({}, ["--nproc=2"], "nproc: 2 cannot be used: torchrun has started 2 processes already"),
        ({}, ["--search_space=x.yaml"], "a search is of one process"),
        ({}, ["--profile"], "a profile is of one process"),
    ],
)
def test_half_a_group_is_refused(
    changed: dict[str, str], argv: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    group = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "1"}
    for name, value in {**group, **changed}.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["--model=RecMamba", "--dataset=ml-100k", *argv]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_group_of_one_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert launch.of_torchrun() is None
