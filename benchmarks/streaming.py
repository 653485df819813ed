"""Serving one event at a time: what an update and the ten best items cost, by the length of the history.

    python -m benchmarks.streaming [--device cpu --threads 1]

An event is ``Recommender.update`` of one user, whose state is read from the store, moved on and stored, and
``Recommender.recommend`` of the ten best of all items without the latest 1,000 that the user has; the store is in
memory. Models as configured, untrained (d 64, two layers, 16 states a channel), 3,416 items as in ML-1M, one attribute
bound. Users of all lengths take turns, event by event, so that what else the machine does falls on all; microseconds
over 2,000 events after 200 to warm up. ``encoding again`` is what a model without a state does for every answer: the
whole history through SequenceSASRec (fused attention), and through RecBole's own SASRec and ``full_sort_predict``, both
with two layers of width 64. Batches are ``update_many`` of 40,000 events of 8,000 users, 512 at a time, with as many
threads as the page says. The index is faiss's HNSW32 over vectors drawn at random, which have no neighbours to speak
of: the hardest case for it, so read its recall as a floor; efSearch 64.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.cells import RESULTS, cell_parser, kept, measured, write_page
from recbole_holo.bridge.config import Config
from recbole_holo.data.attributes import ItemAttribute
from recbole_holo.data.catalogue import Catalogue
from recbole_holo.inference import Event, FaissIndex, Recommender, SQLiteStore
from recbole_holo.inference.records import STORAGES, Codec
from recbole_holo.model.holomambarec import HoloMambaRec
from recbole_holo.model.hydra import Hydra
from recbole_holo.model.mamba4rec import Mamba4Rec
from recbole_holo.model.recmamba import RecMamba
from recbole_holo.model.sequence_sasrec import SequenceSASRec

STATES = {model.__name__: model for model in (HoloMambaRec, RecMamba, Mamba4Rec, Hydra)}
ATTENTION = ("SequenceSASRec", "SASRec")
ITEMS = 3417
LENGTHS = (10, 100, 1_000, 10_000, 100_000)
CATALOGUES = (10_000, 100_000, 1_000_000)
EVENTS = 2_000


def settings_of(model: str, device: str, **others: Any) -> Config:
    """The defaults of a model."""
    return Config(model, "ml-100k", config_dict={**others, "use_gpu": device == "cuda"})


def catalogue(n_items: int) -> Catalogue:
    """Made items with one attribute of 18 values."""
    labels = ["[PAD]", *(f"g{n}" for n in range(18))]
    index = torch.arange(n_items) % 18 + 1
    index[0] = 0
    genre = ItemAttribute("genre", index, len(labels), labels)
    tokens = ["[PAD]", *map(str, range(1, n_items))]
    return Catalogue("made", "item_id", tokens, [""] * n_items, torch.arange(n_items), {"genre": genre})


def recommender_of(model: str, device: str, n_items: int = ITEMS, index: bool = False, **options: Any) -> Recommender:
    torch.manual_seed(0)
    items = catalogue(n_items)
    net = STATES[model](settings_of(model, device), items).to(device).eval()
    return Recommender(net, items, index=FaissIndex(net, "HNSW32", effort=64) if index else None, **options)


def percentiles(seconds: list[float]) -> dict[str, float]:
    """In microseconds."""
    p50, p95, p99 = np.percentile(seconds, [50, 95, 99]) * 1e6
    return {"p50": round(p50, 1), "p95": round(p95, 1), "p99": round(p99, 1)}


def timed(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def events_cell(model: str, store: str, device: str) -> dict[str, Any]:
    """Users of all lengths, in turns."""
    with tempfile.TemporaryDirectory() as folder:
        disk = SQLiteStore(Path(folder) / "states.db") if store == "sqlite" else None
        recommender = recommender_of(model, device, store=disk)
        draw = np.random.default_rng(0)
        users = {f"u{length}": [str(n) for n in draw.integers(1, ITEMS, length)] for length in LENGTHS}
        recommender.rebuild(users.items(), show_progress=False)
        seconds: dict[int, list[float]] = {length: [] for length in LENGTHS}

        def event(user: str, item: str) -> None:
            recommender.update(user, item)
            recommender.recommend(user, k=10)

        for turn in range(EVENTS + 200):
            for length in LENGTHS:
                item = str(draw.integers(1, ITEMS))
                taken = timed(lambda user=f"u{length}", item=item: event(user, item))
                if turn >= 200:
                    seconds[length].append(taken)
        recommender.store.close()
    return {str(length): percentiles(taken) for length, taken in seconds.items()}


def again_cell(model: str, length: int, device: str) -> dict[str, Any]:
    """The whole history for every answer, and its ten best items."""
    rounds = max(3, min(50, 20_000 // length))
    items = torch.randint(1, ITEMS, (1, length), device=device)
    lengths = torch.tensor([length], device=device)
    config = settings_of(model, device, MAX_ITEM_LIST_LENGTH=length, loss_type="CE")
    if model == "SequenceSASRec":
        net: Any = SequenceSASRec(config, catalogue(ITEMS)).to(device).eval()
        answer = lambda: net.score_all(net.forward(items, lengths)).topk(10)  # noqa: E731
    else:
        from recbole.data.interaction import Interaction
        from recbole.model.sequential_recommender.sasrec import SASRec

        net = SASRec(config, catalogue(ITEMS)).to(device).eval()
        batch = Interaction({"item_id_list": items, "item_length": lengths})
        answer = lambda: net.full_sort_predict(batch).topk(10)  # noqa: E731
    with torch.no_grad():
        answer()
        return percentiles([timed(answer) for _ in range(rounds)])


def batches_cell(model: str, device: str) -> dict[str, Any]:
    """Events a second: the median of five runs."""
    recommender, draw = recommender_of(model, device), np.random.default_rng(0)
    events = [Event(f"u{n % 8000}", str(draw.integers(1, ITEMS))) for n in range(40_000)]
    recommender.update_many(events[:4000])
    return {
        "events a second": round(
            40_000 / statistics.median(timed(lambda: recommender.update_many(events)) for _ in range(5))
        )
    }


def catalogue_cell(n_items: int, device: str) -> dict[str, Any]:
    """Recommending only, exactly and by the index, and how many of the ten best the index finds."""
    exact = recommender_of("HoloMambaRec", device, n_items)
    indexed = recommender_of("HoloMambaRec", device, n_items, index=True)
    draw, users = np.random.default_rng(0), [f"u{n}" for n in range(50)]
    events = [Event(user, str(draw.integers(1, n_items))) for _ in range(20) for user in users]
    found: dict[str, Any] = {}
    answers = []
    for name, recommender in (("exact", exact), ("HNSW32", indexed)):
        recommender.update_many(events)
        answers.append([recommender.recommend(user).items for user in users])
        found[name] = percentiles([timed(lambda u=user, r=recommender: r.recommend(u)) for user in users])
    pairs = zip(*answers, strict=True)
    found["recall"] = statistics.mean(len(set(one) & set(other)) / 10 for one, other in pairs)
    return found


def run_cell(words: list[str], device: str) -> dict[str, Any]:
    kind, *rest = words
    if kind == "events":
        return events_cell(rest[0], rest[1], device)
    if kind == "again":
        return again_cell(rest[0], int(rest[1]), device)
    if kind == "batches":
        return batches_cell(rest[0], device)
    return catalogue_cell(int(rest[0]), device)


def cells() -> list[list[str]]:
    found = [["events", model, "memory"] for model in STATES] + [["events", "HoloMambaRec", "sqlite"]]
    found += [["batches", model] for model in STATES]
    found += [["again", model, str(length)] for model in ATTENTION for length in LENGTHS[:-1]]
    return found + [["catalogue", str(size)] for size in CATALOGUES]


def microseconds(cell: dict[str, Any] | None) -> str:
    if cell is None or "failed" in cell:
        return "open" if cell is None else cell["failed"]
    return " / ".join(f"{cell[name]:,.0f}" for name in ("p50", "p95", "p99"))


def page(device: str) -> str:
    def cell(*words: str) -> dict[str, Any] | None:
        return kept("streaming", list(words), device)

    lines = [
        "## An event: update and ten best, µs (p50 / p95 / p99) by the length of the history\n",
        f"| model | {' | '.join(f'{length:,}' for length in LENGTHS)} | spread of p50 |",
        "|---|" + "---:|" * (len(LENGTHS) + 1),
    ]
    for model, store in [*((model, "memory") for model in STATES), ("HoloMambaRec", "sqlite")]:
        found = cell("events", model, store)
        if found:
            middles = [found[str(length)]["p50"] for length in LENGTHS]
            spread = (max(middles) - min(middles)) / statistics.median(middles)
            row = [microseconds(found[str(length)]) for length in LENGTHS]
            name = model if store == "memory" else f"{model}, on disk (SQLite)"
            lines.append(f"| {name} | {' | '.join(row)} | {spread:.0%} |")
    for model, name in zip(
        ATTENTION, ("SequenceSASRec, encoding again", "RecBole's SASRec, encoding again"), strict=True
    ):
        row = [microseconds(cell("again", model, str(length))) if length in LENGTHS[:-1] else "" for length in LENGTHS]
        lines.append(f"| {name} | {' | '.join(row)} | |")
    lines += ["\n## Batches\n", "| model | events a second |", "|---|---:|"]
    for model in STATES:
        found = cell("batches", model)
        lines.append(f"| {model} | {found['events a second']:,} |" if found else f"| {model} | open |")
    lines += [
        "\n## Large catalogues: ten best, µs (p50 / p95 / p99)\n",
        "| items | exact | HNSW32 | its recall |",
        "|---:|---:|---:|---:|",
    ]
    for size in CATALOGUES:
        found = cell("catalogue", str(size))
        if found:
            both = " | ".join(microseconds(found[name]) for name in ("exact", "HNSW32"))
            lines.append(f"| {size:,} | {both} | {found['recall']:.2f} |")
    lines += [
        "\n## States\n",
        f"| model | numbers | {' | '.join(STORAGES)} | states a GB (float32) |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for model in STATES:
        layout = recommender_of(model, "cpu").codec.layout
        sizes = [Codec(layout, storage).number_bytes for storage in STORAGES]
        stored = " | ".join(f"{size:,} B" for size in sizes)
        lines.append(f"| {model} | {layout.size:,} | {stored} | {math.floor(1e9 / sizes[0]):,} |")
    machines = {found["machine"] for words in cells() if (found := cell(*words))}
    return "\n".join([*lines, f"\nMeasured on: {'; '.join(sorted(machines))}."])


def plot(device: str, target: Path) -> None:
    """Median and 99th percentile of an event against the length of the history, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7, 4.4), layout="constrained")
    lines = {model: kept("streaming", ["events", model, "memory"], device) for model in STATES}
    for model, name in zip(ATTENTION, ("SASRec, fused attention", "RecBole's SASRec"), strict=True):
        found = {str(length): kept("streaming", ["again", model, str(length)], device) for length in LENGTHS}
        lines[name] = {length: cell for length, cell in found.items() if cell and "failed" not in cell}
    for name, cells_of in lines.items():
        points = [(length, cells_of[str(length)]) for length in LENGTHS if cells_of and str(length) in cells_of]
        if points:
            x, y = [length for length, _ in points], [cell["p50"] / 1e3 for _, cell in points]
            (line,) = axis.plot(x, y, marker="o", label=name)
            axis.fill_between(x, y, [cell["p99"] / 1e3 for _, cell in points], alpha=0.15, color=line.get_color())
    axis.set(xscale="log", yscale="log", xlabel="events in the user's history", ylabel="milliseconds, p50 to p99")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.savefig(target, dpi=120)


def main() -> None:
    options = cell_parser(__doc__).parse_args()
    torch.set_num_threads(options.threads)
    if options.cell:
        print(json.dumps(run_cell(options.cell, options.device)))
        return
    if not options.render:
        for words in cells():
            threads = 2 if words[0] == "batches" and options.device == "cpu" else options.threads
            measured("streaming", words, argparse.Namespace(**{**vars(options), "threads": threads}))
    body = f"![An event against the length of the history](streaming-{options.device}.png)\n\n{page(options.device)}"
    plot(options.device, RESULTS / f"streaming-{options.device}.png")
    write_page("streaming", options.device, "Constant-time recommendation", __doc__, body, "--threads 1")


if __name__ == "__main__":
    main()
