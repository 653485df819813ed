"""What a run ends with: a table for people, and the same as a JSON file beside the checkpoint."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import nn

from recbole_holo import __version__
from recbole_holo.bridge import checkpoint
from recbole_holo.bridge.compat import installed_version
from recbole_holo.bridge.metric_names import UNSEEN
from recbole_holo.data.event_time import EVENT_TIMES
from recbole_holo.data.order import OrderOfTime
from recbole_holo.data.seen import Repeats
from recbole_holo.model.items import BoundItems
from recbole_holo.ops import backend

PACKAGES = ("recbole", "torch", "numpy", "pandas", "numba", "mamba-ssm", "causal-conv1d")


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Trainable parameters: all of them, and those outside embedding tables and the output layer over items."""
    every = {id(p): p for p in model.parameters() if p.requires_grad}
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    n_items = getattr(model, "n_items", None)
    tables |= {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear) and m.out_features == n_items}
    return sum(p.numel() for p in every.values()), sum(p.numel() for i, p in every.items() if i not in tables)


def versions() -> dict[str, str | None]:
    """Versions of what the numbers depend on; None for what is not installed."""
    found: dict[str, str | None] = {"recbole_holo": __version__, "python": platform.python_version()}
    return found | {package: installed_version(package) for package in PACKAGES}


def git_commit() -> str | None:
    """Commit of the checkout that the package runs from (``+`` marks uncommitted changes); None for an install."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.SubprocessError):  # a report is not kept waiting for its commit
        return None


def write_report(
    config: Any,
    model: nn.Module,
    trainer: Any,
    result: dict[str, Any],
    saved: bool,
    peak_memory: int,
    order_of_time: OrderOfTime | None,
) -> dict[str, Any]:
    """Prints the table, writes ``<checkpoint>.json`` (process 0 only), and returns its content."""
    parameters, without_tables = count_parameters(model)
    seconds = getattr(trainer, "epoch_seconds", [])
    report = {
        "model": config["model"],
        "dataset": config["dataset"],
        "order_of_time": order_of_time and order_of_time._asdict(),
        "valid": result["best_valid_result"],
        "valid_metric": trainer.valid_metric,
        "valid_scores": trainer.valid_scores,
        "test": result["test_result"],
        "repeats": {split: found._asdict() for split, found in trainer.repeats.items()},
        "reported_epoch": "best on validation" if saved and result["best_valid_result"] else "last",
        "epochs": len(seconds) or None,
        "parameters": parameters,
        "parameters_without_embeddings": without_tables,
        "seconds_per_epoch": statistics.median(seconds) if seconds else None,
        "peak_memory_bytes": peak_memory,
        "peak_memory_of": "run" if config["device"].type == "cuda" else "process",
        "device": str(config["device"]),
        "implementations": backend.report(),
        "event_time": model.event_time.kind if isinstance(model, BoundItems) and model.event_time else None,
        "attributes": model.attribute_report() if isinstance(model, BoundItems) else {},
        "seed": config["seed"],
        "versions": versions(),
        "git_commit": git_commit(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "checkpoint": trainer.saved_model_file if saved else None,
        "config": checkpoint.plain(config.final_config_dict),
    }
    if config["local_rank"] == 0:
        print(table(report))
        if saved:
            path = os.path.splitext(trainer.saved_model_file)[0] + ".json"
            Path(path).write_text(json.dumps(report, indent=2, default=str) + "\n", encoding="utf-8")
            print(f"checkpoint: {trainer.saved_model_file}\nreport:     {path}")
    return report


def table(report: dict[str, Any]) -> str:
    """The report as two small tables: the metrics, and what they cost."""
    head = f"{report['model']} on {report['dataset']}, seed {report['seed']} ({report['reported_epoch']} epoch)"
    implementations = ", ".join(f"{op}: {name}" for op, name in sorted(report["implementations"].items()))
    seconds = report["seconds_per_epoch"]
    costs = tabulate(
        [
            ["parameters", f"{report['parameters']:,}"],
            ["  without item tables", f"{report['parameters_without_embeddings']:,}"],
            ["seconds per epoch (median)", "-" if seconds is None else f"{seconds:.2f}"],
            [
                f"peak memory of the {report['peak_memory_of']}",
                f"{report['peak_memory_bytes'] / 2**20:,.0f} MiB ({report['device']})",
            ],
            ["ran on", implementations or "plain PyTorch"],
            *([["event_time", EVENT_TIMES[report["event_time"]]]] if report.get("event_time") else []),
        ],
        tablefmt="plain",
    )
    parts = (head, metrics(report), repeats(report), attributes(report), costs)
    return "\n" + "\n\n".join(part for part in parts if part) + "\n"


def metrics(report: dict[str, Any]) -> str:
    """Each metric on validation and test, with seen items and, where there are two columns, without them."""
    results = [report["valid"] or {}, report["test"] or {}]
    names = [name for name in results[1] or results[0] if not name.endswith(UNSEEN)]
    columns = {"validation": (results[0], ""), "test": (results[1], "")}
    if any(name + UNSEEN in found for found in results for name in names):
        columns = {
            f"{split}{kind}": (found, kind)
            for split, found in zip(("validation", "test"), results, strict=True)
            for kind in ("", UNSEEN)
        }
    lines = [[name, *(found.get(name + kind, "-") for found, kind in columns.values())] for name in names]
    return tabulate(lines, headers=["metric", *columns])


def repeats(report: dict[str, Any]) -> str:
    """How many targets had been seen before, and which column to read; empty where that is not known."""
    found = {split: Repeats(**counts) for split, counts in report["repeats"].items()}
    if not found:
        return ""
    sentences = [one.sentence(split) for split, one in found.items()]
    most = max(found.values(), key=lambda one: one.share)
    return "\n".join([*sentences, most.advice()])


def attributes(report: dict[str, Any]) -> str:
    """What was learned of the weights of item attributes; empty for a model that binds none."""
    rows = report.get("attributes") or {}
    weights = list(next(iter(rows.values()), {}))
    lines = [[name, *(f"{row[key]:.3f}" for key in weights)] for name, row in rows.items()]
    return tabulate(lines, headers=["attribute", *weights], disable_numparse=True) if lines else ""
