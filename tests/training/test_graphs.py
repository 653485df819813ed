"""What a failed capture leaves behind, with stand-ins for CUDA; tests/cuda captures for real."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from recbole_holo.training.graphs import EncoderGraphs

CUDA = torch.device("cuda", 0)


class Generator:
    """As PyTorch's of CUDA: the state is an object, and in a capture that has failed it stays in capture mode."""

    def __init__(self, seed: int) -> None:
        self.state = SimpleNamespace(seed=seed, capturing=False)

    def clone_state(self) -> Generator:
        return Generator(self.state.seed)

    def get_state(self) -> int:
        return self.state.seed

    def set_state(self, seed: int) -> None:
        self.state.seed = seed

    def graphsafe_set_state(self, other: Generator) -> None:
        self.state = other.state


class Device:
    """The parts of CUDA that a capture changes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fails: bool) -> None:
        self.fails, self.generator, self.stream = fails, Generator(7), "default"
        self.allocating: list[Any] = []
        self.pools: dict[Any, int] = {}
        for name, function in {
            "graph_pool_handle": lambda: (0, 1),
            "current_stream": lambda device: self.stream,
            "set_stream": lambda stream: setattr(self, "stream", stream),
            "make_graphed_callables": self.capture,
            "default_generators": (self.generator,),
        }.items():
            monkeypatch.setattr(torch.cuda, name, function)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", self.end, raising=False)
        monkeypatch.setattr(torch._C, "_cuda_releasePool", self.release, raising=False)

    def capture(self, module: nn.Module, given: tuple[Any, ...], allow_unused_input: bool, pool: Any) -> Any:
        self.generator.state.seed += 1  # the rounds before a capture draw
        if self.fails:
            self.allocating.append(pool)
            self.pools[pool] = self.pools.get(pool, 0) + 1
            self.generator.state.capturing = True
            self.stream = "of the capture"
            raise RuntimeError("operation failed due to a previous error during capture")
        return module

    def end(self, device: int, pool: Any) -> None:
        self.allocating.remove(pool)

    def release(self, device: int, pool: Any) -> None:
        self.pools[pool] -= 1


def capture(may_fail: bool) -> EncoderGraphs:
    graphs = EncoderGraphs(nn.Linear(1, 1), 2, may_fail)  # type: ignore[arg-type]
    graphs._encoders[4] = nn.Identity()
    batch: Any = SimpleNamespace(device=CUDA, shape=(2, 8), clone=lambda: None)
    graphs._capture(lambda item_seq: item_seq, batch, {})
    return graphs


@pytest.mark.parametrize("may_fail", [True, False])
def test_a_failed_capture_leaves_nothing_behind(may_fail: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the generator in capture mode, where the next dropout raises, nor the stream, nor the allocator."""
    device = Device(monkeypatch, fails=True)
    if may_fail:
        graphs = capture(may_fail)
        assert graphs._failed
        assert not graphs._encoders  # they replay with the generator's earlier state
    else:
        with pytest.raises(RuntimeError, match="during capture"):
            capture(may_fail)
    assert vars(device.generator.state) == {"seed": 7, "capturing": False}
    assert device.stream == "default"
    assert not device.allocating
    assert device.pools == {(0, 1): 0}


def test_a_capture_draws_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The graph goes on with the state that it was captured with, so that is set back, not exchanged."""
    device = Device(monkeypatch, fails=False)
    state = device.generator.state
    assert set(capture(True)._encoders) == {4, 8}
    assert device.generator.state is state
    assert state.seed == 7
