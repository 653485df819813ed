"""The training step: what it asks of the device, its optimizer, and which batches are replayed from graphs."""

from __future__ import annotations

import logging
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, optim
from torch.utils._python_dispatch import TorchDispatchMode

from recbole_holo.bridge import registry
from recbole_holo.bridge.config import Config
from recbole_holo.data.loader import create_dataset, data_preparation
from recbole_holo.ops import backend
from recbole_holo.training import graphs
from recbole_holo.training.graphs import SHAPES, EncoderGraphs, width_multiple
from recbole_holo.training.schedule import WeightAverage
from recbole_holo.training.trainer import HoloTrainer

LOOKS = ("aten::_local_scalar_dense", "aten::is_nonzero")  # .item(), bool(), int(): each waits for a GPU
SIZES_UNKNOWN = ("aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_consecutive")
FROM_HOST = ("aten::lift_fresh",)  # torch.tensor(...)


class Watch(TorchDispatchMode):
    """Counts the operations that would make the host wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split(".")[0]
        if name in LOOKS + SIZES_UNKNOWN + FROM_HOST:
            self.seen[name] += 1
        if name in ("aten::index", "aten::index_put", "aten::index_put_"):
            self.seen["boolean index"] += any(i is not None and i.dtype == torch.bool for i in args[1])
        if name == "aten::repeat_interleave" and (kwargs or {}).get("output_size") is None:
            self.seen["repeat_interleave"] += 1
        return func(*args, **(kwargs or {}))


def trainer_and_data(dataset: str, model: str = "RecMamba", **settings: Any) -> tuple[HoloTrainer, Any]:
    config = Config(model, dataset, config_dict=settings)
    train, _, _ = data_preparation(config, create_dataset(config))
    torch.manual_seed(0)
    return HoloTrainer(config, registry.get_model_class(model)(config, train.dataset)), train


def test_the_watch_sees_what_it_watches_for() -> None:
    x = torch.randn(4)
    with Watch() as watch:
        x[x > 0].sum().item()
        x[:2][x[:2] > 9] = 0.0
        (x > 0).nonzero()
        torch.tensor([1.0])
        torch.arange(4).repeat_interleave(torch.arange(4))
    assert set(watch.seen) == {
        "boolean index",
        "aten::_local_scalar_dense",
        "aten::nonzero",
        "aten::lift_fresh",
        "repeat_interleave",
    }
    assert watch.seen["boolean index"] == 2


@pytest.fixture
def _reference() -> Iterator[None]:
    """The plain forms are what could run on a GPU."""
    before = backend.get_backend()
    backend.set_backend("reference")
    yield
    backend.set_backend(before)


@pytest.mark.usefixtures("_reference")
@pytest.mark.parametrize("model", list(registry.MODELS))
@pytest.mark.parametrize(
    "settings",
    [{}, {"seen_items": "excluded", "loss_type": "SampledCE"}, {"event_time": "request", "event_time_form": "role"}],
    ids=["plain", "seen", "times"],
)
def test_no_step_asks_the_device(
    model: str, settings: dict[str, Any], cyclic_dataset: str, tiny: dict[str, Any]
) -> None:
    tiny.update(settings)
    tiny.update(item_attributes=["genre"], clip_grad_norm={"max_norm": 1.0}, ema_decay=0.9)
    tiny.update(dropout_prob=0.0, layer_dropout_prob=0.0)  # on a CPU its seeds are drawn on the host
    trainer, train = trainer_and_data(cyclic_dataset, model, **tiny)
    trainer.fit(train, saved=False, verbose=False)
    trainer.average = WeightAverage(trainer.model, 0.9)
    trainer.model.train()
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    batches = iter(train)
    next(batches)  # the epoch's order is copied before it
    with Watch() as watch:
        for batch in batches:
            trainer._step(batch.to(trainer.device), trainer.model.calculate_loss, scaler)
    assert watch.seen.pop("aten::_local_scalar_dense") == len(train) - 1  # on a CPU each loss is looked at
    assert not +watch.seen


@pytest.mark.parametrize("learner", ["adam", "adamw", "sgd", "adagrad", "rmsprop"])
def test_learners_keep_recboles_meaning(learner: str, cyclic_dataset: str, tiny: dict[str, Any]) -> None:
    """Fused or not, a step is that of PyTorch's optimizer with RecBole's settings."""
    tiny.update(learner=learner, weight_decay=0.1, learning_rate=0.02, adam_betas=[0.8, 0.99])
    trainer, train = trainer_and_data(cyclic_dataset, **tiny)
    twin, _ = trainer_and_data(cyclic_dataset, **tiny)
    kind = {"adam": optim.Adam, "adamw": optim.AdamW, "sgd": optim.SGD, "adagrad": optim.Adagrad}.get(
        learner, optim.RMSprop
    )
    betas = {"betas": (0.8, 0.99), "foreach": False, "fused": False} if "adam" in learner else {}
    spared = [p for n, p in twin.model.named_parameters() if n.endswith(("A_log", ".D"))]
    decayed = [p for n, p in twin.model.named_parameters() if not n.endswith(("A_log", ".D"))]
    plain = kind([{"params": decayed}, {"params": spared, "weight_decay": 0.0}], lr=0.02, weight_decay=0.1, **betas)
    assert type(trainer.optimizer) is kind
    if "adam" in learner:
        assert all(group["fused"] for group in trainer.optimizer.param_groups)
    batches = list(train)[:3]
    for net, optimizer in ((trainer.model, trainer.optimizer), (twin.model, plain)):
        net.eval()
        for batch in batches:
            optimizer.zero_grad()
            net.calculate_loss(batch).backward()
            optimizer.step()
    for (name, p), other in zip(trainer.model.named_parameters(), twin.model.parameters(), strict=True):
        torch.testing.assert_close(p, other, rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("learner", ["adam", "adamw", "sgd"])
def test_one_thread_updates_to_the_bit_as_several(
    learner: str, cyclic_dataset: str, tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, train_data = trainer_and_data(cyclic_dataset, **{**tiny, "learner": learner})
    assert trainer.few_parameters
    batches = list(train_data)  # in one order
    threads, updates = [], trainer.optimizer.step
    monkeypatch.setattr(trainer.optimizer, "step", lambda: (threads.append(torch.get_num_threads()), updates())[1])
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = []
        for few in (True, False):
            trainer.few_parameters = few
            trainer.model.load_state_dict(found[0][0] if found else trainer.model.state_dict())
            trainer.optimizer.state.clear()
            start = {name: value.clone() for name, value in trainer.model.state_dict().items()}
            torch.manual_seed(0)
            for batch in batches:
                trainer._step(batch, trainer.model.calculate_loss, torch.amp.GradScaler("cpu", enabled=False))
            assert torch.get_num_threads() == 2
            found.append((start, {name: value.clone() for name, value in trainer.model.state_dict().items()}))
    finally:
        torch.set_num_threads(before)
    assert set(threads[: len(threads) // 2]) == {1}
    assert set(threads[len(threads) // 2 :]) == {2}
    assert any(not torch.equal(found[0][0][name], value) for name, value in found[0][1].items())
    assert all(torch.equal(value, found[1][1][name]) for name, value in found[0][1].items())


def test_recboles_models_keep_recboles_optimizer(cyclic_dataset: str, tiny: dict[str, Any]) -> None:
    config = Config("GRU4Rec", cyclic_dataset, config_dict={**tiny, "learner": "adam"})
    train, _, _ = data_preparation(config, create_dataset(config))
    trainer = HoloTrainer(config, registry.get_model_class("GRU4Rec")(config, train.dataset))
    assert not any(group["fused"] for group in trainer.optimizer.param_groups)


def test_the_reported_loss_is_the_mean_over_targets(cyclic_dataset: str, tiny: dict[str, Any]) -> None:
    tiny.update(learner="sgd", learning_rate=1e-12)  # the weights stay
    trainer, train = trainer_and_data(cyclic_dataset, **tiny, dropout_prob=0.0, layer_dropout_prob=0.0)
    reported = trainer._train_epoch(train, 0)
    with torch.no_grad():
        batches = list(train)
        summed = sum(trainer.model.calculate_loss(batch).item() * batch.n_targets for batch in batches)
    assert reported == pytest.approx(len(batches) * summed / sum(batch.n_targets for batch in batches), rel=1e-4)


def test_an_epoch_keeps_nothing_of_its_steps(cyclic_dataset: str, tiny: dict[str, Any], monkeypatch: Any) -> None:
    """A small tensor kept of every step tears the heap into pieces: ML-1M at length 50 grew by a gigabyte an epoch."""
    trainer, train = trainer_and_data(cyclic_dataset, **tiny)
    kept: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    one_step = trainer._step

    def watched(*args: Any) -> Tensor:
        found = one_step(*args)
        kept.append(weakref.ref(found))
        alive.append(sum(loss() is not None for loss in kept))
        return found

    monkeypatch.setattr(trainer, "_step", watched)
    trainer._train_epoch(train, 0)
    assert len(alive) == len(train) > 3
    assert max(alive) <= 2


# ---------------------------------------------------------------------- which batches are replayed
@pytest.mark.parametrize("longest", [1, 8, 50, 64, 65, 200, 2000])
def test_padded_lengths_are_few(longest: int) -> None:
    multiple = width_multiple(longest)
    assert multiple % 8 == 0
    assert len({min(-(-length // multiple) * multiple, longest) for length in range(1, longest + 1)}) <= SHAPES


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Shapes that are captured, on a machine without CUDA: capturing is replaced by the module itself."""
    shapes: list[tuple[int, ...]] = []

    def capture(module: Any, samples: tuple[Tensor], **settings: Any) -> Any:
        shapes.append(tuple(samples[0].shape))
        return module

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 0))
    monkeypatch.setattr(graphs, "_as_before", lambda device, pool: torch.random.fork_rng(devices=[]))
    return shapes


@pytest.mark.parametrize("event_time", [None, "gap"])
def test_each_shape_of_full_batches_is_captured_once(
    event_time: str | None, captured: list[tuple[int, ...]], cyclic_dataset: str, tiny: dict[str, Any]
) -> None:
    tiny.update(
        event_time=event_time, train_batch_size=6, dropout_prob=0.0, layer_dropout_prob=0.0
    )  # 40 windows: the last batch has four
    plain, train = trainer_and_data(cyclic_dataset, **tiny)
    plain.fit(train, saved=False, verbose=False)
    trainer, train = trainer_and_data(cyclic_dataset, **tiny)
    trainer.graphs = EncoderGraphs(trainer.model, 6, may_fail=False)
    trainer.fit(train, saved=False, verbose=False)
    assert train.round_width_to == 8
    assert sorted(captured) == [(6, 8), (6, 10)]
    assert "hidden_states" not in vars(trainer.model)
    for (name, p), other in zip(trainer.model.named_parameters(), plain.model.parameters(), strict=True):
        torch.testing.assert_close(p, other, rtol=1e-2, atol=1e-3, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("may_fail", [True, False])
def test_a_failed_capture_is_a_warning_or_an_error(
    may_fail: bool,
    captured: list[tuple[int, ...]],
    cyclic_dataset: str,
    tiny: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", fails)
    trainer, train = trainer_and_data(cyclic_dataset, **tiny)
    trainer.graphs = EncoderGraphs(trainer.model, 8, may_fail)
    with caplog.at_level(logging.WARNING):
        if may_fail:
            trainer.fit(train, saved=False, verbose=False)
            assert caplog.text.count("goes on without graphs") == 1
        else:
            with pytest.raises(RuntimeError, match="not permitted"):
                trainer.fit(train, saved=False, verbose=False)
    assert "hidden_states" not in vars(trainer.model)
