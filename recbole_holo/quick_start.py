"""RecBole's three doors, for this package's models and RecBole's alike: run, tune's objective, reload; and those of
serving: a model without its data, and a small file of it."""

from __future__ import annotations

import glob
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from logging import getLogger
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from recbole.utils import init_seed
from torch import Tensor

from recbole_holo.bridge import checkpoint, registry, restoring, strangers
from recbole_holo.bridge.compat import quiet_recbole, recboles_refusals
from recbole_holo.bridge.config import Config
from recbole_holo.bridge.host import drawing_apart, guest, start_log, visible_devices_kept
from recbole_holo.bridge.settings import SETTINGS
from recbole_holo.data.catalogue import Catalogue
from recbole_holo.data.loader import create_dataset, data_preparation
from recbole_holo.errors import ConfigError, DataError
from recbole_holo.ops import backend
from recbole_holo.reporting import write_report
from recbole_holo.training import launch
from recbole_holo.training.stopping import Stopped, stoppable
from recbole_holo.training.trainer import HoloTrainer, check_settings, get_trainer_class

if TYPE_CHECKING:
    from recbole_holo.inference.compression import Compression

_logger = getLogger("recbole_holo")
Files = Sequence[str | os.PathLike[str]] | None


def run(
    model: str | None = None,
    dataset: str | None = None,
    config_file_list: Files = None,
    config_dict: Mapping[str, Any] | None = None,
    saved: bool = True,
    test: bool = True,
    nproc: int = 1,
    world_size: int = -1,
    ip: str = "localhost",
    port: str | int = "5678",
    group_offset: int = 0,
    argv: Sequence[str] = (),
    callback_fn: Callable[[int, float], None] | None = None,
) -> dict[str, Any]:
    """Trains ``model`` on ``dataset`` and evaluates it; RecBole's ``run`` with the same arguments.

    With ``nproc`` above 1, or where ``torchrun`` has started this process among others, the work is spread over
    processes of ``torch.distributed`` (nccl on GPUs, gloo on CPUs); batches, gradients and metrics are those of a
    single process. Of ``torchrun``'s processes each returns the result.

    A run has the process for itself: another thread's waits until it is over. It logs through the logger
    ``recbole_holo``, and leaves logging, random states and whatever else belongs to the application as they were.

    Args:
        config_file_list: yaml files or preset names (``HoloMambaRec_paper``).
        saved: keep checkpoints, and report the best epoch's test metrics; otherwise the last epoch's.
        test: evaluate the test split at the end; without it nothing of it is seen, as tuning must.
        argv: command line words ``--key=value``, which win over everything else.
        callback_fn: called with the epoch and its score after every validation, in one process only; what it raises
            ends the run.

    Returns:
        ``best_valid_score``, ``valid_score_bigger``, ``best_valid_result``, ``test_result`` (RecBole's keys);
        ``test_ranks``: the rank of each test user's item, 0 = not within the largest of ``topk`` (an array
        ``[users]``), and ``test_ranks_unseen``, the same without what the user has seen; None for metrics of single
        scores;
        ``report``: what the table at the end and the JSON file beside the checkpoint hold.
        Of rankings every metric is there twice: ``ndcg@10``, and without seen items ``ndcg@10 (unseen)``.
    """
    settings, group = dict(config_dict or {}), launch.of_torchrun()
    several = nproc != 1 or world_size > 1
    if several and group is not None:
        raise ConfigError("nproc", nproc, f"torchrun has started {group['world_size']} processes already: leave it out")
    if several:
        with visible_devices_kept():
            config = Config(model, dataset, config_file_list, settings, argv)
            _check_writable(config)  # errors before processes start
        group = {"nproc": nproc, "world_size": nproc if world_size == -1 else world_size, "offset": group_offset}
        settings.update(ip=ip, port=str(port))
    work = partial(
        _run,
        model=model,
        dataset=dataset,
        config_file_list=config_file_list,
        settings=settings | (group or {}),
        saved=saved,
        test=test,
        argv=list(argv),
        callback_fn=None if several else callback_fn,
    )
    if several:
        started = time.time()
        try:
            return launch.together(partial(_run_in_own_process, work=work), nproc)
        except KeyboardInterrupt as error:
            found = latest_checkpoint(config["checkpoint_dir"], config["model"], config["dataset"], started)
            raise Stopped(error, found) from error
    return work() if group is None else _run_in_group(group["local_rank"], work)


def _run_in_group(rank: int, work: partial[dict[str, Any]]) -> dict[str, Any]:
    """What one process of several does; ``rank`` is its number on this machine."""
    joined = torch.distributed.is_initialized()  # the application's own group
    result = work(settings={**work.keywords["settings"], "local_rank": rank})
    if not joined:
        torch.distributed.destroy_process_group()
    return result


@quiet_recbole(in_the_command=True)
def _run_in_own_process(rank: int, work: partial[dict[str, Any]]) -> dict[str, Any]:
    """The same, where the process is one that was started for it."""
    return _run_in_group(rank, work)


@guest()
@quiet_recbole()
def _run(model, dataset, config_file_list, settings, saved, test, argv, callback_fn=None) -> dict[str, Any]:
    config = Config(model, dataset, config_file_list, settings, argv)
    if config["device"].type == "cuda":
        torch.cuda.reset_peak_memory_stats(config["device"])  # an earlier run's in this process
    trainer, train_data, valid_data, test_data = prepare(config)
    shown, test_result, ranks, ranks_unseen = bool(config["show_progress"]), None, None, None
    with stoppable(trainer):
        best_score, best_result = trainer.fit(
            train_data, valid_data, saved=saved, show_progress=shown, callback_fn=callback_fn
        )
        if test:
            test_result = trainer.evaluate(test_data, load_best_model=saved, show_progress=shown)
            ranks, ranks_unseen = trainer.evaluator.ranks, trainer.evaluator.ranks_unseen
        result = {
            "best_valid_score": best_score,
            "valid_score_bigger": config["valid_metric_bigger"],
            "best_valid_result": best_result,
            "test_result": test_result,
            "test_ranks": ranks,
            "test_ranks_unseen": ranks_unseen,
        }
        order, memory = train_data._dataset.order_of_time, _peak_memory(config)
        result["report"] = write_report(config, trainer.model, trainer, result, saved, memory, order)
    return result


@guest()
@quiet_recbole()
def objective_function(
    config_dict: Mapping[str, Any] | None = None, config_file_list: Files = None, saved: bool = True
) -> dict[str, Any]:
    """What a tuner minimises or maximises: trains once with ``config_dict``, RecBole's signature and result.

    Called from RecBole's own tuning script it reads the script's command line as RecBole's function does, but only
    the words that are settings.
    """
    quiet = {**(config_dict or {}), "state": "ERROR"}
    config = Config(config_file_list=config_file_list, config_dict=quiet, argv=sys.argv[1:], foreign_argv=True)
    trainer, train_data, valid_data, test_data = prepare(config)
    best_score, best_result = trainer.fit(train_data, valid_data, verbose=False, saved=saved)
    return {
        "model": config["model"],
        "best_valid_score": best_score,
        "valid_score_bigger": config["valid_metric_bigger"],
        "best_valid_result": best_result,
        "test_result": trainer.evaluate(test_data, load_best_model=saved),
    }


@guest()
@quiet_recbole()
def load_data_and_model(
    model_file: str | os.PathLike[str], trust_checkpoint: bool = False, **settings: Any
) -> tuple[Config, Any, Any, Any, Any, Any]:
    """Reloads a checkpoint with its data: ``config, model, dataset, train_data, valid_data, test_data``.

    Works for this package's models and RecBole's. The configuration is the one saved, whatever the yaml files and the
    command line say now, except for ``settings`` (``data_path="…"``, ``use_gpu=False``). Ids have the numbers that the
    checkpoint's model knows them by, whatever the order of the files; what is new or gone is logged.

    Args:
        trust_checkpoint: you know where the file comes from. It may then be a checkpoint written by RecBole itself,
            which is a pickle (loading it runs whatever code it holds), or of one of RecBole's models that evaluate or
            unpickle what their settings say (``bridge/strangers.py``), and name data outside of the working directory.

    Raises:
        CheckpointError: a broken file, one that does not fit its model, or what only ``trust_checkpoint`` allows.
        ConfigError: likewise, of a path.
        DataError: the data have ids of which the model can know nothing; they are named.
    """
    state = checkpoint.load(model_file, trust_checkpoint=trust_checkpoint)
    config = _config_of(state, model_file, settings, trust_checkpoint)
    config.numbering = restoring.numbering_of(state, model_file, config["USER_ID_FIELD"])
    _start(config)
    dataset = create_dataset(config)
    new = restoring.check_numbers(config.numbering, dataset)
    if config.numbering is None:
        _logger.warning(f"{os.fspath(model_file)} does not say its ids: they are numbered as the files have them")
    train_data, valid_data, test_data = data_preparation(config, dataset)
    init_seed(config["seed"], config["reproducibility"])
    model = restoring.restore(_build_model(config, train_data), state, model_file, new, settings)
    restoring.restore_others(model, state, new)
    return config, model.to(config["device"]).eval(), dataset, train_data, valid_data, test_data


def _config_of(state: dict[str, Any], path: Any, said: Mapping[str, Any], trusted: bool) -> Config:
    """The configuration that a checkpoint is loaded with, where ``said`` says nothing else."""
    saved = state.get("config")
    if isinstance(saved, dict):
        settings = strangers.settings_of(saved, path, said, trusted)
        if said.get("use_gpu") is False and "backend" not in said and settings.get("backend") == "cuda":
            settings["backend"] = "auto"  # the device that was asked for has others
        try:
            return Config(saved["model"], saved["dataset"], config_dict=settings, complete=True)
        except (ConfigError, DataError) as error:
            field = getattr(error, "field", None)
            declared = SETTINGS.get(str(field))
            if declared is None or field in said or declared.fits(settings.get(str(field))):
                raise
            raise checkpoint.CheckpointError(f"checkpoint: {os.fspath(path)!r}: {error}") from error
        except Exception as error:  # RecBole takes for granted that settings are there and of their types
            what = f"its settings cannot be used ({error!r})"
            raise checkpoint.CheckpointError(f"checkpoint: {os.fspath(path)!r}: {what}") from error
    if saved is None or not hasattr(saved, "external_config_dict"):
        raise checkpoint.CheckpointError(
            f"checkpoint: {os.fspath(path)!r} does not say its model, data set and settings"
        )
    settings = {**saved.external_config_dict, **strangers.NOT_ITS_OWN, **said, "resume": None}
    return Config(saved["model"], saved["dataset"], config_dict=settings)


def _given(saved: dict[str, Any], key: str) -> Any:
    given = saved.get("given")
    return given.get(key) if isinstance(given, dict) else None


@visible_devices_kept()
def load_model(model_file: str | os.PathLike[str], device: str | torch.device | None = None) -> tuple[Any, Catalogue]:
    """A model of this package to be served, and its items: from the checkpoint alone, without the data.

    Args:
        device: None = a GPU where there is one.

    Raises:
        CheckpointError: a broken file, a model of RecBole's own, or a checkpoint from before items were kept in it.
    """
    state = checkpoint.load(model_file)
    catalogue, saved = restoring.catalogue_of(state, model_file), state.get("config")
    if catalogue is None or not (isinstance(saved, dict) and registry.is_ours(str(saved.get("model")))):
        raise checkpoint.CheckpointError(
            f"checkpoint: {os.fspath(model_file)!r} has no items' ids in it (a model of RecBole's own, or an earlier "
            "version's): reload it with its data, load_data_and_model(), and use Recommender(model, dataset)"
        )
    said: dict[str, Any] = {
        "loss_type": "CE",
        "sparse_embedding": False,
        "cold_items": "train",
        "train_steps_at_once": None,
        "data_path": ".",  # none is read
        "backend": "reference" if _given(saved, "backend") == "reference" else "auto",  # as the device has it
    }
    config = _config_of(state, model_file, said, trusted=False)
    backend.set_backend(config["backend"])
    with drawing_apart():  # what is drawn for a new model is loaded over
        model = registry.get_model_class(config["model"])(config, catalogue)
    model = restoring.restore(model, state, model_file)
    return model.to(device or config["device"]).eval(), catalogue


def compress_checkpoint(
    model_file: str | os.PathLike[str],
    target: str | os.PathLike[str],
    wanted: Compression,
    histories: Tensor | None = None,
    gaps: Tensor | None = None,
) -> None:
    """Writes the model of a checkpoint, compressed, to a file of its own, which holds its bits and the items' ids,
    titles and attributes.

    It is loaded as a checkpoint is (``Recommender.load``, ``load_model``, ``load_data_and_model``); no training goes on
    from it.

    Args:
        wanted: what it is compressed to.
        histories: ``[B, L]``, pads on the right; what states are judged by, where some are to be left out.
        gaps: ``[B, L]``, what a model with ``event_time`` reads of their times, a batch's ``gap_list``.

    Raises:
        ConfigError: a compression that the model cannot have, or no folder to write to.
        CheckpointError: not a checkpoint of this package, or a compressed one.
    """
    from recbole_holo.inference.compression import compress, stored

    folder = os.path.dirname(os.path.abspath(target))
    if not os.path.isdir(folder):
        raise ConfigError("target", os.fspath(target), f"there is no folder {folder!r}: make it, or choose another")
    saved = checkpoint.load(model_file)
    if "compression" in saved:
        raise checkpoint.CheckpointError(f"checkpoint: {os.fspath(model_file)!r} is compressed already")
    small = compress(load_model(model_file, "cpu")[0], wanted, histories, gaps)
    kept: dict[str, Any] = {name: saved[name] for name in ("config", "catalogue", "numbers") if name in saved}
    checkpoint.save({**kept, "compression": asdict(wanted), "state_dict": stored(small)}, target)


# ---------------------------------------------------------------------- shared steps
def prepare(config: Config) -> tuple[Any, Any, Any, Any]:
    """What a run needs, from its configuration: the trainer with its new model, and the training, validation and test
    loaders.

    Raises:
        ConfigError, DataError: settings or data that cannot be used, folders that cannot be written to.
    """
    _check_writable(config)
    resumed = _read_resumed(config)
    _start(config)
    logger = getLogger("recbole_holo")
    logger.info(config)
    for folder in {config["checkpoint_dir"], os.path.dirname(os.path.abspath(resumed or ""))}:
        for name in checkpoint.remove_leftovers(folder) if config["local_rank"] == 0 else ():
            _logger.info(f"{name} in {folder}, which a run that was killed left unfinished, is removed")
    data = create_dataset(config)
    logger.info(data)
    new_ids = restoring.check_numbers(config.numbering, data)
    train_data, valid_data, test_data = data_preparation(config, data)
    init_seed(config["seed"], config["reproducibility"])
    model = _build_model(config, train_data)
    logger.info(model)
    trainer = _build_trainer(config, model)
    if resumed is not None:
        trainer.new_ids = new_ids
        trainer.resume_checkpoint(resumed)
    return trainer, train_data, valid_data, test_data


def _read_resumed(config: Config) -> str | None:
    """The checkpoint that ``resume`` names, looked at before the data are read for it; None to start anew."""
    path = config["resume"]
    if not path:
        return None
    if path == "auto":
        path = latest_checkpoint(config["checkpoint_dir"], config["model"], config["dataset"])
        if path is None:
            where = f"{config['model']} on {config['dataset']} in {config['checkpoint_dir']}"
            _logger.warning(f"resume: auto: there is no checkpoint of {where}; the run starts anew")
            return None
    state = checkpoint.load(path, trust_checkpoint=bool(config["trust_checkpoint"]))
    check_settings(config, state, path)
    config.numbering = restoring.numbering_of(state, path, config["USER_ID_FIELD"])
    return path


def latest_checkpoint(folder: str | os.PathLike[str], model: str, dataset: str, since: float = 0.0) -> str | None:
    """The latest checkpoint in a folder of a run of this model on this data set, one that is whole and was written
    ``since`` then (seconds of :func:`time.time`); None: there is none."""
    names = glob.escape(f"{model}-{dataset}-") + "*.pth"
    written = {path: path.stat().st_mtime for path in Path(folder).glob(names)}
    for path in sorted((path for path in written if written[path] >= since), key=written.__getitem__, reverse=True):
        try:
            saved = checkpoint.load(path)
        except checkpoint.CheckpointError as error:
            _logger.warning(f"resume: auto: {error}")
            continue
        named = saved.get("config")
        if isinstance(named, dict) and (named["model"], named["dataset"]) == (model, dataset) and "optimizer" in saved:
            return os.fspath(path)
    return None


def _start(config: Config) -> None:
    backend.set_backend(config["backend"])
    backend.forget_report()  # what an earlier run of this process ran on
    init_seed(config["seed"], config["reproducibility"])
    start_log(config)


def _build_model(config: Config, train_data: Any) -> Any:
    with recboles_refusals(f"model {config['model']}"):
        return registry.get_model_class(config["model"])(config, train_data._dataset).to(config["device"])


def _build_trainer(config: Config, model: Any) -> Any:
    trainer_class = get_trainer_class(config)
    if not config["single_spec"] and not issubclass(trainer_class, HoloTrainer):
        raise ConfigError("nproc", config["nproc"], f"{config['model']} has a trainer of its own; use one process")
    return trainer_class(config, model)


def _check_writable(config: Config) -> None:
    # With the model's own log folder: RecBole's way of making it fails when two processes try at once.
    for folder in (config["checkpoint_dir"], os.path.join("log", config["model"]), "log_tensorboard"):
        try:
            os.makedirs(folder, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            raise ConfigError(
                "checkpoint_dir" if folder == config["checkpoint_dir"] else "working directory",
                os.path.abspath(folder),
                f"it cannot be written to ({error.strerror}); choose another",
            ) from error


def _peak_memory(config: Config) -> int:
    """Bytes: on the GPU, where there is one, of this run; else of the process since it began."""
    if config["device"].type == "cuda":
        return torch.cuda.max_memory_allocated(config["device"])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
