"""What a search leaves in its folder: ``report.md``, all trials as JSON and CSV, two plots, and ``best.yaml``."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import optuna
import pandas as pd
import yaml
from matplotlib import pyplot
from optuna.importance import FanovaImportanceEvaluator
from optuna.trial import TrialState
from optuna.visualization.matplotlib import plot_optimization_history, plot_param_importances
from tabulate import tabulate


def render(found: Mapping[str, Any]) -> str:
    """The trials as a table, best validation score first, and the results of the best below it."""
    sign = -1 if found["valid_score_bigger"] else 1

    def place(trial: Mapping[str, Any]) -> tuple[bool, float]:
        score = trial["valid_score"]
        return trial["status"] != "ok", math.inf if score is None or math.isnan(score) else sign * score

    trials, names = sorted(found["trials"], key=place), list(found["space"])
    rows = [
        [
            trial["number"],
            *(_short(trial["params"].get(name, "-")) for name in names),
            _short(trial["valid_score"]),
            "-" if trial["seconds"] is None else f"{trial['seconds']:.1f}",
            trial["status"],
        ]
        for trial in trials
    ]
    head = f"{found['model']} on {found['dataset']}: {len(trials)} trials, {found['algo']}, seed {found['seed']}"
    headers = ["trial", *names, "valid score", "seconds", "status"]
    best = ", ".join(f"{name}:{value}" for name, value in (found["best_params"] or {}).items())
    notes = [f"best by validation: {best or 'none yet'}"]
    if best:
        notes.append(f"its validation: {found['best_valid_result']}")
    if found["test_result"] is not None:
        notes.append(f"trained again with these: {found['again_valid_score']:.5g} on validation, {found['checkpoint']}")
        notes.append(f"its test: {found['test_result']}")
    if found["running"]:
        notes.append(f"{found['running']} trials still run in other processes: the last to end tests the best.")
    if found["stopped_early"]:
        notes.append("Stopped early: no better score for as many trials as early_stop allows.")
    if found["combinations"] is not None and len(trials) < found["combinations"]:
        notes.append(f"Not exhaustive: {len(trials)} of {found['combinations']} combinations were tried.")
    return "\n\n".join([head, tabulate(rows, headers, tablefmt="github", disable_numparse=True), "\n\n".join(notes)])


def write(folder: Path, found: Mapping[str, Any], study: optuna.Study) -> None:
    """Writes all files anew from what a search returns; the plots by the last process, when no trial is running."""
    (folder / "trials.json").write_text(json.dumps(found, indent=2, default=str) + "\n", "utf-8")
    pd.json_normalize(found["trials"]).to_csv(folder / "trials.csv", index=False)
    if found["best_params"] is not None:
        head = (
            f"# The best of {len(found['trials'])} trials by validation, {found['best_valid_score']:.5g}.\n"
            f"# --model={found['model']} --dataset={found['dataset']}, after the config files of the search:\n"
            f'# --config_files="{folder / "best.yaml"}"\n'
        )
        settings = yaml.safe_dump({**found["fixed"], **found["best_params"]}, sort_keys=False)
        (folder / "best.yaml").write_text(head + settings, "utf-8")
    plots = _plot(folder, study) if not found["running"] else []
    pictures = "".join(f"\n\n![{path.stem}]({path.name})" for path in plots)
    (folder / "report.md").write_text(f"# Search\n\n{render(found)}{pictures}\n", "utf-8")


def _plot(folder: Path, study: optuna.Study) -> list[Path]:
    done = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    names = {name for trial in done for name in trial.params if len({other.params[name] for other in done}) > 1}
    plots = []
    with pyplot.style.context("default"):  # Optuna sets one of its own for the process
        if done:
            axes = plot_optimization_history(study, target_name="validation score")
            plots.append(_save(axes, folder / "history.png"))
        if len(names) > 1 and len({trial.value for trial in done}) > 1:
            evaluator = FanovaImportanceEvaluator(seed=0)
            axes = plot_param_importances(study, evaluator, sorted(names), target_name="validation score")
            plots.append(_save(axes, folder / "importance.png"))
    return plots


def _save(axes: Any, path: Path) -> Path:
    axes.figure.savefig(path, dpi=100, bbox_inches="tight")
    pyplot.close(axes.figure)
    return path


def _short(value: Any) -> str:
    """A value as a table shows it."""
    if value is None:
        return "-"
    return f"{value:.5g}" if isinstance(value, float) else str(value)
