"""New items: how well those that no one has met in training are found by their attributes.

    python -m benchmarks.cold_items [--dataset amazon-industrial-scientific-18] [--data_path dataset] [--seeds 1 2 3]

A tenth of the items, drawn by the seed, is cold: a user's history ends before the last event of a cold item that has
three others before it, all events of cold items are taken out of what is left, and models are trained on that, with the
cold items in the catalogue. A case is a user's history and the cold item that came next. `among all` is the part of the
cases with the item in the first ten of the whole catalogue, `among new` of the cold items alone. Every row is a
HoloMambaRec, selected on the validation split of the training data; the cases are looked at once, at the end. `random
order` is what an untrained model gives.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from tabulate import tabulate
from tqdm import tqdm

from benchmarks.cells import RESULTS, headline
from recbole_holo.bridge import resources
from recbole_holo.quick_start import load_data_and_model, run

SHARE, BEFORE, TOP = 0.1, 3, 10
ATTRIBUTES = {
    "amazon-industrial-scientific-18": ["categories", "brand"],
    "amazon-beauty": ["categories", "brand", "price"],
    "ml-1m": ["genre", "release_year"],
}
COLD: dict[str, Any] = {"bind_output": True, "cold_items": "attributes"}
ROWS: dict[str, dict[str, Any]] = {
    "item only": {"binding": None},
    "role, trained as rivals": {"binding": "role", "bind_output": True},
    "role": {"binding": "role", **COLD},
    "role, unitary": {"binding": "role", "binding_algebra": "unitary", **COLD},
    "both": {"binding": "both", **COLD},
    "both, products read only": {"binding": "both", **COLD, "bind_output": "added"},
    "addition": {"binding": "add", **COLD},
    "concatenation": {"binding": "concat", **COLD},
    "role, shuffled": {"binding": "role", "attribute_shuffle": True, **COLD},
}


def split(events: pd.DataFrame, items: np.ndarray, seed: int) -> tuple[pd.DataFrame, dict[Any, Any], set[Any]]:
    """What is trained on, the cases (user → cold item), and the cold items.

    Args:
        events: columns user, item, time, each user's in time order.
        items: the catalogue.
    """
    generator = np.random.default_rng(seed)
    cold = set(generator.choice(items, int(SHARE * len(items)), replace=False))
    is_cold = events["item"].isin(cold).to_numpy()
    warm_before = (~is_cold).astype(int)
    warm_before = pd.Series(warm_before).groupby(events["user"].to_numpy()).cumsum().to_numpy() - warm_before
    place = np.arange(len(events))
    last = pd.Series(place[is_cold & (warm_before >= BEFORE)])
    last = last.groupby(events["user"].to_numpy()[last]).max()  # user → row of the case
    cut = events["user"].map(last).fillna(len(events)).to_numpy()
    cases = dict(zip(last.index, events["item"].to_numpy()[last.to_numpy()], strict=True))
    return events[(place < cut) & ~is_cold], cases, cold


def write(dataset: str, data_path: Path, target: Path, seed: int) -> tuple[dict[Any, Any], set[Any]]:
    """The training data as a data set of the same name under ``target``; returns the cases and the cold items."""
    source = data_path / dataset / f"{dataset}.inter"
    raw = pd.read_csv(source, sep="\t", dtype=str, quoting=3)
    names = [column.split(":")[0] for column in raw]
    columns = [raw.columns[names.index(name)] for name in ("user_id", "item_id", "timestamp")]
    events = raw[columns].set_axis(["user", "item", "time"], axis=1)
    order = np.lexsort([np.arange(len(events)), events["time"].astype(float), pd.factorize(events["user"])[0]])
    events = events.iloc[order].reset_index(drop=True)
    kept, cases, cold = split(events, events["item"].unique(), seed)
    folder = target / dataset
    folder.mkdir(parents=True)
    kept.set_axis(columns, axis=1).to_csv(folder / f"{dataset}.inter", sep="\t", index=False, quoting=3)
    (folder / f"{dataset}.item").write_bytes((data_path / dataset / f"{dataset}.item").read_bytes())
    return cases, cold


@torch.no_grad()
def found(model: Any, dataset: Any, cases: dict[Any, Any], cold: set[Any], length: int) -> dict[str, float]:
    """The part of the cases whose item is in the first ten, of all items and of the cold ones."""
    users, items = dataset.field2token_id[dataset.uid_field], dataset.field2token_id[dataset.iid_field]
    known = dataset.inter_feat
    by_user = pd.Series(known[dataset.iid_field].numpy()).groupby(known[dataset.uid_field].numpy()).apply(list)
    asked = [(by_user[users[user]][-length:], items[item]) for user, item in cases.items() if user in users]
    every_cold = torch.tensor(sorted(items[item] for item in cold if item in items))
    hits = {"among all": 0, "among new": 0}
    for first in range(0, len(asked), 256):
        histories, targets = zip(*asked[first : first + 256], strict=True)
        lengths = torch.tensor([len(history) for history in histories])
        seq = torch.nn.utils.rnn.pad_sequence([torch.tensor(h) for h in histories], batch_first=True)
        scores = model.score_all(model.forward(seq, lengths))
        scores[:, 0] = -torch.inf
        own = scores.gather(1, torch.tensor(targets).unsqueeze(1))
        hits["among all"] += int(((scores > own).sum(1) < TOP).sum())
        hits["among new"] += int(((scores[:, every_cold] > own).sum(1) < TOP).sum())
    return {"cases": len(asked), **{name: count / len(asked) for name, count in hits.items()}}


def cell(row: str, dataset: str, data_path: Path, seed: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as scratch:
        cases, cold = write(dataset, data_path, Path(scratch), seed)
        settings: dict[str, Any] = {"data_path": scratch, "checkpoint_dir": f"{scratch}/saved", "seed": seed}
        settings |= {"state": "ERROR", "show_progress": False, "use_gpu": False, "train_batch_size": 64}
        settings |= {"user_inter_num_interval": "[3,inf)", "item_inter_num_interval": None, "keep_unseen_items": True}
        # The columns are loaded whether a row reads them or not: all rows have the same catalogue.
        settings["load_col"] = {"inter": ["user_id", "item_id", "timestamp"], "item": ["item_id", *ATTRIBUTES[dataset]]}
        settings |= {"item_attributes": ATTRIBUTES[dataset], "metrics": ["NDCG"], "topk": [10], **ROWS[row]}
        config_file = str(resources.dataset_config(dataset))
        result = run("HoloMambaRec", dataset, [config_file], settings, test=False)
        config, model, data, *_ = load_data_and_model(result["report"]["checkpoint"], data_path=scratch)
        given = {
            "row": row,
            "seed": seed,
            "valid": result["best_valid_result"],
            "git_commit": result["report"]["git_commit"],
        }
        return (
            given
            | found(model, data, cases, cold, config["MAX_ITEM_LIST_LENGTH"])
            | {"items": data.item_num - 1, "new": len(cold)}
        )


def render(dataset: str) -> str:
    lines, machines = [], set()
    for row in ROWS:
        cells = [json.loads(path.read_text()) for path in sorted(folder(dataset).glob(f"{row}-*.json"))]
        if cells:
            machines |= {one["machine"] for one in cells}
            spread = [[one[name] for one in cells] for name in ("among all", "among new")]
            texts = [
                f"{statistics.mean(v):.4f}" + (f" ± {statistics.stdev(v):.4f}" if len(v) > 1 else "") for v in spread
            ]
            lines.append([row, *texts, f"{statistics.mean(c['valid']['ndcg@10'] for c in cells):.4f}", len(cells)])
            cases, new, items = (round(statistics.mean(c[name] for c in cells)) for name in ("cases", "new", "items"))
    chance = [f"{TOP / items:.4f}", f"{TOP / new:.4f}"]
    lines.append(["random order", *chance, "", ""])
    head = ["", "HR@10 among all", "HR@10 among new", "validation NDCG@10 (known items)", "seeds"]
    body = tabulate(lines, headers=head, tablefmt="github", disable_numparse=True)
    return f"{body}\n\n{cases:,} cases, {new:,} new items of {items:,}. {'; '.join(sorted(machines))}."


def folder(dataset: str) -> Path:
    return RESULTS / "cells" / "cold_items" / dataset


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--dataset", default="amazon-industrial-scientific-18", choices=list(ATTRIBUTES))
    options.add_argument("--data_path", default="dataset", help="folder of the data sets")
    options.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    options.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS))
    options.add_argument("--render", action="store_true", help="run nothing, write the table of the cells there are")
    chosen = options.parse_args()
    jobs = [(row, seed) for seed in chosen.seeds for row in chosen.rows]
    for row, seed in tqdm([] if chosen.render else jobs):
        path = folder(chosen.dataset) / f"{row}-{seed}.json"
        if not path.exists():
            done = cell(row, chosen.dataset, Path(chosen.data_path).resolve(), seed)
            done["machine"] = headline("cpu", torch.get_num_threads())
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(done, indent=1) + "\n")
    body = render(chosen.dataset)
    about = (__doc__ or "").split("\n\n", 2)[2].strip()
    command = f"python -m benchmarks.cold_items --dataset {chosen.dataset}"
    text = f"# New items, {chosen.dataset}\n\n    {command}\n\n{about}\n\n{body}\n"
    (RESULTS / f"cold_items-{chosen.dataset}.md").write_text(text)
    print(body)


if __name__ == "__main__":
    main()
