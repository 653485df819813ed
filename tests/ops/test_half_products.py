"""Products in bfloat16 as AVX512-BF16 and AMX make them.

With portable code in the place of their instructions, so that layouts, tails and threads are tested on every processor.
"""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from recbole_holo.layers import Mamba
from recbole_holo.ops import backend, native
from recbole_holo.ops.cross_entropy import cross_entropy
from recbole_holo.ops.feed_forward import FeedForwardWeights, feed_forward
from recbole_holo.ops.seen_items import SeenItems

SOURCES = ("selective_scan.cpp", "cross_entropy_half.cpp", "feed_forward.cpp", "mamba.cpp", "ssd.cpp")
FORMS = ("avx512 bf16", "amx bf16")
FOLDER = Path(native.__file__).parent


@pytest.fixture(scope="module", params=FORMS)
def emulation(request, tmp_path_factory):
    if native.problem():
        pytest.skip(native.problem())
    target = tmp_path_factory.mktemp("emulated") / "kernels.so"
    flags = [flag for flag in native.FLAGS if flag != "-O3"]
    flags += ["-O0", "-march=native", "-Wno-psabi", f"-DEMULATED={FORMS.index(request.param) + 1}"]
    attempts = [[*flags, "-fopenmp"], flags]
    native._compile(native._compiler(), attempts, [FOLDER / name for name in SOURCES], target, time.monotonic() + 600)
    return request.param, native.load(target)


@pytest.fixture(autouse=True)
def emulated(emulation, monkeypatch):
    form, library = emulation
    monkeypatch.setattr(native, "library", lambda: library)
    assert native.half_products() == form
    before = torch.get_num_threads()
    yield form
    torch.set_num_threads(before)


def relative_error(a, b):
    return float((a.double() - b).norm() / b.norm())


def seen_by(rows, items):
    """Histories of 50 rows, from their fourth event on, and targets of which some were seen."""
    events, row = torch.randint(items, (rows + 60,)), torch.arange(rows)
    start = row // 50 * 50
    seen = SeenItems(events, start, row + 4)
    targets = torch.randint(items, (rows,))
    targets[::3] = events[start[::3]]
    return seen, targets


def by_hand(hidden, table, bias, targets, seen):
    scores = hidden @ table.T if bias is None else hidden @ table.T + bias
    if seen is not None:
        out = torch.zeros(scores.shape, dtype=torch.bool)
        for i in range(len(targets)):
            out[i, seen.items[seen.start[i] : seen.end[i]]] = True
        out[torch.arange(len(targets)), targets] = False
        scores = scores.masked_fill(out, -torch.inf)
    return F.cross_entropy(scores, targets)


def run(hidden, table, bias, targets, seen=None, chunk_size=None):
    with torch.autocast("cpu", torch.bfloat16):
        return cross_entropy(hidden, targets, table, bias, chunk_size, seen=seen)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("with_seen", [True, False])
@pytest.mark.parametrize(
    ("rows", "items", "d", "threads", "chunk_size"),
    [
        (1, 5, 1, 1, None),
        (3, 64, 16, 2, None),
        (131, 301, 33, 1, None),
        (270, 1025, 40, 2, None),
        (200, 257, 65, 5, 7),
    ],
)
def test_cross_entropy(rows, items, d, threads, chunk_size, with_seen, biased):
    torch.set_num_threads(threads)
    seen, targets = seen_by(rows, items)
    seen = seen if with_seen else None
    single = [torch.randn(rows, d), torch.randn(items, d), torch.randn(items)]
    # Factors that are bfloat16 already: what is left is the rounding of the powers.
    single = [t.bfloat16().float().requires_grad_() for t in (single if biased else single[:2])]
    double = [t.detach().double().requires_grad_() for t in single]
    bias, bias_of_reference = (single[2], double[2]) if biased else (None, None)
    loss = run(single[0], single[1], bias, targets, seen, chunk_size)
    expected = by_hand(double[0], double[1], bias_of_reference, targets, seen)
    assert abs(loss - expected) <= 1e-5 * max(1, expected)
    for a, b in zip(torch.autograd.grad(loss, single), torch.autograd.grad(expected, double), strict=True):
        assert relative_error(a, b) < 0.004  # 2⁻⁸
    assert f"native, {native.half_products()}" in backend.report()["cross_entropy"]


@pytest.mark.parametrize("size", [16, 2**14])
def test_others_far_above_the_target(size):
    """The highest score is in the last block, and the references of most rows are raised there."""
    hidden, table = (torch.randn(n, 32).bfloat16().float().requires_grad_() for n in (50, 700))
    with torch.no_grad():
        table[600:] *= size
    targets = torch.randint(300, (50,))
    loss = run(hidden, table, None, targets)
    double = [t.detach().double().requires_grad_() for t in (hidden, table)]
    expected = by_hand(*double, None, targets, None)
    assert abs(loss - expected) <= 1e-5 * expected
    found, wanted = (torch.autograd.grad(value, at) for value, at in ((loss, (hidden, table)), (expected, double)))
    for a, b in zip(found, wanted, strict=True):
        assert relative_error(a, b) < 0.004


def test_nothing_left_but_the_target():
    hidden, table, bias = (torch.randn(*n).requires_grad_() for n in ((2, 20), (70, 20), (70,)))
    seen = SeenItems(torch.arange(70), torch.zeros(2, dtype=torch.long), torch.full((2,), 70))
    loss = run(hidden, table, bias, torch.tensor([3, 69]), seen)
    assert loss == 0
    assert all(gradient.eq(0).all() for gradient in torch.autograd.grad(loss, (hidden, table, bias)))


def test_seen_items_get_no_gradient():
    hidden, table, bias = (torch.randn(*n).requires_grad_() for n in ((9, 20), (70, 20), (70,)))
    seen = SeenItems(torch.arange(40, 50), torch.zeros(9, dtype=torch.long), torch.full((9,), 10))
    _, g_table, g_bias = torch.autograd.grad(run(hidden, table, bias, torch.arange(9), seen), (hidden, table, bias))
    assert g_table[40:50].eq(0).all()
    assert g_bias[40:50].eq(0).all()
    assert g_table[50:].ne(0).all()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_not_a_number_is_not_hidden(value):
    hidden, table = torch.randn(4, 20), torch.randn(90, 20)
    hidden[2, 3] = value
    assert run(hidden, table, None, torch.arange(4)).isnan()


def test_without_gradients():
    hidden, table, targets = torch.randn(40, 20), torch.randn(90, 20), torch.randint(90, (40,))
    with torch.no_grad():
        value = run(hidden, table, None, targets)
    assert value == run(hidden.requires_grad_(), table, None, targets)


@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("rows", [1, 37, 200])
def test_feed_forward(rows, gated):
    d, inner = 48, 80
    given = [torch.randn(rows, d), torch.randn(2 * inner if gated else inner, d) / 7, torch.randn(d, inner) / 9]
    biases = torch.randn(len(given[1])), torch.randn(d)

    def layer(x, up, down):
        return feed_forward(x, FeedForwardWeights(up, biases[0], down, biases[1]), gated)

    agree(layer, given)


@pytest.mark.parametrize("length", [1, 33, 130])
def test_mamba(length):
    block = Mamba(32)
    agree(lambda x: block(x), [torch.randn(3, length, 32)])


def agree(layer, given):
    """Under autocast as without, but for the rounding of factors, which is not nothing."""
    results = []
    for enabled in (True, False):
        leaves = [t.clone().requires_grad_() for t in given]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = layer(*leaves)
        results.append(
            [y.detach(), *torch.autograd.grad((y.float() * torch.linspace(-1, 1, y.numel()).view_as(y)).sum(), leaves)]
        )
    errors = [relative_error(a, b) for a, b in zip(*results, strict=True)]
    assert min(errors[1:]) > 1e-5
    assert max(errors) < 0.03
