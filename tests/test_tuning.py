"""The search is reproducible, complete where it says so, counts a score of 0, and refuses a malformed space."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from recbole.trainer import HyperTuning

from recbole_holo import cli, tuning
from recbole_holo.bridge.config import Config
from recbole_holo.errors import ConfigError, NonFiniteLoss, TrialsFailed
from recbole_holo.tuning import read_space, tune

Score = Callable[[dict[str, Any]], float]
Objective = Callable[[dict[str, Any], "Callable[[int, float], None] | None"], dict[str, Any]]

GRID = {"choice": {"learning_rate": [1e-3, 1e-2, 1e-1], "hidden_size": [32, 64]}}
MIXED = {
    "choice": {"hidden_size": [32, 64]},
    "uniform": {"dropout": [0.0, 0.5]},
    "loguniform": {"learning_rate": [-8, -2]},
    "quniform": {"layers": [1, 4, 1]},
}


def scored(score: Score) -> Objective:
    """An objective that costs nothing; its test score goes against the validation score, and is of the last call."""
    known: dict[str, float] = {}

    def objective(settings: dict[str, Any], after_validation: Callable[[int, float], None] | None) -> dict[str, Any]:
        last = after_validation is None
        value = known[repr(settings)] = known.get(repr(settings), 0.0) if last else score(settings)
        return {
            "valid_score": value,
            "valid_result": {"ndcg@10": value},
            "test_result": {"ndcg@10": -value} if last else None,
            "checkpoint": "M.pth" if last else None,
        }

    return objective


def distance(settings: dict[str, Any]) -> float:
    return -abs(math.log(settings["learning_rate"] / 1e-2)) - settings["hidden_size"] / 1000


def search(
    space: Any = GRID,
    score: Score = distance,
    objective: Objective | None = None,
    bigger: bool = True,
    folder: str | Path | None = None,
    plots: bool = False,  # they cost more than the search does
    **options: Any,
) -> dict[str, Any]:
    pytest.importorskip("optuna")
    from recbole_holo.tuning import report
    from recbole_holo.tuning.search import Search

    folder = Path(folder or tempfile.mkdtemp(dir=Path.cwd()))
    about = {"model": "M", "dataset": "d", "fixed": {"epochs": 2}}
    options = {"show_progress": False, **options}
    with pytest.MonkeyPatch.context() as patch:
        if not plots:
            patch.setattr(report, "_plot", lambda *_: [])
        return Search(objective or scored(score), about, bigger, read_space(space), folder, **options).run()


def tried(report: dict[str, Any]) -> list[dict[str, Any]]:
    return [trial["params"] for trial in report["trials"]]


# ---------------------------------------------------------------------------------------------------------------------
# The search


@pytest.mark.parametrize("seed", [0, 1])
def test_exhaustive_tries_each_combination_once(seed: int) -> None:
    report = search(seed=seed, early_stop=None)
    combinations = {(p["learning_rate"], p["hidden_size"]) for p in tried(report)}
    assert len(report["trials"]) == len(combinations) == report["combinations"] == 6
    assert report["best_params"] == {"learning_rate": 1e-2, "hidden_size": 32}
    assert report["best_valid_score"] == pytest.approx(-0.032)


@pytest.mark.parametrize(("algo", "space"), [("exhaustive", GRID), ("random", MIXED), ("bayes", MIXED)])
def test_a_seed_fixes_the_search(algo: str, space: dict[str, Any]) -> None:
    options: dict[str, Any] = {"algo": algo, "early_stop": None, "max_evals": None if algo == "exhaustive" else 25}
    first, again, other = (search(space, seed=seed, **options) for seed in (1, 1, 2))
    assert tried(first) == tried(again)
    assert tried(first) != tried(other)


def test_bayes_learns_from_the_trials() -> None:
    """25 trials: TPE's first 10 are random, so the rest must not repeat the random search, and come closer."""
    options: dict[str, Any] = {"max_evals": 25, "early_stop": None, "seed": 3}
    random, bayes = search(MIXED, algo="random", **options), search(MIXED, algo="bayes", **options)
    assert tried(random)[10:] != tried(bayes)[10:]

    def mean(report: dict[str, Any]) -> float:
        scores = [trial["valid_score"] for trial in report["trials"][10:]]
        return sum(scores) / len(scores)

    assert mean(bayes) > mean(random)


@pytest.mark.parametrize(("name", "same"), [("exhaustive", "grid"), ("bayes", "tpe")])
def test_others_names_of_the_algorithms(name: str, same: str) -> None:
    assert tried(search(algo=name, max_evals=4)) == tried(search(algo=same, max_evals=4))


def test_zero_is_a_score() -> None:
    """RecBole takes a best score of 0 for none and goes on to a worse one."""
    pytest.importorskip("hyperopt")
    scores = iter([0.0, -0.2, -0.1])
    stock = HyperTuning(
        lambda settings, files: {
            "model": "M",
            "best_valid_score": next(scores),
            "valid_score_bigger": True,
            "best_valid_result": {},
            "test_result": {},
        },
        params_dict={"choice": {"x": [1, 2, 3], "model": ["M"]}},
        algo="exhaustive",
    )
    stock.run()
    assert stock.best_score == -0.1

    scores = iter([0.0, -0.2, -0.1])
    report = search({"choice": {"x": [1, 2, 3]}}, lambda settings: next(scores))
    assert report["best_valid_score"] == 0.0
    assert report["best_params"] == report["trials"][0]["params"]


def test_smaller_can_be_better() -> None:
    report = search({"choice": {"x": [3, 0, 2]}}, lambda settings: settings["x"], bigger=False)
    assert report["best_params"] == {"x": 0}
    assert report["best_valid_score"] == 0


def test_validation_alone_decides() -> None:
    """No trial sees the test split; the one training with the best settings does."""
    calls: list[tuple[int, bool]] = []
    objective = scored(lambda settings: settings["x"])

    def counts(settings: dict[str, Any], after_validation: Any) -> dict[str, Any]:
        calls.append((settings["x"], after_validation is None))
        return objective(settings, after_validation)

    report = search({"choice": {"x": [1, 2, 3]}}, objective=counts)
    assert report["best_params"] == {"x": 3}
    assert report["test_result"] == {"ndcg@10": -3.0}
    assert sorted(calls[:-1]) == [(1, False), (2, False), (3, False)]
    assert calls[-1] == (3, True)
    assert all("test_result" not in trial for trial in report["trials"])


def test_early_stop_and_limits(capsys: pytest.CaptureFixture[str]) -> None:
    space = {"choice": {"x": list(range(30))}}
    report = search(space, lambda settings: 0.5, early_stop=4)
    assert report["stopped_early"]
    assert len(report["trials"]) == 5  # the first sets the score, four do not beat it
    out = capsys.readouterr().out
    assert "Stopped early" in out
    assert "Not exhaustive: 5 of 30 combinations" in out
    report = search(space, lambda settings: settings["x"], early_stop=None, max_evals=7)
    assert len(report["trials"]) == 7
    assert not report["stopped_early"]
    report = search(space, lambda settings: settings["x"], early_stop=None, max_evals=100)
    assert len(report["trials"]) == 30


def test_options_keep_their_type() -> None:
    options = [[64, 32], "relu", None, True, {"max_norm": 1.0}]
    report = search({"choice": {"x": options}}, lambda settings: 1.0)
    assert sorted(map(repr, (p["x"] for p in tried(report)))) == sorted(map(repr, options))
    report = search(
        {"quniform": {"whole": [1, 4, 1], "half": [0, 2, 0.5]}}, lambda settings: 1.0, algo="random", max_evals=9
    )
    assert {type(p["whole"]) for p in tried(report)} == {int}
    assert {type(p["half"]) for p in tried(report)} == {float}
    steps = {"quniform": {"tenths": [0.0, 0.7, 0.1], "even": [1, 9, 2]}}
    report = search(steps, lambda settings: 1.0, algo="random", max_evals=60, early_stop=None)
    # As hyperopt's, multiples of the step; and no 0.30000000000000004.
    assert {p["tenths"] for p in tried(report)} == {0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7}
    assert {p["even"] for p in tried(report)} == {2, 4, 6, 8}


def test_bounds_of_loguniform_are_natural_logarithms() -> None:
    report = search({"loguniform": {"x": [-8, -2]}}, lambda settings: 1.0, algo="random", max_evals=60, early_stop=None)
    drawn = [math.log(p["x"]) for p in tried(report)]
    assert all(-8 <= x <= -2 for x in drawn)
    assert 20 <= sum(x < -5 for x in drawn) <= 40


def test_equal_settings_are_not_trained_twice() -> None:
    seen: list[int] = []
    report = search(
        {"choice": {"x": [1, 2]}},
        lambda settings: seen.append(settings["x"]) or settings["x"],
        algo="random",
        max_evals=8,
        early_stop=None,
    )
    assert sorted(seen) == [1, 2]
    assert [trial["valid_score"] for trial in report["trials"]] == [p["x"] for p in tried(report)]


def curves(settings: dict[str, Any], after_validation: Callable[[int, float], None] | None) -> dict[str, Any]:
    """Twelve epochs towards x, from below."""
    for epoch in range(12):
        if after_validation is not None:
            after_validation(epoch, settings["x"] * (epoch + 1) / 12)
    return {"valid_score": settings["x"], "valid_result": {}, "test_result": {}, "checkpoint": "M.pth"}


def test_trials_that_are_worse_at_the_same_epoch_end_early() -> None:
    space = {"choice": {"x": list(range(1, 21))}}
    whole, pruned = (search(space, objective=curves, pruner=name, early_stop=None) for name in ("none", "median"))
    assert {trial["status"] for trial in whole["trials"]} == {"ok"}
    statuses = {trial["params"]["x"]: trial["status"] for trial in pruned["trials"]}
    assert set(statuses.values()) == {"ok", "pruned after epoch 5"}  # none in the first five
    assert [trial["status"] for trial in pruned["trials"][:5]] == ["ok"] * 5
    assert pruned["best_params"] == whole["best_params"] == {"x": 20}
    kept, ended = ([x for x, status in statuses.items() if (status == "ok") == ok] for ok in (True, False))
    assert sum(kept) / len(kept) > sum(ended) / len(ended)


# ---------------------------------------------------------------------------------------------------------------------
# Stopped and shared searches


def in_processes(*targets: Callable[[], object]) -> list[int | None]:
    """Runs each in a process of its own, all at once, and returns their exit codes."""
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=target) for target in targets]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


@pytest.mark.parametrize(("algo", "space"), [("exhaustive", GRID), ("random", MIXED), ("bayes", MIXED)])
def test_a_killed_search_goes_on(algo: str, space: dict[str, Any], tmp_path: Path) -> None:
    """The trial that was running is run again, and nothing else is drawn than without the kill."""
    options: dict[str, Any] = {"algo": algo, "early_stop": None, "max_evals": 6 if algo == "exhaustive" else 18}
    dies_at, calls = options["max_evals"] - 3, []

    def killed(settings: dict[str, Any]) -> float:
        calls.append(settings)
        if len(calls) == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return distance({"hidden_size": 32, **settings})

    def later(settings: dict[str, Any]) -> float:
        calls.append(settings)
        return distance({"hidden_size": 32, **settings})

    whole = search(space, later, **options)
    calls.clear()
    assert in_processes(lambda: search(space, killed, folder=tmp_path / "s", **options)) == [-signal.SIGKILL]
    assert calls == []
    resumed = search(space, later, folder=tmp_path / "s", **options)
    assert len(calls) == 4  # the one that was cut short, and the three after it
    assert tried(resumed) == tried(whole)
    assert {trial["status"] for trial in resumed["trials"]} == {"ok"}
    assert resumed["best_params"] == whole["best_params"]


def test_an_interrupted_search_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted(settings: dict[str, Any]) -> float:
        if settings["x"] == 3:
            raise KeyboardInterrupt
        return 1.0

    space = {"choice": {"x": [1, 2, 3]}}
    with pytest.raises(KeyboardInterrupt):
        search(space, interrupted, folder=tmp_path, seed=1)
    assert "the same command goes on with it" in capsys.readouterr().err
    report = search(space, lambda settings: settings["x"], folder=tmp_path, seed=1)
    assert sorted(p["x"] for p in tried(report)) == [1, 2, 3]
    again = search(space, lambda settings: pytest.fail("it is complete"), folder=tmp_path, seed=1)
    assert again == report


def test_another_search_is_not_mixed_in(tmp_path: Path) -> None:
    search(folder=tmp_path)
    with pytest.raises(ConfigError, match=r"search_dir.*it holds a search with space.*choose another folder"):
        search({"choice": {"hidden_size": [32, 64]}}, folder=tmp_path)
    with pytest.raises(ConfigError, match="it holds a search with seed: 2020, and this one has 1"):
        search(folder=tmp_path, seed=1)
    more = {"choice": {"x": list(range(9))}}
    assert len(search(more, lambda settings: settings["x"], folder=tmp_path / "b", max_evals=4)["trials"]) == 4
    assert len(search(more, lambda settings: settings["x"], folder=tmp_path / "b", max_evals=6)["trials"]) == 6


@pytest.mark.parametrize("storage", ["{}/shared.log", "sqlite:///{}/shared.db"])
def test_two_processes_share_a_search(storage: str, tmp_path: Path) -> None:
    """Each combination is tried once, by both; the last to end trains with the best. Each has its own folder, as on
    two machines."""
    log = tmp_path / "calls"
    log.touch()

    def objective(settings: dict[str, Any], after_validation: Any) -> dict[str, Any]:
        with open(log, "a", encoding="utf-8") as file:
            file.write(f"{os.getpid()} {settings['x']} {after_validation is None}\n")
        time.sleep(0.1)
        return {"valid_score": settings["x"], "valid_result": {}, "test_result": {}, "checkpoint": "M.pth"}

    space, options = {"choice": {"x": list(range(14))}}, {"early_stop": None, "storage": storage.format(tmp_path)}
    search(space, objective=objective, folder=tmp_path / "first" / "s", max_evals=1, **options)  # makes the storage
    log.write_text("")
    parts = [
        lambda host=host: search(space, objective=objective, folder=tmp_path / host / "s", **options) for host in "ab"
    ]
    assert in_processes(*parts) == [0, 0]
    calls = [line.split() for line in log.read_text().splitlines()]
    trials = [(process, int(x)) for process, x, last in calls if last == "False"]
    assert len({process for process, _ in trials}) == 2
    assert len({x for _, x in trials}) == len(trials) == 13
    assert sum(last == "True" for *_, last in calls) in (1, 2)  # both, if they end at the same moment
    reports = [json.loads((tmp_path / host / "s" / "trials.json").read_text()) for host in "ab"]
    assert all((report["test_result"] is None) == (report["running"] > 0) for report in reports)
    last = next(report for report in reports if report["running"] == 0)
    assert last["best_params"] == {"x": 13}
    assert sorted(p["x"] for p in tried(last)) == list(range(14))


@pytest.mark.parametrize(
    ("storage", "message"),
    [
        ("nonsense://user:secret@host/db", r"nonsense://user:\*\*\*@host/db.*cannot be opened"),
        ("space.yaml", "cannot be opened"),
        ("missing/journal.log", "cannot be opened"),
    ],
)
def test_a_storage_that_cannot_be_opened(storage: str, message: str) -> None:
    Path("space.yaml").write_text("choice: {}\n")
    with pytest.raises(ConfigError, match=f"search_storage.*{message}") as caught:
        search(storage=storage)
    assert "secret" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# Failures


@pytest.mark.parametrize(
    "error",
    [
        NonFiniteLoss("the training loss is not finite in epoch 0, step 3."),
        ValueError("Training loss is nan"),
        torch.cuda.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes"),
        MemoryError(),
        None,
    ],
)
def test_a_failed_point_does_not_end_the_search(error: Exception | None) -> None:
    def score(settings: dict[str, Any]) -> float:
        if settings["x"] != 2:
            return float(settings["x"])
        if error is None:
            return math.nan
        raise error

    report = search({"choice": {"x": [1, 2, 3]}}, score)
    assert report["best_params"] == {"x": 3}
    assert "x: 3" in next(Path.cwd().glob("*/best.yaml")).read_text()
    assert sorted(trial["status"][:6] for trial in report["trials"]) == ["failed", "ok", "ok"]


def test_a_first_failure_does_not_hide_progress() -> None:
    """A score that is nan is none to be compared with."""
    scores = iter([math.nan, *range(20)])
    report = search({"choice": {"x": list(range(21))}}, lambda settings: next(scores), early_stop=3)
    assert len(report["trials"]) == 21


def test_when_everything_fails() -> None:
    with pytest.raises(TrialsFailed, match="all 3 trials failed: failed: the validation score is nan"):
        search({"choice": {"x": [1, 2, 3]}}, lambda settings: math.nan)


def test_faults_of_the_program_are_not_hidden() -> None:
    def score(settings: dict[str, Any]) -> float:
        raise ConfigError("hidden_size", -1, "give a positive number")

    with pytest.raises(ConfigError, match="hidden_size"):
        search(score=score)


def test_a_combination_that_cannot_be_is_a_failed_trial() -> None:
    """Once a trial has shown that settings can be used, a ConfigError is of the combination."""

    def score(settings: dict[str, Any]) -> float:
        if settings["x"] == settings["y"]:
            raise ConfigError("x", settings["x"], "it must not be y")
        return settings["x"] - settings["y"]

    report = search({"choice": {"x": [1, 2, 3], "y": [1, 4]}}, score, seed=2)
    assert report["best_params"] == {"x": 3, "y": 1}
    assert sum("it must not be y" in trial["status"] for trial in report["trials"]) == 1


@pytest.mark.parametrize(("version", "message"), [(None, "is not installed"), ("3.6.1", r"3\.6\.1 is too old")])
def test_optuna_is_asked_for(version: str | None, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "installed_version", {"optuna": version}.get)
    with pytest.raises(ImportError, match=rf'optuna {message}: pip install "recbole-holo\[tune\]"'):
        tune("HoloMambaRec", "ml-100k", GRID)


# ---------------------------------------------------------------------------------------------------------------------
# Output


def test_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = search(folder=tmp_path / "out" / "M", plots=True)
    folder = tmp_path / "out" / "M"
    assert json.loads((folder / "trials.json").read_text()) == report
    table = pd.read_csv(folder / "trials.csv")
    assert table["valid_score"].max() == report["best_valid_score"]
    assert list(table["params.learning_rate"]) == [p["learning_rate"] for p in tried(report)]
    assert yaml.safe_load((folder / "best.yaml").read_text()) == {"epochs": 2, "learning_rate": 0.01, "hidden_size": 32}
    text = (folder / "report.md").read_text()
    for name in ("history.png", "importance.png"):
        assert f"({name})" in text
        assert (folder / name).read_bytes().startswith(b"\x89PNG")
    out = capsys.readouterr().out
    assert "best by validation: learning_rate:0.01, hidden_size:32" in out
    assert out.index("| 0.01 ") < out.index("| 0.1 ")  # the table is sorted by score
    assert "its test: {'ndcg@10': 0.032}" in text


def test_no_plot_of_importance_where_nothing_varies(tmp_path: Path) -> None:
    search({"choice": {"x": [1], "y": [1, 2]}}, lambda settings: settings["y"], folder=tmp_path, plots=True)
    assert (tmp_path / "history.png").exists()
    assert not (tmp_path / "importance.png").exists()


def test_trials_are_on_disk_when_a_later_one_breaks(tmp_path: Path) -> None:
    def score(settings: dict[str, Any]) -> float:
        if settings["x"] == 3:
            raise KeyError("broken")
        return 1.0

    with pytest.raises(KeyError):
        search({"choice": {"x": [1, 2, 3]}}, score, folder=tmp_path, seed=1)
    done = json.loads((tmp_path / "trials.json").read_text())["trials"]
    assert 0 < len(done) < 3


# ---------------------------------------------------------------------------------------------------------------------
# The space file


def test_yaml_and_text_say_the_same(tmp_path: Path) -> None:
    (tmp_path / "space.yaml").write_text(
        "choice:\n  learning_rate: [5e-4, 1e-3, .5e-2]\n  mlp: ['[64, 64]', '[128]']\n"
        "uniform:\n  dropout: [0, 0.5]\nloguniform:\n  decay: [-8, 0]\nquniform:\n  layers: [1, 4, 1]\n"
    )
    (tmp_path / "hyper.test").write_text(
        "# a comment\nlearning_rate choice [5e-4, 1e-3, .5e-2]\nmlp choice ['[64, 64]','[128]']\n\n"
        "dropout uniform 0,0.5\ndecay loguniform -8, 0\nlayers quniform 1,4,1\n"
    )
    space = read_space(tmp_path / "space.yaml")
    assert space == read_space(str(tmp_path / "hyper.test"))
    assert space["learning_rate"].values == (5e-4, 1e-3, 5e-3)
    assert list(space) == ["learning_rate", "mlp", "dropout", "decay", "layers"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "names no parameter"),
        ("choice: {}\n", "names no parameter"),
        ("choice: [1, 2]\n", "map parameters to a list of options"),
        ("- 1\n", "must map distributions to parameters"),
        ("choice: {a: [1\n", "not YAML"),
        ("chioce: {a: [1]}\n", "did you mean choice"),
        ("choice: {a: 1}\n", r"choice\.a.*give a list of options"),
        ("choice: {a: []}\n", "at least one option"),
        ("choice: {a: [1]}\nuniform: {a: [0, 1]}\n", "searched twice"),
        ("uniform: {a: [0]}\n", r"uniform\.a.*give \[low, high\]"),
        ("uniform: {a: [0, x]}\n", r"uniform\.a.*give \[low, high\]"),
        ("uniform: {a: [1, 0]}\n", "low bound must be below"),
        ("uniform: {a: [0, .inf]}\n", "low bound must be below"),
        ("quniform: {a: [0, 1]}\n", r"give \[low, high, step\]"),
        ("quniform: {a: [0, 1, 0]}\n", "step must be above 0"),
        ("quniform: {a: [0, 1, 2]}\n", "step must be above 0"),
        ("loguniform: {a: [1e-4, 1e-2]}\n", r"natural logarithms.*write \[-9\.21, -4\.605\]"),
    ],
)
def test_a_malformed_yaml_space_is_refused(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "space.yaml"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_space(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "names no parameter"),
        ("a choice\n", r"line 1.*name distribution values"),
        ("# x\na choice [1, b]\n", r"line 2.*numbers, strings or a list"),
        ("a chioce [1]\n", "did you mean choice"),
        ("a choice 5\n", "give a list of options"),
        ("a choice [1]\na choice [2]\n", "searched twice"),
        ("a choice [__import__('os').getcwd()]\n", "numbers, strings or a list"),
    ],
)
def test_a_malformed_text_space_is_refused(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "hyper.test"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message):
        read_space(path)


def test_no_such_space() -> None:
    with pytest.raises(FileNotFoundError, match=r"search_space: 'none\.yaml'"):
        read_space("none.yaml")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"algo": "bayesian"}, "did you mean bayes"),
        ({"max_evals": 0}, "max_evals"),
        ({"early_stop": 0}, "early_stop"),
        ({"pruner": "medain"}, "did you mean median"),
        ({"space": MIXED}, "dropout is uniform: list its values as a choice"),
    ],
)
def test_options_that_cannot_be_used(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        search(**options)


# ---------------------------------------------------------------------------------------------------------------------
# Trainings


def words(settings: dict[str, Any]) -> list[str]:
    return [f"--{name}={value}" for name, value in settings.items()]


def test_the_command(cyclic_dataset: str, tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """It leaves a report, settings that --config_files takes, and a checkpoint; no trial is tested."""
    pytest.importorskip("optuna")
    from recbole_holo.tuning import search as module

    run, runs = module.run, []

    def watched(*args: Any, **options: Any) -> dict[str, Any]:
        runs.append((args[3]["hidden_size"], options["test"], options["callback_fn"] is not None))
        return run(*args, **options)

    monkeypatch.setattr(module, "run", watched)
    del tiny["hidden_size"]
    Path("space.yaml").write_text("choice: {hidden_size: [8, 16]}\n")
    command = ["--model=HoloMambaRec", f"--dataset={cyclic_dataset}", "--search_space=space.yaml", *words(tiny)]
    assert cli.main(command) == 0
    folder = Path("search", f"HoloMambaRec-{cyclic_dataset}")
    report = json.loads((folder / "trials.json").read_text())
    best = report["best_params"]["hidden_size"]
    assert sorted(runs[:2]) == [(8, False, True), (16, False, True)]
    assert runs[2:] == [(best, True, False)]
    assert report["best_valid_score"] == max(trial["valid_score"] for trial in report["trials"])
    assert report["best_valid_result"]["ndcg@5"] == report["best_valid_score"] == report["again_valid_score"]
    assert set(report["test_result"]) == set(report["best_valid_result"])
    assert Path(report["checkpoint"]).parent == folder
    assert Path(report["checkpoint"]).is_file()
    assert list(folder.glob("*.pth")) == [Path(report["checkpoint"])]
    config = Config("HoloMambaRec", cyclic_dataset, [str(folder / "best.yaml")])
    assert config["hidden_size"] == best
    assert config["MAX_ITEM_LIST_LENGTH"] == tiny["MAX_ITEM_LIST_LENGTH"]
    assert cli.main(command) == 0  # it is complete
    assert len(runs) == 3


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ({"choice": {"hiden_size": [8]}}, "HoloMambaRec has no such setting: did you mean hidden_size"),
        ({"choice": {"learning_rate": [0.1, -1]}}, "learning_rate: -1 cannot be used"),
        ({"choice": {"epochs": [1]}}, "epochs: 2 cannot be used: it is fixed here and searched"),
        ({"choice": {"dataset": ["a"]}}, "dataset.*keep one of the two"),
    ],
)
def test_settings_are_tried_before_the_search(
    space: dict[str, Any], message: str, cyclic_dataset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("optuna")
    with pytest.raises(ConfigError, match=message):
        tune("HoloMambaRec", cyclic_dataset, space, config_dict={"epochs": 2})
    assert not Path("search").exists()


def test_one_line_from_the_command(cyclic_dataset: str, tiny: dict[str, Any], capsys: Any) -> None:
    pytest.importorskip("optuna")
    Path("space.yaml").write_text("uniform: {dropout_prob: [0, 1]}\n")
    command = ["--model=HoloMambaRec", f"--dataset={cyclic_dataset}", *words(tiny)]
    for others, message in (
        (["--search_space=space.yaml"], "error: algo: 'exhaustive' cannot be used: dropout_prob is uniform"),
        (["--search_space=none.yaml"], "error: search_space: 'none.yaml' is no file"),
        (["--search_space=HoloMambaRec", "--nproc=2"], "error: nproc: 2 cannot be used: a trial is of one process"),
    ):
        assert cli.main([*command, *others]) == 2
        err = capsys.readouterr().err.strip()
        assert err.startswith(message)
        assert "\n" not in err


@pytest.mark.parametrize("name", ["HoloMambaRec", "HoloMambaRec.yaml", "properties/search/HoloMambaRec.yaml"])
def test_shipped_spaces_are_found_from_any_directory(name: str) -> None:
    assert "learning_rate" in read_space(name)
