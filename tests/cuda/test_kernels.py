"""The fused CUDA kernels against the float64 reference on a CPU: every operation and every block.

Tolerances are relative to the largest entry. The kernels are built with fast arithmetic; mamba-ssm itself tests its
scan to rtol 6e-4, atol 2e-3 in float32. Triton multiplies float32 matrices in TF32 unless told not to, so it is told.
"""

from __future__ import annotations

import copy
import os

os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")  # before triton is imported

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from recbole_holo.layers import LatentMamba2, Mamba, Mamba2
from recbole_holo.ops import (
    MambaWeights,
    backend,
    bind,
    causal_conv1d,
    cross_entropy,
    info_nce,
    mamba2_inner,
    mamba_block,
    sample_negatives,
    selective_scan,
    state_space_dual,
    state_space_dual_with_state,
    unbind,
    unitary,
)
from recbole_holo.ops.seen_items import SeenItems

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

TOLERANCES = {torch.float32: 2e-3, torch.bfloat16: 4e-2}
TYPES = list(TOLERANCES)
LENGTHS = (1, 3, 50, 65, 200)


@pytest.fixture(autouse=True)
def _seed_and_backend() -> Iterator[None]:
    torch.manual_seed(0)
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    backend.set_backend("auto")
    yield
    backend.set_backend("auto")
    torch.backends.cuda.matmul.allow_tf32 = allowed


def needs(op: str) -> None:
    function, reason = backend._load_kernel(op)
    if function is None:
        pytest.skip(reason)


def assert_close(found: Tensor, expected: Tensor, tolerance: float, name: str) -> None:
    assert found.shape == expected.shape, name
    error, size = (found.double().cpu() - expected).abs().max().item(), expected.abs().max().item()
    assert error <= tolerance * max(size, 1e-2), f"{name}: error {error:.1e} of {size:.1e}"


def compare(function: Callable[..., Tensor], inputs: list[Tensor], dtype: torch.dtype, typed: tuple[int, ...]) -> None:
    """Values and gradients on CUDA, ``inputs[i]`` for i in ``typed`` in ``dtype``, against float64 on the CPU."""
    rounded = [t.to(dtype if i in typed else torch.float32) for i, t in enumerate(inputs)]
    on_cuda = [t.cuda().requires_grad_() for t in rounded]
    on_cpu = [t.double().requires_grad_() for t in rounded]
    y, expected = function(*on_cuda), function(*on_cpu)
    assert y.is_cuda
    weights = torch.randn_like(expected)
    gradients = torch.autograd.grad(y, on_cuda, weights.to(y))
    references = torch.autograd.grad(expected, on_cpu, weights.to(y.dtype).double())
    assert_close(y, expected, TOLERANCES[dtype], "value")
    for i, (a, b) in enumerate(zip(gradients, references, strict=True)):
        assert_close(a, b, 2 * TOLERANCES[dtype], f"gradient {i}")


def step_bias(size: int) -> Tensor:
    step = torch.exp(torch.empty(size).uniform_(-6.9, -2.3))
    return step + torch.log(-torch.expm1(-step))


def rates(width: int, order: int) -> Tensor:
    return -torch.arange(1.0, order + 1).expand(width, order) * torch.exp(0.1 * torch.randn(width, order))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("width", "order"), [(128, 16), (40, 32), (7, 3)])
def test_selective_scan(dtype, length, width, order):
    needs("selective_scan")
    u, delta, z = (torch.randn(3, length, width) for _ in range(3))
    B, C = torch.randn(3, length, order), torch.randn(3, length, order)
    inputs = [u, 0.5 * delta, rates(width, order), B, C, torch.randn(width), z, step_bias(width)]
    compare(partial(selective_scan, delta_softplus=True), inputs, dtype, typed=(0, 1, 3, 4, 6))
    assert "mamba-ssm" in backend.report()["selective_scan"]


@pytest.mark.parametrize("softplus", [False, True])
def test_selective_scan_without_options(softplus):
    needs("selective_scan")
    inputs = [torch.randn(2, 40, 16), torch.rand(2, 40, 16) / 5, rates(16, 8), *torch.randn(2, 2, 40, 8)]
    compare(partial(selective_scan, delta_softplus=softplus), inputs, torch.float32, typed=(0, 1, 3, 4))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("channels", [128, 9])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_causal_conv1d(dtype, length, channels, activation):
    needs("causal_conv1d")

    def half(xz: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return causal_conv1d(xz.chunk(2, -1)[1], weight, bias, activation)

    inputs = [torch.randn(3, length, 2 * channels), torch.randn(channels, 4), torch.randn(channels)]
    compare(half, inputs, dtype, typed=(0,))
    assert "causal-conv1d" in backend.report()["causal_conv1d"]


@pytest.mark.parametrize(("length", "width"), [(1, 32), (1, 19), (8, 32), (8, 19)])
def test_causal_conv1d_at_an_odd_offset(length, width):
    """A misaligned load ends the use of the GPU for the process; of one step, contiguous() changes no stride."""
    needs("causal_conv1d")
    inputs = [torch.randn(1, length, width), torch.randn(16, 4), torch.randn(16)]
    compare(lambda x, *weights: causal_conv1d(x[..., 3:19], *weights, "silu"), inputs, torch.float32, typed=())


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize(("heads", "width", "groups", "order"), [(2, 64, 1, 64), (8, 16, 4, 16)])
def test_state_space_dual(dtype, length, heads, width, groups, order):
    needs("state_space_dual")
    x, dt = torch.randn(3, length, heads, width), 0.5 * torch.randn(3, length, heads)
    A, B, C = -torch.empty(heads).uniform_(1, 16), *torch.randn(2, 3, length, groups, order)
    inputs = [x, dt, A, B, C, torch.randn(heads), step_bias(heads)]
    compare(state_space_dual, inputs, dtype, typed=(0, 1, 3, 4))
    assert "mamba-ssm" in backend.report()["state_space_dual"]


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("length", [3, 65])
def test_state_space_dual_from_a_state_to_a_state(dtype, length):
    needs("state_space_dual")
    x, dt, A = torch.randn(3, length, 2, 64), 0.5 * torch.randn(3, length, 2), -torch.empty(2).uniform_(1, 16)
    B, C = torch.randn(2, 3, length, 1, 16)

    def run(*inputs: Tensor) -> Tensor:
        y, last = state_space_dual_with_state(*inputs[:-1], initial_state=inputs[-1])
        return torch.cat([y.flatten().to(last), last.flatten()])

    inputs = [x, dt, A, B, C, torch.randn(2), step_bias(2), torch.randn(3, 2, 64, 16)]
    compare(run, inputs, dtype, typed=(0, 1, 3, 4))


@pytest.mark.parametrize("length", LENGTHS)
def test_mamba_block(length):
    needs("mamba_block")
    weights = [None if t is None else t.detach() for t in Mamba(64, bias=True)._weights()]

    def run(hidden, *weights):
        return mamba_block(hidden, MambaWeights(*weights))

    compare(run, [torch.randn(3, length, 64), *weights], torch.float32, typed=())
    assert "mamba-ssm" in backend.report()["mamba_block"]


@pytest.mark.parametrize("name", ["Mamba", "Mamba2", "LatentMamba2"])
def test_parts_of_a_sequence_give_the_whole(name):
    """Mamba-1's kernels know no state: steps in front of a part write it, steps behind it read it."""
    needs("mamba_block" if name == "Mamba" else "mamba2_block")
    build, shape = BLOCKS[name]
    block, hidden = build().cuda(), torch.randn(3, 200, *shape, device="cuda")
    state, outputs = None, []
    for part in hidden.split([1, 63, 136], 1):
        out, state = block.forward_from(part, state)
        outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, 1), block(hidden), rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("norm_before_gate", [False, True])
def test_mamba2_inner(length, norm_before_gate):
    needs("mamba2_block")

    def run(*inputs: Tensor) -> Tensor:
        sizes = {"headdim": 16, "ngroups": 4, "d_state": 16, "chunk_size": 64}
        return mamba2_inner(*inputs, 1e-5, **sizes, norm_before_gate=norm_before_gate)

    channels = 128 + 2 * 4 * 16
    inputs = [torch.randn(3, length, 128 + channels + 8), 0.5 * torch.randn(channels, 4), torch.randn(channels)]
    inputs += [step_bias(8), -torch.empty(8).uniform_(1, 16), torch.randn(8), torch.rand(128) + 0.5]
    compare(run, inputs, torch.float32, typed=())
    assert "mamba-ssm" in backend.report()["mamba2_block"]


BLOCKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Mamba": (lambda: Mamba(64), (64,)),
    "Mamba, odd width": (lambda: Mamba(25, d_state=7), (25,)),
    "Mamba of 50, biases": (lambda: Mamba(50, bias=True), (50,)),
    "Mamba2": (lambda: Mamba2(64, d_state=64, headdim=16), (64,)),
    "Mamba2, sizes not multiples of 8": (lambda: Mamba2(20, d_state=18, headdim=8), (20,)),
    "Mamba2, groups": (lambda: Mamba2(64, d_state=16, headdim=16, ngroups=2), (64,)),
    "LatentMamba2": (lambda: LatentMamba2(8, 16, d_state=16, headdim=16), (8, 16)),
    "LatentMamba2, sizes not multiples of 8": (lambda: LatentMamba2(3, 12, d_state=10, headdim=8), (3, 12)),
}


@pytest.mark.parametrize("name", BLOCKS)
@pytest.mark.parametrize("length", [1, 3, 50, 200])
@pytest.mark.parametrize("autocast", [False, True])
def test_blocks(name, length, autocast):
    """A block trained on CUDA computes on a CPU what it computed there, values and gradients, and from one state."""
    build, shape = BLOCKS[name]
    on_cpu = build().double()
    on_cuda = copy.deepcopy(on_cpu).float().cuda()
    tolerance = TOLERANCES[torch.bfloat16 if autocast else torch.float32]
    x = torch.randn(3, length, *shape)
    x_cpu, x_cuda = x.double().requires_grad_(), x.cuda().requires_grad_()
    expected = on_cpu(x_cpu)
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        y = on_cuda(x_cuda)
    weights = torch.randn_like(expected)
    (expected * weights).sum().backward()
    (y.float() * weights.float().cuda()).sum().backward()
    assert_close(y, expected, tolerance, "value")
    assert_close(x_cuda.grad, x_cpu.grad, 2 * tolerance, "gradient of the input")
    for (parameter, a), b in zip(on_cuda.named_parameters(), on_cpu.parameters(), strict=True):
        assert_close(a.grad, b.grad, 4 * tolerance, f"gradient of {parameter}")


@pytest.mark.parametrize("name", ["Mamba", "Mamba2", "LatentMamba2"])
def test_right_pads_change_nothing(name):
    build, shape = BLOCKS[name]
    block, x = build().cuda(), torch.randn(2, 60, *shape, device="cuda")
    padded = torch.cat([x[:, :33], torch.full_like(x[:, 33:], 50.0)], 1)
    torch.testing.assert_close(block(padded)[:, :33], block(x)[:, :33], rtol=0, atol=0)


@pytest.mark.parametrize("name", ["Mamba", "Mamba2"])
def test_official_modules_agree(name):
    """One state dict in both, one output."""
    mamba_ssm = pytest.importorskip("mamba_ssm", exc_type=Exception)
    ours = {"Mamba": Mamba(64), "Mamba2": Mamba2(64, d_state=64, headdim=16)}[name].cuda()
    sizes = {"Mamba": {}, "Mamba2": {"d_state": 64, "headdim": 16, "chunk_size": 64}}[name]
    theirs = getattr(mamba_ssm, name)(64, **sizes).cuda()
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 50, 64, device="cuda")
    torch.testing.assert_close(ours(x), theirs(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["cpu", "reference"])
def test_without_kernels(name):
    backend.set_backend(name)
    inputs = [torch.randn(2, 20, 8), torch.rand(2, 20, 8), rates(8, 4), *torch.randn(2, 2, 20, 4)]
    compare(selective_scan, inputs, torch.float32, typed=())
    dual = [torch.randn(2, 20, 2, 4), torch.rand(2, 20, 2), -torch.rand(2), *torch.randn(2, 2, 20, 1, 4)]
    compare(state_space_dual, dual, torch.float32, typed=())
    convolution = [torch.randn(2, 5, 8), torch.randn(8, 4), torch.randn(8)]
    compare(partial(causal_conv1d, activation="silu"), convolution, torch.float32, typed=())


def test_insisting_on_kernels():
    for op in ("selective_scan", "causal_conv1d", "mamba_block"):
        needs(op)
    backend.set_backend("cuda")
    assert Mamba(16).cuda()(torch.randn(2, 5, 16, device="cuda")).isfinite().all()


@pytest.mark.parametrize("scale", ["none", "ortho"])
def test_circular_convolution(scale):
    for d in (7, 64):
        inputs = [torch.randn(3, d), torch.randn(3, d)]
        compare(lambda a, b: unbind(bind(unitary(a), b, scale), a, scale), inputs, torch.float32, typed=())


def test_losses():
    targets, negatives = torch.randint(1, 50, (30,)), torch.randint(1, 50, (64,))
    inputs = [torch.randn(30, 16), torch.randn(50, 16)]
    compare(lambda h, t: cross_entropy(h, targets.to(h.device), t, chunk_size=8), inputs, torch.float32, typed=())
    seen = SeenItems(
        torch.randint(50, (40,)), torch.arange(30) // 10 * 12, torch.arange(30) // 10 * 12 + torch.arange(30) % 10
    )
    compare(
        lambda h, t: cross_entropy(
            h, targets.to(h.device), t, None, 8, True, SeenItems(*(part.to(h.device) for part in seen))
        ),
        inputs,
        torch.float32,
        typed=(),
    )
    for cosine in (False, True):
        compare(
            lambda h, t, cosine=cosine: info_nce(
                h, targets.to(h.device), t, negatives.to(h.device), temperature=0.5, cosine=cosine
            ),
            inputs,
            torch.float32,
            typed=(),
        )
    exclude = targets.cuda()
    assert (sample_negatives(exclude.shape, 50, "cuda", exclude) != exclude).all()
