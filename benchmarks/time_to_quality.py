"""Wall time to a given validation NDCG@10: the benchmark that counts.

    OMP_WAIT_POLICY=passive python -m benchmarks.time_to_quality [--dataset ml-100k] [--budget 1800] [--seed 1]

Every model trains as it ships (RecBole's SASRec and GRU4Rec: RecBole's defaults, with cross-entropy) for `budget`
seconds of training, or its own number of epochs if that is less, and is evaluated on the validation split (full
ranking) after every epoch. The clock counts training only, the same for all; with one thread on a CPU it is that of the
process, so that what else the machine does is not counted. The table says when each first reached
parts of the best value that RecBole's SASRec reached; a blank: not within the budget.
"""

from __future__ import annotations

import json
import tempfile
import time
from functools import partial
from typing import Any

import torch

from benchmarks.cells import RESULTS, cell_parser, kept, measured, now, write_page
from recbole_holo.bridge.config import Config
from recbole_holo.quick_start import prepare

OURS = ("RecMamba", "HoloMambaRec", "Hydra", "Mamba4Rec", "SequenceSASRec")
RECBOLE = ("SASRec", "GRU4Rec")
METRIC, PARTS = "ndcg@10", (0.5, 0.8, 0.9, 1.0)
REFERENCE = "SASRec"


def cell(model: str, dataset: str, seed: int, options: Any) -> dict[str, Any]:
    """``curve``: seconds of training and the validation metric, after every epoch."""
    torch.set_num_threads(options.threads)
    settings: dict[str, Any] = {"seed": seed, "use_gpu": options.device == "cuda", "state": "ERROR"}
    settings |= {"show_progress": False, "data_path": options.data_path, "valid_metric": "NDCG@10", "topk": [10]}
    if model in RECBOLE:
        settings |= {"loss_type": "CE", "train_neg_sample_args": None, "metrics": ["NDCG"], "epochs": 300}
    alone = options.threads == 1 and options.device == "cpu"
    clock = time.process_time if alone else partial(now, options.device)
    curve: list[tuple[float, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        config = Config(model, dataset, config_dict=settings | {"checkpoint_dir": folder})
        trainer, train_data, valid_data, _ = prepare(config)
        trainer.eval_collector.data_collect(train_data)
        spent = 0.0
        for epoch in range(config["epochs"]):
            start = clock()
            trainer._train_epoch(train_data, epoch)
            spent += clock() - start
            result = trainer.evaluate(valid_data, load_best_model=False)
            assert result is not None
            curve.append((round(spent, 2), result[METRIC]))
            if spent >= options.budget:
                break
    return {"curve": curve, "epochs": config["epochs"]}


def first_reached(curve: list[tuple[float, float]], wanted: float) -> float | None:
    return next((seconds for seconds, value in curve if value >= wanted), None)


def render(dataset: str, seed: int, device: str) -> str:
    found = {m: kept("time_to_quality", [m, dataset, str(seed)], device) for m in (*OURS, *RECBOLE)}
    curves = {m: one["curve"] for m, one in found.items() if one}
    if REFERENCE not in curves:
        return f"No table yet: its levels are parts of what {REFERENCE} reaches; run `--models {REFERENCE}`."
    best = max(value for _, value in curves[REFERENCE])
    heads = " | ".join(f"{part:.0%}: {part * best:.4f}" for part in PARTS)
    lines = [f"| model | {heads} | best in the budget | at |", "|---|" + "---:|" * (len(PARTS) + 2)]
    for model, curve in curves.items():
        cells = []
        for part in PARTS:
            mine, theirs = (first_reached(c, part * best) for c in (curve, curves[REFERENCE]))
            ratio = f" ({theirs / mine:,.0f}×)" if mine and theirs and model != REFERENCE else ""
            cells.append("" if mine is None else f"{mine:,.0f} s{ratio}")
        seconds, top = max(curve, key=lambda point: point[1])
        name = f"{model} (RecBole)" if model in RECBOLE else model
        lines.append(f"| {name} | {' | '.join(cells)} | {top:.4f} | {seconds:,.0f} s |")
    machines = sorted({one["machine"] for one in found.values() if one})
    return "\n".join([*lines, "", f"Validation NDCG@10, {dataset}, seed {seed}. Measured on: {'; '.join(machines)}."])


def plot(dataset: str, seed: int, device: str) -> None:
    """The curves, time on a logarithmic axis."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4))
    for model in (*OURS, *RECBOLE):
        found = kept("time_to_quality", [model, dataset, str(seed)], device)
        if found:
            label = f"{model} (RecBole)" if model in RECBOLE else model
            axis.plot(*zip(*found["curve"], strict=True), marker=".", label=label)
    axis.set(xscale="log", xlabel="seconds of training", ylabel="validation NDCG@10", title=dataset)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8, loc="upper left")
    figure.tight_layout()
    figure.savefig(RESULTS / f"time_to_quality-{dataset}-{device}.png", dpi=120)


def main() -> None:
    options = cell_parser(__doc__)
    options.add_argument("--dataset", default="ml-100k")
    options.add_argument("--data_path", default="dataset")
    options.add_argument("--seed", type=int, default=1)
    options.add_argument("--budget", type=float, default=1800, help="seconds of training")
    options.add_argument("--models", nargs="+", default=[*OURS, *RECBOLE], choices=[*OURS, *RECBOLE])
    chosen = options.parse_args()
    if chosen.cell:
        print(json.dumps(cell(chosen.cell[0], chosen.cell[1], int(chosen.cell[2]), chosen)))
        return
    for model in () if chosen.render else chosen.models:
        words = [model, chosen.dataset, str(chosen.seed)]
        measured("time_to_quality", words, chosen, ["--data_path", chosen.data_path, "--budget", str(chosen.budget)])
    title = f"Time to quality, {chosen.dataset}"
    given = f"--dataset {chosen.dataset} --seed {chosen.seed} --threads {chosen.threads} --budget {chosen.budget:g}"
    body = render(chosen.dataset, chosen.seed, chosen.device)
    write_page("time_to_quality", chosen.device, title, __doc__, body, given)
    plot(chosen.dataset, chosen.seed, chosen.device)


if __name__ == "__main__":
    main()
