"""Where a step's parameters, memory and time go, layer by layer: ``--profile``.

One training step and one scoring step of the model's own trainer, on a batch of the data set, are split among rows:

* the layers: the model's children; lists of modules are opened, so that every block has a row of its own;
* ``head and loss``: what ``calculate_loss`` and ``full_sort_predict`` do outside ``forward`` and outside all layers;
* ``other``: what lies in none of the others: code of ``forward`` between the layers, parameters of the model itself,
  checks and gradient clipping;
* ``optimizer step``.

Exactly one row runs at any moment, so the rows add up to the total.
"""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, fields
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any

import torch
from recbole.data.dataloader import FullSortEvalDataLoader
from recbole.trainer import Trainer
from recbole.utils import EvaluatorType, KGDataLoaderState
from tabulate import tabulate
from torch import nn

from recbole_holo.bridge import checkpoint
from recbole_holo.bridge.compat import quiet_recbole
from recbole_holo.bridge.config import Config
from recbole_holo.bridge.host import guest, random_states_kept
from recbole_holo.errors import ConfigError
from recbole_holo.ops import backend
from recbole_holo.quick_start import Files, prepare
from recbole_holo.reporting import git_commit, versions
from recbole_holo.tracing import HEAD, OPTIMIZER, OTHER, Clock, CpuPeak, CudaPeak, KeptBytes, Key, Trace
from recbole_holo.training.trainer import get_trainer_class

TOTAL = "total"
STEPS, WARM_UP = 5, 2
Shape = dict[str, list[int]]
COLUMNS = (  # header, field of Row, scale, format
    ("parameters", "parameters", 1, ",d"),
    ("kept\nMiB", "saved_bytes", 2**-20, ".2f"),
    ("forward\nms", "forward_seconds", 1e3, ".2f"),
    ("backward\nms", "backward_seconds", 1e3, ".2f"),
    ("training\nms", "train_seconds", 1e3, ".2f"),
    ("\n%", "train_percent", 1, ".1f"),
    ("peak\nMiB", "train_peak_bytes", 2**-20, ".2f"),
    ("scoring\nms", "score_seconds", 1e3, ".2f"),
    ("\n%", "score_percent", 1, ".1f"),
    ("peak\nMiB", "score_peak_bytes", 2**-20, ".2f"),
)


@dataclass(frozen=True)
class Row:
    """What one layer takes.

    Attributes:
        name: of the layer in the model, or one of the rows that the module's text describes.
        parameters: trainable numbers; shared ones belong to the first layer that has them.
        saved_bytes: what autograd keeps from the forward to the backward pass: tensor storages, each counted once, in
            the row that keeps it first. Parameters, buffers, other tensors of the model, and the batch do not count;
            nor does what a custom function keeps otherwise than by ``save_for_backward``.
        forward_seconds, backward_seconds: medians over the measured steps.
        train_seconds: of the training step: forward, backward and optimizer together.
        train_percent: ``train_seconds`` of the total's.
        train_peak_bytes: the most memory in use at once while the row ran, beyond what was there before the step
            (model, optimizer state, batch). It holds what earlier layers keep, so rows do not add up; the total is
            the highest.
        score_seconds, score_percent, score_peak_bytes: the same of a scoring step, without gradients.
    """

    name: str
    parameters: int = 0
    saved_bytes: int = 0
    forward_seconds: float = 0.0
    backward_seconds: float = 0.0
    train_seconds: float = 0.0
    train_percent: float = 0.0
    train_peak_bytes: int = 0
    score_seconds: float = 0.0
    score_percent: float = 0.0
    score_peak_bytes: int = 0


@guest()
@quiet_recbole()
def run(
    model: str | None = None,
    dataset: str | None = None,
    config_file_list: Files = None,
    config_dict: Mapping[str, Any] | None = None,
    steps: int = STEPS,
    argv: Sequence[str] = (),
) -> dict[str, Any]:
    """Profiles ``model`` on ``dataset`` instead of training it: prints the table, and writes it as JSON to
    ``checkpoint_dir``.

    Args: those of :func:`recbole_holo.quick_start.run`, and ``steps``, over which times are medians.

    Returns:
        What the JSON file holds: ``rows`` (see :class:`Row`; the last is the total), the batches' sizes, the
        implementations that ran, versions and the configuration.
    """
    _check(steps)
    config = Config(model, dataset, config_file_list, dict(config_dict or {}), argv)
    trainer, train_data, _, test_data = prepare(config)
    rows, train_batch, score_batch = _profile(trainer, train_data, test_data, steps)
    trainer.tensorboard.close()  # it has a thread of its own
    report = {
        "model": config["model"],
        "dataset": config["dataset"],
        "rows": [asdict(row) for row in rows],
        "steps": steps,
        "train_batch": train_batch,
        "score_batch": score_batch,
        "device": str(config["device"]),
        "threads": torch.get_num_threads(),
        "implementations": backend.report(),
        "seed": config["seed"],
        "versions": versions(),
        "git_commit": git_commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "config": checkpoint.plain(config.final_config_dict),
    }
    print(table(report))
    path = os.path.splitext(trainer.saved_model_file)[0] + "-profile.json"
    Path(path).write_text(json.dumps(report, indent=2, default=str) + "\n", encoding="utf-8")
    print(f"report: {path}")
    return report


@guest()
@quiet_recbole()
def profile(
    config: Any, model: Any = None, train_data: Any = None, eval_data: Any = None, steps: int = STEPS
) -> list[Row]:
    """The rows of one training step and one scoring step; the last row is the total.

    Time is that of ``perf_counter`` on a CPU and of CUDA events on a GPU. The memory in use is what the allocator says
    on a GPU; on a CPU it is the storages of all tensors that PyTorch operations return, from their creation to their
    release, so that what a kernel takes and releases inside itself is not seen. ``cuda_graphs`` are off. Nothing is
    left changed: parameters, buffers, attributes and gradients of the model, and the random states are what they were.

    Args:
        config: of the model and its data.
        model: built from ``config``; None builds it, and its data.
        train_data, eval_data: loaders; the first batch of each is used.
        steps: measured, after two that are not.

    Raises:
        ConfigError: fewer than one step, or a model that is not trained by steps of gradients.
    """
    _check(steps)
    if model is None:
        trainer, train_data, _, eval_data = prepare(config)
    else:
        trainer = get_trainer_class(config)(config, model)
    return _profile(trainer, train_data, eval_data, steps)[0]


def _profile(trainer: Any, train_data: Any, eval_data: Any, steps: int) -> tuple[list[Row], Shape, Shape]:
    """The rows, and the shape of the widest field of either batch."""
    if not isinstance(trainer, Trainer):
        name = type(trainer.model).__name__
        raise ConfigError("model", name, "it is not trained by steps of gradients, so there is none to profile")
    trainer.graphs = None  # in a CUDA graph, layers cannot be told apart
    model, cuda = trainer.model, trainer.device.type == "cuda"
    layers, kept = layers_of(model), KeptBytes(model)
    seconds: dict[Key, float] = {}
    peaks: dict[Key, int] = {}
    with _unchanged(model, (train_data, eval_data)):
        train_batch, eval_batch = _first_batches(trainer, train_data, eval_data)
        kept.hold(train_batch)
        train = partial(_train_step, trainer, _FirstBatch(train_data, train_batch))
        score = partial(_score_step, trainer, eval_data, eval_batch)
        for step in (train, score):
            for _ in range(WARM_UP):
                step()
            clocks = [Clock(cuda) for _ in range(steps)]
            for clock in clocks:
                with Trace(trainer, layers, clock.change):
                    step()
            times = [clock.seconds() for clock in clocks]
            seconds |= {key: statistics.median(time.get(key, 0.0) for time in times) for key in set().union(*times)}
            memory = CudaPeak() if cuda else CpuPeak()
            with Trace(trainer, layers, memory.change), memory:
                step()
            peaks |= memory.peaks
        with Trace(trainer, layers, kept.change), torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda t: t):
            train()
    return _rows(_parameters(model, layers), kept.bytes, seconds, peaks), _widest(train_batch), _widest(eval_batch[0])


def _check(steps: int) -> None:
    if type(steps) is not int or steps < 1:
        raise ConfigError("profile_steps", steps, "use a whole number of at least 1")


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The layers that get a row: children of the model; a list of modules, and a child that holds nothing but one, is
    replaced by its entries."""
    found: dict[str, nn.Module] = {}

    def visit(parent: nn.Module, prefix: str) -> None:
        for name, child in parent.named_children():
            inside = list(child.children())
            wraps_a_list = len(inside) == 1 and isinstance(inside[0], nn.ModuleList) and not list(child._parameters)
            if isinstance(child, (nn.ModuleList, nn.ModuleDict)) or wraps_a_list:
                visit(child, f"{prefix}{name}.")
            elif not any(child is other for other in found.values()):
                found[prefix + name] = child

    visit(model, "")
    return found


def table(report: dict[str, Any]) -> str:
    """The report for people; rows that hold nothing and never ran are left out."""
    rows = [Row(**row) for row in report["rows"]]
    body = [
        [row.name, *(format(getattr(row, field) * scale, style) for _, field, scale, style in COLUMNS)]
        for row in rows
        if any(astuple(row)[1:])
    ]
    headers = ["", *(header for header, *_ in COLUMNS)]
    text = tabulate(body, headers=headers, colalign=("left", *["right"] * len(COLUMNS)), disable_numparse=True)
    ran_on = ", ".join(f"{op}: {name}" for op, name in sorted(report["implementations"].items())) or "plain PyTorch"
    train, score = (next(iter(report[batch].items())) for batch in ("train_batch", "score_batch"))
    return (
        f"\n{report['model']} on {report['dataset']}: one step, median of {report['steps']} "
        f"({report['device']}, {report['threads']} threads)\n\n{text}\n\n"
        f"batches: training {train[0]} {train[1]}, scoring {score[0]} {score[1]}\nran on:  {ran_on}\n"
    )


# ---------------------------------------------------------------------- one step
def _first_batches(trainer: Any, train_data: Any, eval_data: Any) -> tuple[Any, Any]:
    """The first batch for training and the first for scoring, on the model's device."""
    if hasattr(train_data, "set_mode"):  # knowledge-aware models draw from two loaders; this takes from both
        train_data.set_mode(KGDataLoaderState.RSKG)
    if (trainer.config["train_neg_sample_args"] or {}).get("dynamic"):
        train_data.get_model(trainer.model)
    if hasattr(trainer.model, "e_step"):  # RecBole's NCL clusters its users and items between epochs
        trainer.model.e_step()
    batch, *rest = next(iter(eval_data))
    return next(iter(train_data)).to(trainer.device), (batch.to(trainer.device), *rest)


def _widest(batch: Any) -> Shape:
    name = max(batch.columns, key=lambda key: batch[key].numel())
    return {name: list(batch[name].shape)}


class _FirstBatch:
    """A loader that has one batch, and is its loader otherwise."""

    def __init__(self, loader: Any, batch: Any) -> None:
        self._loader, self._batch = loader, batch

    def __iter__(self) -> Iterator[Any]:
        yield self._batch

    def __len__(self) -> int:
        return 1

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)


def _train_step(trainer: Any, one_batch: _FirstBatch) -> None:
    trainer.model.zero_grad()  # the gradients of the last step are none of this one's memory
    trainer._train_epoch(one_batch, 0, show_progress=False)


@torch.no_grad()
def _score_step(trainer: Any, eval_data: Any, batch: Any) -> None:
    """A batch of RecBole's ``Trainer.evaluate``, as far as the scores."""
    trainer.model.eval()
    if isinstance(eval_data, FullSortEvalDataLoader):
        score = trainer._full_sort_batch_eval
        if trainer.item_tensor is None:
            trainer.item_tensor = eval_data._dataset.get_item_feature().to(trainer.device)
    else:
        score = trainer._neg_sample_batch_eval
    if trainer.config["eval_type"] == EvaluatorType.RANKING:
        trainer.tot_item_num = eval_data._dataset.item_num
    score(batch)


@contextmanager
def _unchanged(model: nn.Module, loaders: Sequence[Any]) -> Iterator[None]:
    """Puts back everything that steps inside the block change."""
    attributes = [(module, dict(vars(module))) for module in model.modules()]
    values = [(tensor, tensor.detach().clone()) for tensor in (*model.parameters(), *model.buffers())]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    parts = [part for loader in loaders for part in (loader, *vars(loader).values())]
    generators = {id(g): g for g in (getattr(part, "generator", None) for part in parts) if g is not None}
    orders = [(generator, generator.get_state()) for generator in generators.values()]
    try:
        with random_states_kept():
            yield
    finally:
        for generator, state in orders:
            generator.set_state(state)
        for module, saved in attributes:
            vars(module).clear()
            vars(module).update(saved)
        with torch.no_grad():
            for tensor, value in values:
                tensor.copy_(value)
        for parameter, gradient in gradients:
            parameter.grad = gradient


# ---------------------------------------------------------------------- rows
def _parameters(model: nn.Module, layers: dict[str, nn.Module]) -> dict[str, int]:
    counts: dict[str, int] = {}
    seen: set[int] = set()
    for name, owner in {**layers, OTHER: model}.items():
        new = {id(p): p.numel() for p in owner.parameters() if p.requires_grad and id(p) not in seen}
        counts[name] = sum(new.values())
        seen |= new.keys()
    return counts


def _rows(
    parameters: dict[str, int], kept: dict[str, int], seconds: dict[Key, float], peaks: dict[Key, int]
) -> list[Row]:
    layers = [name for name in parameters if name != OTHER]
    names = [*layers, HEAD, OTHER, OPTIMIZER]

    def spent(name: str, *phases: str) -> float:
        return sum(seconds.get((phase, name), 0.0) for phase in phases)

    def peak(name: str, *phases: str) -> int:
        return max(peaks.get((phase, name), 0) for phase in phases)

    train = ("forward", "backward", "optimizer")
    train_seconds, score_seconds = (sum(spent(name, *phases) for name in names) for phases in (train, ("score",)))
    rows = [
        Row(
            name,
            parameters.get(name, 0),
            kept.get(name, 0),
            spent(name, "forward"),
            spent(name, "backward"),
            spent(name, *train),
            100 * spent(name, *train) / train_seconds,
            peak(name, *train),
            spent(name, "score"),
            100 * spent(name, "score") / score_seconds,
            peak(name, "score"),
        )
        for name in names
    ]
    totals = {
        field.name: (max if field.name.endswith("peak_bytes") else sum)(getattr(row, field.name) for row in rows)
        for field in fields(Row)[1:]
    }
    return [*rows, Row(TOTAL, **totals)]
