"""Updates of several models in several threads, each the first of its model."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from recbole_holo.inference import Event, Recommender
from recbole_holo.layers.carried import _steppers
from recbole_holo.layers.traced_step import step_program
from recbole_holo.model.stepping import _programs
from recbole_holo.ops import backend

from .conftest import N_ITEMS, served

HISTORY = [f"i{1 + n * 7 % (N_ITEMS - 1)}" for n in range(4)]
KINDS: list[tuple[str, dict[str, Any]]] = [
    ("Hydra", {"num_layers": 1}),
    ("HoloMambaRec", {"num_layers": 1, "bundle_size": 2, "bundle_recent": 2}),
]


def together(works: list[Callable[[], Any]]) -> list[Any]:
    """All at once, in a thread each: what they return, or raise."""
    results: list[Any] = [None] * len(works)
    start = threading.Barrier(len(works))

    def run(number: int) -> None:
        start.wait()
        try:
            results[number] = works[number]()
        except BaseException as error:
            results[number] = error

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


# The tracing of a step changed classes of PyTorch for all threads: TraceError, NameError, or other results elsewhere.
def test_two_models_and_eight_threads_from_a_cold_start() -> None:
    models = [served(name, **settings) for name, settings in KINDS]
    alone, *recommenders = (Recommender(*models[number % 2]) for number in (0, 0, 1, 0, 1, 0, 1, 0, 1))
    other = Recommender(*models[1])
    for one in (alone, other):
        one.update_many([Event("a", item) for item in HISTORY], batch_size=1)
    wanted = [one.codec.decode(one.store.get(["a"])[0], "a").numbers for one in (alone, other)]

    def work(recommender: Recommender) -> None:
        recommender.forget(["a"])
        for item in HISTORY:
            recommender.update("a", item)
        recommender.recommend(history=HISTORY, k=1)

    for _ in range(100):
        _programs.clear()
        _steppers.clear()
        for result in together([lambda r=r: work(r) for r in recommenders]):
            if result is not None:
                raise result
        for number, one in enumerate(recommenders):
            found = one.codec.decode(one.store.get(["a"])[0], "a").numbers
            np.testing.assert_allclose(found, wanted[number % 2], rtol=1e-4, atol=1e-5)


def test_tracing_changes_no_class_of_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A module that is called meanwhile by another thread runs as ever."""
    model, _ = served("Hydra")
    before = {name: getattr(torch.nn.Module, name) for name in ("__call__", "__getattr__")}
    encode, seen = type(model).encode_vectors, []

    def watched(self: Any, x: Any, carried: Any = None) -> Any:
        seen.append({name: getattr(torch.nn.Module, name) for name in before})
        return encode(self, x, carried)

    monkeypatch.setattr(type(model), "encode_vectors", watched)
    places = dict.fromkeys(model._blocks(), (0, 0))
    program = step_program(model, model.hidden_size, places)
    assert seen == [before]
    assert (program is not None) == backend.runs_native(torch.zeros(1))


@pytest.mark.parametrize("name", ["HoloMambaRec", "Hydra", "RecMamba", "Mamba4Rec"])
def test_every_model_has_a_program(name: str) -> None:
    if not backend.runs_native(torch.zeros(1)):
        pytest.skip("there are no C++ kernels here")
    model, items = served(name)
    Recommender(model, items).update("a", "i1")
    assert _programs[model][2] is not None
