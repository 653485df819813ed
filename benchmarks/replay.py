"""Streams a data set's events in the order of time through a recommender, and compares it with the offline test.

    python -m benchmarks.replay CHECKPOINT [--data_path dataset/] [--storages float32 float16 int8]

Before each user's last event the recommender is asked for its ten best items, the ones that the user has among them,
as in the offline evaluation with all items ranked; that event is the test target. The offline test encodes the latest
MAX_ITEM_LIST_LENGTH events, the recommender has read all of them: for users with fewer, the two must say the same, up
to float32's rounding, which may exchange neighbours whose scores are equal to six digits. The others have their metrics
side by side. float16 and int8 keep a user's state in fewer bytes between events, and round it after every one of them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from tabulate import tabulate
from tqdm import tqdm

from benchmarks.cells import RESULTS, headline
from recbole_holo.data.sequences import HISTORY_START
from recbole_holo.inference import Event, Recommender
from recbole_holo.quick_start import load_data_and_model
from recbole_holo.training.trainer import get_trainer_class

K = 10
TOGETHER = 1024  # events of all users


def offline_ranks(model: Any, test: Any) -> np.ndarray:
    """Of each test row's target, from 1; 0 = not among the K best."""
    rows = test.dataset
    ranks = []
    with torch.no_grad():
        for index in torch.arange(len(rows)).split(256):
            batch = rows[index]
            scores = model.full_sort_predict(batch)
            scores[:, 0] = -torch.inf
            best = scores.topk(K).indices
            ranks.append(first_place(best.numpy(), batch[model.POS_ITEM_ID].numpy()))
    return np.concatenate(ranks)


def first_place(best: np.ndarray, target: np.ndarray) -> np.ndarray:
    """``best [B, K]``, ``target [B]`` → the target's place from 1, 0 where it is not there."""
    hits = best == target[:, None]
    return np.where(hits.any(1), hits.argmax(1) + 1, 0)


def streamed_ranks(
    recommender: Recommender, users: np.ndarray, items: np.ndarray, times: np.ndarray
) -> tuple[dict[int, int], float]:
    """User → rank of the last event's item; and events a second. Events are given user by user, in order."""
    last_of = {int(user): row for row, user in enumerate(users)}
    tokens = recommender.catalogue.tokens
    ranks: dict[int, int] = {}
    order = np.argsort(times, kind="stable")  # stable: a user's events stay in order
    start = time.perf_counter()
    for chunk in tqdm(np.array_split(order, -(-len(order) // TOGETHER)), desc=recommender.codec.storage):
        final = [row for row in chunk if last_of[int(users[row])] == row]
        recommender.update_many(events(users, items, times, chunk[~np.isin(chunk, final)], tokens), TOGETHER)
        answers = recommender.recommend_many([str(users[row]) for row in final], K, exclude_seen=False) if final else []
        for row, answer in zip(final, answers, strict=True):
            target = tokens[items[row]]
            ranks[int(users[row])] = answer.items.index(target) + 1 if target in answer.items else 0
        recommender.update_many(events(users, items, times, np.array(final, dtype=int), tokens), TOGETHER)
    return ranks, len(order) / (time.perf_counter() - start)


def events(
    users: np.ndarray, items: np.ndarray, times: np.ndarray, rows: np.ndarray, tokens: list[str]
) -> Iterator[Event]:
    return (Event(str(users[row]), tokens[items[row]], float(times[row]), str(row)) for row in rows)


def scores(ranks: np.ndarray) -> str:
    """Hit and NDCG."""
    gain = np.where(ranks > 0, 1 / np.log2(ranks + 1.0 + (ranks == 0)), 0)
    return f"{(ranks > 0).mean():.4f} / {gain.mean():.4f}" if len(ranks) else ""


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("checkpoint")
    flags.add_argument("--data_path", default="dataset", help="folder of the data set")
    flags.add_argument("--storages", nargs="+", default=["float32"])
    flags.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = flags.parse_args()
    torch.set_num_threads(options.threads)
    config, model, _, train, _, test = load_data_and_model(
        options.checkpoint, data_path=options.data_path, state="ERROR", show_progress=False, use_gpu=False
    )
    longest = config["MAX_ITEM_LIST_LENGTH"]
    offline = offline_ranks(model, test)
    trainer = get_trainer_class(config)(config, model)
    trainer.eval_collector.data_collect(train)
    official = trainer.evaluate(test, load_best_model=False)[f"ndcg@{K}"]
    assert abs(float(scores(offline).split(" / ")[1]) - official) < 2e-4, (scores(offline), official)

    every = test.dataset._events
    fields = (train.dataset.uid_field, model.ITEM_ID, config["TIME_FIELD"])
    users, items, times = (every[field].numpy() for field in fields)
    if test.dataset.event_times is not None:  # a model that reads times is given them as its training was
        times = test.dataset.event_times
    rows = test.dataset.inter_feat
    test_users = rows[train.dataset.uid_field].numpy()
    # Events before the test target: to its row from the user's first.
    first = {int(user): row for row, user in reversed(list(enumerate(users)))}
    ends = (rows[HISTORY_START] + rows[model.ITEM_SEQ_LEN]).numpy()
    lengths = np.array([end - first[int(user)] for user, end in zip(test_users, ends, strict=True)])
    fits = lengths <= longest
    lines = [["offline, the latest events", "", "", scores(offline), scores(offline[fits]), scores(offline[~fits])]]
    for storage in options.storages:
        recommender = Recommender(model, train.dataset, storage=storage)
        found, speed = streamed_ranks(recommender, users, items, times)
        ranks = np.array([found[int(user)] for user in test_users])
        differ = int((ranks != offline)[fits].sum())
        measured = [scores(part) for part in (ranks, ranks[fits], ranks[~fits])]
        lines.append([f"streamed, states in {storage}", f"{speed:,.0f}", str(differ), *measured])
    head = ["", "events a second", f"of {fits.sum():,} users that fit, ranked otherwise"]
    head += [f"all {len(fits):,}: hit / NDCG@{K}", "those that fit", f"the {(~fits).sum():,} with longer histories"]
    body = tabulate(lines, headers=head, tablefmt="github", disable_numparse=True)
    name = f"replay-{config['model']}-{config['dataset']}-{longest}"
    about = (__doc__ or "").split("\n\n", 2)[2].strip()
    keys = ("model", "dataset", "seed", "MAX_ITEM_LIST_LENGTH")
    keys += ("binding", "binding_scale", "bind_output", "event_time", "epochs")
    training = "python run_recbole_holo.py " + " ".join(f"--{key}={config[key]}" for key in keys)
    text = f"# {config['model']} on {config['dataset']}, replayed\n\n    {training}\n    "
    text += f"python -m benchmarks.replay CHECKPOINT --storages {' '.join(options.storages)}\n\n{about}\n\n"
    text += f"{len(users):,} events; trained on windows of at most {longest} events.\n\n{body}\n\n"
    text += f"{headline('cpu', options.threads)}.\n"
    (RESULTS / f"{name}.md").write_text(text)
    print(body)


if __name__ == "__main__":
    main()
