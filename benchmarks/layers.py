"""Times the selective scan and whole layers, prints a Markdown table.

    OMP_WAIT_POLICY=passive python -m benchmarks.scan [--device cuda] [--threads 2] [--rounds 7]

Every row of a size is measured in turn in each round, so that what else the machine does falls on all of them; medians
over the rounds, after one to compile and warm up. Widths of a recommender: d_model 64, d_inner 128, d_state 16.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recbole_holo.layers import Mamba, Mamba2
from recbole_holo.ops import backend, selective_scan
from recbole_holo.ops.selective_scan import selective_scan_reference

SIZES = ((256, 50), (256, 200), (16, 2048))
D_MODEL, D_INNER, D_STATE, HEADS = 64, 128, 16, 2


class Attention(nn.Module):
    """Causal self-attention of SASRec's size: four projections around PyTorch's fused attention, no dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(D_MODEL, 3 * D_MODEL), nn.Linear(D_MODEL, D_MODEL)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


def rows(batch: int, length: int, device: str) -> dict[str, tuple[Callable[[], Any], list[Tensor]]]:
    """Name → a function and the tensors it is differentiated by."""
    shapes = [(batch, length, D_INNER)] * 2 + [(D_INNER, D_STATE)] + [(batch, length, D_STATE)] * 2
    u, delta, A, B, C = (torch.randn(shape, device=device) for shape in shapes)
    z, D, bias = torch.randn_like(u), torch.ones(D_INNER, device=device), torch.full((D_INNER,), -4.0, device=device)
    scan = [t.requires_grad_() for t in (u, delta, -A.exp().detach(), B, C, D, z, bias)]
    x = torch.randn(batch, length, D_MODEL, device=device, requires_grad=True)
    layers = {
        "Mamba layer": Mamba(D_MODEL, d_state=D_STATE),
        "Mamba-2 layer": Mamba2(D_MODEL, d_state=D_STATE, headdim=64),
        "GRU 64→64": nn.GRU(D_MODEL, D_MODEL, batch_first=True),
        "attention layer (SDPA)": Attention(),
    }
    found: dict[str, tuple[Callable[[], Any], list[Tensor]]] = {
        "selective scan": (lambda: selective_scan(*scan, delta_softplus=True), scan),
        "selective scan, reference loop": (lambda: selective_scan_reference(*scan, delta_softplus=True), scan),
    }
    for name, layer in layers.items():
        layer = layer.to(device)
        found[name] = (lambda layer=layer: layer(x), [x, *layer.parameters()])
    return found


def measure(batch: int, length: int, device: str, rounds: int) -> dict[str, tuple[float, float]]:
    """Name → median milliseconds of the forward pass, and of both passes."""
    table = rows(batch, length, device)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in table}
    for turn in range(rounds + 1):
        for name, (run, inputs) in table.items():
            start = _now(device)
            output = run()
            y = output[0] if isinstance(output, tuple) else output  # the GRU returns its last state too
            middle = _now(device)
            torch.autograd.grad(y, inputs, torch.ones_like(y))
            if turn:
                times[name].append((middle - start, _now(device) - start))
    return {
        name: (1e3 * statistics.median(t[0] for t in taken), 1e3 * statistics.median(t[1] for t in taken))
        for name, taken in times.items()
    }


def processor(device: str) -> str:
    if device == "cuda":
        return torch.cuda.get_device_name()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return f"{next(names, platform.processor())}, {torch.get_num_threads()} threads"


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    print(f"{processor(options.device)}; torch {torch.__version__}; {datetime.date.today()}; ms, medians\n")
    print("| batch, length | what | forward | forward + backward | times attention |\n|---|---|---:|---:|---:|")
    for batch, length in SIZES:
        medians = measure(batch, length, options.device, options.rounds)
        scale = medians["attention layer (SDPA)"][1]
        for name, (forward, both) in medians.items():
            print(f"| {batch}, {length} | {name} | {forward:.1f} | {both:.1f} | {both / scale:.2f} |", flush=True)
    print("\n" + "; ".join(f"{op}: {implementation}" for op, implementation in backend.report().items()))


if __name__ == "__main__":
    main()
