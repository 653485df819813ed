"""Times whole layers side by side, prints a Markdown table.

    OMP_WAIT_POLICY=passive python -m benchmarks.layers [--device cuda] [--rounds 7] [--sizes 256x50 …] [--autocast]

What is timed is a sublayer as it stands in a model, with its norm and its residual, forward and backward, without
dropout: a Mamba or Mamba-2 block, SASRec's attention (four projections) on PyTorch's fused attention and as RecBole
writes it, and ``nn.GRU`` of Mamba's inner width. d_model 64, d_inner 128, d_state 16, two heads of attention. Every row
of a size is measured in turn in each round, so that what else the machine does falls on all of them, each time after a
run that is not timed; medians over the rounds. With --autocast the matrix products of all rows are in bfloat16.
"""

from __future__ import annotations

import statistics
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cells import headline, now, parser
from recbole_holo.layers import LatentMamba2, Mamba, Mamba2
from recbole_holo.ops import backend

SIZES = ((256, 50), (256, 200), (16, 2048), (4, 10000))
D_MODEL, D_INNER, D_STATE, HEADS = 64, 128, 16, 2
EXPLICIT_ELEMENTS = 2**28  # of the attention weights that the explicit form holds several times over


class Sublayer(nn.Module):
    """``LayerNorm(x + f(x))``."""

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self.inside, self.norm = inside, nn.LayerNorm(D_MODEL)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x + self.inside(x))


class Attention(nn.Module):
    """Causal self-attention as in SASRec: four projections around the attention of two heads."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.query, self.key, self.value, self.dense = (nn.Linear(D_MODEL, D_MODEL) for _ in range(4))
        self.fused = fused

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            mask = torch.full((x.shape[1], x.shape[1]), -10000.0, device=x.device).triu(1)
            y = torch.softmax(q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + mask, -1) @ v
        return self.dense(y.transpose(1, 2).flatten(2))


class Latent(nn.Module):
    """Hydra's four latent heads of width 16, without their gate."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = LatentMamba2(4, 16, d_state=64, headdim=16)

    def forward(self, x: Tensor) -> Tensor:
        return self.heads(x.unflatten(-1, (4, 16))).flatten(2)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(D_MODEL, D_INNER, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.gru(x)[0]


def rows(batch: int, length: int, device: str) -> dict[str, tuple[nn.Module, tuple[str, ...]]]:
    """Name → a module, and the CPU forms that it must do without."""
    table: dict[str, tuple[nn.Module, tuple[str, ...]]] = {"Mamba": (Sublayer(Mamba(D_MODEL, d_state=D_STATE)), ())}
    if device == "cpu":
        table["Mamba, numba"] = (table["Mamba"][0], ("native",))
    table["Mamba-2"] = (Sublayer(Mamba2(D_MODEL, d_state=D_STATE, headdim=64)), ())
    table["Hydra's latent Mamba-2"] = (Sublayer(Latent()), ())
    table["attention, fused"] = (Sublayer(Attention(fused=True)), ())
    if batch * HEADS * length**2 <= EXPLICIT_ELEMENTS:
        table["attention, as RecBole writes it"] = (Sublayer(Attention(fused=False)), ())
    table["GRU 64→128"] = (Recurrent(), ())
    return {name: (module.to(device), excluded) for name, (module, excluded) in table.items()}


def measure(batch: int, length: int, device: str, rounds: int, half: bool = False) -> dict[str, tuple[float, float]]:
    """Name → median milliseconds of the forward pass, and of both passes."""
    table = rows(batch, length, device)
    x = torch.randn(batch, length, D_MODEL, device=device, requires_grad=True)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in table}
    for _ in range(rounds):
        for name, (module, excluded) in table.items():
            with backend.excluding(*excluded) if excluded else nullcontext():
                for timed in (False, True):  # the first takes its memory back from what ran before
                    start = now(device)
                    with torch.autocast(device, torch.bfloat16, enabled=half):
                        y = module(x)
                    middle = now(device)
                    torch.autograd.grad(y, [x, *module.parameters()], torch.ones_like(y))
                    if timed:
                        times[name].append((middle - start, now(device) - start))
    return {
        name: (1e3 * statistics.median(t[0] for t in taken), 1e3 * statistics.median(t[1] for t in taken))
        for name, taken in times.items()
    }


def size(text: str) -> tuple[int, int]:
    batch, _, length = text.partition("x")
    return int(batch), int(length)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--autocast", action="store_true", help="matrix products of all rows in bfloat16")
    options.add_argument("--sizes", nargs="+", type=size, default=SIZES, metavar="BATCHxLENGTH")
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    print(f"{headline(chosen.device, chosen.threads)}; milliseconds, medians of {chosen.rounds}\n")
    print(
        "| batch, length | sublayer | forward | forward + backward | times as fast: Mamba |\n|---|---|---:|---:|---:|"
    )
    for batch, length in chosen.sizes:
        medians = measure(batch, length, chosen.device, chosen.rounds, chosen.autocast)
        scale = medians["Mamba"][1]
        for name, (forward, both) in medians.items():
            print(f"| {batch}, {length} | {name} | {forward:.1f} | {both:.1f} | {both / scale:.2f} |", flush=True)
    print("\n" + "; ".join(f"{op}: {implementation}" for op, implementation in backend.report().items()))


if __name__ == "__main__":
    main()
