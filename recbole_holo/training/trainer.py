"""RecBole's trainer with checkpoints that are safe, resuming that is exact, and processes that agree."""

from __future__ import annotations

import os
import random
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import Any

import numpy as np
import torch
from recbole.data.dataloader import FullSortEvalDataLoader
from recbole.trainer import Trainer
from recbole.utils import get_trainer, set_color
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from recbole_holo.bridge import checkpoint, registry
from recbole_holo.bridge.config import overridden
from recbole_holo.errors import ConfigError, NonFiniteLoss
from recbole_holo.training import distributed


class SafeCheckpoints(Trainer):
    """Mixed in before one of RecBole's trainers.

    * Checkpoints hold plain values and tensors, are written whole or not at all, and carry what resuming needs:
      the optimizer, the random states of Python, NumPy and PyTorch, and the order of the batches to come.
    * Candidates of a uniN/popN evaluation are the same at every evaluation and for every model of one seed, so that
      epochs and models compare on equal terms and a reloaded model repeats its metrics. RecBole draws anew each time.
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
        self._resumed: dict[str, Any] | None = None

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
                    "state_dict": self.model.state_dict(),
                    "other_parameter": checkpoint.pack(self.model.other_parameter()),
                    "optimizer": self.optimizer.state_dict(),
                    "random_state": self._random_state(),
                },
                path,
            )
        distributed.barrier()
        if verbose:
            self.logger.info(set_color("Saving current", "blue") + f": {path}")

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
        return checkpoint.load(path, self.device, trust_checkpoint=bool(self.config["trust_checkpoint"]))

    def resume_checkpoint(self, resume_file: str | os.PathLike[str]) -> None:
        """Continues from a checkpoint: the next epoch runs as it would have run without the stop."""
        saved = self._load(os.fspath(resume_file))
        if saved["config"]["model"] != self.config["model"]:
            raise ConfigError("resume", os.fspath(resume_file), f"it is a checkpoint of {saved['config']['model']}")
        self.saved_model_file = os.fspath(resume_file)
        self.start_epoch = saved["epoch"] + 1
        self.cur_step = saved["cur_step"]
        self.best_valid_score = saved["best_valid_score"]
        self.best_valid_result = saved.get("best_valid_result")
        self.model.load_state_dict(saved["state_dict"])
        self.model.load_other_parameter(checkpoint.unpack(saved.get("other_parameter")))
        self.optimizer.load_state_dict(saved["optimizer"])
        self._resumed = saved.get("random_state")
        self.logger.info(f"resuming {resume_file} from epoch {self.start_epoch}")

    def fit(self, train_data: Any, valid_data: Any = None, **kwargs: Any) -> tuple[float, dict[str, float] | None]:
        self._train_data = train_data
        if self._resumed is not None:
            self._restore_random_state(self._resumed)
            self._resumed = None
        if self.start_epoch >= self.epochs > 0:
            self.eval_collector.data_collect(train_data)
            self.logger.info(f"nothing to train: the checkpoint has {self.start_epoch} of {self.epochs} epochs")
            return self.best_valid_score, self.best_valid_result
        return super().fit(train_data, valid_data, **kwargs)

    # ------------------------------------------------------------------ evaluation
    def _valid_epoch(self, valid_data: Any, show_progress: bool = False) -> tuple[float, dict[str, float]]:
        score, self._valid_result = super()._valid_epoch(valid_data, show_progress)
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
            self.model.load_state_dict(saved["state_dict"])
            self.model.load_other_parameter(checkpoint.unpack(saved.get("other_parameter")))
            self.logger.info(f"Loading model structure and parameters from {path}")
        with self._same_candidates(eval_data):
            return super().evaluate(eval_data, load_best_model=False, show_progress=show_progress)

    @contextmanager
    def _same_candidates(self, eval_data: Any) -> Iterator[None]:
        if isinstance(eval_data, FullSortEvalDataLoader):
            yield
            return
        state = np.random.get_state()
        phase = getattr(eval_data._sampler, "phase", None) or "test"
        np.random.seed(self.config["seed"] + ("valid", "test").index(phase))
        try:
            yield
        finally:
            np.random.set_state(state)


class HoloTrainer(SafeCheckpoints, Trainer):
    """The trainer of this package's models, and of every RecBole model that trains with RecBole's plain ``Trainer``.

    Same features and, in one process, the same numbers as RecBole's (early stopping, AMP, gradient clipping,
    tensorboard, wandb). Besides: no host synchronisation per step on CUDA; parameters marked ``_no_weight_decay`` (the
    SSM's ``A_log``, ``D``, ``dt_bias``) are not decayed; a loss that is not finite stops training with the step and the
    last good checkpoint; over several processes, gradients are those of the whole batch in one process.
    """

    def __init__(self, config, model) -> None:
        # As one process sees it: RecBole then leaves the model unwrapped, and gradients are averaged here.
        with overridden(config, single_spec=True):
            super().__init__(config, model)
        self.epoch_seconds: list[float] = []
        distributed.broadcast_parameters(self.model)
        self.eval_collector = distributed.GatheringCollector(config)

    def _build_optimizer(self, **kwargs: Any) -> torch.optim.Optimizer:
        if "params" not in kwargs:
            parameters = list(self.model.parameters())
            undecayed = [p for p in parameters if getattr(p, "_no_weight_decay", False)]
            if undecayed:
                decayed = [p for p in parameters if not getattr(p, "_no_weight_decay", False)]
                kwargs["params"] = [{"params": decayed}, {"params": undecayed, "weight_decay": 0.0}]
        optimizer = super()._build_optimizer(**kwargs)
        for group in optimizer.param_groups:
            if "betas" in group and self.config["adam_betas"]:
                group["betas"] = tuple(self.config["adam_betas"])
        return optimizer

    def _train_epoch(
        self,
        train_data: Any,
        epoch_idx: int,
        loss_func: Callable[[Any], Tensor | tuple[Tensor, ...]] | None = None,
        show_progress: bool = False,
    ) -> float | tuple[float, ...]:
        started = perf_counter()
        self.model.train()
        loss_func = loss_func or self.model.calculate_loss
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.enable_scaler)
        half = torch.float16 if self.enable_scaler else torch.bfloat16
        total: Tensor | None = None
        broken_at = torch.full((), -1, device=self.device)  # first step with a loss that is not finite
        batches = tqdm(
            train_data,
            ncols=100,
            desc=set_color(f"Train {epoch_idx:>5}", "pink"),
            disable=not show_progress,
        )
        for step, interaction in enumerate(batches):
            interaction = interaction.to(self.device)
            self.optimizer.zero_grad()
            with torch.autocast(self.device.type, dtype=half, enabled=self.enable_amp):
                losses = loss_func(interaction)
            parts = losses if isinstance(losses, tuple) else (losses,)
            loss = torch.stack([part.sum() for part in parts]).sum() * distributed.loss_weight(interaction)

            broken = ~torch.isfinite(loss.detach())
            broken_at = torch.where(broken & (broken_at < 0), step, broken_at)
            if self.device.type == "cpu" and broken:
                break  # on CUDA looking costs a synchronisation: it is done once an epoch
            scaler.scale(loss).backward()
            distributed.average_gradients(self.model)
            if self.clip_grad_norm:
                scaler.unscale_(self.optimizer)
                clip_grad_norm_(self.model.parameters(), **self.clip_grad_norm)
            scaler.step(self.optimizer)
            scaler.update()
            current = torch.stack([part.detach().double().sum() for part in parts])
            total = current if total is None else total + current
        if int(broken_at) >= 0:
            self._stop_at(epoch_idx, int(broken_at))
        self.epoch_seconds.append(perf_counter() - started)
        values = [] if total is None else total.tolist()
        return tuple(values) if len(values) > 1 else sum(values)

    def _stop_at(self, epoch: int, step: int) -> None:
        good = self.saved_model_file if os.path.exists(self.saved_model_file) else None
        raise NonFiniteLoss(
            f"the training loss is not finite in epoch {epoch}, step {step}. "
            + (f"The last good checkpoint is {good}. " if good else "No checkpoint was written yet. ")
            + "Lower learning_rate, set clip_grad_norm: {max_norm: 1.0}, or switch enable_amp off."
        )

    # ------------------------------------------------------------------ evaluation
    def evaluate(self, eval_data: Any, *args: Any, **kwargs: Any) -> dict[str, float] | None:
        self.eval_collector.sharded = getattr(eval_data, "is_sharded", False)
        return super().evaluate(eval_data, *args, **kwargs)

    def _neg_sample_batch_eval(self, batched_data: Any) -> tuple[Any, Tensor, Tensor, Tensor]:
        histories, candidates, positive_u, positive_i = batched_data
        if not isinstance(candidates, tuple):
            return super()._neg_sample_batch_eval(batched_data)
        user_row, row, item = (index.to(self.device) for index in candidates)
        histories = histories.to(self.device)
        hidden = self.model.forward(histories[self.model.ITEM_SEQ], histories[self.model.ITEM_SEQ_LEN])
        n_users = int(user_row[-1]) + 1
        scores = torch.full((n_users, self.tot_item_num), -np.inf, device=self.device)
        scores[user_row, item] = self.model.score_pairs(hidden[row], item).float()
        return histories, scores, positive_u, positive_i

    def _map_reduce(self, result: dict[str, float], num_sample: int) -> dict[str, float]:
        return result  # the rows of all processes were gathered before the metrics were computed


def get_trainer_class(config) -> type[Trainer]:
    """The trainer of a configuration's model: RecBole's, with safe checkpoints and exact resuming mixed in."""
    base = Trainer if registry.is_ours(config["model"]) else get_trainer(config["MODEL_TYPE"], config["model"])
    if base is Trainer:
        return HoloTrainer
    return type(base.__name__, (SafeCheckpoints, base), {"__module__": __name__})
