"""What this installation can do and what it lacks: ``python -m recbole_holo.doctor [--json]``.

Exit status 0, or 1 when something makes the package unusable. It also runs in an environment that
``import recbole_holo`` refuses, to say why.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tabulate import tabulate

from recbole_holo import __version__
from recbole_holo.bridge import compat, resources

REQUIRED = ("recbole", "torch", "numpy", "pandas", "scipy", "numba")
# distribution -> (what it is for, the oldest that works, what installs it)
OPTIONAL = {
    "optuna": ("recbole_holo.tuning.tune", "4.0", 'pip install "recbole-holo[tune]"'),
    "hyperopt": ("RecBole's own HyperTuning", "0", "pip install hyperopt"),
    "kmeans-pytorch": ("RecBole's LDiffRec with n_cate > 1", "0", "pip install kmeans-pytorch"),
    "thop": ("RecBole's get_flops", "0", "pip install thop"),
    "wandb": ("log_wandb: True", "0", "pip install wandb"),
}


def report() -> dict[str, Any]:
    """Everything that the doctor looks at, in plain values.

    Returns:
        ``versions``, ``cpu``, ``cuda``, ``kernels``, ``optional``, ``shims``, ``folders``, and ``problems``: what makes
        the package unusable, each with its remedy.
    """
    problems = compat.problems()
    found: dict[str, Any] = {
        "versions": {"recbole_holo": __version__, "python": platform.python_version()}
        | {name: compat.installed_version(name) for name in REQUIRED},
        "optional": {name: _optional(name) for name in OPTIONAL},
        "shims": {name: {"state": state.state, "why": state.why} for name, state in compat.shim_states().items()},
        "folders": {name: _folder(name) for name in ("properties", "dataset_configs")},
    }
    probes: dict[str, Callable[[], Any]] = {"cpu": _cpu, "cuda": _cuda, "kernels": _kernels}
    for name, probe in probes.items():
        try:
            found[name] = probe()
        except Exception as error:  # a library may break in any way when it is imported; the doctor reports it
            found[name] = {"error": f"{type(error).__name__}: {error}"}
            problems.append(f"{name} could not be examined: {type(error).__name__}: {error}")
    for name, path in found["folders"].items():
        if path is None:
            problems.append(f"{name}/ was found neither in the package nor beside it: reinstall recbole-holo")
    return found | {"problems": problems}


def _cpu() -> dict[str, Any]:
    import torch

    return {
        "model": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
    }


def _cpu_model() -> str:
    """The processor's name; Linux tells it in /proc/cpuinfo, ``platform`` only its family."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text("utf-8").splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _cuda() -> dict[str, Any]:
    import torch

    devices = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            {
                "name": properties.name,
                "memory": f"{properties.total_memory / 2**30:.0f} GiB",
                "capability": f"{properties.major}.{properties.minor}",
            }
        )
    return {"built_for": torch.version.cuda, "devices": devices}


def _kernels() -> dict[str, str]:
    from recbole_holo.ops.backend import kernel_status

    return dict(kernel_status())


def _optional(name: str) -> dict[str, str | None]:
    purpose, oldest, install = OPTIONAL[name]
    version = compat.installed_version(name)
    usable = version is not None and compat.release(version) >= compat.release(oldest)
    return {"version": version, "for": purpose, "remedy": None if usable else install}


def _folder(name: str) -> str | None:
    path = resources.folder(name)
    return str(path) if path.is_dir() else None


def render(found: dict[str, Any]) -> str:
    """The report for people."""
    cpu, cuda = found["cpu"], found["cuda"]
    threads = f"{cpu.get('cores')} cores, {cpu.get('threads')} torch threads"
    devices = [f"{device['name']}, {device['memory']}, {device['capability']}" for device in cuda.get("devices", [])]
    sections = {
        "Versions": [[name, version or "not installed"] for name, version in found["versions"].items()],
        "Processor": [
            ["CPU", cpu.get("error") or f"{cpu['model']}, {threads}, {cpu['instructions']}"],
            ["CUDA", cuda.get("error") or "; ".join(devices) or _without_devices(cuda)],
        ],
        "Kernels": list(map(list, found["kernels"].items())),
        "Optional packages": [[name, _optional_line(entry)] for name, entry in found["optional"].items()],
        "Shims for RecBole": [[name, f"{entry['state']}: {entry['why']}"] for name, entry in found["shims"].items()],
        "Folders": [[name, path or "not found"] for name, path in found["folders"].items()],
        "Problems": [[f"{number}.", text] for number, text in enumerate(found["problems"], start=1)],
    }
    width = max(len(str(row[0])) for rows in sections.values() for row in rows)
    parts = []
    for title, rows in sections.items():
        body = tabulate(
            [[str(name).ljust(width), value] for name, value in rows],
            tablefmt="plain",
            maxcolwidths=[None, 90],
            disable_numparse=True,
        )
        parts.append(f"{title}\n{body}" if rows else f"{title}\nnone")
    return "\n\n".join(parts)


def _without_devices(cuda: dict[str, Any]) -> str:
    return (
        f"torch is built for CUDA {cuda['built_for']}, no device" if cuda["built_for"] else "torch is built without it"
    )


def _optional_line(entry: dict[str, str | None]) -> str:
    state = entry["version"] or "not installed"
    if entry["remedy"] is None:
        return state
    return f"{state}{', too old' if entry['version'] else ''}; for {entry['for']}: {entry['remedy']}"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the report; returns the exit status."""
    flags = argparse.ArgumentParser(prog="python -m recbole_holo.doctor", description="What this installation can do.")
    flags.add_argument("--json", action="store_true", help="print the report as JSON")
    args = flags.parse_args(argv)
    found = report()
    print(json.dumps(found, indent=2) if args.json else render(found))
    return 1 if found["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
