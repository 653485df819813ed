"""The profile: what it counts is what there is, and it leaves no trace."""

from __future__ import annotations

import json
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from recbole_holo import cli, profiling
from recbole_holo.bridge import registry
from recbole_holo.bridge.config import Config
from recbole_holo.data.loader import create_dataset, data_preparation
from recbole_holo.errors import ConfigError
from recbole_holo.model.base import SequenceRecommender
from recbole_holo.profiling import Row, profile
from recbole_holo.quick_start import load_data_and_model, prepare, run
from recbole_holo.reporting import count_parameters
from recbole_holo.tracing import HEAD, OPTIMIZER, OTHER

BATCH, LENGTH, WIDTH = 8, 10, 16  # of a training batch of `tiny` with pad_to: max


class Probe(SequenceRecommender):
    """Embeddings and layers that a test chooses."""

    def __init__(self, config: Any, dataset: Any, *layers: nn.Module) -> None:
        super().__init__(config, dataset)
        self.item_embedding = nn.Embedding(self.n_items, WIDTH, padding_idx=0)
        self.layers = nn.ModuleList(layers)
        self.shift = nn.Parameter(torch.zeros(WIDTH))  # of no layer

    def hidden_states(self, item_seq: Tensor) -> Tensor:
        h = self.item_embedding(item_seq)
        for layer in self.layers:
            h = layer(h)
        return h + self.shift

    def item_vectors(self) -> Tensor:
        return self.item_embedding.weight


class Slow(nn.Module):
    """The identity; takes so many seconds forward and backward."""

    def __init__(self, forward: float, backward: float) -> None:
        super().__init__()
        self.seconds = forward, backward

    def forward(self, h: Tensor) -> Tensor:
        return _Sleep.apply(h, *self.seconds)


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, forward: float, backward: float) -> Tensor:
        ctx.seconds = backward
        time.sleep(forward)
        return h.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        time.sleep(ctx.seconds)
        return gradient, None, None


class Wide(nn.Module):
    """The identity by way of a tensor that is ``times`` as large, gone when it returns."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def forward(self, h: Tensor) -> Tensor:
        with torch.no_grad():
            self.seen = h.unsqueeze(0).expand(self.times, *h.shape).clone().sum()
        return h * 1.0


class Watched(nn.Linear):
    """Remembers the weights it ran with."""

    def forward(self, h: Tensor) -> Tensor:
        seen.append(self.weight.sum().item())
        return super().forward(h)


seen: list[float] = []


def profiled(dataset: str, settings: dict[str, Any], *layers: nn.Module, steps: int = 1) -> dict[str, Row]:
    config = Config("RecMamba", dataset, config_dict={**settings, "pad_to": "max"})
    train, _, test = data_preparation(config, create_dataset(config))
    model = Probe(config, train.dataset, *layers)
    return {row.name: row for row in profile(config, model, train, test, steps)}


# ---------------------------------------------------------------------- every model
@pytest.mark.parametrize("model", [*registry.MODELS, "GRU4Rec", "SASRec", "BPR", "LightGCN", "ItemKNN"])
@pytest.mark.parametrize("mode", ["full", "uni5"])
def test_rows_of_every_model(model: str, mode: str, cyclic_dataset: str, tiny: dict[str, Any]) -> None:
    tiny["eval_args"] = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": mode}
    config = Config(model, cyclic_dataset, config_dict={**tiny, "item_attributes": ["genre"]})
    trainer, train, _, test = prepare(config)
    *rows, total = profile(config, trainer.model, train, test, steps=1)
    assert total.name == "total"
    assert [row.name for row in rows[-3:]] == [HEAD, OTHER, OPTIMIZER]
    assert total.parameters == sum(row.parameters for row in rows) == count_parameters(trainer.model)[0]
    assert total.saved_bytes == sum(row.saved_bytes for row in rows)
    for field in ("train", "score"):
        percents = [getattr(row, f"{field}_percent") for row in rows]
        assert min(percents) >= 0
        assert sum(percents) == pytest.approx(100)
        assert getattr(total, f"{field}_seconds") == pytest.approx(sum(getattr(r, f"{field}_seconds") for r in rows))
        assert getattr(total, f"{field}_peak_bytes") == max(getattr(row, f"{field}_peak_bytes") for row in rows)
    for row in rows:
        assert row.train_seconds == pytest.approx(row.forward_seconds + row.backward_seconds) or row.name == OPTIMIZER
    assert total.forward_seconds > 0
    assert total.score_seconds > 0
    if model != "ItemKNN":  # nothing of it is trained
        assert total.backward_seconds > 0
        assert total.saved_bytes > 0
        assert total.train_peak_bytes > 0
        assert next(row for row in rows if row.name == OPTIMIZER).train_seconds > 0


@pytest.mark.parametrize(
    ("model", "settings", "names"),
    [
        ("HoloMambaRec", {"num_layers": 2}, ["item_embedding", "binding", "layers.0", "layers.1"]),
        ("Hydra", {"num_layers": 1, "bundle_size": 2, "bundle_recent": 2}, ["item_embedding", "bundling", "layers.0"]),
        ("SequenceSASRec", {"n_layers": 2}, ["position_embedding", "trm_encoder.layer.0", "trm_encoder.layer.1"]),
        ("SASRec", {"n_layers": 2}, ["position_embedding", "trm_encoder.layer.0", "trm_encoder.layer.1"]),
        ("GRU4Rec", {}, ["item_embedding", "gru_layers", "dense"]),
    ],
)
def test_every_layer_has_a_row_and_runs(
    model: str, settings: dict[str, Any], names: list[str], cyclic_dataset: str, tiny: dict[str, Any]
) -> None:
    config = Config(model, cyclic_dataset, config_dict={**tiny, "item_attributes": ["genre"], **settings})
    rows = {row.name: row for row in profile(config, steps=1)}
    for name in names:
        row = rows[name]
        assert min(row.parameters, row.forward_seconds, row.backward_seconds) > 0, name
        folded = model == "HoloMambaRec" and name == "item_embedding"  # into the table of bound vectors
        assert folded or row.score_seconds > 0, name


# ---------------------------------------------------------------------- what is counted
def test_kept_bytes_are_those_that_autograd_needs(cyclic_dataset: str, tiny: dict[str, Any]) -> None:
    """A Linear needs its input, a Tanh its output, which is the next Linear's input; weights and batch do not count."""
    rows = profiled(
        cyclic_dataset,
        tiny,
        nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.Tanh()),
        nn.Sequential(nn.Linear(2 * WIDTH, WIDTH), nn.Tanh()),
        nn.ReLU(),
    )
    hidden = BATCH * LENGTH * WIDTH * 4
    kept = [rows[name].saved_bytes for name in ("item_embedding", "layers.0", "layers.1", "layers.2")]
    assert kept == [0, hidden + 2 * hidden, hidden, hidden]
    assert rows[HEAD].saved_bytes > 0
    assert rows[OPTIMIZER].saved_bytes == 0


def test_parameters_belong_to_the_first_layer_that_has_them(cyclic_dataset: str, tiny: dict[str, Any]) -> None:
    first, second = nn.Linear(WIDTH, WIDTH), nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False))
    second[0].weight = first.weight
    frozen = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
    rows = profiled(cyclic_dataset, tiny, first, second, frozen)
    counts = [rows[name].parameters for name in ("item_embedding", "layers.0", "layers.1", "layers.2", OTHER)]
    assert counts == [21 * WIDTH, WIDTH * WIDTH + WIDTH, 0, 0, WIDTH]


def test_time_goes_to_the_layer_that_takes_it(cyclic_dataset: str, tiny: dict[str, Any]) -> None:
    rows = profiled(cyclic_dataset, tiny, Slow(0.05, 0.0), nn.Linear(WIDTH, WIDTH), Slow(0.0, 0.05), steps=3)
    assert rows["layers.0"].forward_seconds > 0.05
    assert rows["layers.0"].score_seconds > 0.05
    assert rows["layers.2"].backward_seconds > 0.05
    assert rows["layers.0"].backward_seconds < 0.05
    assert rows["layers.2"].forward_seconds < 0.05
    assert rows["total"].train_seconds > 0.1


def test_peak_memory_is_that_of_the_layer_at_work(cyclic_dataset: str, tiny: dict[str, Any]) -> None:
    hidden = BATCH * LENGTH * WIDTH * 4
    rows = profiled(cyclic_dataset, tiny, nn.Tanh(), Wide(1000), nn.Tanh())
    for peak in ("train_peak_bytes", "score_peak_bytes"):
        first, wide, last = (getattr(rows[f"layers.{number}"], peak) for number in range(3))
        assert wide > 1000 * hidden
        assert max(first, last) < 500 * hidden
        assert getattr(rows["total"], peak) == wide
    assert rows["layers.0"].train_peak_bytes >= 2 * hidden  # embeddings, and their tanh


# ---------------------------------------------------------------------- nothing is left changed
@pytest.mark.parametrize("model", ["HoloMambaRec", "Hydra", "GRU4Rec", "LightGCN"])
def test_a_profile_leaves_no_trace(model: str, cyclic_dataset: str, tiny: dict[str, Any]) -> None:
    config = Config(model, cyclic_dataset, config_dict={**tiny, "item_attributes": ["genre"]})
    trainer, train, _, test = prepare(config)
    net = trainer.model.train()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

    def state() -> dict[str, Any]:
        return {
            "parameters": {name: value.clone() for name, value in net.state_dict().items()},
            "gradients": {name: p.grad for name, p in net.named_parameters()},
            "attributes": {name: sorted(vars(module)) for name, module in net.named_modules()},
            "hooks": sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules()),
            "training": [module.training for module in net.modules()],
            "python": random.getstate(),
            "numpy": np.random.get_state()[1].tolist(),
            "torch": torch.get_rng_state(),
            "batches": train.generator.get_state(),
        }

    net.calculate_loss(next(iter(train))).sum().backward()
    before = state()
    profile(config, net, train, test, steps=1)
    after = state()
    for name, value in before["parameters"].items():
        assert torch.equal(value, after["parameters"].pop(name)), name
    assert after["parameters"] == {}
    assert all(after["gradients"][name] is gradient for name, gradient in before["gradients"].items())
    for name in ("torch", "batches"):
        assert torch.equal(before[name], after[name])
    for name in ("attributes", "hooks", "training", "python", "numpy"):
        assert before[name] == after[name]
    optimizer.step()  # the gradients are whole


def test_the_profiled_steps_are_steps(cyclic_dataset: str, tiny: dict[str, Any]) -> None:
    seen.clear()
    layer = Watched(WIDTH, WIDTH)
    before = layer.weight.detach().clone()
    profiled(cyclic_dataset, tiny, layer, steps=2)
    assert len(set(seen)) >= 4  # weights change from training step to training step
    assert torch.equal(layer.weight, before)


def test_training_after_a_profile_is_training_without_one(cyclic_dataset: str, tiny: dict[str, Any]) -> None:
    checkpoint = run("RecMamba", cyclic_dataset, config_dict={**tiny, "epochs": 1})["report"]["checkpoint"]
    losses = []
    for profiles in (False, True):
        config, model, _, train, _, test = load_data_and_model(checkpoint)
        torch.manual_seed(5)
        if profiles:
            profile(config, model, train, test, steps=1)
        losses.append([model.train().calculate_loss(batch).item() for batch in train])
    assert losses[0] == losses[1]


# ---------------------------------------------------------------------- the command
def test_the_command_prints_a_table_and_writes_it(cyclic_dataset: str, tiny: dict[str, Any], capsys: Any) -> None:
    settings = [f"--{key}={value}" for key, value in tiny.items()]
    argv = ["--model=RecMamba", f"--dataset={cyclic_dataset}", "--profile", "--profile_steps=2", *settings]
    assert cli.main(argv) == 0
    printed = capsys.readouterr().out
    for text in ("RecMamba on cycle: one step, median of 2", "layers.0", "optimizer step", "total", "ran on:"):
        assert text in printed
    assert not list(Path("saved").glob("*.pth")), "it does not train"
    (path,) = Path("saved").glob("*-profile.json")
    report = json.loads(path.read_text())
    assert [row["name"] for row in report["rows"]][-1] == "total"
    assert report["train_batch"] == {"item_id_list": [8, 10]}
    assert report["config"]["hidden_size"] == 16
    assert report["versions"]["torch"]
    assert profiling.table(report) in printed


@pytest.mark.parametrize(
    ("flags", "field"),
    [(["--nproc=2"], "nproc"), (["--profile_steps=0"], "profile_steps"), (["--model=Hydr"], "model")],
)
def test_bad_flags(flags: list[str], field: str, cyclic_dataset: str, capsys: Any) -> None:
    assert cli.main([f"--dataset={cyclic_dataset}", "--profile", *flags, "--state=ERROR"]) == 2
    assert f"error: {field}: " in capsys.readouterr().err


def test_a_model_without_gradient_steps(cyclic_dataset: str, tiny: dict[str, Any]) -> None:
    config = Config("RecMamba", cyclic_dataset, config_dict=tiny)
    _, train, _, test = prepare(config)
    boosting = type("BoostingTrainer", (), {"model": object()})()  # as RecBole's for decision trees: no Trainer
    with pytest.raises(ConfigError, match="not trained by steps of gradients"):
        profiling._profile(boosting, train, test, 1)
