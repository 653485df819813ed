"""The step in other runtimes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from recbole_holo.errors import ConfigError
from recbole_holo.inference.export import export_onnx, export_step
from recbole_holo.ops import backend
from tests.model.conftest import build_tiny

from .conftest import N_ITEMS, served

MODELS = ["HoloMambaRec", "Hydra", "RecMamba", "Mamba4Rec", "RecMamba_paper"]


def histories() -> torch.Tensor:
    return torch.randint(1, N_ITEMS, (5, 9), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", MODELS)
def test_torch_export(name: str) -> None:
    model, _ = served(name)
    step = export_step(model).module()
    assert backend.get_backend() == "auto"
    items, state = histories(), model.init_state(5)
    numbers = state.numbers
    for t, column in enumerate(items.T):
        scores, numbers = step(column, torch.full((5,), t), numbers)
        hidden, state = model.step(column, state)
        with torch.no_grad():
            torch.testing.assert_close(scores, model.score_all(hidden), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(numbers, state.numbers, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_onnx(name: str, tmp_path: Path) -> None:
    import onnxruntime

    model, _ = served(name)
    path = tmp_path / "step.onnx"
    export_onnx(model, path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    items, state = histories(), model.init_state(5)
    numbers = state.numbers.numpy()
    for t, column in enumerate(items.T):
        given = {"items": column.numpy(), "events": np.full(5, t, dtype=np.int64), "numbers": numbers}
        wanted = {one.name for one in session.get_inputs()}
        scores, numbers = session.run(["scores", "next_numbers"], {k: v for k, v in given.items() if k in wanted})
        hidden, state = model.step(column, state)
    with torch.no_grad():
        np.testing.assert_allclose(scores, model.score_all(hidden).numpy(), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(numbers, state.numbers.numpy(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("form", ["add", "role"])
def test_the_time_before_an_event_is_an_input(form: str, tmp_path: Path) -> None:
    import onnxruntime

    model, _ = served("RecMamba", event_time="gap", event_time_form=form, event_time_buckets=6)
    torch.nn.init.normal_(model.event_time.vectors)
    export_onnx(model, tmp_path / "step.onnx")
    session = onnxruntime.InferenceSession(str(tmp_path / "step.onnx"), providers=["CPUExecutionProvider"])
    items, state = histories(), model.init_state(5)
    gaps, numbers = items % 6, state.numbers.numpy()
    for t, (column, since) in enumerate(zip(items.T, gaps.T, strict=True)):
        given = {"items": column.numpy(), "events": np.full(5, t), "numbers": numbers, "gaps": since.numpy()}
        wanted = {one.name for one in session.get_inputs()}
        scores, numbers = session.run(["scores", "next_numbers"], {k: v for k, v in given.items() if k in wanted})
        hidden, state = model.step(column, state, gaps=since)
    with torch.no_grad():
        np.testing.assert_allclose(scores, model.score_all(hidden).numpy(), rtol=1e-3, atol=1e-4)
        assert not torch.allclose(hidden, model.forward(items, torch.full((5,), 9)), rtol=1e-2)


def test_what_has_no_graph() -> None:
    with pytest.raises(ConfigError, match=r"bundle_inference: 3 .* a graph cannot follow"):
        export_step(served(bundle_size=3, bundle_recent=5)[0])
    with pytest.raises(ConfigError, match="only a model with a state has a step"):
        export_step(build_tiny("SequenceSASRec"))
