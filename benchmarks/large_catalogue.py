"""Times a training step by the size of the catalogue and the loss, with its memory, prints a Markdown table.

    OMP_WAIT_POLICY=passive python -m benchmarks.large_catalogue [--device cuda] [--threads 2] [--items 10000 1000000]

A step is forward, backward and fused AdamW of HoloMambaRec's defaults (d = 64, two Mamba layers, tied table, no
attributes) on 16 windows of 50 items drawn by Zipf's law; 512 negatives. Every row runs in a process of its own, after
two steps to compile and warm up. Memory is the peak resident size of that process, libraries included, or what PyTorch
allocated on the GPU at most.
"""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
from typing import Any

import torch
from recbole.data.interaction import Interaction
from torch import Tensor, optim

from benchmarks.cells import headline, now, parser
from recbole_holo.bridge.config import Config
from recbole_holo.data import TARGETS_SUFFIX
from recbole_holo.data.attributes import ItemAttribute
from recbole_holo.model.holomambarec import HoloMambaRec
from recbole_holo.training.sparse import lazy_optimizer

ITEMS = (10_000, 100_000, 1_000_000)
WINDOWS, LENGTH = 16, 50
SAMPLED: dict[str, Any] = {"loss_type": "SampledCE", "negative_distribution": "popularity"}
ROWS: dict[str, dict[str, Any]] = {
    "CE": {"loss_type": "CE"},
    "InfoNCE, uniform": {"loss_type": "InfoNCE"},
    "InfoNCE, uniform, sparse": {"loss_type": "InfoNCE", "sparse_embedding": True},
    "SampledCE, popularity": SAMPLED,
    "SampledCE, popularity, sparse": {**SAMPLED, "sparse_embedding": True},
}


class Catalogue:
    """What a model reads of a data set: as many items, and training targets by Zipf's law."""

    def __init__(self, n_items: int, field: str) -> None:
        self.n_items, self.field = n_items, field
        self.item_attributes: dict[str, ItemAttribute] = {}
        self.inter_feat = {field: self.draw((1_000_000,))}

    def num(self, field: str) -> int:
        return self.n_items

    def __getitem__(self, rows: slice) -> dict[str, Tensor]:
        return self.inter_feat

    def draw(self, shape: tuple[int, ...]) -> Tensor:
        """Items 1..n_items-1 with chances proportional to 1/id: an exponentiated uniform."""
        return (torch.rand(shape, dtype=torch.float64) * torch.tensor(float(self.n_items)).log()).exp().long()


def measure(settings: dict[str, Any], n_items: int, device: str, rounds: int) -> tuple[float, float]:
    """Median milliseconds of a step, and the peak memory in GiB."""
    torch.manual_seed(0)
    config = Config("HoloMambaRec", "ml-100k", config_dict={**settings, "use_gpu": device == "cuda"})
    catalogue = Catalogue(n_items, config["ITEM_ID_FIELD"])
    model = HoloMambaRec(config, catalogue).to(device).train()
    learner = lazy_optimizer("adamw") if settings.get("sparse_embedding") else optim.AdamW
    optimizer = learner(model.parameters(), lr=1e-3, weight_decay=0.01, fused=True)
    times = []
    for turn in range(rounds + 2):
        items = catalogue.draw((WINDOWS, LENGTH + 1)).to(device)
        batch = Interaction({model.ITEM_SEQ: items[:, :-1], catalogue.field + TARGETS_SUFFIX: items[:, 1:]})
        start = now(device)
        optimizer.zero_grad()
        model.calculate_loss(batch).backward()
        optimizer.step()
        if turn > 1:
            times.append(now(device) - start)
    peak = (
        torch.cuda.max_memory_allocated()
        if device == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    )
    return 1e3 * statistics.median(times), peak / 2**30


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--items", type=int, nargs="+", default=ITEMS, help="sizes of the catalogue")
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--row", choices=ROWS, help="measure this row alone, print JSON")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    if options.row:
        print(json.dumps(measure(ROWS[options.row], options.items[0], options.device, options.rounds)))
        return
    print(f"{headline(options.device, options.threads)}; medians of {options.rounds}\n")
    print("| items | loss | ms a step | of CE's | peak GiB | of CE's |\n|---:|---|---:|---:|---:|---:|")
    for n_items in options.items:
        for name in ROWS:
            command = [sys.executable, "-m", "benchmarks.large_catalogue", "--row", name, "--items", str(n_items)]
            for key in ("device", "threads", "rounds"):
                command += [f"--{key}", str(getattr(options, key))]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            time, memory = json.loads(done.stdout.splitlines()[-1])
            if name == "CE":
                whole = time, memory
            ratios = time / whole[0], memory / whole[1]
            print(
                f"| {n_items:,} | {name} | {time:.1f} | {ratios[0]:.3f} | {memory:.2f} | {ratios[1]:.2f} |", flush=True
            )


if __name__ == "__main__":
    main()
