"""How many test events depend on the order of time: ``python -m benchmarks.protocols DATASET [--data_path=dataset/]``.

Leave-one-out under every ``ties`` and ``time_precision``, compared with the default: the users whose validation or test
item is another one, and those whose whole history is the same. Also how many events have the time of the one before,
and how many test items their users had met before. Nothing is trained.
"""

from __future__ import annotations

import argparse
import itertools
import logging
from typing import Any

import numpy as np
from tabulate import tabulate

TIES, PRECISIONS = ("file", "item", "random"), ("float64", "float32")


def histories(dataset: str, data_path: str, **settings: Any) -> dict[str, list[str]]:
    """User → item ids in the order of time, after the data set's own filters."""
    from recbole_holo.bridge.config import Config
    from recbole_holo.data.loader import create_dataset

    config = Config("RecMamba", dataset, config_dict={"data_path": data_path, "state": "ERROR", **settings})
    logging.disable()
    data = create_dataset(config)
    data.build()
    users = data.id2token(data.uid_field, data._events[data.uid_field].numpy())
    items = data.id2token(data.iid_field, data._events[data.iid_field].numpy())
    starts = np.flatnonzero(np.r_[True, users[1:] != users[:-1]])
    return {users[a]: items[a:b].tolist() for a, b in zip(starts, [*starts[1:], len(users)], strict=True)}


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("dataset")
    flags.add_argument("--data_path", default="dataset/", help="folder of the data sets")
    args = flags.parse_args()
    orders = {
        (ties, precision): histories(args.dataset, args.data_path, ties=ties, time_precision=precision)
        for precision, ties in itertools.product(PRECISIONS, TIES)
    }
    default = orders["file", "float64"]
    long_enough = [user for user, items in default.items() if len(items) > 2]
    rows = []
    for (ties, precision), found in orders.items():
        other = {place: sum(found[u][place] != default[u][place] for u in long_enough) for place in (-2, -1)}
        same = sum(found[user] == items for user, items in default.items())
        rows.append([ties, precision, f"{other[-2]:,}", f"{other[-1]:,}", f"{same:,}"])
    head = ["ties", "time_precision", "other validation item", "other test item", "same history"]
    again = sum(default[user][-1] in default[user][:-1] for user in long_enough)
    print(f"{args.dataset}: {len(long_enough):,} users with a test item, {again:,} of them had met it before\n")
    print(tabulate(rows, head, tablefmt="github"))


if __name__ == "__main__":
    main()
