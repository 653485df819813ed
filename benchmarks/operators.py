"""Times every operation in each of its forms, prints a Markdown table.

    OMP_WAIT_POLICY=passive python -m benchmarks.operators [--device cuda] [--threads 2] [--rounds 7] [--only scan …]

Batch x length is 256 x 50 and 16 x 2048, the widths are those of our models, the loss is over 3,417 items. A form is
named by what the package calls it; reference is the plain one that the others are tested against. Every form of an
operation is measured in turn in each round, so that what else the machine does falls on all of them, each time after a
run that is not timed; milliseconds are medians over the rounds.
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
from recbole_holo.ops import backend, bind, causal_conv1d, cross_entropy, selective_scan, state_space_dual
from recbole_holo.ops.dropout import dropout
from recbole_holo.ops.feed_forward import FeedForwardWeights, feed_forward

SIZES = ((256, 50), (16, 2048))
ITEMS, VALUES, WIDTHS = 3417, 1500, (16, 32, 50, 64, 128, 256)
Context = Callable[[], AbstractContextManager[Any]]
Forms = dict[str, tuple[Context, Callable[..., Tensor]]]


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


def operations(batch: int, length: int, device: str) -> Iterator[tuple[str, list[Tensor], Forms]]:
    """Name, the tensors that it is differentiated by, and its forms."""

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, device=device)

    u, steps = draw(batch, length, 128), draw(batch, length, 128) - 4
    scan = [u, steps, -draw(128, 16).exp(), draw(batch, length, 16), draw(batch, length, 16), draw(128), draw(*u.shape)]
    forms = chosen("selective_scan", partial(selective_scan, delta_softplus=True), u)
    yield "selective scan, 128 channels, N 16", scan, forms

    for heads, width, groups in ((8, 16, 4), (2, 64, 1)):
        x, bc = draw(batch, length, heads, width), draw(2, batch, length, groups, 64)
        dual = [x, draw(batch, length, heads) - 4, -8 * torch.rand(heads, device=device), *bc]
        name = f"state space dual, {heads} heads of {width} in {groups} groups, N 64"
        yield name, dual, chosen("state_space_dual", state_space_dual, x)

    for channels in (128, 640):
        x = draw(batch, length, channels)
        forms = chosen("causal_conv1d", partial(causal_conv1d, activation="silu"), x)
        yield f"convolution and SiLU, {channels} channels", [x, draw(channels, 4), draw(channels)], forms

    for d in WIDTHS:
        yield (
            f"circular convolution, d {d}",
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
    yield "item bound with three attributes, d 64", [draw(batch * length, 64), *tables], forms

    forms = {"package": (nullcontext, lambda x: dropout(x, 0.2)), "PyTorch": (nullcontext, lambda x: F.dropout(x, 0.2))}
    yield "dropout, 64 channels", [draw(batch, length, 64)], forms

    for gated, name in ((False, "feed-forward, GELU, 64 → 256"), (True, "feed-forward, gated, 64 → 128")):
        weights = draw(256, 64) / 8, draw(64, 128 if gated else 256) / 8

        def layer(x: Tensor, up: Tensor, down: Tensor, gated: bool = gated) -> Tensor:
            return feed_forward(x, FeedForwardWeights(up, None, down, None), gated, p=0.2)

        yield (
            name,
            [draw(batch, length, 64), *weights],
            {"package": (nullcontext, layer), "PyTorch": (reference, layer)},
        )

    targets = torch.randint(ITEMS, (batch * length,), device=device)
    forms = {
        "package": (nullcontext, lambda h, table: cross_entropy(h, targets, table)),
        "without native": (CONTEXTS[1], lambda h, table: cross_entropy(h, targets, table)),
        "PyTorch": (nullcontext, lambda h, table: F.cross_entropy(h @ table.T, targets)),
    }
    yield "cross-entropy, d 64", [draw(batch * length, 64), draw(ITEMS, 64) / 8], forms


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


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--only", nargs="+", default=[""], help="operations whose name has one of these words")
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    print(f"{headline(given.device, given.threads)}; milliseconds, medians of {given.rounds}\n")
    print("| batch, length | operation | form | forward | of the best | forward + backward | of the best |")
    print("|---|---|---|---:|---:|---:|---:|")
    for batch, length in SIZES:
        for name, inputs, forms in operations(batch, length, given.device):
            if not any(word in name for word in given.only):
                continue
            found = measure(inputs, forms, given.device, given.rounds)
            best = [min(times) for times in zip(*found.values(), strict=True)]
            for form, times in found.items():
                columns = " | ".join(f"{t:.1f} | {t / least:.1f}" for t, least in zip(times, best, strict=True))
                print(f"| {batch}, {length} | {name} | {form} | {columns} |", flush=True)


if __name__ == "__main__":
    main()
