"""Training on CUDA: no step waits for the device, and replayed graphs compute what eager steps do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from recbole_holo.bridge import registry
from recbole_holo.bridge.config import Config
from recbole_holo.data.loader import create_dataset, data_preparation
from recbole_holo.ops import backend
from recbole_holo.quick_start import run
from recbole_holo.training.trainer import HoloTrainer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

SETTINGS = {"hidden_size": 64, "MAX_ITEM_LIST_LENGTH": 24, "train_batch_size": 8, "learning_rate": 0.003}
WITHOUT_DROPOUT = {"dropout_prob": 0.0, "layer_dropout_prob": 0.0, "hidden_dropout_prob": 0.0, "attn_dropout_prob": 0.0}


@pytest.fixture(autouse=True)
def _backend() -> Iterator[None]:
    backend.set_backend("auto")
    yield
    torch.cuda.set_sync_debug_mode("default")


def trainer_and_data(dataset: str, model: str, **settings: Any) -> tuple[HoloTrainer, Any]:
    config = Config(model, dataset, config_dict=settings)
    assert config["device"].type == "cuda"
    train, _, _ = data_preparation(config, create_dataset(config))
    torch.manual_seed(0)
    net = registry.get_model_class(model)(config, train.dataset).to(config["device"])
    return HoloTrainer(config, net), train


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("amp", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("model", list(registry.MODELS))
def test_no_step_waits_for_the_device(
    model: str, amp: bool, graphs: bool, cyclic_dataset: str, tiny: dict[str, Any]
) -> None:
    tiny.update(SETTINGS, enable_amp=amp, cuda_graphs=graphs, item_attributes=["genre"], ema_decay=0.9)
    trainer, train = trainer_and_data(cyclic_dataset, model, **tiny, clip_grad_norm={"max_norm": 1.0})
    train_without_waiting(trainer, train)


@pytest.mark.parametrize(
    "settings",
    [
        {"binding": "both", "binding_algebra": "unitary", "bind_output": True, "attribute_floats": "learned"},
        {"binding": "role", "bind_output": True, "cold_items": "attributes", "loss_type": "BPR"},
        {"bundle_size": 3, "bundle_recent": 4, "bundle_schedule": "mixed"},
        {"event_time": "gap", "event_time_form": "role", "cuda_graphs": True},
    ],
    ids=["bound", "cold", "bundled", "times"],
)
@pytest.mark.parametrize("model", ["HoloMambaRec", "Hydra", "RecMamba", "Mamba4Rec"])
def test_metadata_and_bundles_do_not_wait(
    model: str, settings: dict[str, Any], cyclic_dataset: str, tiny: dict[str, Any]
) -> None:
    tiny.update(SETTINGS, item_attributes=["genre", "tags", "price"])
    trainer, train = trainer_and_data(cyclic_dataset, model, **{**tiny, **settings})
    train_without_waiting(trainer, train)


def train_without_waiting(trainer: HoloTrainer, train: Any) -> None:
    trainer.fit(train, saved=False, verbose=False)  # compiles, tunes and captures
    trainer.model.train()
    scaler = torch.amp.GradScaler("cuda", enabled=False)
    batches = iter(train)
    first = next(batches)  # the epoch's order is copied before it
    with trainer.graphs.replaying() if trainer.graphs is not None else nullcontext():
        trainer._step(first.to(trainer.device), trainer.model.calculate_loss, scaler)
        torch.cuda.set_sync_debug_mode("error")
        for batch in batches:
            trainer._step(batch.to(trainer.device), trainer.model.calculate_loss, scaler)
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("amp", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("model", list(registry.MODELS))
def test_graphs_compute_what_eager_steps_do(
    model: str, amp: bool, cyclic_dataset: str, tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step by step from the same weights, for each shape of a batch, the short last one among them."""
    monkeypatch.setenv("TRITON_F32_DEFAULT", "ieee")
    tiny.update(SETTINGS, **WITHOUT_DROPOUT, enable_amp=amp, item_attributes=["genre"], train_batch_size=6)
    trainer, train = trainer_and_data(cyclic_dataset, model, **tiny, cuda_graphs=True)
    assert trainer.graphs is not None
    train.round_width_to = 8
    trainer.model.train()
    gradients: dict[bool, list[dict[str, torch.Tensor]]] = {}
    losses: dict[bool, list[torch.Tensor]] = {}
    captured_widths = set()
    batches = list(train)
    for graphed in (False, True, True):  # captured the second time, replayed again the third
        gradients[graphed], losses[graphed] = [], []
        for batch in batches:
            trainer.optimizer.zero_grad()
            torch.manual_seed(5)  # the same negatives
            with torch.autocast("cuda", torch.bfloat16, enabled=amp, cache_enabled=False):
                if graphed:
                    with trainer.graphs.replaying():
                        loss = trainer.model.calculate_loss(batch)
                else:
                    loss = trainer.model.calculate_loss(batch)
            loss.backward()
            losses[graphed].append(loss.detach().clone())
            named = trainer.model.named_parameters()
            gradients[graphed].append({n: p.grad.detach().clone() for n, p in named if p.grad is not None})
        captured_widths.update(trainer.graphs._encoders)
    assert captured_widths == {b["item_id_list"].shape[1] for b in batches if len(b) == 6}
    tolerance = 5e-2 if amp else 2e-3
    torch.testing.assert_close(torch.stack(losses[True]), torch.stack(losses[False]), rtol=tolerance, atol=tolerance)
    for eager, replayed in zip(gradients[False], gradients[True], strict=True):
        assert eager.keys() == replayed.keys()
        for name, gradient in eager.items():
            scale = gradient.abs().max().clamp(min=1e-6)
            assert (replayed[name] - gradient).abs().max() / scale < tolerance, name


def test_training_goes_on_after_a_failed_capture(
    cyclic_dataset: str, tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """With dropout, whose generator a failed capture leaves in capture mode, and with the cache emptied."""
    tiny.update(SETTINGS, cuda_graphs="auto", dropout_prob=0.2)
    trainer, train = trainer_and_data(cyclic_dataset, "HoloMambaRec", **tiny)
    eager = trainer.model.hidden_states
    waiting = lambda items, **times: eager(items, **times) * items.max().item()  # noqa: E731
    monkeypatch.setattr(trainer.model, "hidden_states", waiting)
    stream = torch.cuda.current_stream()
    trainer.fit(train, saved=False, verbose=False)
    assert "cannot be captured" in caplog.text
    assert torch.cuda.current_stream() == stream
    torch.cuda.empty_cache()


@pytest.mark.parametrize("model", list(registry.MODELS))
def test_training_with_graphs_learns_as_without(model: str, cyclic_dataset: str, tiny: dict[str, Any]) -> None:
    """Optimizer, clipping, dropout and validation between replays: the loss falls as it does eagerly."""
    tiny.update(SETTINGS, item_attributes=["genre"], epochs=8, clip_grad_norm={"max_norm": 1.0}, loss_type="CE")
    falls = []
    for graphs in (False, True):
        trainer, train = trainer_and_data(cyclic_dataset, model, **tiny, cuda_graphs=graphs)
        trainer.fit(train, saved=False, verbose=False)
        losses = list(trainer.train_loss_dict.values())
        falls.append(losses[-1] / losses[0])
    assert falls[0] < 0.9
    assert falls[1] == pytest.approx(falls[0], abs=0.1)


def test_peak_memory_is_of_the_run_and_not_of_the_one_before(cyclic_dataset: str, tiny: dict[str, Any]) -> None:
    def peak(hidden_size: int) -> int:
        settings = {**tiny, "hidden_size": hidden_size, "epochs": 1}
        return run("HoloMambaRec", cyclic_dataset, config_dict=settings)["report"]["peak_memory_bytes"]

    assert peak(512) > 2 * peak(16)
