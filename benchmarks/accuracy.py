"""Accuracy tables, cell by cell: ``python -m benchmarks.accuracy TABLE [--data_path=dataset/] [--render]``.

A table is a yaml file in ``benchmarks/tables``: rows (a model and its settings) × seeds × data sets under one protocol.
Every cell is a JSON file in ``results/cells/TABLE`` with its metrics, the rank of every test user's item (with seen
items kept, and without them), full configuration, versions, commit, machine and time; only the cells that are missing
run, so a table can be stopped and continued, here or on another machine; a run that was stopped goes on from its last
checkpoint, in ``*.unfinished`` beside its cell. The result is ``results/TABLE.md``, mean ± standard deviation over the
seeds, and a plot.

Keys of a table: ``title``, ``protocol``, ``dataset`` (or ``datasets``: name → settings; with ``data`` where the name is
not the data's own, and ``tuned_on``, another of them whose choices are taken), ``published`` (name → rows that others
report, shown beside ours: ``row``, ``differs`` and metrics), ``settings`` (of all cells), ``seeds``, ``report`` (the
test metrics shown; each also without seen items, where cells have that), ``rows``: name → ``model``, ``settings``,
``config_files``, ``search`` and ``base``, a row whose model, settings and choice it starts from, or ``outside``, the
script that makes its cells; ``baseline`` (a row that the others are compared with), ``pairs`` (of rows that are
compared with each other), ``show_validation`` (a column of the score that epochs are chosen by), ``plot`` (the last
metric by row), ``curves`` (validation by epoch), ``notes``.

**Tuning.** The values of a row's ``search`` (setting → list: all combinations; or a list of choices; or the name of one
of the table's ``spaces``, which several rows then have alike) are tried with the table's ``tuning_seed`` first, and the
best ``valid_metric`` on *validation* is taken for all its seeds: the test split is not evaluated in these runs, so
nothing of it can be chosen by. With ``stop_trials: {after: 0.4, below: 0.9}`` a trial ends early that, when 40 % or
more of its epochs are over, has less than .9 of what the row's best trial had at the same part of its own; its file
stays. ``trial_settings`` are those of trials only.

Models are selected on validation where the table has one, and the last epoch is reported where it has none; the
metrics shown are those of the test split, read once, at the end of a run.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tqdm import tqdm

from benchmarks.cells import RESULTS
from benchmarks.rendering import packed, render

TABLES = Path(__file__).resolve().parent / "tables"


@dataclass(frozen=True)
class Table:
    """A table's file."""

    name: str
    content: dict[str, Any]

    @classmethod
    def load(cls, name: str) -> Table:
        return cls(name, yaml.safe_load((TABLES / f"{name}.yaml").read_text(encoding="utf-8")))

    @property
    def datasets(self) -> dict[str, dict[str, Any]]:
        """Name → its settings, and ``data`` and ``tuned_on``."""
        return self.content.get("datasets") or {self.content["dataset"]: {}}

    def data(self, dataset: str) -> str:
        """What RecBole knows a data set of the table as."""
        return self.datasets[dataset].get("data", dataset)

    def tuned_on(self, dataset: str) -> str:
        """The data set whose choices are taken: itself, where it says none."""
        return self.datasets[dataset].get("tuned_on", dataset)

    def cell(self, dataset: str, row: str, seed: int) -> Path:
        return self._folder(dataset) / f"{row}-{seed}.json"

    def trial(self, dataset: str, row: str, choice: dict[str, Any]) -> Path:
        words = [f"{key}={value}" for key, value in choice.items()]
        return self._folder(dataset) / "tuning" / row / f"{','.join(words)}.json"

    def _folder(self, dataset: str) -> Path:
        folder = RESULTS / "cells" / self.name
        return folder / dataset if "datasets" in self.content else folder

    def lineage(self, row: str) -> list[str]:
        """The rows that a row is based on, the first of them first, and itself."""
        base = self.content["rows"][row].get("base")
        return [*(self.lineage(base) if base else []), row]

    def model(self, row: str) -> str:
        return next(spec["model"] for one in self.lineage(row) if "model" in (spec := self.content["rows"][one]))

    def config_files(self, row: str) -> list[str]:
        return [file for one in self.lineage(row) for file in self.content["rows"][one].get("config_files", [])]

    def trials(self, dataset: str, row: str) -> dict[Path, dict[str, Any]]:
        """File → what it tries, of the runs that a row is tuned by; none without a ``search``."""
        search = self.content["rows"][row].get("search")
        dataset = self.tuned_on(dataset)
        if not search:
            return {}
        if isinstance(search, str):
            search = self.content["spaces"][search]
        if isinstance(search, list):
            choices = search
        else:
            choices = [dict(zip(search, values, strict=True)) for values in itertools.product(*search.values())]
        return {self.trial(dataset, row, choice): choice for choice in choices}

    def best(self, dataset: str, row: str) -> dict[str, Any]:
        """The choice with the best validation score among a row's own trials, of which none is missing."""
        trials = self.trials(dataset, row)
        scores = {path: max(curve) for path, curve in self.finished(dataset, row).items()}
        return trials[max(scores, key=lambda path: scores[path])] if trials else {}

    def finished(self, dataset: str, row: str) -> dict[Path, list[float]]:
        """File → validation scores by epoch, of a row's trials that came to their end."""
        there = [path for path in self.trials(dataset, row) if path.exists()]
        reports = {path: json.loads(path.read_text()) for path in there}
        ended = {path: one for path, one in reports.items() if "stopped_after" not in one}
        # Early files have no curve but the score of the best epoch.
        only = {path: [one["valid"][one["config"]["valid_metric"].lower()]] for path, one in ended.items()}
        return {path: one.get("valid_scores") or only[path] for path, one in ended.items()}

    def settings(self, dataset: str, row: str, choice: dict[str, Any] | None) -> dict[str, Any]:
        """Of a cell or, with ``choice``, of a trial; a later row of the lineage overrules an earlier one."""
        found = {**self.content.get("settings", {}), **self.datasets[dataset]}
        for mine in ("data", "tuned_on"):
            found.pop(mine, None)
        for one in self.lineage(row):
            found.update(self.content["rows"][one].get("settings", {}))
            if choice is not None:
                found.update(self.content.get("trial_settings", {}))
            found.update(choice if one == row and choice is not None else self.best(dataset, one))
        return found


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("table", choices=sorted(path.stem for path in TABLES.glob("*.yaml")))
    flags.add_argument("--data_path", default="dataset/", help="folder of the data sets")
    flags.add_argument("--datasets", nargs="*", default=None, help="only these data sets")
    flags.add_argument("--rows", nargs="*", default=None, help="only these rows")
    flags.add_argument("--seeds", nargs="*", type=int, default=None, help="only these seeds")
    flags.add_argument("--render", action="store_true", help="run nothing, write the table from the cells there are")
    args = flags.parse_args()
    table = Table.load(args.table)
    jobs = [] if args.render else missing(table, args.datasets, args.rows, args.seeds)
    for dataset, row, seed, choice in tqdm(jobs, desc=args.table, unit="run"):
        run_cell(table, dataset, row, seed, choice, os.path.abspath(args.data_path))
        render(table)
    print(render(table))


Job = tuple[str, str, int, dict[str, Any] | None]  # data set, row, seed; of a trial, what it tries


def missing(
    table: Table, datasets: list[str] | None = None, rows: list[str] | None = None, seeds: list[int] | None = None
) -> list[Job]:
    """What there is to run: the trials of a data set's rows, then its cells, seed by seed."""
    for given, known in ((datasets, table.datasets), (rows, table.content["rows"])):
        unknown = set(given or []) - set(known)
        if unknown:
            raise SystemExit(f"{table.name} has no {', '.join(sorted(unknown))}; it has {', '.join(known)}")
    jobs: list[Job] = []
    planned: set[Path] = set()  # a trial may be of several data sets
    for dataset in datasets or table.datasets:
        wanted = [row for row in rows or table.content["rows"] if "outside" not in table.content["rows"][row]]
        for row in dict.fromkeys(one for name in wanted for one in table.lineage(name)):
            for path, choice in table.trials(dataset, row).items():
                if not path.exists() and path not in planned:
                    planned.add(path)
                    jobs.append((table.tuned_on(dataset), row, table.content["tuning_seed"], choice))
        for seed, row in itertools.product(seeds or table.content["seeds"], wanted):
            if not table.cell(dataset, row, seed).exists():
                jobs.append((dataset, row, seed, None))
    return jobs


def run_cell(
    table: Table, dataset: str, row: str, seed: int, choice: dict[str, Any] | None, data_path: str
) -> dict[str, Any]:
    """Trains one cell, or with ``choice`` one trial, and writes its file."""
    from recbole_holo.quick_start import run

    tuning = choice is not None
    settings = table.settings(dataset, row, choice)
    settings.update(seed=seed, data_path=data_path, state="ERROR", show_progress=False)
    path = table.cell(dataset, row, seed) if choice is None else table.trial(dataset, row, choice)
    scratch = path.with_suffix(".unfinished")
    scratch.mkdir(parents=True, exist_ok=True)
    settings["resume"] = next((str(file) for file in scratch.glob("saved/*.pth")), None)
    try:
        with _inside(scratch), contextlib.redirect_stdout(io.StringIO()):
            result = run(
                table.model(row),
                table.data(dataset),
                config_file_list=table.config_files(row),
                config_dict=settings,
                saved=table.content.get("select_on_validation", True),
                test=not tuning,
                callback_fn=StopsTrials.of(table, dataset, row, settings) if tuning else None,
            )
        report = result["report"]
    except TrialStopped as stopped:
        report = {"stopped_after": stopped.epochs, "valid_score": stopped.score, "config": settings, "seed": seed}
    for mine in ("data_path", "resume"):
        report["config"].pop(mine, None)
    report["checkpoint"] = None
    for key in ("ranks", "ranks_unseen"):
        if not tuning and result[f"test_{key}"] is not None:
            report[key] = packed(np.asarray(result[f"test_{key}"]))
    path.write_text(json.dumps(report, indent=1, default=str) + "\n", encoding="utf-8")
    shutil.rmtree(scratch)
    return report


class TrialStopped(Exception):
    """Ends a trial that cannot be expected to be the best."""

    def __init__(self, epochs: int, score: float) -> None:
        super().__init__(f"stopped after {epochs} epochs at {score}")
        self.epochs, self.score = epochs, score


@dataclass(frozen=True)
class StopsTrials:
    """Called after every validation of a trial.

    Attributes:
        epochs: of the trial.
        after: the part of them during which no trial is stopped.
        best: what is to be reached at each part of the run: the scores by epoch, the highest so far, of the best trial.
    """

    epochs: int
    after: float
    best: np.ndarray

    @classmethod
    def of(cls, table: Table, dataset: str, row: str, settings: dict[str, Any]) -> StopsTrials | None:
        """None for a table that stops no trials, and for a row's first trial."""
        rule, curves = table.content.get("stop_trials"), list(table.finished(dataset, row).values())
        if not rule or not curves:
            return None
        return cls(settings["epochs"], rule["after"], rule["below"] * np.maximum.accumulate(max(curves, key=max)))

    def __call__(self, epoch: int, score: float) -> None:
        done = (epoch + 1) / self.epochs
        if self.after <= done < 1 and score < self.best[int(np.ceil(done * len(self.best))) - 1]:
            raise TrialStopped(epoch + 1, score)


@contextlib.contextmanager
def _inside(folder: Path) -> Iterator[None]:
    before = os.getcwd()  # RecBole writes its logs and checkpoints into the working directory
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


if __name__ == "__main__":
    main()
