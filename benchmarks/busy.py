"""The first command's training on an idle machine and beside busy processes, by how OpenMP's idle threads wait.

    python -m benchmarks.busy [--model HoloMambaRec] [--dataset ml-100k] [--loads 0 3] [--rounds 3] [--epochs 3]

Seconds an epoch of the model as it ships, with as many threads as `--threads` says (2), the first epoch left out. Each
way of waiting has a process of its own; a load is that many processes, each of them one thread that adds numbers. Ways
and loads take turns, round by round, and the table has the least of all rounds and, in brackets, the median: what the
machine does besides can only add to them. `the command` is what the command sets where a user says nothing, `as it is`
PyTorch's own way. Linux, GCC's OpenMP.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

from recbole_holo.openmp import SPIN_COUNT, VARIABLES

WAYS = {
    "the command": {"GOMP_SPINCOUNT": SPIN_COUNT},
    "as it is": {},
    "GOMP_SPINCOUNT=100000": {"GOMP_SPINCOUNT": "100000"},
    "GOMP_SPINCOUNT=30000": {"GOMP_SPINCOUNT": "30000"},
    "GOMP_SPINCOUNT=10000": {"GOMP_SPINCOUNT": "10000"},
    "OMP_WAIT_POLICY=passive": {"OMP_WAIT_POLICY": "passive"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}


def epochs(options: argparse.Namespace) -> list[float]:
    """Seconds of epochs, in this process."""
    from recbole_holo.bridge.config import Config
    from recbole_holo.quick_start import prepare

    with tempfile.TemporaryDirectory() as folder:
        settings = {"checkpoint_dir": folder, "use_gpu": False, "show_progress": False, "state": "ERROR"}
        if options.data_path:
            settings["data_path"] = options.data_path
        trainer, train_data, _, _ = prepare(Config(options.model, options.dataset, config_dict=settings, argv=[]))
        for epoch in range(options.epochs):
            trainer._train_epoch(train_data, epoch)
    return trainer.epoch_seconds


@contextmanager
def load(processes: int) -> Iterator[None]:
    """So many processes beside this one that never wait."""
    program = "n = 0\nwhile True: n += 1"
    busy = [subprocess.Popen([sys.executable, "-c", program]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in busy:
            process.kill()
            process.wait()


def measure(way: str, options: argparse.Namespace) -> list[float]:
    """Seconds of each epoch but the first, of a process that waits that way."""
    said = {name: v for name, v in os.environ.items() if name not in VARIABLES}
    command = [sys.executable, "-W", "ignore", "-m", "benchmarks.busy", "--here", *sys.argv[1:]]
    environment = {**said, "OMP_NUM_THREADS": str(options.threads), **WAYS[way]}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])[1:]


def show(found: dict[tuple[str, int], list[float]], ways: list[str], loads: list[int]) -> str:
    beside = [f"beside {number} busy processes" if number else "alone" for number in loads]
    lines = [f"| seconds an epoch | {' | '.join(beside)} |", "|---|" + "---:|" * len(loads)]
    for way in ways:
        cells = [f"{min(found[way, n]):.2f} ({statistics.median(found[way, n]):.2f})" for n in loads]
        lines.append(f"| {way} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="HoloMambaRec")
    options.add_argument("--dataset", default="ml-100k")
    options.add_argument("--data_path", default=None)
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--loads", type=int, nargs="+", default=[0, 3])
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--epochs", type=int, default=3)
    options.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    options.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    chosen = options.parse_args()
    if chosen.here:
        print(json.dumps(epochs(chosen)))
        return
    found: dict[tuple[str, int], list[float]] = defaultdict(list)
    for number in range(chosen.rounds):
        for processes in chosen.loads:
            for way in chosen.ways:
                with load(processes):
                    seconds = measure(way, chosen)
                found[way, processes] += seconds
                print(f"round {number + 1}, {processes} beside, {way}: {min(seconds):.2f}", file=sys.stderr, flush=True)
    print(show(found, chosen.ways, chosen.loads))
    print("\nload of the machine at the end, this benchmark's own included:", *(f"{n:.1f}" for n in os.getloadavg()))


if __name__ == "__main__":
    main()
