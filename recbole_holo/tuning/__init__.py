"""Search for settings with Optuna: ``tune()``, what the command does with ``--search_space``.

Every combination, random draws or TPE; trials that are worse than others at the same epoch end early; the search is
kept in a file, so that it goes on after a stop, and several processes or machines can share it. docs/tuning.md shows
all of it. A search space is a YAML file in RecBole's ``params_dict`` form::

    choice:                          # one of a list, values of any type
      learning_rate: [5e-4, 1e-3]
      hidden_size: [64, 128]
    uniform:                         # [low, high]
      dropout_prob: [0.0, 0.5]
    loguniform:                      # [low, high] are natural logarithms, as in RecBole and hyperopt
      weight_decay: [-12, -4]
    quniform:                        # [low, high, step]: multiples of the step; whole numbers stay whole
      n_layers: [1, 4, 1]

or one in RecBole's text form (``hyper.test``), one ``name distribution values`` a line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recbole_holo.bridge import checkpoint
from recbole_holo.bridge.compat import installed_version, release
from recbole_holo.errors import MissingExtra
from recbole_holo.tuning.space import Parameter, read_space

__all__ = ["Parameter", "read_space", "tune"]

OLDEST_OPTUNA = "4.0"


def tune(
    model: str,
    dataset: str,
    search_space: str | Path | Mapping[str, Any],
    config_file_list: Sequence[str] | None = None,
    config_dict: Mapping[str, Any] | None = None,
    algo: str = "exhaustive",
    max_evals: int | None = None,
    early_stop: int | None = 10,
    pruner: str = "median",
    seed: int = 2020,
    folder: str | Path | None = None,
    storage: str | None = None,
) -> dict[str, Any]:
    """Search for the settings with the best validation score, train and test with them, and print the trials.

    Called again with the same arguments it goes on where it was stopped; called by several processes or machines with
    one ``storage`` they share its trials, and the last to end trains with the best.

    Args:
        model: name of a model, ours or RecBole's.
        dataset: name of a data set.
        search_space: see :func:`read_space`.
        config_file_list: configuration files that all trials share.
        config_dict: settings that all trials share.
        algo: ``exhaustive`` or ``grid`` (every combination of choices), ``random``, ``bayes`` or ``tpe``.
        max_evals: the most trials, of all processes; None means all combinations for ``exhaustive`` and 100 otherwise.
        early_stop: stop after so many trials in a row without a better score; None never stops.
        pruner: ``median`` ends a trial whose best score so far is below the median of what others had by that epoch,
            once five have been completed and not in the first five epochs; ``none`` ends none.
        seed: of the search; the seed of the training is the configuration's.
        folder: where the search is kept and its report is written; None means ``search/<model>-<dataset>``.
        storage: a file or the URL of a database (``postgresql://…``) that several processes share, where the search has
            the name of ``folder``; None means ``journal.log`` in ``folder``.

    Returns:
        ``best_params``, ``best_valid_score``, ``valid_score_bigger`` and ``best_valid_result`` of the best trial;
        ``test_result``, ``again_valid_score`` and ``checkpoint`` of a training with these settings at the end, the only
        one that sees the test split (None while other processes still run trials); ``trials`` (one dict each, in
        order), and how the search was made.

    Raises:
        MissingExtra: Optuna is not installed.
        ConfigError: an argument that cannot be used, or a ``folder`` that holds another search.
        TrialsFailed: every trial failed.
    """
    version = installed_version("optuna")
    if version is None or release(version) < release(OLDEST_OPTUNA):
        found = "is not installed" if version is None else f"{version} is too old"
        raise MissingExtra(f'optuna {found}: pip install "recbole-holo[tune]"')
    from recbole_holo.tuning.search import OF_THE_MACHINE, Search, training

    path, space = Path(folder or Path("search", f"{model}-{dataset}")), read_space(search_space)
    files, given = list(config_file_list or ()), {**(config_dict or {}), "model": model, "dataset": dataset}
    objective, config = training(model, dataset, files, given, space, path)
    plain = checkpoint.plain(config.given)
    about = {
        "model": model,
        "dataset": dataset,
        "fixed": {name: plain[name] for name in config_dict or {} if name in plain},
        "config": {name: value for name, value in plain.items() if name not in OF_THE_MACHINE},
    }
    bigger, shown = bool(config["valid_metric_bigger"]), bool(config["show_progress"])
    search = Search(objective, about, bigger, space, path, algo, max_evals, early_stop, pruner, seed, storage, shown)
    return search.run()
