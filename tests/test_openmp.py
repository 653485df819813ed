"""The command says how OpenMP's idle threads wait, before PyTorch reads it and unless the user has said it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from recbole_holo.openmp import SPIN_COUNT, VARIABLES, set_waiting

ROOT = Path(__file__).resolve().parent.parent
PROGRAM = """
import os, subprocess, sys
import recbole_holo.cli
from recbole_holo.openmp import set_waiting
assert "torch" not in sys.modules, "loaded before anything could be said"
set_waiting()
child = subprocess.run([sys.executable, "-c", "import os; print(os.environ.get('GOMP_SPINCOUNT'))"],
                       capture_output=True, text=True).stdout.strip()
print(os.environ.get("GOMP_SPINCOUNT"), child)
"""


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ({}, SPIN_COUNT),
        ({"OMP_WAIT_POLICY": "active"}, "None"),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"KMP_BLOCKTIME": "0"}, "None"),
        ({"KMP_INIT_AT_FORK": "FALSE"}, SPIN_COUNT),  # libraries set it
    ],
)
def test_it_can_be_said_in_time_and_children_hear_it(said: dict[str, str], found: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES} | said
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [found, found]


@pytest.mark.skipif(sys.platform != "linux", reason="GCC's OpenMP")
def test_openmp_has_read_what_the_command_set() -> None:
    """By its own account."""
    environment = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    environment["OMP_DISPLAY_ENV"] = "verbose"
    done = subprocess.run(
        [sys.executable, "run_recbole_holo.py", "--dataset=nowhere"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        check=False,
    )
    assert f"GOMP_SPINCOUNT = '{SPIN_COUNT}'" in done.stderr


def test_nothing_is_said_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert "torch" in sys.modules
    set_waiting()
    assert "GOMP_SPINCOUNT" not in os.environ
