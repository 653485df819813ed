"""RecBole's trainer with checkpoints that are safe, resuming that is exact, and processes that agree."""

from __future__ import annotations

import os
import random
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from time import perf_counter
from typing import Any

import numpy as np
import torch
from recbole.data.dataloader import FullSortEvalDataLoader
from recbole.trainer import Trainer
from recbole.utils import get_trainer, set_color
from torch import Tensor
from tqdm import tqdm

from recbole_holo.bridge import checkpoint, registry, restoring
from recbole_holo.bridge.config import overridden
from recbole_holo.bridge.host import random_states_kept
from recbole_holo.bridge.metric_names import kept_name
from recbole_holo.data.batches import SequenceTrainLoader
from recbole_holo.data.catalogue import Catalogue
from recbole_holo.errors import NonFiniteLoss
from recbole_holo.model.base import SequenceRecommender
from recbole_holo.model.state_space import StateSpaceRecommender
from recbole_holo.training import distributed, resuming
from recbole_holo.training.contention import Contention
from recbole_holo.training.evaluation import TwoColumns
from recbole_holo.training.graphs import EncoderGraphs, width_multiple
from recbole_holo.training.schedule import LearningRate, WeightAverage
from recbole_holo.training.sparse import clip_grad_norm_, lazy_optimizer

FEW_PARAMETERS = 2**20  # one thread updates them in some milliseconds


class SafeCheckpoints(TwoColumns):
    """Mixed in before one of RecBole's trainers.

    * Checkpoints hold plain values and tensors, are written whole or not at all, and carry what resuming needs:
      the optimizer, the random states of Python, NumPy and PyTorch, and the order of the batches to come.
    * Evaluations have two columns, see :mod:`recbole_holo.training.evaluation`.
    * What an evaluation draws, the candidates of uniN/popN and what RecBole's transforms and models draw, is the same
      at every evaluation of one seed, whatever ``worker`` and the number of processes: epochs and models compare on
      equal terms, and a reloaded model repeats its metrics. Training draws as if there had been no evaluation. RecBole
      draws anew each time, and evaluations shift what training draws.
    """

    saved_model_file: str

    def __init__(self, config, model) -> None:
        super().__init__(config, model)
        name = f"{config['model']}-{config['dataset']}-{os.path.basename(self.saved_model_file).split('-', 1)[1]}"
        stem, suffix = os.path.splitext(name)
        # RecBole's names have a resolution of one second: parallel trials would overwrite each other.
        unique = distributed.broadcast(f"{stem}-{uuid.uuid4().hex[:6]}{suffix}")
        self.saved_model_file = os.path.join(self.checkpoint_dir, unique)
        self._train_data: Any = None
        self._valid_result: dict[str, float] | None = None  # of the epoch that is being saved
        self.valid_scores: list[float] = []  # of every epoch with a validation
        self._valid_data: Any = None
        self._resumed: dict[str, Any] | None = None  # the checkpoint that the next fit goes on from
        self._known_items: dict[str, Any] = {}  # what checkpoints say of ids
        self._selection: dict[str, Any] | None = None  # what scores of epochs depend on
        self.new_ids: dict[str, list[str]] = {}  # by field, what the checkpoint that is resumed does not know
        self._unlike = False  # whether the checkpoint says no score in the metric that epochs are chosen by

    # ------------------------------------------------------------------ saving and resuming
    def _save_checkpoint(self, epoch: int, verbose: bool = True, **kwargs: Any) -> None:
        path = kwargs.pop("saved_model_file", self.saved_model_file)
        if self.config["local_rank"] == 0:
            checkpoint.save(
                {
                    "config": {
                        "model": self.config["model"],
                        "dataset": self.config["dataset"],
                        "given": getattr(self.config, "given", self.config.external_config_dict),
                    },
                    "epoch": epoch,
                    "cur_step": self.cur_step,
                    "best_valid_score": float(self.best_valid_score),
                    "best_valid_result": self._valid_result,
                    "valid_scores": self.valid_scores,
                    **self._weights(),
                    "other_parameter": checkpoint.pack(self.model.other_parameter()),
                    "optimizer": self.optimizer.state_dict(),
                    "random_state": self._random_state(),
                    "selection": self._depends_on(),
                    **self._items(),
                },
                path,
            )
        distributed.barrier()
        if verbose:
            self.logger.info(set_color("Saving current", "blue") + f": {path}")

    def _items(self) -> dict[str, Any]:
        """Which ids have which numbers; of this package's models also what serves them without their data."""
        if not self._known_items and self._train_data is not None:
            dataset, model = self._train_data._dataset, self.config["model"]
            self._known_items = {
                "catalogue": Catalogue.of(dataset).plain() if registry.is_ours(model) else None,
                "numbers": restoring.numbers_of(dataset, model),
            }
        return self._known_items

    def _depends_on(self) -> dict[str, Any] | None:
        if self._selection is None and self._train_data is not None:
            self._selection = {
                **resuming.selection(self.config, self._valid_data),
                "train": resuming.fingerprint(self._train_data._dataset),
            }
        return self._selection

    def _weights(self) -> dict[str, Any]:
        """What a checkpoint holds of the model's parameters and buffers."""
        return {"state_dict": self.model.state_dict()}

    def _load_weights(self, saved: dict[str, Any]) -> None:
        """The inverse, to continue training."""
        restoring.restore(self.model, saved, self.saved_model_file, self.new_ids)

    def save_pretrained_model(self, epoch: int, saved_model_file: str) -> None:
        """What RecBole's S3Rec trainer writes between its two stages, and reads back in the second."""
        self._save_checkpoint(epoch, verbose=False, saved_model_file=saved_model_file)
        self.saved_model_file = saved_model_file

    def _random_state(self) -> dict[str, Any]:
        _, keys, position, has_gauss, cached = np.random.get_state()
        state = {
            "python": random.getstate(),
            "numpy": (np.asarray(keys, dtype=np.int64), int(position), int(has_gauss), float(cached)),
            "torch": torch.get_rng_state(),
        }
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        generator = getattr(self._train_data, "generator", None)
        if generator is not None:
            state["batches"] = generator.get_state()
        return state

    def _restore_random_state(self, state: dict[str, Any]) -> None:
        version, internal, gauss = state["python"]
        random.setstate((version, tuple(internal), gauss))
        keys, position, has_gauss, cached = state["numpy"]
        np.random.set_state(("MT19937", keys.cpu().numpy().astype(np.uint32), position, has_gauss, cached))
        torch.set_rng_state(state["torch"].cpu())
        if "cuda" in state and self.device.type == "cuda":
            torch.cuda.set_rng_state(state["cuda"].cpu(), self.device)
        if "batches" in state and getattr(self._train_data, "generator", None) is not None:
            self._train_data.generator.set_state(state["batches"].cpu())

    def _load(self, path: str) -> dict[str, Any]:
        saved = checkpoint.load(path, self.device, trust_checkpoint=bool(self.config["trust_checkpoint"]))
        _refuse_compressed(saved, path)
        return saved

    def resume_checkpoint(self, resume_file: str | os.PathLike[str]) -> None:
        """Continues from a checkpoint: the next epoch runs as it would have run without the stop.

        Settings may be others than the checkpoint's where :mod:`recbole_holo.training.resuming` says so.

        Raises:
            ConfigError: a setting that can be no other.
            CheckpointError, DataError: it does not fit the model, or the model not the data.
        """
        path = os.fspath(resume_file)
        saved = self._load(path)
        check_settings(self.config, saved, path)
        self.saved_model_file = path
        self.start_epoch = saved["epoch"] + 1
        self._resume_selection(saved)
        self._load_weights(saved)
        restoring.restore_others(self.model, saved, self.new_ids)
        self._load_optimizer(saved["optimizer"])
        self._resumed = saved
        self.logger.info(f"resuming {resume_file} from epoch {self.start_epoch}")
        planned = saved["config"].get("given", {}).get("epochs", self.epochs)
        if self.schedule is not None and planned != self.epochs:
            self.logger.warning(
                f"epochs: {self.epochs}, but the checkpoint is of a run of {planned}: lr_scheduler goes over all "
                f"epochs, so the learning rate jumps. To continue as planned use {planned}, or lr_scheduler: ~"
            )

    def _load_optimizer(self, saved: dict[str, Any]) -> None:
        """Its moments and counts of steps, for the learning rate, betas and decay that the settings say now.

        (PyTorch's way would take these from the checkpoint, too.)
        """
        own = self.optimizer.state_dict()
        n_items = self.model.n_items if getattr(self.model, "trained_items", None) is not None else None
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        state = {
            index: {
                slot: found if torch.is_tensor(v) and (found := restoring.grown(v, of, n_items)) is not None else v
                for slot, v in saved["state"][index].items()
            }
            for index, of in enumerate(parameters)
            if index in saved["state"]
        }
        self.optimizer.load_state_dict({"state": state, "param_groups": own["param_groups"]})

    def _resume_selection(self, saved: dict[str, Any]) -> None:
        """The best epoch so far, in the metric that epochs are chosen by now; the checkpoint's may be another."""
        self.valid_scores = list(saved.get("valid_scores", []))
        self.cur_step, self.best_valid_score = saved["cur_step"], saved["best_valid_score"]
        self.best_valid_result = found = saved.get("best_valid_result")
        if not found:
            return
        name = self.valid_metric
        if self.config.ranks_general and name not in found:  # from before there were two columns
            name = kept_name(name)
        score = found.get(name)
        if score == self.best_valid_score:
            return
        worst = -np.inf if self.valid_metric_bigger else np.inf
        self.cur_step, self.valid_scores, self.best_valid_score = 0, [], worst if score is None else score
        self._unlike = score is None
        self.logger.warning(
            f"valid_metric: {self.valid_metric}, but the checkpoint is of a run with another: its epoch, "
            + ("which does not say it, is not compared with" if score is None else f"with {score}, is to be beaten")
        )

    def _check_data(self, saved: dict[str, Any], dataset: Any) -> None:
        """
        Raises:
            DataError: the ids of the checkpoint have other numbers in the data set.
        """
        numbering = restoring.numbering_of(saved, self.saved_model_file, dataset.uid_field)
        if numbering is not None:
            numbering.new_ids(dataset)

    def _go_on(self, saved: dict[str, Any]) -> None:
        """What is left of resuming when the data are there."""
        self._check_data(saved, self._train_data._dataset)
        now = self._depends_on() or {}
        then = saved.get("selection") or now  # an older one does not say
        differing = distributed.broadcast([key for key in now if then.get(key) != now[key]])
        if "train" in differing:
            differing.remove("train")
            self.logger.warning("the training data are not those that the checkpoint's epochs were trained on")
        if self._valid_data and (differing or self._unlike):
            self._measure_again(differing or ["valid_metric"])
        if "random_state" in saved:
            self._restore_random_state(saved["random_state"])

    def _measure_again(self, differing: list[str]) -> None:
        before = self.best_valid_score
        self.eval_collector.data_collect(self._train_data)
        self.best_valid_score, self.best_valid_result = self._valid_epoch(self._valid_data)
        self.cur_step, self.valid_scores = 0, []
        what = ", ".join("validation data" if key == "data" else key for key in differing)
        self.logger.warning(
            f"{what}: not as in the run that is resumed; its epoch, with {before} then, has "
            f"{self.valid_metric} {self.best_valid_score} now, which is to be beaten"
        )

    def fit(self, train_data: Any, valid_data: Any = None, **kwargs: Any) -> tuple[float, dict[str, float] | None]:
        self._train_data, self._valid_data = train_data, valid_data
        if self._resumed is not None:
            saved, self._resumed = self._resumed, None
            self._go_on(saved)
        if self.start_epoch >= self.epochs > 0:
            self.eval_collector.data_collect(train_data)
            self.logger.info(f"nothing to train: the checkpoint has {self.start_epoch} of {self.epochs} epochs")
            return self.best_valid_score, self.best_valid_result
        try:
            return super().fit(train_data, valid_data, **kwargs)
        finally:
            self.tensorboard.close()  # RecBole leaves its thread and its file to the process

    # ------------------------------------------------------------------ evaluation
    def _valid_epoch(self, valid_data: Any, show_progress: bool = False) -> tuple[float, dict[str, float]]:
        score, self._valid_result = super()._valid_epoch(valid_data, show_progress)
        self.valid_scores.append(float(score))
        return score, self._valid_result

    @torch.no_grad()
    def evaluate(
        self,
        eval_data: Any,
        load_best_model: bool = True,
        model_file: str | None = None,
        show_progress: bool = False,
    ) -> dict[str, float] | None:
        if not eval_data:
            return None
        if load_best_model:
            path = model_file or self.saved_model_file
            saved = self._load(path)
            self._check_data(saved, eval_data._dataset)
            restoring.restore(self.model, saved, path)
            restoring.restore_others(self.model, saved)
            self.logger.info(f"Loading model structure and parameters from {path}")
        with self._same_draws(eval_data):
            return super().evaluate(eval_data, load_best_model=False, show_progress=show_progress)

    @contextmanager
    def _same_draws(self, eval_data: Any) -> Iterator[None]:
        phase = getattr(eval_data._sampler, "phase", None) or "test"
        seed = self.config["seed"] + ("valid", "test").index(phase)
        workers, order = eval_data.num_workers, eval_data.generator.get_state()
        if not isinstance(eval_data, FullSortEvalDataLoader):
            eval_data.num_workers = 0  # each would draw numbers of its own for its share of the batches
        eval_data.generator.manual_seed(seed)  # what workers' seeds are drawn from
        try:
            with random_states_kept():
                random.seed(seed)
                np.random.seed(seed)
                torch.manual_seed(seed)
                yield
        finally:
            eval_data.num_workers = workers
            eval_data.generator.set_state(order)


class HoloTrainer(SafeCheckpoints, Trainer):
    """The trainer of this package's models, and of every RecBole model that trains with RecBole's plain ``Trainer``.

    Same features and, for RecBole's models in one process whose evaluations draw nothing, the same numbers as RecBole's
    (early stopping, AMP, gradient clipping, tensorboard, wandb). Besides:

    * no host synchronisation per step on CUDA, and none at all in an epoch of whole sequences (with ``seen_items:
      excluded`` and CE one a step);
    * this package's models get PyTorch's fused adam or adamw; of their parameters, those marked ``_no_weight_decay``
      (the SSM's ``A_log``, ``D``, ``dt_bias``) are not decayed;
    * a schedule of the learning rate (``lr_scheduler``), an average of the weights (``ema_decay``): it is what
      validation, the saved best model and the model that :meth:`fit` leaves have, while training goes on with the
      weights themselves, which a checkpoint holds, too; graphs of small batches (``cuda_graphs``);
    * a loss that is not finite stops training with the step and the last good checkpoint: at once on a CPU, at the end
      of the epoch on CUDA, where looking means waiting;
    * over several processes, gradients are those of the whole batch in one process;
    * once a run it says that training waits for cores which other processes use, and what helps.

    ``enable_amp: True`` is bfloat16 autocast, which needs no scaling; with ``enable_scaler: True`` it is float16.
    """

    def __init__(self, config, model) -> None:
        self.schedule = LearningRate.from_config(config)
        self.ema_decay = WeightAverage.decay_of(config)
        self.average: WeightAverage | None = None  # while training
        # As one process sees it: RecBole then leaves the model unwrapped, and gradients are averaged here.
        with overridden(config, single_spec=True):
            super().__init__(config, model)
        self.epoch_seconds: list[float] = []
        distributed.broadcast_parameters(self.model)
        self.graphs = EncoderGraphs.from_config(config, self.model)
        self.contention = Contention(self.logger.warning)
        self.few_parameters = sum(p.numel() for p in model.parameters()) <= FEW_PARAMETERS

    def _build_optimizer(self, **kwargs: Any) -> torch.optim.Optimizer:
        optimizer = super()._build_optimizer(**kwargs)
        if isinstance(self.model, SequenceRecommender) and not kwargs:
            optimizer = self._own_optimizer(optimizer)
        for group in optimizer.param_groups:
            if "betas" in group and self.config["adam_betas"]:
                group["betas"] = tuple(self.config["adam_betas"])
        return optimizer

    def _own_optimizer(self, recboles: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """RecBole's, with undecayed parameters in a group of their own, and for adam and adamw fused or sparse."""
        parameters = list(self.model.parameters())
        groups: list[dict[str, Any]] = [
            {"params": [p for p in parameters if not getattr(p, "_no_weight_decay", False)]},
            {"params": [p for p in parameters if getattr(p, "_no_weight_decay", False)], "weight_decay": 0.0},
        ]
        groups = [group for group in groups if group["params"]]
        kind: Any = type(recboles)
        settings: dict[str, Any] = {
            key: recboles.defaults[key] for key in ("lr", "weight_decay") if key in recboles.defaults
        }
        if getattr(self.model, "sparse_embedding", False):
            kind = lazy_optimizer(self.learner)
        if issubclass(kind, (torch.optim.Adam, torch.optim.AdamW)):
            settings["fused"] = self.device.type in ("cpu", "cuda")
        return kind(groups, **settings)

    # ------------------------------------------------------------------ training
    def fit(self, train_data: Any, valid_data: Any = None, **kwargs: Any) -> tuple[float, dict[str, float] | None]:
        if self.ema_decay is not None and self.average is None:
            self.average = WeightAverage(self.model, self.ema_decay)
        if self.graphs is not None and isinstance(train_data, SequenceTrainLoader):
            train_data.round_width_to = width_multiple(self.config["MAX_ITEM_LIST_LENGTH"])
        result = super().fit(train_data, valid_data, **kwargs)
        if self.average is not None:
            self.average.keep()
            self.average = None
        return result

    def _train_epoch(
        self,
        train_data: Any,
        epoch_idx: int,
        loss_func: Callable[[Any], Tensor | tuple[Tensor, ...]] | None = None,
        show_progress: bool = False,
    ) -> float | tuple[float, ...]:
        started = perf_counter()
        self.model.train()
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.enable_scaler)
        batches = iter(train_data)
        steps = len(train_data)  # after iter: the epoch's own number
        shown = tqdm(
            batches,
            total=steps,
            ncols=100,
            desc=set_color(f"Train {epoch_idx:>5}", "pink"),
            disable=not show_progress,
        )
        losses = torch.zeros(0, 1)  # of every step, on the device
        self.contention.begin()
        with self.graphs.replaying() if self.graphs is not None else nullcontext():
            for step, interaction in enumerate(shown):
                if isinstance(self.model, StateSpaceRecommender):
                    done = (epoch_idx + step / steps) / self.epochs
                    self.model.set_progress(done, epoch_idx * steps + step)
                if self.schedule is not None:
                    self._set_learning_rate(self.schedule.factor((epoch_idx + (step + 1) / steps) / self.epochs))
                found = self._step(interaction.to(self.device), loss_func or self.model.calculate_loss, scaler)
                if step == 0:  # in one piece: small tensors that outlive their step would tear the heap into pieces
                    losses = found.new_zeros(steps, len(found))
                losses[step] = found
                self.contention.step()
                if not self._looks_finite(found):
                    break
        self.contention.end()
        losses = losses.double().cpu()
        broken = ~torch.isfinite(losses).all(1)
        if broken.any():
            self._stop_at(epoch_idx, int(broken.int().argmax()))
        self.epoch_seconds.append(perf_counter() - started)
        values = losses.sum(0).tolist()
        return tuple(values) if len(values) > 1 else values[0]

    def _step(
        self,
        interaction: Any,
        loss_func: Callable[[Any], Tensor | tuple[Tensor, ...]],
        scaler: torch.amp.GradScaler,
    ) -> Tensor:
        """One update, or none if the loss is seen not to be finite; returns its parts, weighted: ``[n_parts]``."""
        self.optimizer.zero_grad()
        half = torch.float16 if self.enable_scaler else torch.bfloat16
        weight = distributed.loss_weight(interaction)
        found: list[Tensor] = []
        terms = self._terms(interaction, loss_func)
        while True:
            # A graph holds the casts that it was captured with, so there is nothing to cache.
            with torch.autocast(self.device.type, half, enabled=self.enable_amp, cache_enabled=self.graphs is None):
                losses = next(terms, None)
            if losses is None:
                break
            parts = losses if isinstance(losses, tuple) else (losses,)
            if weight is not None:
                parts = tuple(part * weight for part in parts)
            found.append(torch.stack([part.detach().sum() for part in parts]))
            if not self._looks_finite(found[-1]):
                return found[-1]
            scaler.scale(sum(parts[1:], parts[0]).sum()).backward()
        values = torch.stack(found).sum(0) if found else torch.zeros(1, device=self.device)
        distributed.average_gradients(self.model)
        if self.clip_grad_norm:
            scaler.unscale_(self.optimizer)
            clip_grad_norm_(self.model.parameters(), **self.clip_grad_norm)
        with self._threads_of_an_update():
            scaler.step(self.optimizer)
            scaler.update()
            if self.average is not None:
                self.average.update()
        return values

    @contextmanager
    def _threads_of_an_update(self) -> Iterator[None]:
        """One where parameters are few: PyTorch's optimizers start and join the threads for each parameter.

        Updates are element by element, so that values are the same.
        """
        threads = torch.get_num_threads()
        alone = self.device.type == "cpu" and self.few_parameters
        if alone:
            torch.set_num_threads(1)
        try:
            yield
        finally:
            if alone:
                torch.set_num_threads(threads)

    def _looks_finite(self, losses: Tensor) -> bool:
        """On a CPU, whether they are finite; on CUDA, where looking means waiting, True until the epoch ends."""
        return self.device.type != "cpu" or bool(torch.isfinite(losses).all())

    def _terms(
        self, interaction: Any, loss_func: Callable[[Any], Tensor | tuple[Tensor, ...]]
    ) -> Iterator[Tensor | tuple[Tensor, ...]]:
        """What adds up to the loss of a batch, each term to be differentiated before the next is asked for."""
        steps, model = self.config["train_steps_at_once"], self.model
        if steps is None or not isinstance(model, SequenceRecommender) or model.ITEM_TARGETS not in interaction:
            yield loss_func(interaction)
        else:
            yield from model.losses_in_parts(interaction, steps)

    def _set_learning_rate(self, factor: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate * factor

    def _stop_at(self, epoch: int, step: int) -> None:
        good = self.saved_model_file if os.path.exists(self.saved_model_file) else None
        raise NonFiniteLoss(
            f"the training loss is not finite in epoch {epoch}, step {step}. "
            + (f"The last good checkpoint is {good}. " if good else "No checkpoint was written yet. ")
            + "Lower learning_rate, set clip_grad_norm: {max_norm: 1.0}, or switch enable_amp off."
        )

    # ------------------------------------------------------------------ checkpoints
    def _weights(self) -> dict[str, Any]:
        if self.average is None:
            return super()._weights()
        training = self.average.state_dict()
        with self.average.applied():
            return {"state_dict": {k: v.clone() for k, v in self.model.state_dict().items()}, "ema": training}

    def _load_weights(self, saved: dict[str, Any]) -> None:
        super()._load_weights(saved)
        if "ema" in saved:
            average = WeightAverage(self.model, self.ema_decay or 0.0)
            weights = restoring.rows_for_new_items(self.model, saved["ema"]["weights"])
            # And the model has the weights that were trained, average or not.
            average.load_state_dict({**saved["ema"], "weights": weights})
            if self.ema_decay is not None:
                self.average = average

    # ------------------------------------------------------------------ evaluation
    def _valid_epoch(self, valid_data: Any, show_progress: bool = False) -> tuple[float, dict[str, float]]:
        with self.average.applied() if self.average is not None else nullcontext():
            return super()._valid_epoch(valid_data, show_progress)

    def _neg_sample_batch_eval(self, batched_data: Any) -> tuple[Any, Tensor, Tensor, Tensor]:
        histories, candidates, positive_u, positive_i = batched_data
        if not isinstance(candidates, tuple):
            return super()._neg_sample_batch_eval(batched_data)
        user_row, row, item = (index.to(self.device) for index in candidates)
        histories = histories.to(self.device)
        hidden = self.model.last_states(histories)
        n_users = int(user_row[-1]) + 1
        scores = torch.full((n_users, self.tot_item_num), -np.inf, device=self.device)
        scores[user_row, item] = self.model.score_pairs(hidden[row], item).float()
        return histories, scores, positive_u, positive_i

    def _map_reduce(self, result: dict[str, float], num_sample: int) -> dict[str, float]:
        return result  # the rows of all processes were gathered before the metrics were computed


def _refuse_compressed(saved: dict[str, Any], path: str) -> None:
    if "compression" in saved:
        raise checkpoint.CheckpointError(
            f"checkpoint: {path!r} is of a compressed model, which is not trained on nor loaded over another: use the "
            "checkpoint that it was made of; to evaluate it, load_data_and_model()"
        )


def check_settings(config: Any, saved: dict[str, Any], path: str) -> None:
    """That a run with the settings of ``config`` may go on from a checkpoint.

    Raises:
        CheckpointError: one that no training goes on from.
        ConfigError: a setting that differs and cannot be obeyed.
    """
    _refuse_compressed(saved, path)
    then = saved.get("config")
    if not isinstance(then, dict) or not all(key in saved for key in ("epoch", "optimizer", "state_dict")):
        raise checkpoint.CheckpointError(f"checkpoint: {path!r} is not of a run of this package that could go on")
    now = {"model": config["model"], "dataset": config["dataset"], **config.given}
    resuming.check(then, now, config.known_keys(), path)


def get_trainer_class(config) -> type[Trainer]:
    """The trainer of a configuration's model: RecBole's, with safe checkpoints and exact resuming mixed in."""
    base = Trainer if registry.is_ours(config["model"]) else get_trainer(config["MODEL_TYPE"], config["model"])
    if base is Trainer:
        return HoloTrainer
    return type(base.__name__, (SafeCheckpoints, base), {"__module__": __name__})
