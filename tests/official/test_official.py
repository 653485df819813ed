"""Values, gradients, steps and states of the official kernels behind our calls, against float64.

All errors are relative to the largest entry. What the loops and the interpreter compute in float32 is exact to a few
units in the last place, so a call that means something else shows.
"""

from __future__ import annotations

import copy
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from model.conftest import STATE_SPACE, build
from torch import Tensor, nn

from recbole_holo.layers import LatentMamba2, Mamba, Mamba2
from recbole_holo.ops import backend, causal_conv1d, mamba2_inner, selective_scan, state_space_dual
from recbole_holo.ops.causal_conv1d import causal_conv1d_reference
from recbole_holo.ops.mamba_block import MambaState
from recbole_holo.ops.selective_scan import selective_scan_reference
from recbole_holo.ops.state_space_dual import state_space_dual_reference, state_space_dual_with_state

pytestmark = pytest.mark.skipif(
    "RECBOLE_HOLO_OFFICIAL" not in os.environ, reason="the official sources are not here: .ci/official gets them"
)

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2}  # of values
OF_GRADIENTS = {torch.float32: 1e-4, torch.bfloat16: 8e-2}  # sums that cancel among them
TYPES = list(TOLERANCE)


def assert_close(found: Tensor, expected: Tensor, tolerance: float, name: str) -> None:
    assert found.shape == expected.shape, name
    error, size = (found.double() - expected).abs().max().item(), expected.abs().max().item()
    assert error <= tolerance * max(size, 1e-2), f"{name}: error {error:.1e} of {size:.1e}"


def compare(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], dtype=torch.float32, typed: tuple[int, ...] = ()
) -> None:
    """Values and gradients with ``inputs[i]``, i in ``typed``, in ``dtype``, against the same values in float64."""
    single = [t.to(dtype if i in typed else torch.float32).requires_grad_() for i, t in enumerate(inputs)]
    double = [t.detach().double().requires_grad_() for t in single]
    y, expected = function(*single), function(*double)
    weights = torch.randn_like(expected)
    gradients = torch.autograd.grad(y, single, weights.to(y.dtype))
    references = torch.autograd.grad(expected, double, weights.to(y.dtype).double())
    assert_close(y, expected, TOLERANCE[dtype], "value")
    for i, (a, b) in enumerate(zip(gradients, references, strict=True)):
        assert_close(a, b, OF_GRADIENTS[dtype], f"gradient {i}")


def step_bias(size: int) -> Tensor:
    step = torch.exp(torch.empty(size).uniform_(-6.9, -2.3))
    return step + torch.log(-torch.expm1(-step))


def rates(width: int, order: int) -> Tensor:
    return -torch.arange(1.0, order + 1).expand(width, order) * torch.exp(0.1 * torch.randn(width, order))


@pytest.mark.parametrize("op", list(backend._OPERATIONS))
def test_every_kernel_is_the_official_one(op: str) -> None:
    function, reason = backend._load_kernel(op)
    assert reason == ""
    assert function is not None
    assert function.__module__.startswith(("mamba_ssm.", "causal_conv1d."))


# ------------------------------------------------------------------------------------------------- single operations
@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("batch", "length"), [(3, 1), (1, 1), (2, 3), (1, 50), (2, 128)])
@pytest.mark.parametrize(("width", "order"), [(16, 4), (7, 3)])
def test_selective_scan(dtype, batch, length, width, order) -> None:
    u, delta, z = torch.randn(3, batch, length, width)
    B, C = torch.randn(2, batch, length, order)
    inputs = [u, 0.5 * delta, rates(width, order), B, C, torch.randn(width), z, step_bias(width)]
    compare(partial(selective_scan, delta_softplus=True), inputs, dtype, typed=(0, 1, 3, 4, 6))
    assert "mamba-ssm" in backend.report()["selective_scan"]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    ("batch", "length", "heads", "width", "groups", "order"),
    [(2, 1, 2, 16, 1, 16), (1, 17, 2, 16, 1, 16), (1, 8, 4, 5, 2, 7), (1, 1, 1, 1, 1, 1)],
)
def test_state_space_dual_from_a_state_to_a_state(dtype, batch, length, heads, width, groups, order) -> None:
    x, dt = torch.randn(batch, length, heads, width), 0.5 * torch.randn(batch, length, heads)
    A, B, C = -torch.empty(heads).uniform_(1, 16), *torch.randn(2, batch, length, groups, order)

    def run(*inputs: Tensor) -> Tensor:
        y, last = state_space_dual_with_state(*inputs[:-1], initial_state=inputs[-1], chunk_size=16)
        return torch.cat([y.flatten().to(last), last.flatten()])

    inputs = [x, dt, A, B, C, torch.randn(heads), step_bias(heads), torch.randn(batch, heads, width, order)]
    compare(run, inputs, dtype, typed=(0, 1, 3, 4))
    assert "mamba-ssm" in backend.report()["state_space_dual"]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("batch", "length"), [(3, 1), (1, 1), (2, 3), (1, 8), (2, 50)])
@pytest.mark.parametrize(("channels", "width"), [(16, 4), (9, 3), (1, 2)])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_causal_conv1d(dtype, batch, length, channels, width, activation) -> None:
    inputs = [torch.randn(batch, length, channels), torch.randn(channels, width), torch.randn(channels)]
    compare(partial(causal_conv1d, activation=activation), inputs, dtype, typed=(0,))
    assert "causal-conv1d" in backend.report()["causal_conv1d"]


# From a buffer of 4096 numbers to ``[batch, length, channels]``: what a model may have at hand.
VIEWS: dict[str, Callable[[Tensor, int, int, int], Tensor]] = {
    "second half": lambda t, b, n, c: t[: b * n * 2 * c].view(b, n, 2 * c)[..., c:],
    "at an odd offset": lambda t, b, n, c: t[: b * n * (c + 16)].view(b, n, c + 16)[..., 3 : 3 + c],
    "contiguous at an odd offset": lambda t, b, n, c: t[3 : 3 + b * n * c].view(b, n, c),
    "time last": lambda t, b, n, c: t[: b * n * c].view(b, c, n).transpose(1, 2),
    "time last at an odd offset": lambda t, b, n, c: t[3 : 3 + b * n * c].view(b, c, n).transpose(1, 2),
    "part of the time": lambda t, b, n, c: t[: b * (n + 5) * c].view(b, c, n + 5)[..., 3 : 3 + n].transpose(1, 2),
    "every other step": lambda t, b, n, c: t[: b * n * 2 * c].view(b, 2 * n, c)[:, ::2],
    "one step repeated": lambda t, b, n, c: t[: b * c].view(b, 1, c).expand(b, n, c),
    "one sequence repeated": lambda t, b, n, c: t[: n * c].view(1, n, c).expand(b, n, c),
    "one channel repeated": lambda t, b, n, c: t[: b * n].view(b, n, 1).expand(b, n, c),
}


def behind(y: Tensor) -> Tensor:
    """``y [batch, L, D]`` behind three other channels: its gradient is a view at an odd offset."""
    return torch.cat([y.new_zeros(*y.shape[:2], 3), y], -1)


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 1), (1, 8), (2, 8)])
@pytest.mark.parametrize("channels", [16, 9])
def test_views_into_the_convolution(name, batch, length, channels) -> None:
    """Steps of size 1 have any stride, of which the kernel reads a layout; loads of 16 bytes want their address.

    A repeated step was read as channels-last with a stride of 0, which the kernel takes for time last: other values.
    """

    def run(buffer: Tensor, *weights: Tensor) -> Tensor:
        return behind(causal_conv1d(VIEWS[name](buffer, batch, length, channels), *weights, "silu"))

    compare(run, [torch.randn(4096), torch.randn(channels, 4), torch.randn(2 * channels)[::2]])


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 1), (1, 128)])
def test_views_into_the_scan(name, batch, length) -> None:
    """128 steps are loaded 16 bytes at a time."""

    def run(buffer: Tensor, A: Tensor, B: Tensor, D: Tensor, bias: Tensor) -> Tensor:
        u = VIEWS[name](buffer, batch, length, 8)
        return behind(selective_scan(u, u, A, B, B, D[::2], u, bias[::2], True))

    compare(run, [torch.randn(4096), rates(8, 3), torch.randn(batch, length, 3), torch.randn(16), step_bias(16)])


@pytest.mark.parametrize("name", ["at an odd offset", "contiguous at an odd offset", "time last", "one step repeated"])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 8)])
def test_views_into_the_fused_mamba2(name, batch, length) -> None:
    """The convolution reads its channels in place, 8 at a time, among those of z, x, B, C and dt."""
    sizes = {"norm_eps": 1e-5, "headdim": 2, "ngroups": 1, "d_state": 4, "chunk_size": 16}

    def run(buffer: Tensor, weight: Tensor, bias: Tensor, *others: Tensor) -> Tensor:
        zxbcdt = VIEWS[name](buffer, batch, length, 16 + 24 + 8)
        return behind(mamba2_inner(zxbcdt, weight, bias[::2], *others, **sizes))

    inputs = [torch.randn(4096), 0.5 * torch.randn(24, 4), torch.randn(48), step_bias(8), -torch.rand(8) - 1]
    compare(run, [*inputs, torch.randn(8), torch.rand(16) + 0.5])
    assert "mamba-ssm" in backend.report()["mamba2_block"]


@pytest.mark.parametrize("name", ["second half", "part of the time", "one channel repeated"])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 8)])
def test_views_into_the_dual(name, batch, length) -> None:
    def run(buffer: Tensor, dt: Tensor, A: Tensor, D: Tensor) -> Tensor:
        x = VIEWS[name](buffer, batch, length, 4)
        B = VIEWS[name](buffer, batch, length, 1).unsqueeze(-1)  # one group, one state: strides of any size
        return behind(state_space_dual(x.unflatten(-1, (1, 4)), dt, A, B, B, D[::2][:1], None, True, 16).flatten(2))

    compare(run, [torch.randn(4096), torch.randn(batch, length, 1), -torch.rand(1) - 1, torch.randn(3)])


# ------------------------------------------------------------------------------------------------------------- blocks
BLOCKS: dict[str, tuple[Callable[[], Any], tuple[int, ...]]] = {
    "mamba": (lambda: Mamba(64), (64,)),
    "mamba of 50": (lambda: Mamba(50), (50,)),
    "mamba of an odd inner width": (lambda: Mamba(15, expand=1, d_state=7), (15,)),
    "mamba with biases": (lambda: Mamba(12, d_state=4, bias=True, d_conv=3), (12,)),
    "mamba without a bias of the convolution": (lambda: Mamba(16, conv_bias=False, d_conv=2), (16,)),
    "mamba2": (lambda: Mamba2(64, d_state=16, headdim=16, chunk_size=16), (64,)),
    "mamba2 of 50": (lambda: Mamba2(50, d_state=16, chunk_size=16), (50,)),
    "mamba2 of an odd inner width": (lambda: Mamba2(15, expand=1, d_state=6, headdim=5, chunk_size=16), (15,)),
    "mamba2 with biases and groups": (
        lambda: Mamba2(16, d_state=8, headdim=4, ngroups=2, bias=True, chunk_size=16),
        (16,),
    ),
    "latent mamba2": (lambda: LatentMamba2(4, 8, d_state=8, headdim=4, ngroups=2, chunk_size=16), (4, 8)),
    "latent mamba2 of odd widths": (lambda: LatentMamba2(3, 5, d_state=6, headdim=5, chunk_size=16), (3, 5)),
}


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize(
    ("batch", "length", "dtype"),
    [
        (2, 1, torch.float32),
        (1, 1, torch.float32),
        (2, 3, torch.float32),
        (1, 17, torch.float32),
        (2, 3, torch.bfloat16),
    ],
)
def test_a_block(name: str, batch: int, length: int, dtype: torch.dtype) -> None:
    """A bias of the output projection, whose gradient the official function gives as one number, among them."""
    build_block, shape = BLOCKS[name]
    exact = build_block().double()
    block = copy.deepcopy(exact).float()
    x = torch.randn(batch, length, *shape)
    x_exact, x = x.double().requires_grad_(), x.requires_grad_()
    expected = exact(x_exact)
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        y = block(x)
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    (y.float() * weights.float()).sum().backward()
    assert_close(y, expected, TOLERANCE[dtype], "value")
    assert_close(x.grad, x_exact.grad, OF_GRADIENTS[dtype], "gradient of the input")
    for (parameter, a), b in zip(block.named_parameters(), exact.parameters(), strict=True):
        assert_close(a.grad, b.grad, OF_GRADIENTS[dtype], f"gradient of {parameter}")


@pytest.mark.parametrize("sizes", [{"d_state": 8, "headdim": 16}, {"d_state": 5, "headdim": 4}])
def test_mamba2_of_sizes_that_are_no_multiples_of_8_is_composed_and_says_so(sizes, caplog) -> None:
    with caplog.at_level("INFO", "recbole_holo"):
        Mamba2(16, **sizes)(torch.randn(2, 9, 16))
    assert {"causal_conv1d", "state_space_dual"} <= backend.report().keys()
    assert "mamba2_block: composed" in caplog.text
    assert "takes multiples of 8" in caplog.text


@pytest.mark.parametrize("name", BLOCKS)
def test_parts_of_a_sequence_and_steps_go_on_from_each_other(name: str) -> None:
    """Parts that begin at any step, the last of them a single one; then steps, with the states in rows of a table."""
    build_block, shape = BLOCKS[name]
    block, x = build_block().eval(), torch.randn(2, 12, *shape)
    with torch.no_grad():
        expected = copy.deepcopy(block).double()(x.double())
        state, outputs = None, []
        for part in x[:, :9].split([1, 7, 1], 1):
            y, state = block.forward_from(part, state)
            outputs.append(y)
        sizes = [t[0].numel() for t in state]
        table = torch.cat([t.flatten(1) for t in state], 1)
        rows = MambaState(*(t.view_as(s) for t, s in zip(table.split(sizes, 1), state, strict=True)))
        outputs += [block.step(x[:, t], rows).unsqueeze(1) for t in range(9, 12)]
    assert_close(torch.cat(outputs, 1), expected, 1e-5, "value")
    assert {"mamba_step", "mamba2_step"} & backend.report().keys()


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_step_in_bfloat16(name: str, batch: int) -> None:
    build_block, shape = BLOCKS[name]
    block, x = build_block().eval(), torch.randn(batch, *shape)
    state = MambaState(*(torch.randn(batch, *sizes) for sizes in block.state_shapes()))
    with torch.no_grad():
        before = MambaState(*(t.double() for t in state))
        expected, after = copy.deepcopy(block).double().forward_from(x.double().unsqueeze(1), before)
        with torch.autocast("cpu", torch.bfloat16):
            y = block.step(x, state)
    assert_close(y, expected.squeeze(1), TOLERANCE[torch.bfloat16], "value")
    for found, wanted, kind in zip(state, after, MambaState._fields, strict=True):
        assert_close(found, wanted, TOLERANCE[torch.bfloat16], kind)


# ------------------------------------------------------------------------------------------------------ whole models
@pytest.mark.parametrize(
    ("preset", "hidden_size"),
    [(name, size) for name in STATE_SPACE for size in (50, 64)] + [(f"{name}_paper", 64) for name in STATE_SPACE],
)
def test_a_model(preset: str, hidden_size: int) -> None:
    """Loss and gradients of a batch with rows of 9 and 1 events, and the scores of a batch of one event."""
    sizes = {"hidden_size": hidden_size, "MAX_ITEM_LIST_LENGTH": 9, "num_layers": 1, "chunk_size": 16}
    without = dict.fromkeys(("dropout_prob", "layer_dropout_prob", "hidden_dropout_prob", "attn_dropout_prob"), 0.0)
    if preset == "Hydra" and hidden_size % 4:
        sizes |= {"head_dim": 10, "headdim": 5}
    exact = build(preset, **sizes, **without).double()
    model = copy.deepcopy(exact).float()
    valid = torch.arange(9) < torch.tensor([[9], [1]])
    items, targets = torch.randint(1, 30, (2, 2, 9)) * valid
    losses = []
    for net in (exact, model):
        hidden = net.hidden_states(items)[valid]
        losses.append(torch.nn.functional.cross_entropy(net.score_all(hidden), targets[valid]))
        losses[-1].backward()
        with torch.no_grad():
            losses.append(net.score_all(net.forward(items[:, :1], torch.ones(2, dtype=torch.long))))
    assert_close(losses[2], losses[0], 1e-5, "loss")
    assert_close(losses[3], losses[1], 1e-5, "scores")
    for (name, a), b in zip(model.named_parameters(), exact.parameters(), strict=True):
        assert (a.grad is None) == (b.grad is None), name
        if b.grad is not None:
            assert_close(a.grad, b.grad, OF_GRADIENTS[torch.float32], name)


# ------------------------------------------------------------------------------------------------ the references
def test_the_references_agree() -> None:
    """What everything else is compared with computes what the official references do."""
    interface = importlib.import_module("mamba_ssm.ops.selective_scan_interface")
    u, delta, z, B, C = torch.randn(2, 9, 6), torch.randn(2, 9, 6), torch.randn(2, 9, 6), *torch.randn(2, 2, 9, 4)
    A, D, bias = rates(6, 4), torch.randn(6), step_bias(6)
    theirs = interface.selective_scan_ref(
        *(t.transpose(1, 2) for t in (u, delta)),
        A,
        *(t.transpose(1, 2) for t in (B, C)),
        D,
        z.transpose(1, 2),
        bias,
        True,
    )
    ours = selective_scan_reference(u, delta, A, B, C, D, z, bias, True)
    assert_close(theirs.transpose(1, 2), ours.double(), 1e-5, "scan")

    convolution = importlib.import_module("causal_conv1d.causal_conv1d_interface")
    weight = torch.randn(6, 3)
    theirs = convolution.causal_conv1d_ref(u.transpose(1, 2), weight, bias, activation="silu").transpose(1, 2)
    assert_close(theirs, causal_conv1d_reference(u, weight, bias, "silu").double(), 1e-5, "convolution")

    dual = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
    x, dt, A, B, C = torch.randn(2, 8, 4, 5), torch.randn(2, 8, 4), -torch.rand(4), *torch.randn(2, 2, 8, 2, 3)
    theirs = dual.ssd_chunk_scan_combined_ref(x, dt, A, B, C, 4, D[:4], None, bias[:4], True)
    assert_close(theirs, state_space_dual_reference(x, dt, A, B, C, D[:4], bias[:4]).double(), 1e-5, "dual")


@pytest.mark.parametrize(
    ("name", "module", "sizes"),
    [
        ("Mamba", "mamba_simple", {"d_state": 16}),
        ("Mamba2", "mamba2", {"d_state": 16, "headdim": 8, "chunk_size": 16}),
    ],
)
def test_official_modules_take_our_parameters(name: str, module: str, sizes: dict[str, int], monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(PyTorchModelHubMixin=object))
    theirs = getattr(importlib.import_module(f"mamba_ssm.modules.{module}"), name)(32, **sizes)
    ours: nn.Module = {"Mamba": Mamba, "Mamba2": Mamba2}[name](32, **sizes)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(2, 11, 32)
    assert_close(ours(x), theirs(x).double(), 1e-5, "value")
