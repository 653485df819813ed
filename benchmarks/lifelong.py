"""Training on long histories: seconds and memory of a step against the length, for state space models and attention.

    OMP_WAIT_POLICY=passive python -m benchmarks.lifelong [--lengths 512 1024 …] [--models RecMamba …] [--device cuda]
    python -m benchmarks.lifelong --render          # the table and the plot of the cells that are there

Every cell is a process of its own: a data set of random histories of one length over 5,000 items, and steps of the
model's own trainer with 32,768 events a step, whatever the length. Width 64, two layers, BPR (one negative a target:
RecBole's loss, and as cheap as RecMamba's authors' own, so that the layers are what is compared), dropout 0.2 (none
inside SequenceSASRec's attention: fused attention knows none on a CPU). Whole-sequence models take a loss at every
position; RecBole's SASRec and GRU4Rec are trained as RecBole trains them, on prefixes, one target a row, so that an
epoch over the same targets takes them `length` times as many steps. Memory is what the tensors of a step take at most,
parameters and batch excluded, as `--profile` counts it; a process has some 100 MB more. Cells are kept in
results/cells/lifelong and not measured again; a cell that does not fit into the memory is kept as such.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from recbole.data.interaction import Interaction

from benchmarks.cells import RESULTS, cell_parser, kept, measured, now, write_page
from recbole_holo.bridge.config import Config
from recbole_holo.data.batches import SequenceBatch
from recbole_holo.quick_start import prepare
from recbole_holo.tracing import CpuPeak, CudaPeak

LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
EVENTS, ITEMS = 32768, 5000
WHOLE = ("RecMamba", "HoloMambaRec", "Hydra", "LinRec", "SequenceSASRec")
PREFIX = ("SASRec", "GRU4Rec")
NAMES = {
    "SequenceSASRec": "SequenceSASRec (fused attention)",
    "SASRec": "SASRec (RecBole)",
    "GRU4Rec": "GRU4Rec (RecBole)",
}
EQUAL = {
    "hidden_size": 64,
    "num_layers": 2,
    "n_layers": 2,
    "n_heads": 2,
    "inner_size": 256,
    "embedding_size": 64,
    "loss_type": "BPR",
    "similarity": "dot",
    "temperature": 1.0,
    "dropout_prob": 0.2,
    "layer_dropout_prob": 0.2,
    "hidden_dropout_prob": 0.2,
    "train_neg_sample_args": None,
    "item_attributes": [],
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
}
ROUNDS, PATIENCE = 3, 300.0  # measured steps; seconds after which no further one is begun


def write_histories(folder: Path, users: int, length: int) -> None:
    """``users`` histories of ``length`` inputs, the last one's target and two events that are held out; others of ten
    events, so that every item occurs."""
    generator = np.random.default_rng(0)
    histories = [*generator.integers(0, ITEMS, (users, length + 3)), *np.arange(ITEMS).reshape(-1, 10)]
    (folder / "lifelong").mkdir()
    with (folder / "lifelong" / "lifelong.inter").open("w") as file:
        file.write("user_id:token\titem_id:token\ttimestamp:float\n")
        for user, history in enumerate(histories):
            file.writelines(f"u{user}\ti{item}\t{t}\n" for t, item in enumerate(history))


def full_batch(data: Any, model: str, batch: int, length: int) -> Interaction:
    """A batch of full length from the rows of the training split: histories, or RecBole's prefixes."""
    rows = data[torch.nonzero(data.inter_feat["item_length"] == length).flatten()[:batch]]
    if model in WHOLE:
        return SequenceBatch(rows.interaction, batch * length, 1.0)
    rows["neg_item_id"] = torch.randint(1, ITEMS, (batch,))
    return rows


def cell(model: str, length: int, device: str, threads: int) -> dict[str, Any]:
    """Seconds and bytes of a training step, in this process."""
    torch.set_num_threads(threads)
    batch = max(EVENTS // length, 1)
    with tempfile.TemporaryDirectory() as folder:
        write_histories(Path(folder), batch, length)
        settings = EQUAL | {
            "data_path": folder,
            "checkpoint_dir": folder,
            "MAX_ITEM_LIST_LENGTH": length,
            "train_batch_size": batch,
            "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full", "group_by": "user"},
            "attn_dropout_prob": 0.0 if model == "SequenceSASRec" else 0.2,
            "use_gpu": device == "cuda",
            "show_progress": False,
            "state": "ERROR",
        }
        trainer, train_data, _, _ = prepare(Config(model, "lifelong", config_dict=settings))
        batches = [full_batch(train_data._dataset, model, batch, length)]
    peak = (CudaPeak if device == "cuda" else CpuPeak)()
    with peak:
        peak.change(("step", "all"))
        trainer._train_epoch(batches, 0)  # warms up, too
    taken, began = [], time.perf_counter()
    for _ in range(ROUNDS):
        start = now(device)
        trainer._train_epoch(batches, 0)
        taken.append(now(device) - start)
        if time.perf_counter() - began > PATIENCE:
            break
    seconds = statistics.median(taken)
    steps = 1 if model in WHOLE else length  # to have every event as a target
    return {
        "batch": batch,
        "seconds": seconds,
        "bytes": peak.peaks[("step", "all")],
        "microseconds_a_target": 1e6 * seconds * steps / (batch * length),
        "steps_measured": len(taken),
    }


def cells(device: str) -> Iterator[dict[str, Any]]:
    for model in (*WHOLE, *PREFIX):
        for length in LENGTHS:
            found = kept("lifelong", [model, str(length)], device)
            if found is not None:
                yield found | {"model": model, "length": length}


def render(device: str) -> str:
    """The cells that are there as Markdown: time and memory of a step, and what they are to RecMamba's."""
    found = {(c["model"], c["length"]): c for c in cells(device)}
    lengths = sorted({length for _, length in found})
    lines = []
    for title, key, scale, unit in (
        ("Seconds a step", "seconds", 1.0, ".3f"),
        ("Memory of a step, MiB", "bytes", 2**-20, ",.0f"),
        ("Microseconds a target", "microseconds_a_target", 1.0, ",.1f"),
    ):
        lines += [f"**{title}** (× RecMamba's)", "", "| length | " + " | ".join(map(str, lengths)) + " |"]
        lines.append("|---|" + "---:|" * len(lengths))
        for model in (*WHOLE, *PREFIX):
            row = [text(found.get((model, n)), found.get(("RecMamba", n)), key, scale, unit) for n in lengths]
            if any(row):
                lines.append(f"| {NAMES.get(model, model)} | " + " | ".join(row) + " |")
        lines.append("")
    machines = sorted({c["machine"] for c in found.values() if "machine" in c})
    return "\n".join([*lines, "Measured on: " + "; ".join(machines) + "."])


def text(found: dict[str, Any] | None, base: dict[str, Any] | None, key: str, scale: float, unit: str) -> str:
    if found is None:
        return ""
    if "failed" in found:
        return found["failed"]
    value = f"{found[key] * scale:{unit}}"
    return f"{value} ({found[key] / base[key]:.1f}×)" if base and key in base and base is not found else value


def plot(device: str, target: Path) -> None:
    """Time and memory of a step against the length, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = [c for c in cells(device) if "failed" not in c]
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    for axis, key, scale, label in (
        (axes[0], "seconds", 1, "seconds a step"),
        (axes[1], "bytes", 2**-20, "memory of a step, MiB"),
    ):
        for model in (*WHOLE, *PREFIX):
            mine = sorted((c["length"], c[key] * scale) for c in found if c["model"] == model)
            if mine:
                axis.plot(*zip(*mine, strict=True), marker="o", label=NAMES.get(model, model))
        axis.set(xscale="log", yscale="log", xlabel=f"length of the histories ({EVENTS:,} events a step)", ylabel=label)
        axis.set_xticks(LENGTHS, [str(n) for n in LENGTHS])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(target, dpi=120)


def main() -> None:
    options = cell_parser(__doc__)
    options.add_argument("--lengths", nargs="+", type=int, default=LENGTHS)
    options.add_argument("--models", nargs="+", default=[*WHOLE, *PREFIX], choices=[*WHOLE, *PREFIX])
    chosen = options.parse_args()
    if chosen.cell:
        print(json.dumps(cell(chosen.cell[0], int(chosen.cell[1]), chosen.device, chosen.threads)))
        return
    for length in () if chosen.render else chosen.lengths:
        for model in chosen.models:
            measured("lifelong", [model, str(length)], chosen)
    write_page("lifelong", chosen.device, "Training on long histories", __doc__, render(chosen.device))
    plot(chosen.device, RESULTS / f"lifelong-{chosen.device}.png")


if __name__ == "__main__":
    main()
