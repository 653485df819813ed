"""What a training step costs in calls and bytes: a guard that needs no clock."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from recbole_holo.ops import native
from recbole_holo.tracing import CpuPeak
from tests.model.conftest import build

BATCH, ITEMS = 16, 500


class Calls(TorchDispatchMode):
    """PyTorch's operations that compute something; views cost nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.counted: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not any(result.alias_info for result in function._schema.returns):
            self.counted[str(function.overloadpacket)] += 1
        return function(*args, **(kwargs or {}))


class Kernels:
    """The compiled library, counting what is asked of it."""

    def __init__(self) -> None:
        self.library, self.counted = native.library(), Counter()

    def __getattr__(self, name):
        function = getattr(self.library, name)

        def call(*arguments):
            self.counted[name] += 1
            return function(*arguments)

        return call


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def step(name: str, length: int):
    """A function that does one step of loss and gradients over full histories, on a model of the shipped size."""
    model = build(name, n_items=ITEMS, n_values=None, MAX_ITEM_LIST_LENGTH=length, loss_type="CE").train()
    items = torch.randint(1, ITEMS, (BATCH, length + 1))
    batch = {model.ITEM_SEQ: items[:, :-1], model.ITEM_TARGETS: items[:, 1:]}
    parameters = [p for p in model.parameters() if p.requires_grad]

    def run():
        torch.autograd.grad(model.calculate_loss(batch), parameters, allow_unused=True)

    run()  # lets what is made once be made
    return run


@pytest.mark.parametrize("name", ["RecMamba", "HoloMambaRec"])
def test_kernel_calls_of_a_step(name, monkeypatch):
    run, kernels = step(name, 64), Kernels()
    monkeypatch.setattr(native, "library", lambda: kernels)
    run()
    asked = {
        name: count for name, count in kernels.counted.items() if name not in ("lanes", "stretch", "states_together")
    }
    dropouts = asked.pop("dropout")
    wanted = {"mamba_forward": 2, "mamba_backward": 2, "cross_entropy": 1}
    if name == "RecMamba":
        wanted |= {"feed_forward": 2, "feed_forward_backward": 2}
    assert asked == wanted
    assert dropouts == 2 * {"RecMamba": 5, "HoloMambaRec": 3}[name]


@pytest.mark.parametrize(("name", "most"), [("RecMamba", 260), ("HoloMambaRec", 190)])
def test_calls_do_not_grow_with_the_length(name, most):
    counts = []
    for length in (40, 400):
        run = step(name, length)
        with Calls() as calls:
            run()
        counts.append(calls.counted)
    assert counts[0] == counts[1]
    assert counts[0].total() <= most, counts[0].most_common(12)


@pytest.mark.parametrize(("name", "floats_a_step"), [("RecMamba", 900), ("HoloMambaRec", 800), ("Hydra", 2600)])
def test_memory_is_linear_in_the_length(name, floats_a_step):
    peaks = []
    for length in (256, 512, 1024):
        run = step(name, length)
        peak = CpuPeak()
        peak.change(("step", "all"))
        with peak:
            run()
        peaks.append(peak.peaks[("step", "all")])
    first, second = peaks[1] - peaks[0], peaks[2] - peaks[1]
    assert second == pytest.approx(2 * first, rel=0.02)
    assert second <= 4 * floats_a_step * BATCH * 512
