"""The learning rate along a run and the average of the weights: values, resuming, and what validation sees."""

from __future__ import annotations

import math
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from recbole_holo.bridge import registry
from recbole_holo.bridge.checkpoint import load
from recbole_holo.bridge.config import Config
from recbole_holo.data.loader import create_dataset, data_preparation
from recbole_holo.errors import ConfigError
from recbole_holo.quick_start import load_data_and_model, run
from recbole_holo.training.schedule import KINDS, LearningRate, WeightAverage
from recbole_holo.training.trainer import HoloTrainer


def trainer_and_data(dataset: str, model: str = "RecMamba", **settings: Any) -> tuple[HoloTrainer, Any, Any]:
    config = Config(model, dataset, config_dict=settings)
    train, valid, _ = data_preparation(config, create_dataset(config))
    torch.manual_seed(0)
    return HoloTrainer(config, registry.get_model_class(model)(config, train.dataset)), train, valid


# ---------------------------------------------------------------------- learning rate
@pytest.mark.parametrize("kind", KINDS)
def test_rates_rise_to_one_and_fall_to_the_end(kind: str) -> None:
    rate = LearningRate(kind, 0.25, 0.1)
    steps = [rate.factor((step + 1) / 1000) for step in range(1000)]
    assert max(steps) == pytest.approx(1.0)
    peak = steps.index(max(steps))
    assert peak in (249, 250)
    assert all(a < b for a, b in pairwise(steps[: peak + 1]))
    assert all(a > b for a, b in pairwise(steps[peak:]))
    assert steps[-1] == pytest.approx(0.1)
    assert steps[0] == pytest.approx(1 / 25 if kind == "onecycle" else 1 / 250, rel=1e-2)
    middle = rate.factor(0.25 + 0.75 / 3)
    assert middle == pytest.approx(0.7 if kind == "linear" else 0.1 + 0.9 * (1 + math.cos(math.pi / 3)) / 2)


def test_without_a_warm_up_the_rate_only_falls() -> None:
    assert LearningRate("linear", 0.0, 0.0).factor(0.01) == pytest.approx(0.99)


def test_onecycle_is_pytorchs() -> None:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1.0, total_steps=1001, pct_start=0.3, cycle_momentum=False, final_div_factor=4.0
    )
    ours = LearningRate("onecycle", 0.3, 0.01)  # 1/25/4
    for step in range(1, 1000):
        optimizer.step()
        theirs.step()
        assert ours.factor(step / 1000) == pytest.approx(
            theirs.get_last_lr()[0], abs=5e-3
        )  # its peak is a step earlier


def test_every_step_has_its_rate(cyclic_dataset: str, tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {**tiny, "epochs": 3, "lr_scheduler": "cosine", "warmup_ratio": 0.2, "lr_final_ratio": 0.01}
    settings["learning_rate"] = 0.01
    trainer, train, valid = trainer_and_data(cyclic_dataset, **settings)
    rates, step = [], trainer.optimizer.step

    def recorded(*args: Any, **kwargs: Any) -> Any:
        assert len({group["lr"] for group in trainer.optimizer.param_groups}) == 1
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        return step(*args, **kwargs)

    monkeypatch.setattr(trainer.optimizer, "step", recorded)
    trainer.fit(train, valid, saved=False, verbose=False)
    total = 3 * len(train)
    rate = LearningRate("cosine", 0.2, 0.01)
    assert rates == pytest.approx([0.01 * rate.factor((step + 1) / total) for step in range(total)])


# ---------------------------------------------------------------------- average
def test_the_average_follows_its_recurrence() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    average, expected = WeightAverage(model, 0.8), [p.detach().double() for p in model.parameters()]
    for n in range(1, 60):
        for p in model.parameters():
            p.data += torch.randn_like(p)
        average.update()
        decay = min(0.8, (1 + n) / (10 + n))
        expected = [decay * a + (1 - decay) * p.detach() for a, p in zip(expected, model.parameters(), strict=True)]
    trained = [p.detach().clone() for p in model.parameters()]
    addresses = [p.data_ptr() for p in model.parameters()]
    with average.applied():
        for p, wanted in zip(model.parameters(), expected, strict=True):
            torch.testing.assert_close(p.detach().double(), wanted, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(p, before) for p, before in zip(model.parameters(), trained, strict=True))
    assert [p.data_ptr() for p in model.parameters()] == addresses


def test_validation_and_the_saved_model_have_the_average(cyclic_dataset: str, tiny: dict[str, Any]) -> None:
    settings = {**tiny, "ema_decay": 0.9, "epochs": 3, "eval_step": 3, "learning_rate": 0.02}
    trainer, train, valid = trainer_and_data(cyclic_dataset, **settings)
    evaluated: dict[str, torch.Tensor] = {}
    evaluate = trainer.evaluate

    def remembered(*args: Any, **kwargs: Any) -> Any:
        evaluated.update({name: p.detach().clone() for name, p in trainer.model.named_parameters()})
        return evaluate(*args, **kwargs)

    trainer.evaluate = remembered  # type: ignore[method-assign]
    torch.manual_seed(1)
    trainer.fit(train, valid, verbose=False)
    plain, train, valid = trainer_and_data(cyclic_dataset, **{**settings, "ema_decay": None})
    torch.manual_seed(1)
    plain.fit(train, valid, verbose=False)

    saved = load(trainer.saved_model_file)
    left = dict(trainer.model.named_parameters())
    assert evaluated.keys() == left.keys()
    for name, trained in plain.model.named_parameters():
        assert torch.equal(saved["ema"]["weights"][name], trained), name  # averaging does not disturb training
        assert torch.equal(saved["state_dict"][name], evaluated[name]), name
        assert torch.equal(left[name], evaluated[name]), name
        assert not torch.equal(trained, evaluated[name]), name


def test_the_report_is_of_the_average(cyclic_dataset: str, tiny: dict[str, Any]) -> None:
    settings = {**tiny, "ema_decay": 0.9, "learning_rate": 0.02}
    result = run("RecMamba", cyclic_dataset, config_dict=settings)
    config, net, _, train, valid, test = load_data_and_model(result["report"]["checkpoint"])
    trainer = HoloTrainer(config, net)
    trainer.eval_collector.data_collect(train)
    assert trainer.evaluate(test, load_best_model=False) == result["test_result"]
    assert trainer.evaluate(valid, load_best_model=False) == result["best_valid_result"]


@pytest.mark.parametrize("eval_step", [0, 1])
@pytest.mark.parametrize(
    "settings",
    [
        {"lr_scheduler": "cosine"},
        {"lr_scheduler": "onecycle", "ema_decay": 0.9},
        {"ema_decay": 0.9, "train_batch_tokens": 40},
    ],
    ids=str,
)
def test_resuming_is_exact(
    settings: dict[str, Any],
    eval_step: int,
    cyclic_dataset: str,
    tiny: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiny.update(eval_step=eval_step, epochs=5, dropout_prob=0.3, learning_rate=0.01, stopping_step=9, **settings)
    save = HoloTrainer._save_checkpoint

    def and_keep_a_copy(self: HoloTrainer, epoch: int, *args: Any, **kwargs: Any) -> None:
        save(self, epoch, *args, **kwargs)
        shutil.copy(self.saved_model_file, f"epoch-{epoch}.pth")

    with monkeypatch.context() as patched:
        patched.setattr(HoloTrainer, "_save_checkpoint", and_keep_a_copy)
        whole = run("RecMamba", cyclic_dataset, config_dict=tiny)
    early = min(int(path.stem.split("-")[1]) for path in Path.cwd().glob("epoch-*.pth"))
    assert early < load(whole["report"]["checkpoint"])["epoch"]
    rest = run("RecMamba", cyclic_dataset, config_dict={**tiny, "resume": f"epoch-{early}.pth"})
    assert rest["test_result"] == whole["test_result"]
    assert rest["best_valid_result"] == whole["best_valid_result"]
    assert_equal(load(rest["report"]["checkpoint"]), load(whole["report"]["checkpoint"]))


def assert_equal(left: Any, right: Any, path: str = "") -> None:
    """Checkpoints are alike to the bit, but for the configuration."""
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right), path
    elif isinstance(left, dict):
        assert left.keys() == right.keys(), path
        for key in left.keys() - {"config"}:
            assert_equal(left[key], right[key], f"{path}/{key}")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), path
        for index, (a, b) in enumerate(zip(left, right, strict=True)):
            assert_equal(a, b, f"{path}/{index}")
    else:
        assert left == right, path


def test_a_run_may_be_continued_without_the_average(cyclic_dataset: str, tiny: dict[str, Any]) -> None:
    tiny.update(epochs=2, eval_step=0)
    first = run("RecMamba", cyclic_dataset, config_dict={**tiny, "ema_decay": 0.9})["report"]["checkpoint"]
    trained = load(first)["ema"]["weights"]
    trainer, _, _ = trainer_and_data(cyclic_dataset, **tiny)
    trainer.resume_checkpoint(first)
    for name, p in trainer.model.named_parameters():
        assert torch.equal(p, trained[name]), name
    assert trainer.average is None


@pytest.mark.parametrize(
    ("field", "settings"),
    [
        ("lr_scheduler", {"lr_scheduler": "cosin"}),
        ("warmup_ratio", {"lr_scheduler": "linear", "warmup_ratio": 1.0}),
        ("lr_final_ratio", {"lr_scheduler": "linear", "lr_final_ratio": -0.1}),
        ("ema_decay", {"ema_decay": 1.0}),
        ("cuda_graphs", {"cuda_graphs": "always"}),
        ("cuda_graphs", {"cuda_graphs": True, "use_gpu": False}),
    ],
)
def test_bad_settings_name_the_field(
    field: str, settings: dict[str, Any], cyclic_dataset: str, tiny: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=f"^{field}: "):
        trainer_and_data(cyclic_dataset, **tiny, **settings)
