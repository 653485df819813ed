"""The search is reproducible, complete where it says so, counts a score of 0, and refuses a malformed space."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from recbole.trainer import HyperTuning

from recbole_holo import tuning
from recbole_holo.errors import ConfigError, NonFiniteLoss
from recbole_holo.tuning import Parameter, Tuning, read_space, tune, tune_with_ray

GRID = {"choice": {"learning_rate": [1e-3, 1e-2, 1e-1], "hidden_size": [32, 64]}}
MIXED = {
    "choice": {"hidden_size": [32, 64]},
    "uniform": {"dropout": [0.0, 0.5]},
    "loguniform": {"learning_rate": [-8, -2]},
    "quniform": {"layers": [1, 4, 1]},
}


def scored(score: Callable[[dict[str, Any]], float], bigger: bool = True) -> tuning.Objective:
    """An objective that costs nothing; its test score goes against the validation score."""

    def objective(settings: dict[str, Any], files: list[str] | None) -> dict[str, Any]:
        value = score(settings)
        return {
            "model": settings["model"],
            "best_valid_score": value,
            "valid_score_bigger": bigger,
            "best_valid_result": {"ndcg@10": value},
            "test_result": {"ndcg@10": -value},
        }

    return objective


def distance(settings: dict[str, Any]) -> float:
    return -abs(math.log(settings["learning_rate"] / 1e-2)) - settings["hidden_size"] / 1000


def search(space: Any = GRID, score: Callable[[dict[str, Any]], float] = distance, **options: Any) -> dict[str, Any]:
    pytest.importorskip("hyperopt")
    bigger = options.pop("bigger", True)
    return tune("M", "d", space, objective=scored(score, bigger), **options)


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
    """25 trials: hyperopt's first 20 are random, so the rest must not repeat the random search."""
    options: dict[str, Any] = {"max_evals": 25, "early_stop": None, "seed": 3}
    random, bayes = search(MIXED, algo="random", **options), search(MIXED, algo="bayes", **options)
    assert tried(random)[20:] != tried(bayes)[20:]


def test_zero_is_a_score() -> None:
    """RecBole takes a best score of 0 for none and goes on to a worse one."""
    pytest.importorskip("hyperopt")
    scores = iter([0.0, -0.2, -0.1])
    stock = HyperTuning(
        scored(lambda settings: next(scores)),
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
    report = search({"choice": {"x": [1, 2, 3]}}, lambda settings: settings["x"])
    assert report["best_params"] == {"x": 3}
    assert report["test_result"] == {"ndcg@10": -3.0}


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
    assert Parameter("n", "quniform", (1, 9, 2)).decode(2.9999999996) == 3


def test_settings_reach_the_objective() -> None:
    pytest.importorskip("hyperopt")
    seen: list[tuple[dict[str, Any], list[str] | None]] = []

    def objective(settings: dict[str, Any], files: list[str] | None) -> dict[str, Any]:
        seen.append((settings, files))
        return scored(lambda settings: 1.0)(settings, files)

    tune("M", "d", {"choice": {"x": [1]}}, ["a.yaml"], {"epochs": 2}, objective=objective)
    assert seen == [({"epochs": 2, "model": "M", "dataset": "d", "x": 1}, ["a.yaml"])]
    with pytest.raises(ConfigError, match=r"epochs.*keep one of the two"):
        tune("M", "d", {"choice": {"epochs": [1]}}, config_dict={"epochs": 2}, objective=objective)


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
    assert sorted(trial["status"][:6] for trial in report["trials"]) == ["failed", "ok", "ok"]


def test_a_first_failure_does_not_hide_progress() -> None:
    """hyperopt's own early stopping never sees progress after a first loss of infinity."""
    scores = iter([math.nan, *range(20)])
    report = search({"choice": {"x": list(range(21))}}, lambda settings: next(scores), early_stop=3)
    assert len(report["trials"]) == 21


def test_when_everything_fails() -> None:
    with pytest.raises(RuntimeError, match="all 3 trials failed: failed: the validation score is nan"):
        search({"choice": {"x": [1, 2, 3]}}, lambda settings: math.nan)


def test_faults_of_the_program_are_not_hidden() -> None:
    def score(settings: dict[str, Any]) -> float:
        raise ConfigError("hidden_size", -1, "give a positive number")

    with pytest.raises(ConfigError, match="hidden_size"):
        search(score=score)


def test_hyperopt_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "installed_version", {"hyperopt": None}.get)
    with pytest.raises(ImportError, match=r'hyperopt is not installed: pip install "recbole-holo\[tune\]"'):
        tune("M", "d", GRID, objective=scored(distance))
    monkeypatch.setattr(tuning, "installed_version", {"hyperopt": "0.2.7"}.get)
    with pytest.raises(ImportError, match=r"hyperopt 0\.2\.7 is too old"):
        tune("M", "d", GRID, objective=scored(distance))


# ---------------------------------------------------------------------------------------------------------------------
# Output


def test_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = search(output_file=tmp_path / "out" / "M.result")
    text = (tmp_path / "out" / "M.result").read_text()
    assert text.count("Valid result:") == 6
    assert "learning_rate:0.01, hidden_size:32" in text
    assert json.loads((tmp_path / "out" / "M.json").read_text()) == report
    out = capsys.readouterr().out
    assert "best by validation: learning_rate:0.01, hidden_size:32" in out
    assert out.index("0.01 ") < out.index("0.1 ")  # the table is sorted by score
    with pytest.raises(ConfigError, match="the JSON is written beside it"):
        search(output_file="M.json")


def test_trials_are_on_disk_when_a_later_one_breaks(tmp_path: Path) -> None:
    def score(settings: dict[str, Any]) -> float:
        if settings["x"] == 3:
            raise KeyError("broken")
        return 1.0

    with pytest.raises(KeyError):
        search({"choice": {"x": [1, 2, 3]}}, score, output_file=tmp_path / "M.result", seed=1)
    done = json.loads((tmp_path / "M.json").read_text())["trials"]
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
        ({"space": MIXED}, "dropout is uniform: list its values as a choice"),
    ],
)
def test_options_that_cannot_be_used(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        search(**options)


def test_the_class_alone() -> None:
    """What :func:`tune` wraps is usable as RecBole's class is."""
    pytest.importorskip("hyperopt")
    alone = Tuning(scored(distance), read_space(GRID), fixed={"model": "M"}, early_stop=None)
    alone.run()
    assert alone.best_params == {"learning_rate": 1e-2, "hidden_size": 32}
    assert len(alone.score_list) == len(alone.params2result) == 6


# ---------------------------------------------------------------------------------------------------------------------
# The real objective, and ray


def test_training_for_real(cyclic_dataset: str, tiny: dict[str, Any]) -> None:
    pytest.importorskip("hyperopt")
    del tiny["hidden_size"]
    report = tune("HoloMambaRec", cyclic_dataset, {"choice": {"hidden_size": [8, 16]}}, config_dict=tiny)
    assert sorted(params["hidden_size"] for params in tried(report)) == [8, 16]
    assert report["best_valid_score"] == max(trial["valid_score"] for trial in report["trials"])
    assert report["best_valid_result"]["ndcg@5"] == report["best_valid_score"]


def test_the_ray_trial_returns_one_flat_dict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["default_worker.py", "--epochs=99"])
    (tmp_path / "start").mkdir()
    seen: list[Any] = []

    def objective(settings: dict[str, Any], files: list[str] | None) -> dict[str, Any]:
        seen.append((settings, files, Path.cwd(), sys.argv))
        return scored(lambda settings: 0.5)(settings, files)

    result = tuning.ray_trainable(
        {"x": 0},
        fixed={"model": "M"},
        space=read_space({"choice": {"x": [7]}}),
        objective=objective,
        config_file_list=["a.yaml"],
        working_directory=str(tmp_path / "start"),
    )
    assert result == {"valid_score": 0.5, "valid_score_bigger": True, "valid/ndcg@10": 0.5, "test/ndcg@10": -0.5}
    assert seen == [({"model": "M", "x": 7}, ["a.yaml"], tmp_path / "start", ["default_worker.py"])]


@pytest.mark.parametrize("version", [None, "2.6.3"])
def test_ray_is_asked_for(version: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "installed_version", {"ray": version}.get)
    with pytest.raises(ImportError, match=r'pip install "recbole-holo\[ray\]"'):
        tune_with_ray("M", "d", GRID)


def test_ray_searches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        tuning._ray_tune()
        import ray
    except ImportError as error:
        pytest.skip(str(error))
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[1]), prepend=":")
    ray.init(num_cpus=2, include_dashboard=False)
    try:
        with pytest.raises(ConfigError, match="exhaustive or random"):
            tune_with_ray("M", "d", GRID, algo="bayes")
        objective = scored(lambda settings: -abs(settings["x"][0] - 2))
        report = tune_with_ray(
            "M", "d", {"choice": {"x": [[1], [2], [3]]}}, storage_path=tmp_path / "ray", objective=objective
        )
        assert report["best_params"] == {"x": [2]}
        assert len(report["trials"]) == 3
        space = {"loguniform": {"x": [-3, 0]}, "quniform": {"n": [1, 4, 1]}}
        drawn = [
            tune_with_ray(
                "M",
                "d",
                space,
                algo="random",
                max_evals=3,
                storage_path=tmp_path / "ray",
                objective=scored(lambda settings: settings["x"]),
            )
            for _ in range(2)
        ]
        assert tried(drawn[0]) == tried(drawn[1])
        assert all(math.exp(-3) <= p["x"] <= 1 and type(p["n"]) is int for p in tried(drawn[0]))
    finally:
        ray.shutdown()


@pytest.mark.parametrize("name", ["HoloMambaRec", "HoloMambaRec.yaml", "properties/search/HoloMambaRec.yaml"])
def test_shipped_spaces_are_found_from_any_directory(name: str) -> None:
    assert "learning_rate" in read_space(name)
