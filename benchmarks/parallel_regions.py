"""OpenMP's parallel regions in a training step: how many, and whose.

    python -m benchmarks.parallel_regions [--model RecMamba] [--dataset ml-1m] [--data_path dataset] [--threads 2]

At both ends of a region threads wait for each other: on an idle machine that costs some microseconds, and beside other
processes as long as one of the threads waits for a core. So few long regions are better than many short ones, on both.

A small library counts the calls of GOMP_parallel (Linux, GCC's OpenMP, which PyTorch has there); it is compiled and
loaded in front of PyTorch in a process of its own. The settings are those of `benchmarks.epoch`, `disjoint, bf16` with
`--lean`. Each region is counted for the operator of PyTorch in which it is opened, or for the kernel of this package.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

COUNTER = "RECBOLE_HOLO_COUNTER"
STEPS = 4  # of which the first warms up


class Kernels:
    """The library of kernels, with each call counted."""

    def __init__(self, library: Any, counting: Callable[[str], Any]) -> None:
        self._library, self._counting = library, counting

    def __getattr__(self, name: str) -> Any:
        called = getattr(self._library, name)

        def kernel(*args: Any) -> Any:
            with self._counting(f"kernel {name}"):
                return called(*args)

        return kernel


def count(options: argparse.Namespace) -> tuple[Counter[str], Counter[str]]:
    """Regions and calls of a step, by name, summed over the measured steps."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from benchmarks.epoch import POSITIONS, SETTINGS
    from recbole_holo.bridge.config import Config
    from recbole_holo.ops import native
    from recbole_holo.quick_start import prepare

    torch.set_num_threads(options.threads)
    counter = ctypes.CDLL(os.environ[COUNTER])
    counter.parallel_regions.restype = ctypes.c_long
    regions: Counter[str] = Counter()
    calls: Counter[str] = Counter()

    @contextmanager
    def counting(name: str) -> Iterator[None]:
        before = counter.parallel_regions()
        yield
        regions[name] += counter.parallel_regions() - before
        calls[name] += 1

    class Operators(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            with counting(str(function)):
                return function(*args, **kwargs or {})

    given = {"data_path": options.data_path, "MAX_ITEM_LIST_LENGTH": options.length, "use_gpu": False}
    given |= {"train_batch_size": POSITIONS // options.length, "window_stride": options.length}
    given |= {"enable_amp": options.lean}
    with tempfile.TemporaryDirectory() as folder:
        settings = SETTINGS | given | {"checkpoint_dir": folder}
        trainer, train_data, _, _ = prepare(Config(options.model, options.dataset, config_dict=settings, argv=[]))
        trainer.model.train()
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        kernels = Kernels(native.library(), counting)
        native.library = lambda: kernels  # type: ignore[assignment, return-value]
        for number, batch in enumerate(islice(train_data, STEPS)):
            if number == 1:
                regions.clear()
                calls.clear()
                begun = counter.parallel_regions()
            with Operators():
                trainer._step(batch, trainer.model.calculate_loss, scaler)
        regions["(all)"] = counter.parallel_regions() - begun
    return regions, calls


def show(regions: Counter[str], calls: Counter[str]) -> str:
    steps = STEPS - 1
    lines = ["| | calls a step | parallel regions a step |", "|---|---:|---:|"]
    for name, number in regions.most_common():
        if number:
            called = "" if name == "(all)" else f"{calls[name] / steps:.4g}"
            lines.append(f"| {name} | {called} | {number / steps:.4g} |")
    return "\n".join(lines)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--model", default="RecMamba")
    options.add_argument("--dataset", default="ml-1m")
    options.add_argument("--data_path", default="dataset")
    options.add_argument("--length", type=int, default=200)
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--lean", action="store_true", help="matrix products in bfloat16")
    chosen = options.parse_args()
    if COUNTER in os.environ:
        print(show(*count(chosen)))
        return
    with tempfile.TemporaryDirectory() as folder:
        made = str(Path(folder) / "counter.so")
        source = str(Path(__file__).with_name("parallel_regions.c"))
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", source, "-o", made, "-ldl"], check=True)
        environment = {**os.environ, COUNTER: made, "LD_PRELOAD": made}
        command = [sys.executable, "-m", "benchmarks.parallel_regions", *sys.argv[1:]]
        sys.exit(subprocess.run(command, env=environment, check=False).returncode)


if __name__ == "__main__":
    main()
