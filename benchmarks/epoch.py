"""One epoch over every training event of ML-1M, its memory, and the evaluation of all users.

    OMP_WAIT_POLICY=passive python -m benchmarks.epoch [--dataset ml-1m] [--lengths 200 50] [--data_path dataset]

Width 64, two layers, full softmax over all items, every event but a user's first and last two a target once. Our
models train as they ship (but for the loss, which is cross-entropy for all, and HoloMambaRec's binding, its paper's:
the default binds the scored table, too, and takes longer), on whole sequences, 3,200 positions a batch (16 windows of
200, 64 of 50), windows overlapping by half; a row `disjoint, bf16` has windows that do not overlap and the factors of
matrix products in bfloat16 (`window_stride`, `enable_amp`). RecBole's SASRec and GRU4Rec train as RecBole ships them,
at the same width, on prefixes. Seconds of an epoch: the second of two, the first warms up. As one of RecBole takes up
to hours, a few steps of it are measured and multiplied by its number of steps; all rows of an epoch are padded to one
length, so that steps cost alike. Peak memory is that of the whole process. Evaluation is full ranking of all users on
the validation split, metrics included.
"""

from __future__ import annotations

import json
import statistics
import tempfile
from itertools import islice
from typing import Any

import torch

from benchmarks.cells import cell_parser, kept, measured, now, peak_memory, write_page
from recbole_holo.bridge.config import Config
from recbole_holo.quick_start import prepare

OURS = ("RecMamba", "HoloMambaRec", "Hydra", "Mamba4Rec", "SequenceSASRec")
RECBOLE = ("SASRec", "GRU4Rec")
POSITIONS = 3200  # of a batch of our models
PAPER = {"HoloMambaRec": {"binding": "item", "bind_output": False}}  # the form measured
LEAN = ("RecMamba", "HoloMambaRec")  # measured with disjoint windows and bfloat16 too
STEPS = 3  # of RecBole's models, after one to warm up
SETTINGS = {
    "hidden_size": 64,
    "embedding_size": 64,
    "num_layers": 2,
    "n_layers": 2,
    "loss_type": "CE",
    "similarity": "dot",
    "temperature": 1.0,
    "train_neg_sample_args": None,
    "show_progress": False,
    "state": "ERROR",
}


def cell(model: str, dataset: str, length: int, lean: bool, options: Any) -> dict[str, Any]:
    """Seconds of an epoch and of an evaluation, and peak bytes, in this process."""
    torch.set_num_threads(options.threads)
    given = {"use_gpu": options.device == "cuda", "data_path": options.data_path, "MAX_ITEM_LIST_LENGTH": length}
    given |= PAPER.get(model, {})
    if model in OURS:
        given["train_batch_size"] = POSITIONS // length
    if lean:
        given |= {"window_stride": length, "enable_amp": True}
    with tempfile.TemporaryDirectory() as folder:
        config = Config(model, dataset, config_dict=SETTINGS | given | {"checkpoint_dir": folder})
        trainer, train_data, valid_data, _ = prepare(config)
        trainer.eval_collector.data_collect(train_data)
        seconds = []
        if model in OURS:
            for epoch in range(2):
                start = now(options.device)
                trainer._train_epoch(train_data, epoch)
                seconds.append(now(options.device) - start)
            epoch_seconds, steps = seconds[1], len(train_data)
        else:
            steps = len(train_data)
            for batch in islice(train_data, STEPS + 1):
                start = now(options.device)
                trainer._train_epoch([batch], 0)
                seconds.append(now(options.device) - start)
            epoch_seconds = statistics.median(seconds[1:]) * steps
        evaluation = []
        for _ in range(2):
            start = now(options.device)
            trainer.evaluate(valid_data, load_best_model=False)
            evaluation.append(now(options.device) - start)
    return {
        "epoch_seconds": epoch_seconds,
        "extrapolated": model in RECBOLE,
        "steps": steps,
        "evaluation_seconds": evaluation[1],
        "users": len(valid_data._dataset),
        "peak_bytes": peak_memory(options.device),
    }


def rows(dataset: str, length: int) -> list[list[str]]:
    """The names of the cells of a length."""
    named = [[model, dataset, str(length)] for model in (*OURS, *RECBOLE)]
    return named + [[model, dataset, str(length), "lean"] for model in LEAN]


def render(dataset: str, lengths: list[int], device: str) -> str:
    lines = ["| length | model | seconds an epoch | as many as RecBole's SASRec takes | peak MiB | evaluation, s |"]
    lines.append("|---|---|---:|---:|---:|---:|")
    machines = set()
    for length in lengths:
        found = {words[0] + " ".join(words[3:]): kept("epoch", words, device) for words in rows(dataset, length)}
        scale = found["SASRec"]
        for model, one in found.items():
            if one is None:
                continue
            machines.add(one["machine"])
            name = f"{model} (RecBole)" if model in RECBOLE else model.replace("lean", ", disjoint, bf16")
            seconds = f"{one['epoch_seconds']:,.1f}" + (" (extrapolated)" if one["extrapolated"] else "")
            ratio = f"1/{scale['epoch_seconds'] / one['epoch_seconds']:,.0f}" if scale else ""
            memory = f"{one['peak_bytes'] / 2**20:,.0f}"
            lines.append(f"| {length} | {name} | {seconds} | {ratio} | {memory} | {one['evaluation_seconds']:.1f} |")
    return "\n".join([*lines, "", f"Measured on: {'; '.join(sorted(machines))}."])


def main() -> None:
    options = cell_parser(__doc__)
    options.add_argument("--dataset", default="ml-1m")
    options.add_argument("--data_path", default="dataset")
    options.add_argument("--lengths", nargs="+", type=int, default=[200, 50])
    options.add_argument("--models", nargs="+", default=[*OURS, *RECBOLE], choices=[*OURS, *RECBOLE])
    chosen = options.parse_args()
    if chosen.cell:
        model, dataset, length = chosen.cell[:3]
        print(json.dumps(cell(model, dataset, int(length), "lean" in chosen.cell, chosen)))
        return
    for length in () if chosen.render else chosen.lengths:
        for words in rows(chosen.dataset, length):
            if words[0] in chosen.models:
                measured("epoch", words, chosen, ["--data_path", chosen.data_path])
    body = render(chosen.dataset, chosen.lengths, chosen.device)
    write_page("epoch", chosen.device, f"An epoch of {chosen.dataset}", __doc__, body)


if __name__ == "__main__":
    main()
