"""The search: Optuna's study in a file, its trials, those that a stop cut short, and the training with the best."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
import os
import re
import socket
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import psutil
import torch
from optuna.samplers import BaseSampler, PartialFixedSampler, RandomSampler, TPESampler
from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState
from tqdm import tqdm

from recbole_holo.bridge.config import Config
from recbole_holo.errors import ConfigError, NonFiniteLoss, TrialsFailed, nearest
from recbole_holo.quick_start import run
from recbole_holo.tuning import report
from recbole_holo.tuning.space import Parameter

# RecBole's names, and what others call the same.
ALGORITHMS = {"exhaustive": "exhaustive", "grid": "exhaustive", "random": "random", "bayes": "bayes", "tpe": "bayes"}
PRUNERS: dict[str, optuna.pruners.BasePruner] = {
    "median": optuna.pruners.MedianPruner(n_startup_trials=5, n_warmup_steps=5),
    "none": optuna.pruners.NopPruner(),
}
RANDOM_TRIALS = 100  # of a search without a number of combinations
HEARTBEAT = 60  # seconds between signs of life of a trial in a database; without any for five of them it is given up
# What may differ between the processes of one search.
OF_THE_MACHINE = {"data_path", "gpu_id", "use_gpu", "worker", "checkpoint_dir", "show_progress", "state"}

# Trains with the searched settings; with a function that is called after every validation as a trial, which sees
# nothing of the test split. Returns valid_score, valid_result, and otherwise test_result and checkpoint.
Objective = Callable[[Mapping[str, Any], "Callable[[int, float], None] | None"], dict[str, Any]]


def training(
    model: str,
    dataset: str,
    files: Sequence[str],
    fixed: Mapping[str, Any],
    space: Mapping[str, Parameter],
    folder: Path,
) -> tuple[Objective, Config]:
    """The objective of a search, and the configuration that its trials share.

    Raises:
        ConfigError: a setting that cannot be used, is both fixed and searched, or has a name that means nothing.
    """
    for name in fixed.keys() & space.keys():
        raise ConfigError(name, fixed[name], "it is fixed here and searched in search_space: keep one of the two")
    config = Config(model, dataset, files, fixed)
    known = config.known_keys() | set(config.final_config_dict)
    for name in space.keys() - known:
        raise ConfigError("search_space", name, f"{model} has no such setting: {nearest(name, known)}")
    logging.disable(logging.WARNING)  # the first configuration has said it all
    try:
        for name, parameter in space.items():
            for value in parameter.options.values():
                Config(model, dataset, files, {**fixed, name: value})
    finally:
        logging.disable(logging.NOTSET)

    def train(settings: Mapping[str, Any], after_validation: Callable[[int, float], None] | None) -> dict[str, Any]:
        last = after_validation is None
        quiet = {} if last else {"state": "ERROR", "show_progress": False}
        settings = {**fixed, **settings, **quiet, "checkpoint_dir": str(folder)}
        with contextlib.nullcontext() if last else contextlib.redirect_stdout(io.StringIO()):  # a table
            found = run(model, dataset, files, settings, saved=last, test=last, callback_fn=after_validation)
        return {
            "valid_score": float(found["best_valid_score"]),
            "valid_result": _floats(found["best_valid_result"]),
            "test_result": _floats(found["test_result"]),
            "checkpoint": found["report"]["checkpoint"],
        }

    return train, config


class Draws(BaseSampler):
    """Optuna's samplers, whose draws follow from the seed and a trial's place in the search alone.

    So a search that is stopped, or shared, draws what it would have drawn otherwise, and no combination is tried twice;
    TPE's draws also follow from the scores that are known by then.
    """

    def __init__(self, algo: str, seed: int, space: Mapping[str, Parameter]) -> None:
        self.algo, self.seed = algo, seed
        self.options = {name: list(parameter.options) for name, parameter in space.items()}
        self.now: BaseSampler = RandomSampler()

    def before_trial(self, study: optuna.Study, trial: FrozenTrial) -> None:
        first = trial.user_attrs.get("retry_of", trial.number)
        others = study.get_trials(deepcopy=False)
        place = sum(other.number < first and "retry_of" not in other.user_attrs for other in others)
        seed = int(np.random.SeedSequence([self.seed, place]).generate_state(1)[0])
        if self.algo == "exhaustive":
            shape = [len(options) for options in self.options.values()]
            order = np.random.default_rng(self.seed).permutation(math.prod(shape))
            chosen = np.unravel_index(order[place % len(order)], shape)
            fixed = {name: self.options[name][i] for name, i in zip(self.options, chosen, strict=True)}
            self.now = PartialFixedSampler(fixed, RandomSampler(seed))
        elif self.algo == "random":
            self.now = RandomSampler(seed)
        else:
            self.now = TPESampler(seed=seed, multivariate=True, constant_liar=True)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, Any]:
        return self.now.infer_relative_search_space(study, trial)

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, Any]) -> dict[str, Any]:
        return self.now.sample_relative(study, trial, search_space)

    def sample_independent(self, study: optuna.Study, trial: FrozenTrial, name: str, distribution: Any) -> Any:
        return self.now.sample_independent(study, trial, name, distribution)


class Search:
    """One process's part in a search: ``folder`` and what follows it are those of :func:`recbole_holo.tuning.tune`.

    Args:
        about: what all processes of a search have in common: ``model``, ``dataset``, ``fixed`` and anything else.
        bigger: whether a bigger validation score is better.
    """

    def __init__(
        self,
        objective: Objective,
        about: Mapping[str, Any],
        bigger: bool,
        space: Mapping[str, Parameter],
        folder: Path,
        algo: str = "exhaustive",
        max_evals: int | None = None,
        early_stop: int | None = 10,
        pruner: str = "median",
        seed: int = 2020,
        storage: str | None = None,
        show_progress: bool = True,
    ) -> None:
        for field, name, allowed in (("algo", algo, ALGORITHMS), ("pruner", pruner, PRUNERS)):
            if name not in allowed:
                raise ConfigError(field, name, nearest(name, allowed))
        for field, number in (("max_evals", max_evals), ("early_stop", early_stop)):
            if number is not None and number < 1:
                raise ConfigError(field, number, "give a positive number or None")
        self.objective, self.space, self.folder = objective, dict(space), folder
        self.sign, self.early_stop, self.show_progress = 1 if bigger else -1, early_stop, show_progress
        self.algo, self.seed = ALGORITHMS[algo], seed
        self.combinations = count_combinations(space) if self.algo == "exhaustive" else None
        self.limit = min(max_evals or self.combinations or RANDOM_TRIALS, self.combinations or sys.maxsize)
        spaces = {name: {p.distribution: list(p.values)} for name, p in self.space.items()}
        about = {**about, "algo": self.algo, "seed": seed, "space": spaces, "valid_score_bigger": bigger}
        self.about = json.loads(json.dumps(about, default=str))  # as a storage gives it back
        with _quiet_optuna():
            self._open(storage or str(folder / "journal.log"), PRUNERS[pruner])

    def _open(self, storage: str, pruner: optuna.pruners.BasePruner) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError("search_dir", str(self.folder), f"{error.strerror}; choose another") from error
        try:
            self.study = optuna.create_study(
                storage=_storage(storage),
                study_name=self.folder.resolve().name,
                direction="maximize" if self.sign > 0 else "minimize",
                sampler=Draws(self.algo, self.seed, self.space),
                pruner=pruner,
                load_if_exists=True,
            )
        except Exception as error:  # whatever a database's driver raises, or reading a file that is no journal
            shown = re.sub(r"(://[^:/@]*):[^@]*@", r"\1:***@", storage)
            raise ConfigError("search_storage", shown, f"it cannot be opened: {_last_line(error)}") from error
        theirs = self.study.user_attrs.get("about", self.about)
        for key in [*self.about, *theirs]:
            mine, other = (json.dumps(about.get(key), sort_keys=True) for about in (self.about, theirs))
            if mine != other:
                raise ConfigError(
                    "search_dir",
                    str(self.folder),
                    f"it holds a search with {key}: {other}, and this one has {mine}; choose another folder, or repeat "
                    "that search's command to go on with it",
                )
        self.study.set_user_attr("about", self.about)

    # ------------------------------------------------------------------ trials
    def run(self) -> dict[str, Any]:
        """Runs trials until there are enough, and returns what :func:`recbole_holo.tuning.tune` does."""
        others = 0
        with _quiet_optuna():
            try:
                with tqdm(total=self.limit, desc="search", unit="trial", disable=not self.show_progress) as bar:
                    self._run_trials(bar)
                others = len(self._all(TrialState.RUNNING))
                if not others:  # else the last of them does it
                    self._train_with_best()
            except KeyboardInterrupt:
                print("the search was stopped; the same command goes on with it", file=sys.stderr)
                raise
            finally:
                found = self._found()
                found["running"] = found["running"] or others  # which may have ended by now, and train
                report.write(self.folder, found, self.study)
        print(f"{report.render(found)}\n\nreport: {self.folder / 'report.md'}")
        return found

    def _run_trials(self, bar: tqdm) -> None:
        while True:
            self._take_up_interrupted()
            trials = self._counted()
            bar.n = len(trials)
            bar.refresh()
            if len(trials) >= self.limit or self._stops_early(trials):
                return
            self.study.optimize(lambda trial: self._run_trial(trial, bar), n_trials=1)

    def _run_trial(self, trial: optuna.Trial, bar: tqdm) -> float:
        """The score of a trial; nan makes it a failed one."""
        began = time.perf_counter()
        trial.set_user_attr("process", [socket.gethostname(), os.getpid(), psutil.Process().create_time()])
        settings = {name: parameter.suggest(trial) for name, parameter in self.space.items()}
        trial.set_user_attr("settings", settings)
        if sum(other.number < trial.number for other in self._counted()) >= self.limit:
            return math.nan  # another process began the last one at the same moment
        best = self._best()

        def after_validation(epoch: int, score: float) -> None:
            trial.report(float(score), epoch)
            bar.set_postfix_str(f"epoch {epoch}: {score:.5g}, best {best.value if best else math.nan:.5g}")
            if trial.should_prune():
                raise optuna.TrialPruned

        done = self._all(TrialState.COMPLETE)
        for same in (other for other in done if other.params == trial.params):
            trial.set_user_attr("valid_result", same.user_attrs["valid_result"])
            return same.value or 0.0
        try:
            found = self.objective(settings, after_validation)
        except (ValueError, RuntimeError, MemoryError) as error:
            # A ConfigError of the first trial would be one of all; later it is of a combination.
            if not (_is_failure_of_the_point(error) or (isinstance(error, ConfigError) and done)):
                raise
            trial.set_user_attr("failure", _last_line(error))
            return math.nan
        finally:
            trial.set_user_attr("seconds", time.perf_counter() - began)
        score = found["valid_score"]
        trial.set_user_attr("valid_result", found["valid_result"])
        if not math.isfinite(score):
            trial.set_user_attr("failure", f"the validation score is {score}")
        return score if math.isfinite(score) else math.nan

    def _take_up_interrupted(self) -> None:
        """Queues the trials again that a stop, a crash or a fault of the program cut short."""
        for trial in self._all(TrialState.RUNNING):
            if _is_gone(trial):
                self.study.tell(trial.number, state=TrialState.FAIL, skip_if_finished=True)
        attempts: dict[int, list[FrozenTrial]] = {}
        for trial in self._all():
            attempts.setdefault(trial.user_attrs.get("retry_of", trial.number), []).append(trial)
        for first, trials in attempts.items():
            if all(_is_interrupted(trial) for trial in trials):
                self.study.enqueue_trial(trials[-1].params, user_attrs={"retry_of": first})

    def _all(self, *states: TrialState) -> list[FrozenTrial]:
        return self.study.get_trials(deepcopy=False, states=states or None)

    def _counted(self) -> list[FrozenTrial]:
        """All but interrupted trials and those in the queue."""
        return [trial for trial in self._all() if trial.state != TrialState.WAITING and not _is_interrupted(trial)]

    def _stops_early(self, trials: list[FrozenTrial]) -> bool:
        best, without_progress = -math.inf, 0
        ended = [trial for trial in trials if trial.state.is_finished()]
        for trial in sorted(ended, key=lambda trial: (trial.datetime_complete, trial.number)):
            score = -math.inf if trial.value is None or trial.state == TrialState.PRUNED else self.sign * trial.value
            without_progress = 0 if score > best else without_progress + 1
            best = max(best, score)
        return self.early_stop is not None and without_progress >= self.early_stop

    # ------------------------------------------------------------------ the best one
    def _best(self) -> FrozenTrial | None:
        """Of equal ones the first."""
        return max(self._all(TrialState.COMPLETE), key=lambda trial: self.sign * (trial.value or 0), default=None)

    def _train_with_best(self) -> None:
        """Trains once more with the best settings, which gives the test result and the checkpoint."""
        best = self._best()
        if best is None:
            reasons = sorted({_record(trial)["status"] for trial in self._counted()})
            raise TrialsFailed(f"all {len(self._counted())} trials failed: {'; '.join(reasons)}")
        if self.study.user_attrs.get("last", {}).get("trial") != best.number:
            found = self.objective(best.user_attrs["settings"], None)
            self.study.set_user_attr("last", {"trial": best.number, **found})

    def _found(self) -> dict[str, Any]:
        """What is known by now, in plain values."""
        trials, best = self._counted(), self._best()
        last = self.study.user_attrs.get("last", {})
        if best is None or last.get("trial") != best.number:
            last = {}  # another has become the best since
        of_best = best.user_attrs if best else {"settings": None, "valid_result": None}
        return {
            **self.about,
            "combinations": self.combinations,
            "best_params": of_best["settings"],
            "best_valid_score": best and best.value,
            "best_valid_result": of_best["valid_result"],
            "test_result": last.get("test_result"),
            "again_valid_score": last.get("valid_score"),
            "checkpoint": last.get("checkpoint"),
            "stopped_early": len(trials) < self.limit and self._stops_early(trials),
            "running": len(self._all(TrialState.RUNNING)),
            "trials": [_record(trial) for trial in trials],
        }


def _record(trial: FrozenTrial) -> dict[str, Any]:
    known = trial.user_attrs
    status = {
        TrialState.COMPLETE: "ok",
        TrialState.PRUNED: f"pruned after epoch {trial.last_step}",
        TrialState.RUNNING: "running on {}, process {}".format(*known.get("process", "??")),
    }
    return {
        "number": trial.number,
        "params": known.get("settings", {}),
        "status": status.get(trial.state, f"failed: {known.get('failure')}"),
        "valid_score": trial.value,
        "best_valid_result": known.get("valid_result"),
        "seconds": known.get("seconds"),
    }


def count_combinations(space: Mapping[str, Parameter]) -> int:
    """The number of combinations of all options.

    Raises:
        ConfigError: a parameter is no choice, so that its values cannot be counted.
    """
    for parameter in space.values():
        if parameter.distribution != "choice":
            remedy = "list its values as a choice, or take random or bayes"
            raise ConfigError("algo", "exhaustive", f"{parameter.name} is {parameter.distribution}: {remedy}")
    return math.prod(len(parameter.options) for parameter in space.values())


def _storage(name: str) -> BaseStorage:
    """A database by its URL, or a file that processes append to.

    The file is Optuna's journal and not SQLite's, which must not lie in a folder that machines share. A database sees
    by itself that a trial of another machine has died.
    """
    if "://" in name:
        return RDBStorage(name, heartbeat_interval=HEARTBEAT, grace_period=5 * HEARTBEAT)
    return JournalStorage(JournalFileBackend(name))


def _is_gone(trial: FrozenTrial) -> bool:
    """Whether the process of a running trial has ended. Of another machine's this is not known; this one has no trial
    running when it is asked."""
    host, number, began = trial.user_attrs.get("process", [None, 0, 0.0])
    if host is None:  # it would have said so at once
        return trial.datetime_start is not None and datetime.now() - trial.datetime_start > timedelta(minutes=1)
    if host != socket.gethostname():
        return False
    try:
        return number == os.getpid() or psutil.Process(number).create_time() != began
    except psutil.NoSuchProcess:
        return True


def _is_interrupted(trial: FrozenTrial) -> bool:
    """Whether it failed for a reason that is none of its settings'."""
    return trial.state == TrialState.FAIL and "failure" not in trial.user_attrs


def _is_failure_of_the_point(error: Exception) -> bool:
    """Whether these settings failed rather than the program: the loss became nan, or memory ran out."""
    if isinstance(error, MemoryError | torch.cuda.OutOfMemoryError | NonFiniteLoss):
        return True
    # RecBole's own trainers raise a plain ValueError, torch's CPU allocator a plain RuntimeError.
    return "loss is nan" in str(error) or "can't allocate memory" in str(error)


def _last_line(error: Exception) -> str:
    return str(error).strip().rpartition("\n")[2] or type(error).__name__


def _floats(metrics: Mapping[str, Any] | None) -> dict[str, float] | None:
    """Metrics as Python floats: RecBole's are numpy scalars, which JSON does not know."""
    return None if metrics is None else {str(name): float(value) for name, value in metrics.items()}


@contextlib.contextmanager
def _quiet_optuna() -> Iterator[None]:
    """Without a line of log a trial, which the bar shows, and without notes that parts of Optuna are new."""
    before = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(before)
