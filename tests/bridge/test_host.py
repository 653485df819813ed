"""A run is a guest of the application that calls it: what it leaves behind, what is seen of it, and two at once."""

from __future__ import annotations

import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recbole_holo import profiling
from recbole_holo.bridge import host
from recbole_holo.quick_start import load_data_and_model, load_model, objective_function, run


@pytest.fixture
def application(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[logging.Handler]:
    """An application with a log file of its own and nothing else on the root logger."""
    monkeypatch.delenv(host.VISIBLE_DEVICES, raising=False)
    handler, root = logging.FileHandler(tmp_path / "application.txt"), logging.getLogger()
    before, level = root.handlers[:], root.level
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    yield handler
    root.handlers[:] = before
    root.setLevel(level)
    handler.close()


def process() -> dict[str, Any]:
    """What an application may have set up."""
    root, own = logging.getLogger(), logging.getLogger("recbole_holo")
    _, keys, *rest = np.random.get_state()
    flags = torch.backends.cudnn
    return {
        "handlers": [(handler, handler.level, handler.stream.closed) for handler in root.handlers],
        "level": (root.level, logging.root.manager.disable, logging.raiseExceptions),
        "our logger": (own.handlers[:], own.level, own.propagate),
        "warnings": (warnings.filters[:], warnings.showwarning),
        "signals": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "directory": os.getcwd(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "python": random.getstate(),
        "numpy": (keys.tolist(), rest),
        "torch": torch.get_rng_state().tolist(),
        "flags": (flags.benchmark, flags.deterministic, torch.is_anomaly_enabled(), torch.get_default_dtype()),
        "visible devices": os.environ.get(host.VISIBLE_DEVICES),
        "streams": (sys.stdout, sys.stderr, sys.excepthook),
        "threads at work": [str(one) for one in threading.enumerate() if "tqdm_monitor" not in one.name],
    }


# Handlers of the root logger were removed and closed, its level was the run's, random states were seeded, and gpu_id
# stayed in the environment.
@pytest.mark.parametrize("door", ["run", "workers", "reload", "objective", "profile", "serve", "error"])
def test_a_run_leaves_the_application_as_it_was(
    door: str, application: logging.Handler, cyclic_dataset: str, tiny: dict[str, Any]
) -> None:
    settings: dict[str, Any] = {**tiny, "epochs": 1, "state": "WARNING"}
    prefixes = {"train_on": "prefixes", "worker": 1}  # a loader with workers sets a signal handler
    doors: dict[str, Callable[[], Any]] = {
        "run": lambda: run("RecMamba", cyclic_dataset, config_dict=settings),
        "workers": lambda: run("RecMamba", cyclic_dataset, config_dict={**settings, **prefixes}, test=False),
        "reload": lambda: load_data_and_model(checkpoint),
        "serve": lambda: load_model(checkpoint, "cpu"),
        "objective": lambda: objective_function({**settings, "model": "BERT4Rec", "dataset": cyclic_dataset}),
        "profile": lambda: profiling.run("RecMamba", cyclic_dataset, config_dict=settings, steps=1),
        "error": lambda: run("RecMamba", cyclic_dataset, config_dict={**settings, "topk": [2000]}),
    }
    checkpoint = doors["run"]()["report"]["checkpoint"] if door in ("reload", "serve") else ""
    random.seed(1), np.random.seed(2), torch.manual_seed(3)
    before = process()
    if door == "error":
        with pytest.raises(ValueError, match="topk"):
            doors[door]()
    else:
        doors[door]()
    after = process()
    for name, value in before.items():
        assert after[name] == value, name
    logging.getLogger("app").warning("later")
    assert "later" in Path("application.txt").read_text()
    assert not any("later" in log.read_text() for log in Path("log").rglob("*.log"))


def test_the_application_gets_what_its_root_logger_lets_through(
    application: logging.Handler, write_dataset: Callable[..., str], tiny: dict[str, Any]
) -> None:
    """And the run's file gets everything, RecBole's lines among them."""
    inter = [(f"u{u}", f"i{(u + t) % 9}", t) for u in range(9) for t in range(6)]
    items = [(f"i{i}", "a") for i in range(8)]  # one is missing: a warning
    data = write_dataset(inter, "some", item=("item_id:token\tgenre:token", items))
    columns = {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", "genre"]}
    settings = {**tiny, "epochs": 1, "state": "INFO", "load_col": columns}
    run("RecMamba", data, config_dict=settings, saved=False)
    application.flush()
    told, (log,) = Path("application.txt").read_text(), Path("log/RecMamba").glob("*.log")
    assert "interactions are dropped" in told
    assert "order of time" not in told
    for line in ("interactions are dropped", "order of time", "epoch 0 training", "mamba_block: "):
        assert line in log.read_text(), line
    assert "\x1b" not in log.read_text()

    logging.getLogger().setLevel(logging.INFO)
    run("RecMamba", data, config_dict=settings, saved=False)
    application.flush()
    assert "epoch 0 training" in Path("application.txt").read_text()


def test_without_an_application_a_run_is_shown_on_the_terminal(
    application: logging.Handler, cyclic_dataset: str, tiny: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    logging.getLogger().handlers.clear()
    run("RecMamba", cyclic_dataset, config_dict={**tiny, "epochs": 1, "state": "INFO"}, saved=False)
    assert "epoch 0 training" in capsys.readouterr().err
    assert logging.getLogger().handlers == []


# Both drew from the same random states, and neither was what it is alone.
def test_two_runs_at_once_are_what_they_are_alone(cyclic_dataset: str, tiny: dict[str, Any]) -> None:
    def of(model: str) -> Any:
        result = run(model, cyclic_dataset, config_dict={**tiny, "dropout_prob": 0.3}, saved=False)
        return result["test_result"], result["report"]["valid_scores"], result["report"]["implementations"]

    models = ["RecMamba", "BPR", "Hydra"]
    alone = {model: of(model) for model in models}
    with ThreadPoolExecutor(len(models)) as threads:
        assert dict(zip(models, threads.map(of, models), strict=True)) == alone


# A new model's parameters were drawn from the random state of the process, which a run in another thread had seeded.
def test_a_model_is_loaded_beside_a_run_without_touching_its_random_numbers(
    cyclic_dataset: str, tiny: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = run("HoloMambaRec", cyclic_dataset, config_dict={**tiny, "epochs": 1})["report"]["checkpoint"]
    expected = load_model(checkpoint, "cpu")[0].state_dict()
    seen: list[Any] = []
    initialise = torch.nn.init.normal_

    def watched(*args: Any, **kwargs: Any) -> Any:
        result = initialise(*args, **kwargs)
        seen.append(torch.get_rng_state())
        return result

    monkeypatch.setattr(torch.nn.init, "normal_", watched)
    before = torch.get_rng_state()
    with host.guest():  # a run in this thread
        thread = threading.Thread(target=lambda: seen.append(load_model(checkpoint, "cpu")[0].state_dict()))
        thread.start()
        thread.join(60)
        assert not thread.is_alive()  # loading does not wait for the run
    *states, found = seen
    assert states
    assert all(torch.equal(state, before) for state in states)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def test_drawing_apart() -> None:
    before = torch.get_rng_state()
    with host.drawing_apart():
        drawn = [torch.rand(3), torch.randn(3), torch.empty(3).uniform_(), torch.randperm(9), torch.randint(5, (3,))]
        drawn += [torch.bernoulli(torch.full((9,), 0.5)), torch.nn.Linear(3, 3).weight]
        drawn += [torch.nn.init.trunc_normal_(torch.empty(4))]
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(drawn[0], drawn[1])


# The second said that it ran on what the first had run on, and the process's memory stood there as its own.
def test_a_second_run_reports_what_it_ran_on_itself(
    cyclic_dataset: str, tiny: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    first = run("Hydra", cyclic_dataset, config_dict={**tiny, "epochs": 1})["report"]
    second = run("BPR", cyclic_dataset, config_dict={**tiny, "epochs": 1, "embedding_size": 8})["report"]
    again = run("Hydra", cyclic_dataset, config_dict={**tiny, "epochs": 1})["report"]
    assert first["implementations"]
    assert second["implementations"] == {}
    assert again["implementations"] == first["implementations"]
    assert [report["peak_memory_of"] for report in (first, second)] == ["process", "process"]
    assert "peak memory of the process" in capsys.readouterr().out
