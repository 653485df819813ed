"""Times every operation in each of its forms, prints a Markdown table.

    OMP_WAIT_POLICY=passive python -m benchmarks.operators [--device cuda] [--threads 2] [--rounds 7] [--only scan …]

Batch x length is 256 x 50 and 16 x 2048, the widths are those of our models, the loss is over 3,417 items. A form is
named by what the package calls it; reference is the plain one that the others are tested against. Every form of an
operation is measured in turn in each round, so that what else the machine does falls on all of them, each time after a
run that is not timed; milliseconds are medians over the rounds.

The last column is the share of the machine's limit: the least time for both passes over the time taken. The least time
is that of the operation's multiply-adds and exponentials alone, by loops of bare instructions measured in the same run
(benchmarks/limits.py), one after the other; no memory is counted. Counted are: of a layer of matrix products each
product once forwards and twice backwards; of cross-entropy three products of positions, items and width, and one
exponential a score; of the scan 3 multiply-adds and an exponential a channel, state and step forwards, 9 and one
backwards; of the state space dual its recurrence, 2 multiply-adds a number of the state and step forwards and twice
that backwards; of a gate or activation an exponential each way; of a transform 5/2 d log₂ d operations, three forwards
and three backwards. Where factors are bfloat16 the limit of products is that of the fastest instruction for these.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.cells import headline, now, parser
from benchmarks.limits import Limits, Work
from benchmarks.limits import measure as measure_limits
from recbole_holo.ops import backend, bind, causal_conv1d, cross_entropy, selective_scan, state_space_dual
from recbole_holo.ops.dropout import dropout
from recbole_holo.ops.feed_forward import FeedForwardWeights, feed_forward

SIZES = ((256, 50), (16, 2048))
ITEMS, VALUES, WIDTHS = 3417, 1500, (16, 32, 50, 64, 128, 256)
Context = Callable[[], AbstractContextManager[Any]]
Forms = dict[str, tuple[Context, Callable[..., Tensor]]]
HALF = "package, bfloat16"  # the name of the forms in which the factors of products are


@contextmanager
def reference() -> Iterator[None]:
    backend.set_backend("reference")
    yield
    backend.set_backend("auto")


CONTEXTS: tuple[Context, ...] = (nullcontext, lambda: backend.excluding("native"), reference)


def chosen(op: str, function: Callable[..., Tensor], like: Tensor) -> Forms:
    """The forms that the package chooses among, the best first."""
    forms: Forms = {}
    for context in CONTEXTS:
        with context():
            forms.setdefault(backend.choose(op, like), (context, function))
    return forms


def by_transforms(a: Tensor, b: Tensor) -> Tensor:
    return torch.fft.irfft(torch.fft.rfft(a) * torch.fft.rfft(b), n=a.shape[-1])


class ByMatrices:
    """The circular convolution by products with the matrices of the real Fourier transform and of its inverse."""

    def __init__(self, d: int, device: str) -> None:
        self.half = d // 2 + 1
        angle = torch.outer(torch.arange(d), torch.arange(self.half)).double() * (2 * math.pi / d)
        twice = torch.full((self.half,), 2.0).index_fill_(0, torch.tensor([0] + [d // 2] * (d % 2 == 0)), 1.0)
        self.matrix = torch.cat([angle.cos(), -angle.sin()], 1).float().to(device)
        self.inverse = (self.matrix.T / d * twice.repeat(2).to(device).unsqueeze(-1)).contiguous()

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        (x, y), (u, v) = ((t @ self.matrix).split(self.half, -1) for t in (a, b))
        return torch.cat([x * u - y * v, x * v + y * u], -1) @ self.inverse


def bound_at_once(carrying: list[Tensor], item: Tensor, *tables: Tensor) -> Tensor:
    """An item bound with the sum of its attributes' vectors, as the package does."""
    vectors = (F.embedding(i, t[:, :64]) for i, t in zip(carrying, tables, strict=True))
    return item + bind(item, sum(vectors, torch.zeros_like(item)))


def bound_one_by_one(carrying: list[Tensor], item: Tensor, *tables: Tensor) -> Tensor:
    return sum((bind(item, F.embedding(i, t[:, :64])) for i, t in zip(carrying, tables, strict=True)), item)


def bound_as_spectra(carrying: list[Tensor], item: Tensor, *tables: Tensor) -> Tensor:
    """The vectors kept as spectra, which spares one of the three transforms."""
    looked_up = torch.stack([F.embedding(i, t) for i, t in zip(carrying, tables, strict=True)]).sum(0)
    spectrum = torch.view_as_complex(looked_up.unflatten(1, (-1, 2)))
    return torch.fft.irfft(torch.fft.rfft(item) * (1 + spectrum), n=item.shape[-1])


def halved(device: str) -> AbstractContextManager[Any]:
    return torch.autocast(device, torch.bfloat16)


def operations(batch: int, length: int, device: str) -> Iterator[tuple[str, Work | None, list[Tensor], Forms]]:
    """Name, the least work of both passes, the tensors that it is differentiated by, and its forms."""
    rows = batch * length

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device)

    u, steps = draw(batch, length, 128), draw(batch, length, 128) - 4
    scan = [u, steps, -draw(128, 16).exp(), draw(batch, length, 16), draw(batch, length, 16), draw(128), draw(*u.shape)]
    forms = chosen("selective_scan", partial(selective_scan, delta_softplus=True), u)
    work = Work(24 * rows * 128 * 16, 2 * rows * 128 * (16 + 2))
    yield "selective scan, 128 channels, N 16", work, scan, forms

    for heads, width, groups in ((8, 16, 4), (2, 64, 1)):
        x, bc = draw(batch, length, heads, width), draw(2, batch, length, groups, 64)
        dual = [x, draw(batch, length, heads) - 4, -8 * torch.rand(heads, device=device), *bc]
        name = f"state space dual, {heads} heads of {width} in {groups} groups, N 64"
        work = Work(12 * rows * heads * width * 64, 2 * rows * heads)
        yield name, work, dual, chosen("state_space_dual", state_space_dual, x)

    for channels in (128, 640):
        x = draw(batch, length, channels)
        forms = chosen("causal_conv1d", partial(causal_conv1d, activation="silu"), x)
        work = Work(3 * 8 * rows * channels, 2 * rows * channels)
        yield f"convolution and SiLU, {channels} channels", work, [x, draw(channels, 4), draw(channels)], forms

    for d in WIDTHS:
        yield (
            f"circular convolution, d {d}",
            Work(6 * 2.5 * rows * d * math.log2(d)),
            [draw(batch * length, d), draw(batch * length, d)],
            {
                "real transforms": (nullcontext, bind),
                "real transforms, differentiated by PyTorch": (nullcontext, by_transforms),
                "matrix products": (nullcontext, ByMatrices(d, device)),
            },
        )

    carrying = [torch.randint(VALUES, (batch * length,), device=device) for _ in range(3)]
    tables = [draw(VALUES, 66) for _ in carrying]  # the 33 complex numbers of a spectrum, or 64 real ones
    forms = {
        "package: their sum at once": (nullcontext, partial(bound_at_once, carrying)),
        "one by one": (nullcontext, partial(bound_one_by_one, carrying)),
        "kept as spectra": (nullcontext, partial(bound_as_spectra, carrying)),
    }
    yield "item bound with three attributes, d 64", None, [draw(batch * length, 64), *tables], forms

    forms = {"package": (nullcontext, lambda x: dropout(x, 0.2)), "PyTorch": (nullcontext, lambda x: F.dropout(x, 0.2))}
    yield "dropout, 64 channels", None, [draw(batch, length, 64)], forms

    for gated, name in ((False, "feed-forward, GELU, 64 → 256"), (True, "feed-forward, gated, 64 → 128")):
        inner = 128 if gated else 256
        weights = draw(256, 64) / 8, draw(64, inner) / 8

        def layer(x: Tensor, up: Tensor, down: Tensor, gated: bool = gated) -> Tensor:
            return feed_forward(x, FeedForwardWeights(up, None, down, None), gated, p=0.2)

        forms = {"package": (nullcontext, layer), "PyTorch": (reference, layer), HALF: (partial(halved, device), layer)}
        work = Work(6 * rows * 64 * (256 + inner), 2 * rows * inner)
        yield name, work, [draw(batch, length, 64), *weights], forms

    targets = torch.randint(ITEMS, (batch * length,), device=device)
    forms = {
        "package": (nullcontext, lambda h, table: cross_entropy(h, targets, table)),
        "without native": (CONTEXTS[1], lambda h, table: cross_entropy(h, targets, table)),
        "PyTorch": (nullcontext, lambda h, table: F.cross_entropy(h @ table.T, targets)),
        HALF: (partial(halved, device), lambda h, table: cross_entropy(h, targets, table)),
    }
    for d in (64, 128):
        work = Work(6 * rows * ITEMS * d, rows * ITEMS)
        yield f"cross-entropy, d {d}", work, [draw(rows, d), draw(ITEMS, d) / d**0.5], forms


def measure(inputs: list[Tensor], forms: Forms, device: str, rounds: int) -> dict[str, tuple[float, float]]:
    """Form → median milliseconds of the forward pass, and of both passes."""
    inputs = [t.requires_grad_() for t in inputs]
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in forms}
    for _ in range(rounds):
        for name, (context, function) in forms.items():
            for timed in (False, True):  # once over what the form before it left in the caches and the heap
                with context():
                    start = now(device)
                    y = function(*inputs)
                    middle = now(device)
                    torch.autograd.grad(y, inputs, torch.ones_like(y))
                    if timed:
                        times[name].append((middle - start, now(device) - start))
    medians = {name: [1e3 * statistics.median(t) for t in zip(*taken, strict=True)] for name, taken in times.items()}
    return {name: (forward, both) for name, (forward, both) in medians.items()}


def share(work: Work | None, limits: Limits | None, half: bool, milliseconds: float) -> str:
    """Of the machine's limit, as a cell of the table."""
    if work is None or limits is None:
        return ""
    return f"{100e3 * work.seconds(limits, half) / milliseconds:.0f} %"


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--only", nargs="+", default=[""], help="operations whose name has one of these words")
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    print(f"{headline(given.device, given.threads)}; milliseconds, medians of {given.rounds}\n")
    limits = measure_limits(given.threads) if given.device == "cpu" else None
    if limits is not None:
        print(f"{limits}\n")
    print(
        "| batch, length | operation | form | forward | of the best | forward + backward | of the best | of the limit |"
    )
    print("|---|---|---|---:|---:|---:|---:|---:|")
    for batch, length in SIZES:
        for name, work, inputs, forms in operations(batch, length, given.device):
            if not any(word in name for word in given.only):
                continue
            found = measure(inputs, forms, given.device, given.rounds)
            best = [min(times) for times in zip(*found.values(), strict=True)]
            for form, times in found.items():
                columns = " | ".join(f"{t:.1f} | {t / least:.1f}" for t, least in zip(times, best, strict=True))
                reached = share(work, limits, form == HALF, times[1])
                print(f"| {batch}, {length} | {name} | {form} | {columns} | {reached} |", flush=True)


if __name__ == "__main__":
    main()
