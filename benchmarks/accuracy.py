"""Accuracy tables, cell by cell: ``python -m benchmarks.accuracy TABLE [--data_path=dataset/] [--render]``.

A table is a yaml file in ``benchmarks/tables``: rows (a model and its settings) × seeds on one data set and protocol.
Every cell is a JSON file in ``results/cells/TABLE`` with its metrics, full configuration, versions, commit, machine and
time; only the cells that are missing run, so a table can be stopped and continued, here or on another machine. The
result is ``results/TABLE.md``: mean ± standard deviation over the seeds.

Models are selected on validation where the table has one, and the last epoch is reported where it has none; the
metrics shown are those of the test split, read once, at the end of a run.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from tabulate import tabulate
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent
RESULTS = ROOT.parent / "results"


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("table", choices=sorted(path.stem for path in (ROOT / "tables").glob("*.yaml")))
    flags.add_argument("--data_path", default="dataset/", help="folder of the data sets")
    flags.add_argument("--rows", nargs="*", default=None, help="only these rows")
    flags.add_argument("--seeds", nargs="*", type=int, default=None, help="only these seeds")
    flags.add_argument("--render", action="store_true", help="run nothing, write the table from the cells there are")
    args = flags.parse_args()
    table = yaml.safe_load((ROOT / "tables" / f"{args.table}.yaml").read_text(encoding="utf-8"))
    missing = [
        (row, seed)
        for seed in (args.seeds or table["seeds"])
        for row in (args.rows or table["rows"])
        if not cell_path(args.table, row, seed).exists()
    ]
    for row, seed in tqdm([] if args.render else missing, desc=args.table, unit="cell"):
        run_cell(args.table, table, row, seed, os.path.abspath(args.data_path))
        render(args.table, table)
    print(render(args.table, table))


def cell_path(name: str, row: str, seed: int) -> Path:
    return RESULTS / "cells" / name / f"{row}-{seed}.json"


def run_cell(name: str, table: dict[str, Any], row: str, seed: int, data_path: str) -> None:
    from recbole_holo.quick_start import run

    spec = table["rows"][row]
    settings = {**table.get("settings", {}), **spec.get("settings", {}), "seed": seed, "data_path": data_path}
    settings.update(state="ERROR", show_progress=False)
    path = cell_path(name, row, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch, _inside(scratch), contextlib.redirect_stdout(io.StringIO()):
        result = run(
            spec["model"],
            table["dataset"],
            config_file_list=spec.get("config_files", []),
            config_dict=settings,
            saved=table.get("select_on_validation", True),
        )
    report = result["report"]
    report["config"].pop("data_path", None)
    report["checkpoint"] = None
    path.write_text(json.dumps(report, indent=1, default=str) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _inside(folder: str) -> Iterator[None]:
    before = os.getcwd()  # RecBole writes its logs and checkpoints into the working directory
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def render(name: str, table: dict[str, Any]) -> str:
    """Writes ``results/NAME.md`` from the cells there are and returns the table."""
    lines, sources = [], set()
    for row in table["rows"]:
        cells = [json.loads(p.read_text()) for s in table["seeds"] if (p := cell_path(name, row, s)).exists()]
        if not cells:
            continue
        spread = [_mean_and_deviation([cell["test"][metric] for cell in cells]) for metric in table["report"]]
        seconds = statistics.median(cell["seconds_per_epoch"] for cell in cells)
        lines.append(
            [
                row,
                *spread,
                f"{cells[0]['parameters']:,}",
                f"{cells[0]['parameters_without_embeddings']:,}",
                f"{seconds:.1f}",
                len(cells),
            ]
        )
        for c in cells:
            packages = ", ".join(f"{k} {c['versions'][k]}" for k in ("recbole", "torch", "numba") if c["versions"][k])
            sources.add(
                f"{c['date'][:10]}; {c['device']}, {c['machine']}; {packages}; commit {_short(c['git_commit'])}"
            )
    head = ["model", *(f"test {m}" for m in table["report"]), "parameters", "without item tables", "s/epoch", "seeds"]
    text = tabulate(lines, headers=head, tablefmt="github", disable_numparse=True)
    document = f"# {table['title']}\n\n{table['protocol'].strip()}\n\n{text}\n\n"
    document += f"Seeds {', '.join(map(str, table['seeds']))}; mean ± standard deviation over seeds. Reproduce with\n\n"
    document += f"    python -m benchmarks.accuracy {name} --data_path=dataset/\n\n"
    document += (
        "Ran on: "
        + " | ".join(sorted(sources))
        + ". Seconds per epoch are of a shared machine: compare rows, not papers.\n"
    )
    if table.get("notes"):
        document += f"\n{table['notes'].strip()}\n"
    (RESULTS / f"{name}.md").write_text(document, encoding="utf-8")
    return text


def _short(commit: str | None) -> str:
    """The start of a commit; ``+`` stays: files that git tracks were changed."""
    if commit is None:
        return "unknown (no checkout)"
    return commit[:8] + ("+" if commit.endswith("+") else "")


def _mean_and_deviation(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.4f}{deviation}"


if __name__ == "__main__":
    main()
