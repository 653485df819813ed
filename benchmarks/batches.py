"""Pads and time of the training batches of whole sequences; prints a Markdown table.

    python -m benchmarks.batches [--dataset ml-1m --data_path dataset/] [--lengths 50 200] [--sizes 16 64]

Pads are a share of all positions of an epoch: of batches made of rows as they are shuffled, and of ours, which are
sorted by length before (:mod:`recbole_holo.data.batches`). Times are medians over epochs: planning one, and gathering
a batch.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from typing import Any

import numpy as np
import torch

from benchmarks.cells import headline, now
from recbole_holo.bridge.compat import quiet_recbole
from recbole_holo.bridge.config import Config
from recbole_holo.data.loader import create_dataset, data_preparation


def measure(dataset: str, length: int, size: int, epochs: int, **settings: Any) -> list[float]:
    """Pads shuffled, pads sorted (shares), milliseconds of a plan, microseconds of a batch."""
    given = {"MAX_ITEM_LIST_LENGTH": length, "train_batch_size": size, "item_attributes": [], "state": "ERROR"}
    config = Config("RecMamba", dataset, config_dict={**given, **settings})
    train, _, _ = data_preparation(config, create_dataset(config))
    lengths = train.dataset.inter_feat[train.dataset.item_list_length_field].numpy()
    shuffled = np.random.default_rng(0).permutation(lengths)
    positions = sum(part.max() * len(part) for part in np.split(shuffled, range(size, len(shuffled), size)))
    plans, batches, padded, device = [], [], 0, config["device"].type
    for _ in range(epochs):
        start = now(device)
        epoch = iter(train)
        plans.append(now(device) - start)
        start, padded = now(device), 0
        for batch in epoch:
            padded += batch["item_id_list"].numel()
        batches.append((now(device) - start) / len(train))
    total = lengths.sum()
    return [
        1 - total / positions,
        1 - total / padded,
        1e3 * statistics.median(plans),
        1e6 * statistics.median(batches),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="ml-1m")
    parser.add_argument("--data_path", default="dataset/")
    parser.add_argument("--lengths", nargs="+", type=int, default=[50, 200])
    parser.add_argument("--sizes", nargs="+", type=int, default=[16, 64])
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args()
    given = {} if options.dataset == "ml-100k" else {"data_path": os.path.abspath(options.data_path)}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"{options.dataset}; {headline(device, torch.get_num_threads())}\n")
    print("| length | batch | pads, shuffled | pads, sorted | plan, ms | batch, µs |\n|---:|---:|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory() as scratch, quiet_recbole():
        os.chdir(scratch)  # RecBole writes its logs into the working directory
        for length in options.lengths:
            for size in options.sizes:
                before, after, plan, batch = measure(options.dataset, length, size, options.epochs, **given)
                print(f"| {length} | {size} | {before:.1%} | {after:.1%} | {plan:.1f} | {batch:.0f} |", flush=True)


if __name__ == "__main__":
    main()
