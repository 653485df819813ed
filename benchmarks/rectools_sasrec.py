"""A row that we did not write: RecTools' SASRec, trained on our splits and scored by our metrics on its lists.

    python -m benchmarks.rectools_sasrec export ml-1m FOLDER [--data_path dataset/] [--ties item]
    python benchmarks/rectools_sasrec.py train FOLDER [--epochs 100 --every 5 --patience 3 --length 200 …]
    python -m benchmarks.rectools_sasrec score FOLDER TABLE ROW

The middle command runs in an environment of its own, ``pip install "rectools[torch]"``, which this package does not
need; the other two in this package's. ``export`` writes every user's events in our order, a place in the history for a
time. ``train`` fits SASRecModel for at most ``--epochs``, validates every ``--every`` on the items before the last,
seen items left out, stops after ``--patience`` validations without gain, and writes the best epoch's ten best items for
each user's last, with seen items and without. ``score`` ranks the last items in these lists and writes a table's cell.
"""

from __future__ import annotations

import argparse
import json
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

K = 10
LISTS = {"ranks": False, "ranks_unseen": True}  # file and key of a cell → whether seen items are left out


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = flags.add_subparsers(dest="command", required=True)
    export_flags = commands.add_parser("export")
    export_flags.add_argument("dataset")
    export_flags.add_argument("folder", type=Path)
    export_flags.add_argument("--data_path", default="dataset/")
    export_flags.add_argument("--ties", default="file")
    export_flags.add_argument("--time_precision", default="float64")
    train_flags = commands.add_parser("train")
    train_flags.add_argument("folder", type=Path)
    for name, value in (("epochs", 100), ("every", 5), ("patience", 3), ("length", 200), ("seed", 1)):
        train_flags.add_argument(f"--{name}", type=int, default=value)
    for name, value in (("factors", 64), ("blocks", 2), ("heads", 2), ("batch_size", 128), ("negatives", 256)):
        train_flags.add_argument(f"--{name}", type=int, default=value)
    train_flags.add_argument("--dropout", type=float, default=0.1)
    train_flags.add_argument("--rate", type=float, default=1e-3)
    train_flags.add_argument("--loss", default="softmax", choices=("softmax", "sampled_softmax", "gBCE"))
    train_flags.add_argument("--threads", type=int, default=1)
    score_flags = commands.add_parser("score")
    score_flags.add_argument("folder", type=Path)
    score_flags.add_argument("table")
    score_flags.add_argument("row")
    args = flags.parse_args()
    {"export": export, "train": train, "score": score}[args.command](args)


def export(args: argparse.Namespace) -> None:
    """``events.csv.gz``: user, item, place, part (train, valid, test), by the package's own loading and split."""
    from recbole_holo.bridge.config import Config
    from recbole_holo.data.loader import create_dataset, data_preparation

    settings = {"data_path": args.data_path, "ties": args.ties, "time_precision": args.time_precision}
    config = Config("RecMamba", args.dataset, config_dict={**settings, "item_attributes": []})
    _, _, test = data_preparation(config, create_dataset(config))
    split = test._dataset
    rows = split[np.arange(len(split))]
    lengths, begins = rows[split.item_list_length_field].numpy(), rows.histories.begin.numpy()
    firsts, items = rows.histories.first.numpy(), split.events.items.numpy()
    targets, names = rows[split.iid_field].numpy(), split.field2id_token[split.iid_field]
    parts = []
    for user, (first, last) in enumerate(zip(firsts, begins + lengths, strict=True)):
        known = [*items[first:last], targets[user]]
        part = ["train"] * (len(known) - 2) + ["valid", "test"]
        parts.append(pd.DataFrame({"user": user, "item": names[known], "place": range(len(known)), "part": part}))
    args.folder.mkdir(parents=True, exist_ok=True)
    pd.concat(parts).to_csv(args.folder / "events.csv.gz", index=False)
    (args.folder / "data.json").write_text(json.dumps({"dataset": args.dataset, **settings}))


def train(args: argparse.Namespace) -> None:
    """``ranks.csv``, ``ranks_unseen.csv``: user, item, rank; ``run.json``: what was done."""
    import torch
    from pytorch_lightning import Trainer, seed_everything
    from rectools.dataset import Dataset
    from rectools.models import SASRecModel

    torch.set_num_threads(args.threads)
    seed_everything(args.seed, workers=True)
    events = pd.read_csv(args.folder / "events.csv.gz", dtype={"item": str})
    columns = {"user": "user_id", "item": "item_id"}
    made = events.rename(columns=columns).assign(weight=1.0, datetime=pd.to_datetime(events["place"], unit="D"))
    known = {
        "valid": Dataset.construct(made[made["part"] == "train"]),
        "test": Dataset.construct(made[made["part"] != "test"]),
    }
    targets = {part: events[events["part"] == part].set_index("user")["item"] for part in known}

    def trainer() -> Any:
        return Trainer(
            max_epochs=args.epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_model_summary=False,
        )

    model = SASRecModel(
        n_blocks=args.blocks,
        n_heads=args.heads,
        n_factors=args.factors,
        dropout_rate=args.dropout,
        session_max_len=args.length,
        batch_size=args.batch_size,
        loss=args.loss,
        n_negatives=args.negatives,
        lr=args.rate,
        get_trainer_func=trainer,
        recommend_torch_device="cpu",
    )

    def lists(part: str, left_out: bool) -> pd.DataFrame:
        users = targets[part].index.to_numpy()
        return model.recommend(users=users, dataset=known[part], k=K, filter_viewed=left_out)

    scores: list[float] = []
    seconds: list[float] = []
    for done in range(0, args.epochs, args.every):
        started = time.perf_counter()
        model.fit_partial(known["valid"], min_epochs=args.every, max_epochs=args.every)
        seconds.append((time.perf_counter() - started) / args.every)
        scores.append(ndcg(ranks_in(lists("valid", True), targets["valid"])))
        print(
            f"epoch {done + args.every}: validation ndcg@{K} (unseen) {scores[-1]:.4f}, {seconds[-1]:.1f} s", flush=True
        )
        if scores[-1] == max(scores):
            for name, left_out in LISTS.items():
                lists("test", left_out).to_csv(args.folder / f"{name}.csv", index=False)
        elif len(scores) - 1 - int(np.argmax(scores)) >= args.patience:
            break
    parameters = sum(p.numel() for p in model.torch_model.parameters() if p.requires_grad)
    tables = sum(p.numel() for name, p in model.torch_model.named_parameters() if "item_model" in name)
    found = {
        "valid_scores": scores,
        "seconds_per_epoch": float(np.median(seconds)),
        "parameters": parameters,
        "parameters_without_embeddings": parameters - tables,
        "seed": args.seed,
        "threads": args.threads,
        "config": {key: value for key, value in vars(args).items() if key not in ("folder", "command")},
        "versions": {"torch": torch.__version__},
    }
    (args.folder / "run.json").write_text(json.dumps(found, indent=1))


def ranks_in(lists: pd.DataFrame, targets: pd.Series) -> np.ndarray:
    """Where each user's item stands in its list, from 1, 0 = nowhere: ``[users]``, in the order of ``targets``."""
    of = lists.astype({"item_id": str}).merge(targets.rename("target"), left_on="user_id", right_index=True)
    found = of[of["item_id"] == of["target"]].set_index("user_id")["rank"]
    return found.reindex(targets.index, fill_value=0).to_numpy()


def ndcg(ranks: np.ndarray) -> float:
    return float(np.where(ranks > 0, 1 / np.log2(np.maximum(ranks, 1) + 1), 0.0).mean())


def score(args: argparse.Namespace) -> None:
    """The cell of a table, as if the row had been run there."""
    from importlib import metadata

    from benchmarks.accuracy import Table
    from benchmarks.rendering import by_user, packed
    from recbole_holo.bridge.metric_names import UNSEEN
    from recbole_holo.reporting import git_commit

    data = json.loads((args.folder / "data.json").read_text())
    run = json.loads((args.folder / "run.json").read_text())
    events = pd.read_csv(args.folder / "events.csv.gz", dtype={"item": str})
    targets = events[events["part"] == "test"].set_index("user")["item"]
    table, test = Table.load(args.table), {}
    ranks = {name: ranks_in(pd.read_csv(args.folder / f"{name}.csv"), targets) for name in LISTS}
    for name, kind in (("ranks", ""), ("ranks_unseen", UNSEEN)):
        test |= {
            f"{metric}@{K}{kind}": float(by_user(ranks[name], f"{metric}@{K}").mean()) for metric in ("hit", "ndcg")
        }
    cell = {
        **run,
        "model": "RecTools' SASRec",
        "test": test,
        "git_commit": git_commit(),
        "device": "cpu",
        "machine": f"{run['threads']} threads",
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": {**run["versions"], "recbole": metadata.version("recbole"), "numba": None},
        **{name: packed(found) for name, found in ranks.items()},
    }
    path = table.cell(data["dataset"], args.row, run["seed"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(cell, indent=1) + "\n")
    print(f"{path}: {test}")


if __name__ == "__main__":
    main()
