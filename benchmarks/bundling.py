"""What bundling saves of the encoder: its time and memory by the number of events that enter it at once.

    OMP_WAIT_POLICY=passive python -m benchmarks.bundling [--device cuda] [--threads 2] [--lengths 200 2000]

HoloMambaRec's defaults (d = 64, two Mamba layers), 32,768 events whatever the length, of which the latest 50 of each
history are not bundled. Encoding is from item ids to the hidden states of its tokens, the bundling itself included;
training adds the backward pass. Sizes are measured in turn in each round, each time after a run that is not timed;
medians over the rounds. Memory is what the tensors of forward and backward take at most, parameters excluded.
"""

from __future__ import annotations

import statistics

import torch
from tabulate import tabulate
from torch import Tensor

from benchmarks.cells import headline, now, parser, write_page
from benchmarks.large_catalogue import Catalogue
from recbole_holo.bridge.config import Config
from recbole_holo.model.holomambarec import HoloMambaRec
from recbole_holo.tracing import CpuPeak, CudaPeak

EVENTS, RECENT, SIZES, ITEMS = 32_768, 50, (1, 2, 4, 8, 16), 5_000


def make(length: int, device: str) -> HoloMambaRec:
    settings = {"MAX_ITEM_LIST_LENGTH": length, "bundle_size": max(SIZES), "bundle_recent": RECENT, "dropout_prob": 0.0}
    config = Config("HoloMambaRec", "ml-100k", config_dict={**settings, "use_gpu": device == "cuda"})
    return HoloMambaRec(config, Catalogue(ITEMS, config["ITEM_ID_FIELD"])).to(device).train()


def seconds(model: HoloMambaRec, items: Tensor, device: str) -> tuple[float, float]:
    """Of encoding without gradients, and of encoding with its backward pass; each the second time."""
    times = []
    for _ in range(2):
        start = now(device)
        with torch.no_grad():
            model.token_states(items)
        middle = now(device)
        model.token_states(items)[0].sum().backward()
        times.append((middle - start, now(device) - middle))
    return times[-1]


def kept_bytes(model: HoloMambaRec, items: Tensor, device: str) -> int:
    """What the tensors of encoding and its backward pass take at most."""
    peak = (CudaPeak if device == "cuda" else CpuPeak)()
    with peak:
        peak.change(("step", "all"))
        model.token_states(items)[0].sum().backward()
    return peak.peaks[("step", "all")]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=7)
    options.add_argument("--lengths", type=int, nargs="+", default=[200, 2000])
    chosen = options.parse_args()
    torch.set_num_threads(chosen.threads)
    lines = []
    for length in chosen.lengths:
        model, batch = make(length, chosen.device), EVENTS // length
        items = torch.randint(1, ITEMS, (batch, length), device=chosen.device)
        times: dict[int, list[tuple[float, float]]] = {size: [] for size in SIZES}
        memory, tokens = {}, {}
        for turn in range(chosen.rounds):
            for size in SIZES:
                assert model.bundling is not None
                model.bundling.training_size = size
                times[size].append(seconds(model, items, chosen.device))
                if turn == 0:
                    memory[size] = kept_bytes(model, items, chosen.device)
                    tokens[size] = (length - RECENT) // size + RECENT + (length - RECENT) % size
        medians = {size: [statistics.median(t) for t in zip(*taken, strict=True)] for size, taken in times.items()}
        for size in SIZES:
            ratios = [medians[1][i] / medians[size][i] for i in (0, 1)]
            cells = [f"{1e3 * medians[size][i]:.1f} ({ratios[i]:.1f}×)" for i in (0, 1)]
            kept = f"{memory[size] / 2**20:.0f} ({memory[1] / memory[size]:.1f}×)"
            lines.append([length, size, f"{tokens[size]} ({length / tokens[size]:.1f}×)", *cells, kept])
    head = ["length", "k", "steps of a history", "encoding, ms", "with its backward pass, ms", "memory, MiB"]
    body = tabulate(lines, headers=head, tablefmt="github", disable_numparse=True)
    body = f"In brackets: times fewer than with k 1.\n\n{body}\n\n{headline(chosen.device, chosen.threads)}."
    given = f"--threads {chosen.threads} --rounds {chosen.rounds}"
    write_page("bundling", chosen.device, "What bundling saves of the encoder", __doc__, body, given)


if __name__ == "__main__":
    main()
