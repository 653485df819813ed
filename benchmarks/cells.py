"""Cells of a table, each measured in a process of its own and kept, so that a later day or machine fills the rest.

A benchmark gives a function that measures one cell in the current process; :func:`measured` calls it in a fresh one,
because peak memory belongs to a process, and keeps what it returns in ``results/cells/<table>/<device>/<name>.json``.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).resolve().parents[1] / "results"
COMMAND = "OMP_WAIT_POLICY=passive python -m benchmarks."


def parser(doc: str | None) -> argparse.ArgumentParser:
    """The options that all benchmarks share."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    made.add_argument("--threads", type=int, default=torch.get_num_threads())
    return made


def cell_parser(doc: str | None) -> argparse.ArgumentParser:
    """Those of benchmarks with cells."""
    made = parser(doc)
    made.add_argument("--render", action="store_true", help="measure nothing, write the table of the cells there are")
    made.add_argument("--cell", nargs="+", help=argparse.SUPPRESS)
    return made


def measured(
    table: str, words: list[str], options: argparse.Namespace, extra: list[str] | None = None
) -> dict[str, Any]:
    """The cell named by ``words``: as kept, else measured by ``benchmarks.<table> --cell *words`` and kept.

    A process that dies for want of memory leaves a cell that says so.
    """
    path = path_of(table, words, options.device)
    if path.exists():
        return json.loads(path.read_text())
    command = [sys.executable, "-m", f"benchmarks.{table}", "--cell", *words]
    command += ["--device", options.device, "--threads", str(options.threads), *(extra or [])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        found = json.loads(done.stdout.splitlines()[-1])
    elif done.returncode in (-9, 137) or "memory" in done.stderr:
        found = {"failed": "out of memory"}
    else:
        raise SystemExit(f"{' '.join(words)}: {done.stderr[-3000:]}")
    found["machine"] = headline(options.device, options.threads)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=1) + "\n")
    print(" ".join(words), json.dumps(found), flush=True)
    return found


def kept(table: str, words: list[str], device: str) -> dict[str, Any] | None:
    """A cell that was measured before."""
    path = path_of(table, words, device)
    return json.loads(path.read_text()) if path.exists() else None


def path_of(table: str, words: list[str], device: str) -> Path:
    return RESULTS / "cells" / table / device / f"{'-'.join(words)}.json"


def write_page(table: str, device: str, title: str, doc: str | None, body: str, given: str = "") -> None:
    """``results/<table>-<device>.md``: what was run, with the options ``given``, and the table."""
    about = (doc or "").split("\n\n", 2)[2].strip()
    text = f"# {title}\n\n    {f'{COMMAND}{table} {given}'.rstrip()}\n\n{about}\n\n{body}\n"
    (RESULTS / f"{table}-{device}.md").write_text(text)
    print(body)


def processor(device: str) -> str:
    """The name of what computes."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())


def headline(device: str, threads: int) -> str:
    """Machine, version and date."""
    machine = processor(device) if device == "cuda" else f"{processor(device)}, {threads} threads"
    return f"{machine}; torch {torch.__version__}; {datetime.date.today()}"


def now(device: str) -> float:
    """Seconds, when all that was asked of the device is done."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory(device: str) -> int:
    """Bytes: the highest use so far, of this process or of the GPU's tensors."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
