"""Search for hyper-parameters: RecBole's ``HyperTuning`` with its faults mended, and the same search on ray.

A search space is a YAML file in RecBole's ``params_dict`` form::

    choice:                          # one of a list, values of any type
      learning_rate: [5e-4, 1e-3]
      hidden_size: [64, 128]
    uniform:                         # [low, high]
      dropout_prob: [0.0, 0.5]
    loguniform:                      # [low, high] are natural logarithms, as in RecBole and hyperopt
      weight_decay: [-12, -4]
    quniform:                        # [low, high, step]; whole numbers stay whole
      n_layers: [1, 4, 1]

or one in RecBole's text form (``hyper.test``), one ``name distribution values`` a line. Parameters are chosen by the
validation score alone; test results are only reported.
"""

from __future__ import annotations

import ast
import importlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from recbole.trainer import HyperTuning
from tabulate import tabulate

from recbole_holo.bridge import resources
from recbole_holo.bridge.compat import installed_version, quiet_recbole, release
from recbole_holo.errors import ConfigError, MissingExtra, NonFiniteLoss, nearest

Objective = Callable[[dict[str, Any], "list[str] | None"], dict[str, Any]]

ALGORITHMS = ("exhaustive", "random", "bayes")
# distribution -> what its values are
DISTRIBUTIONS = {
    "choice": "a list of options",
    "uniform": "[low, high]",
    "loguniform": "[low, high], both natural logarithms",
    "quniform": "[low, high, step]",
}


# ---------------------------------------------------------------------------------------------------------------------
# The search space


@dataclass(frozen=True)
class Parameter:
    """One searched setting.

    Attributes:
        name: the configuration key.
        distribution: one of :data:`DISTRIBUTIONS`.
        values: the options of a choice, else the numbers that bound the distribution.
    """

    name: str
    distribution: str
    values: tuple[Any, ...]

    def __post_init__(self) -> None:
        field = f"{self.distribution}.{self.name}"
        if self.distribution == "choice":
            if not self.values:
                raise ConfigError(field, [], "list at least one option")
            return
        numbers = [value for value in self.values if isinstance(value, int | float) and not isinstance(value, bool)]
        expected = 3 if self.distribution == "quniform" else 2
        if len(self.values) != expected or len(numbers) != expected:
            raise ConfigError(field, list(self.values), f"give {DISTRIBUTIONS[self.distribution]}")
        low, high, *step = numbers
        if not (math.isfinite(low) and math.isfinite(high) and low < high):
            raise ConfigError(field, list(self.values), "the low bound must be below the high one")
        if step and not 0 < step[0] <= high - low:
            raise ConfigError(field, list(self.values), "the step must be above 0 and no wider than the bounds")
        if self.distribution == "loguniform" and low > 0 and high < 1:
            raise ConfigError(
                field,
                list(self.values),
                f"the bounds are natural logarithms, so this draws from {math.exp(low):.4g} to {math.exp(high):.4g}; "
                f"for values from {low:g} to {high:g} write [{math.log(low):.4g}, {math.log(high):.4g}]",
            )

    def decode(self, drawn: Any) -> Any:
        """The setting that a drawn number stands for: an option by its index, a whole number as an int."""
        if self.distribution == "choice":
            return self.values[int(drawn)]
        if self.distribution == "quniform" and all(float(value).is_integer() for value in self.values):
            return round(drawn)
        return float(drawn)


class _SpaceLoader(yaml.SafeLoader):
    """YAML 1.1 reads ``1e-3`` as a string; here, as in RecBole's own files, it is a number."""


_SpaceLoader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*\.?[\d_]*|\.\d[\d_]*)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


def read_space(source: str | Path | Mapping[str, Any]) -> dict[str, Parameter]:
    """Read a search space.

    Args:
        source: a ``.yaml``/``.yml`` file, a file in RecBole's text form (any other suffix), the name of a space that
            the package ships (``HoloMambaRec``), or what the YAML file holds.

    Returns:
        The searched parameters by name, in the file's order.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: the space is empty or malformed, names an unknown distribution, or a parameter twice.
    """
    if isinstance(source, Mapping):
        entries, origin = list(_entries_of_mapping(source)), "search_space"
    else:
        path, origin = Path(source), str(source)
        if not path.is_file() and path.parent in (Path(), Path("properties/search")):
            path = resources.properties("search", f"{path.stem}.yaml")  # a shipped space, from any directory
        if not path.is_file():
            raise FileNotFoundError(
                f"search_space: {origin!r} is no file; give a YAML file, RecBole's hyper.test form, or the name of a "
                "shipped space such as HoloMambaRec"
            )
        text = path.read_text("utf-8")
        yaml_form = path.suffix in (".yaml", ".yml")
        entries = list(_entries_of_mapping(_load_yaml(text, origin)) if yaml_form else _entries_of_text(text, origin))
    space: dict[str, Parameter] = {}
    for distribution, name, values in entries:
        if distribution not in DISTRIBUTIONS:
            raise ConfigError(f"{origin}: distribution", distribution, nearest(distribution, DISTRIBUTIONS))
        if name in space:
            raise ConfigError(f"{origin}: {distribution}.{name}", values, "it is searched twice: keep one of the two")
        if not isinstance(values, list | tuple):
            raise ConfigError(f"{origin}: {distribution}.{name}", values, f"give {DISTRIBUTIONS[distribution]}")
        space[name] = Parameter(name, distribution, tuple(values))
    if not space:
        raise ConfigError(
            "search_space", origin, "it names no parameter; for example `choice: {learning_rate: [1e-3]}`"
        )
    return space


def _load_yaml(text: str, origin: str) -> Mapping[str, Any]:
    try:
        content = yaml.load(text, Loader=_SpaceLoader)
    except yaml.YAMLError as error:
        raise ConfigError("search_space", origin, f"it is not YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, Mapping):
        raise ConfigError("search_space", origin, "the file must map distributions to parameters: `choice: {...}`")
    return content


def _entries_of_mapping(content: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    for distribution, parameters in content.items():
        if distribution not in DISTRIBUTIONS:
            raise ConfigError("search_space: distribution", distribution, nearest(distribution, DISTRIBUTIONS))
        if not isinstance(parameters, Mapping):
            raise ConfigError(
                f"search_space: {distribution}", parameters, f"map parameters to {DISTRIBUTIONS[distribution]}"
            )
        for name, values in parameters.items():
            yield distribution, str(name), values


def _entries_of_text(text: str, origin: str) -> Iterator[tuple[str, str, Any]]:
    for number, line in enumerate(text.splitlines(), start=1):
        words = line.split(maxsplit=2)
        if not words or words[0].startswith("#"):
            continue
        if len(words) < 3:
            raise ConfigError(f"{origin} line {number}", line, "write `name distribution values`")
        name, distribution, values = words
        try:
            # `1, 4, 1` without brackets is how RecBole writes bounds; it parses as a tuple.
            yield distribution, name, ast.literal_eval(values)
        except (ValueError, SyntaxError) as error:
            raise ConfigError(f"{origin} line {number}", values, "write numbers, strings or a list") from error


# ---------------------------------------------------------------------------------------------------------------------
# hyperopt


class Tuning(HyperTuning):
    """RecBole's search, with these differences:

    * The search is reproducible: hyperopt gets a generator seeded with ``seed``; RecBole gives it none.
    * A score of 0 is a score; RecBole takes it for "no score yet" and replaces it by the next, better or not.
    * ``exhaustive`` visits each combination once, in an order shuffled by ``seed``. RecBole draws at random until 1,000
      draws in a row were seen before, which can end with combinations untried.
    * Options keep their type (hyperopt turns lists into tuples) and whole ``quniform`` values are ints.
    * A trial whose loss becomes nan or that runs out of memory counts as failed and the search goes on.
    """

    def __init__(
        self,
        objective: Objective,
        space: Mapping[str, Parameter],
        fixed: Mapping[str, Any] | None = None,
        config_file_list: Sequence[str] | None = None,
        algo: str = "exhaustive",
        max_evals: int | None = None,
        early_stop: int | None = 10,
        seed: int = 2020,
        after_trial: Callable[[Tuning], None] | None = None,
    ) -> None:
        hp = _hyperopt().hp
        if algo not in ALGORITHMS:
            raise ConfigError("algo", algo, nearest(algo, ALGORITHMS))
        for field, number in (("max_evals", max_evals), ("early_stop", early_stop)):
            if number is not None and number < 1:
                raise ConfigError(field, number, "give a positive number or None")
        self.parameters = dict(space)
        self.fixed = dict(fixed or {})
        self.seed = seed
        self.trials: list[dict[str, Any]] = []
        self.best_trial: dict[str, Any] | None = None
        self.stopped_early = False
        self._after_trial = after_trial
        self._early_stop = early_stop
        self._without_progress = 0
        if algo == "exhaustive":
            combinations = math.prod(grid_shape(self.parameters))
            self._grid = iter(np.random.default_rng(seed).permutation(combinations))
            max_evals = min(max_evals or combinations, combinations)
        make = {
            "choice": lambda p: hp.choice(p.name, list(range(len(p.values)))),
            "uniform": lambda p: hp.uniform(p.name, *p.values),
            "loguniform": lambda p: hp.loguniform(p.name, *p.values),
            "quniform": lambda p: hp.quniform(p.name, *p.values),
        }
        super().__init__(
            objective,
            space={name: make[parameter.distribution](parameter) for name, parameter in self.parameters.items()},
            fixed_config_file_list=list(config_file_list) if config_file_list else None,
            algo=self._next_of_grid if algo == "exhaustive" else algo,
            max_evals=max_evals or 100,
        )
        self.early_stop_fn = self._stop_early

    def _next_of_grid(self, new_ids: list[int], domain: Any, trials: Any, seed: int) -> list[dict[str, Any]]:
        """hyperopt's ``algo``: propose the next combination of the shuffled grid."""
        from hyperopt.base import miscs_update_idxs_vals

        documents: list[dict[str, Any]] = []
        for new_id in new_ids:
            indices = np.unravel_index(next(self._grid), grid_shape(self.parameters))
            misc = {"tid": new_id, "cmd": domain.cmd, "workdir": domain.workdir}
            chosen = {name: [int(index)] for name, index in zip(self.parameters, indices, strict=True)}
            miscs_update_idxs_vals([misc], {name: [new_id] for name in chosen}, chosen)
            documents += trials.new_trial_docs([new_id], [None], [domain.new_result()], [misc])
        return documents

    def _stop_early(self, trials: Any, *state: Any) -> tuple[bool, tuple[()]]:
        """Stop after ``early_stop`` trials in a row without a better score."""
        self.stopped_early = self._early_stop is not None and self._without_progress >= self._early_stop
        return self.stopped_early, ()

    def trial(self, params: Mapping[str, Any]) -> dict[str, Any]:
        """Run one trial; called by hyperopt with what it drew, returns its loss."""
        from hyperopt import STATUS_FAIL, STATUS_OK

        settings = {name: parameter.decode(params[name]) for name, parameter in self.parameters.items()}
        label = self.params2str(settings)
        start = time.perf_counter()
        record: dict[str, Any] = {"params": settings, "status": "ok"}
        try:
            result = self.objective_function({**self.fixed, **settings}, self.fixed_config_file_list)
        except (ValueError, RuntimeError, MemoryError) as error:
            if not _is_failure_of_the_point(error):
                raise
            record["status"] = f"failed: {_last_line(error)}"
        else:
            record |= {
                "valid_score": float(result["best_valid_score"]),
                "valid_score_bigger": bool(result["valid_score_bigger"]),
                "best_valid_result": _plain(result["best_valid_result"]),
                "test_result": _plain(result["test_result"]),
            }
            self.model = result["model"]
            if not math.isfinite(record["valid_score"]):
                record["status"] = f"failed: the validation score is {record['valid_score']}"
        record["seconds"] = time.perf_counter() - start
        self.trials.append(record)
        ok = record["status"] == "ok"
        if ok:
            self.params2result[label] = result
            self.params_list.append(label)
            self.score_list.append(record["valid_score"])
        if ok and _better(record, self.best_trial):
            self.best_trial, self.best_params, self.best_score = record, settings, record["valid_score"]
            self.best_test_result = record["test_result"]
            self._without_progress = 0
        else:
            self._without_progress += 1
        if self._after_trial is not None:
            self._after_trial(self)
        if not ok:
            return {"status": STATUS_FAIL, "loss": math.inf}
        return {
            "status": STATUS_OK,
            "loss": -record["valid_score"] if record["valid_score_bigger"] else record["valid_score"],
        }

    def run(self) -> None:
        """Search.

        Raises:
            RuntimeError: every trial failed.
        """
        hyperopt = _hyperopt()
        try:
            hyperopt.fmin(
                self.trial,
                self.space,
                algo=self.algo,
                max_evals=self.max_evals,
                early_stop_fn=self.early_stop_fn,
                rstate=np.random.default_rng(self.seed),
            )
        except hyperopt.exceptions.AllTrialsFailed:
            reasons = sorted({record["status"] for record in self.trials})
            raise RuntimeError(f"all {len(self.trials)} trials failed: {'; '.join(reasons)}") from None


def tune(
    model: str,
    dataset: str,
    search_space: str | Path | Mapping[str, Any],
    config_file_list: Sequence[str] | None = None,
    config_dict: Mapping[str, Any] | None = None,
    algo: str = "exhaustive",
    max_evals: int | None = None,
    early_stop: int | None = 10,
    seed: int = 2020,
    output_file: str | Path | None = None,
    saved: bool = True,
    objective: Objective | None = None,
) -> dict[str, Any]:
    """Search for the settings with the best validation score, and print the trials.

    Args:
        model: name of a model, ours or RecBole's.
        dataset: name of a data set.
        search_space: see :func:`read_space`.
        config_file_list: configuration files that all trials share.
        config_dict: settings that all trials share.
        algo: ``exhaustive`` (every combination of choices), ``random`` or ``bayes`` (hyperopt's TPE).
        max_evals: the most trials; None means all combinations for ``exhaustive`` and 100 otherwise.
        early_stop: stop after so many trials in a row without a better score; None never stops.
        seed: of the search; the seed of the training is the configuration's.
        output_file: where to write RecBole's text report; the same as JSON goes beside it, with the suffix ``.json``,
            and is brought up to date after each trial.
        saved: keep each trial's best epoch on disk and test that one; False tests the last epoch.
        objective: called with (settings, files) in place of :func:`recbole_holo.quick_start.objective_function`.

    Returns:
        ``best_params``, ``best_valid_score``, ``valid_score_bigger``, ``best_valid_result`` and ``test_result`` of the
        best trial, ``trials`` (one dict each, in order), and how the search was made.

    Raises:
        ImportError: hyperopt is not installed.
        ConfigError: the space, ``algo``, ``max_evals``, ``early_stop`` or ``config_dict`` cannot be used.
        RuntimeError: every trial failed.
    """
    space = read_space(search_space)
    about = {"model": model, "dataset": dataset, "algo": algo, "seed": seed}
    text_file, json_file = _output_files(output_file)

    def save(tuning: Tuning) -> None:
        if json_file is not None:
            json_file.write_text(json.dumps(_report(about, tuning), indent=2, default=str) + "\n", "utf-8")

    tuning = Tuning(
        objective or _objective(saved),
        space,
        fixed=_fixed_settings(model, dataset, config_dict, space),
        config_file_list=config_file_list,
        algo=algo,
        max_evals=max_evals,
        early_stop=early_stop,
        seed=seed,
        after_trial=save,
    )
    tuning.run()
    if text_file is not None:
        tuning.export_result(output_file=str(text_file))
    save(tuning)
    report = _report(about, tuning)
    print(render(report))
    return report


# ---------------------------------------------------------------------------------------------------------------------
# ray


def ray_trainable(
    config: dict[str, Any],
    fixed: Mapping[str, Any],
    space: Mapping[str, Parameter],
    objective: Objective | None,
    config_file_list: list[str] | None,
    working_directory: str,
) -> dict[str, Any]:
    """One trial on a ray worker. It lives in the package so that a worker that unpickles it gets the shims.

    Args:
        config: what ray drew, by parameter.
        fixed: the settings that all trials share.
        space: the searched parameters.
        objective: called in place of the package's own, when given.
        config_file_list: the configuration files that all trials share.
        working_directory: where the search was started; ``data_path`` and the like are relative to it, and ray starts
            a worker elsewhere.

    Returns:
        ONE flat dict; a second, nested one would make ray look for the metric in it and fail.
    """
    os.chdir(working_directory)
    sys.argv = sys.argv[:1]  # the objective reads settings from the command line, and this one is ray's
    settings = {name: parameter.decode(config[name]) for name, parameter in space.items()}
    result = (objective or _objective(saved=True))({**fixed, **settings}, config_file_list)
    return {
        "valid_score": float(result["best_valid_score"]),
        "valid_score_bigger": bool(result["valid_score_bigger"]),
        **{f"valid/{name}": value for name, value in _plain(result["best_valid_result"]).items()},
        **{f"test/{name}": value for name, value in _plain(result["test_result"]).items()},
    }


def tune_with_ray(
    model: str,
    dataset: str,
    search_space: str | Path | Mapping[str, Any],
    config_file_list: Sequence[str] | None = None,
    config_dict: Mapping[str, Any] | None = None,
    algo: str = "exhaustive",
    max_evals: int = 100,
    seed: int = 2020,
    storage_path: str | Path = "ray_results",
    cpus_per_trial: float = 1,
    gpus_per_trial: float | None = None,
    objective: Objective | None = None,
) -> dict[str, Any]:
    """:func:`tune` on ray, trials side by side on this machine.

    Args:
        model, dataset, search_space, config_file_list, config_dict, seed, objective: as in :func:`tune`.
        algo: ``exhaustive`` or ``random``.
        max_evals: how many points ``random`` draws.
        storage_path: where ray keeps the trials.
        cpus_per_trial: processor cores a trial holds.
        gpus_per_trial: CUDA devices a trial holds, a fraction to share one; None means 1 where there is a
            device, else 0.

    Returns:
        The same as :func:`tune`.

    Raises:
        ImportError: ray is not installed or too old.
        ConfigError: as in :func:`tune`.
        RuntimeError: every trial failed.
    """
    ray_tune = _ray_tune()
    if algo not in ("exhaustive", "random"):
        raise ConfigError("algo", algo, "on ray, give exhaustive or random")
    space = read_space(search_space)
    if algo == "exhaustive":
        grid_shape(space)
    make: dict[str, Callable[[Parameter], Any]] = {
        "choice": lambda p: (ray_tune.grid_search if algo == "exhaustive" else ray_tune.choice)(
            list(range(len(p.values)))
        ),
        "uniform": lambda p: ray_tune.uniform(*p.values),
        "loguniform": lambda p: ray_tune.loguniform(math.exp(p.values[0]), math.exp(p.values[1])),
        "quniform": lambda p: ray_tune.quniform(*p.values),
    }
    if gpus_per_trial is None:
        gpus_per_trial = min(1, torch.cuda.device_count())
    trainable = ray_tune.with_parameters(
        ray_trainable,
        fixed=_fixed_settings(model, dataset, config_dict, space),
        space=space,
        objective=objective,
        config_file_list=list(config_file_list) if config_file_list else None,
        working_directory=os.getcwd(),
    )
    # 2.31 has it in ray.train only, 2.60 in ray.tune.
    run_config = getattr(ray_tune, "RunConfig", None) or importlib.import_module("ray.train").RunConfig
    results = ray_tune.Tuner(
        ray_tune.with_resources(trainable, {"cpu": cpus_per_trial, "gpu": gpus_per_trial}),
        param_space={name: make[parameter.distribution](parameter) for name, parameter in space.items()},
        tune_config=ray_tune.TuneConfig(
            num_samples=1 if algo == "exhaustive" else max_evals,
            search_alg=ray_tune.search.basic_variant.BasicVariantGenerator(random_state=seed),
        ),
        run_config=run_config(name=f"{model}-{dataset}", storage_path=os.path.abspath(storage_path)),
    ).fit()
    trials = [_ray_record(result, space) for result in results]
    best: dict[str, Any] | None = None
    for record in trials:
        if record["status"] == "ok" and _better(record, best):
            best = record
    if best is None:
        raise RuntimeError(f"all {len(trials)} trials failed: {'; '.join(sorted({t['status'] for t in trials}))}")
    about = {"model": model, "dataset": dataset, "algo": algo, "seed": seed}
    report = _assemble(about, space, trials, best, stopped_early=False)
    print(render(report))
    return report


def _ray_record(result: Any, space: Mapping[str, Parameter]) -> dict[str, Any]:
    """A ray result in the form of :attr:`Tuning.trials`."""
    params = {name: space[name].decode(drawn) for name, drawn in result.config.items()}
    if result.error is not None:
        return {"params": params, "status": f"failed: {_last_line(result.error)}", "seconds": math.nan}
    metrics = result.metrics
    record = {
        "params": params,
        "status": "ok",
        "valid_score": metrics["valid_score"],
        "valid_score_bigger": metrics["valid_score_bigger"],
        "best_valid_result": {k.removeprefix("valid/"): v for k, v in metrics.items() if k.startswith("valid/")},
        "test_result": {k.removeprefix("test/"): v for k, v in metrics.items() if k.startswith("test/")},
        "seconds": metrics["time_total_s"],
    }
    if not math.isfinite(record["valid_score"]):
        record["status"] = f"failed: the validation score is {record['valid_score']}"
    return record


# ---------------------------------------------------------------------------------------------------------------------
# What both share


def grid_shape(space: Mapping[str, Parameter]) -> tuple[int, ...]:
    """The number of options of each parameter.

    Raises:
        ConfigError: a parameter is no choice, so that its values cannot be counted.
    """
    for parameter in space.values():
        if parameter.distribution != "choice":
            raise ConfigError(
                "algo",
                "exhaustive",
                f"{parameter.name} is {parameter.distribution}: list its values as a choice, or take random or bayes",
            )
    return tuple(len(parameter.values) for parameter in space.values())


def render(report: Mapping[str, Any]) -> str:
    """The trials as a table, best validation score first, and the results of the best below it."""
    sign = -1 if report["valid_score_bigger"] else 1
    trials = sorted(report["trials"], key=lambda t: sign * t["valid_score"] if t["status"] == "ok" else math.inf)
    names = list(report["space"])
    rows = [
        [
            *(_short(t["params"][name]) for name in names),
            _short(t.get("valid_score")),
            f"{t['seconds']:.1f}",
            t["status"],
        ]
        for t in trials
    ]
    lines = [
        f"{report['model']} on {report['dataset']}: {len(trials)} trials, {report['algo']}, seed {report['seed']}",
        tabulate(rows, headers=[*names, "valid score", "seconds", "status"], disable_numparse=True),
        f"best by validation: {HyperTuning.params2str(report['best_params'])}",
        f"its validation:     {report['best_valid_result']}",
        f"its test:           {report['test_result']}",
    ]
    if report["stopped_early"]:
        lines.append("Stopped early: no better score for as many trials as early_stop allows.")
    if report["algo"] == "exhaustive" and len(trials) < report["combinations"]:
        lines.append(f"Not exhaustive: {len(trials)} of {report['combinations']} combinations were tried.")
    return "\n".join(lines)


def _short(value: Any) -> str:
    """A value as a table shows it."""
    if value is None:
        return "-"
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _report(about: Mapping[str, Any], tuning: Tuning) -> dict[str, Any]:
    return _assemble(about, tuning.parameters, tuning.trials, tuning.best_trial, tuning.stopped_early)


def _assemble(
    about: Mapping[str, Any],
    space: Mapping[str, Parameter],
    trials: list[dict[str, Any]],
    best: Mapping[str, Any] | None,
    stopped_early: bool,
) -> dict[str, Any]:
    best = best or {}
    return {
        **about,
        "space": {name: {p.distribution: list(p.values)} for name, p in space.items()},
        "combinations": math.prod(grid_shape(space)) if about["algo"] == "exhaustive" else None,
        "best_params": best.get("params"),
        "best_valid_score": best.get("valid_score"),
        "valid_score_bigger": best.get("valid_score_bigger"),
        "best_valid_result": best.get("best_valid_result"),
        "test_result": best.get("test_result"),
        "stopped_early": stopped_early,
        "trials": trials,
    }


def _better(record: Mapping[str, Any], best: Mapping[str, Any] | None) -> bool:
    """Whether a trial beats the best so far; of equal ones the first stays."""
    if best is None:
        return True
    if record["valid_score_bigger"]:
        return bool(record["valid_score"] > best["valid_score"])
    return bool(record["valid_score"] < best["valid_score"])


def _fixed_settings(
    model: str, dataset: str, config_dict: Mapping[str, Any] | None, space: Mapping[str, Parameter]
) -> dict[str, Any]:
    """What all trials share.

    Raises:
        ConfigError: a setting is both fixed and searched.
    """
    fixed = {**(config_dict or {}), "model": model, "dataset": dataset}
    for name in fixed.keys() & space.keys():
        raise ConfigError(name, fixed[name], "it is fixed here and searched in search_space: keep one of the two")
    return fixed


def _objective(saved: bool) -> Objective:
    from recbole_holo.quick_start import objective_function

    def objective(config_dict: dict[str, Any], config_file_list: list[str] | None) -> dict[str, Any]:
        with quiet_recbole():
            return objective_function(config_dict, config_file_list, saved)

    return objective


def _is_failure_of_the_point(error: Exception) -> bool:
    """Whether these settings failed rather than the program: the loss became nan, or memory ran out."""
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError | NonFiniteLoss):
        return True
    # RecBole's own trainers raise a plain ValueError, torch's CPU allocator a plain RuntimeError.
    return "loss is nan" in str(error) or "can't allocate memory" in str(error)


def _last_line(error: Exception) -> str:
    """What went wrong, without the worker's traceback that ray puts before it."""
    return str(error).strip().rpartition("\n")[2] or type(error).__name__


def _plain(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Metrics as Python floats: RecBole's are numpy scalars, which JSON does not know."""
    return {str(name): float(value) for name, value in metrics.items()}


def _output_files(output_file: str | Path | None) -> tuple[Path | None, Path | None]:
    if output_file is None:
        return None, None
    path = Path(output_file)
    if path.suffix == ".json":
        raise ConfigError("output_file", str(path), "it names the text report; the JSON is written beside it")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path, path.with_suffix(".json")


def _hyperopt() -> Any:
    return _extra("hyperopt", (0, 3), "tune", "hyperopt")


def _ray_tune() -> Any:
    return _extra("ray", (2, 31), "ray", "ray.tune")


def _extra(package: str, minimum: tuple[int, ...], extra: str, module: str) -> Any:
    """An optional module, or an ImportError that says how to get it."""
    version = installed_version(package)
    if version is None or release(version) < minimum:
        found = "is not installed" if version is None else f"{version} is too old"
        raise MissingExtra(f'{package} {found}: pip install "recbole-holo[{extra}]"')
    return importlib.import_module(module)
