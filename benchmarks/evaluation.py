"""Times a full-ranking evaluation, ours against RecBole's ``Trainer.evaluate``, and the share of the second column in
ours; prints a Markdown table.

    python -m benchmarks.evaluation [--dataset ml-1m --data_path dataset/] [--models RecMamba] [--lengths 50 200]

Both evaluate the same model on the same test rows; their metrics must be equal. Ours is timed with both columns and
with the first alone, which is all that RecBole computes. RecBole's rows are its own: padded to MAX_ITEM_LIST_LENGTH, in
batches of ``eval_batch_size``, on the host. Runs alternate, so that what else the machine does falls on all; medians
over the rounds, after one to compile and warm up. Time is that of the whole call: batches, encoding, scores, top k and
metrics. The second column's share is the median of the rounds' ratios less 1, without a GPU in seconds of the
processor: on a busy machine these are steadier than the clock's.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from typing import Any

import torch
from recbole.data.dataloader import FullSortEvalDataLoader
from recbole.trainer import Trainer

from benchmarks.cells import headline, now
from recbole_holo.bridge import registry
from recbole_holo.bridge.compat import quiet_recbole
from recbole_holo.bridge.config import Config, overridden
from recbole_holo.data.loader import create_dataset, data_preparation
from recbole_holo.ops import backend
from recbole_holo.training.trainer import HoloTrainer


def measure(model: str, dataset: str, length: int, rounds: int, **settings: Any) -> dict[str, Any]:
    """Median seconds of each, the share of the second column, and the number of histories."""
    metrics = ["Hit", "NDCG", "MRR", "MAP", "Recall", "Precision"]  # those that RecBole's trainer can compute in topk
    config = Config(
        model,
        dataset,
        config_dict={"MAX_ITEM_LIST_LENGTH": length, "metrics": metrics, "state": "ERROR", **settings},
    )
    train, _, test = data_preparation(config, create_dataset(config))
    torch.manual_seed(0)
    net = registry.get_model_class(model)(config, train.dataset).to(config["device"])
    ours, theirs = HoloTrainer(config, net), Trainer(config, net)
    with overridden(config, pad_to="max"):
        # RecBole's loader, whose rows the data set pads as RecBole does.
        padded = FullSortEvalDataLoader(config, test.dataset, None)
    device = config["device"].type
    times: dict[str, list[float]] = {"ours": [], "one column": [], "recbole": []}
    work: dict[str, list[float]] = {name: [] for name in times}
    for turn in range(rounds + 1):
        results = {}
        for name, trainer, loader in (("ours", ours, test), ("one column", ours, test), ("recbole", theirs, padded)):
            pad_to = "max" if name == "recbole" else config["pad_to"]
            trainer.columns = 1 if name == "one column" else 2
            with overridden(config, pad_to=pad_to):
                start, worked = now(device), time.process_time()
                results[name] = trainer.evaluate(loader, load_best_model=False)
                if turn:
                    times[name].append(now(device) - start)
                    work[name].append(time.process_time() - worked)
        first = {name: results["ours"][name] for name in results["recbole"]}
        if not first == results["one column"] == results["recbole"]:
            raise AssertionError(f"metrics differ: {results}")
    spent = times if device == "cuda" else work
    shares = [two / one - 1 for two, one in zip(spent["ours"], spent["one column"], strict=True)]
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    return {"histories": len(test.dataset), **medians, "share": statistics.median(shares)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="ml-1m")
    parser.add_argument("--data_path", default="dataset/")
    parser.add_argument("--models", nargs="+", default=["RecMamba"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[50, 200])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    given = {} if options.dataset == "ml-100k" else {"data_path": os.path.abspath(options.data_path)}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{headline(device, options.threads)}; seconds, medians\n")
    print("| model | length | histories | RecBole | ours | times faster | of it the second column |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as scratch, quiet_recbole():
        os.chdir(scratch)  # RecBole writes its logs into the working directory
        for model in options.models:
            for length in options.lengths:
                row = measure(model, options.dataset, length, options.rounds, **given)
                print(
                    f"| {model} | {length} | {row['histories']:,} | {row['recbole']:.2f} | {row['ours']:.2f} "
                    f"| {row['recbole'] / row['ours']:.1f} | {row['share']:.1%} |",
                    flush=True,
                )
    print("\n" + "; ".join(f"{op}: {implementation}" for op, implementation in backend.report().items()))


if __name__ == "__main__":
    main()
