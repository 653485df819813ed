"""An accuracy table as Markdown and as a plot: means, deviations, and whether a difference is one."""

from __future__ import annotations

import base64
import json
import statistics
import zlib
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import stats
from tabulate import tabulate

from benchmarks.cells import RESULTS
from recbole_holo.bridge.metric_names import UNSEEN, kept_name
from recbole_holo.data.event_time import EVENT_TIMES

if TYPE_CHECKING:
    from benchmarks.accuracy import Table


def packed(ranks: np.ndarray) -> str:
    """Ranks from 1 to 255, 0 = further down, as text."""
    return base64.b64encode(zlib.compress(np.minimum(ranks, 255).astype(np.uint8).tobytes(), 9)).decode()


def unpacked(text: str) -> np.ndarray:
    """:func:`packed` undone: ``[users]``."""
    return np.frombuffer(zlib.decompress(base64.b64decode(text)), np.uint8).astype(int)


def by_user(ranks: np.ndarray, metric: str) -> np.ndarray:
    """A metric such as ``ndcg@10``, with seen items or without, of users with a single item to be found, by its rank in
    that ranking: ``[users]``."""
    kind, k = kept_name(metric).split("@")
    found = (ranks > 0) & (ranks <= int(k))
    at = np.maximum(ranks, 1)
    return np.where(found, {"hit": np.ones(len(at)), "ndcg": 1 / np.log2(at + 1), "mrr": 1 / at}[kind], 0.0)


def difference(ours: list[np.ndarray], theirs: list[np.ndarray]) -> tuple[float, float]:
    """Of two rows' metrics by user, one array a seed: the mean of ours less theirs, and the paired t-test's p.

    A user counts once, with the mean over the seeds; the test is over users, the seeds' spread is the table's.
    """
    mine, other = np.mean(ours, 0), np.mean(theirs, 0)
    return float((mine - other).mean()), float(stats.ttest_rel(mine, other).pvalue)


def holm(p_values: list[float]) -> list[float]:
    """Corrected for the number of comparisons (Holm 1979)."""
    order = np.argsort(p_values)
    count, corrected, highest = len(p_values), [0.0] * len(p_values), 0.0
    for place, i in enumerate(order):
        highest = max(highest, min((count - place) * p_values[i], 1.0))
        corrected[i] = highest
    return corrected


def render(table: Table) -> str:
    """Writes ``results/NAME.md``, and where there are several rows its plot, from the cells there are."""
    content = table.content
    found = {
        (dataset, row): [
            json.loads(path.read_text())
            for seed in content["seeds"]
            if (path := table.cell(dataset, row, seed)).exists()
        ]
        for dataset in table.datasets
        for row in content["rows"]
    }
    parts = []
    for dataset in table.datasets:
        text = _dataset(table, dataset, {row: found[dataset, row] for row in content["rows"] if found[dataset, row]})
        parts.append(f"**{dataset}**\n\n{text}" if len(table.datasets) > 1 else text)
    body = "\n\n".join(parts)
    document = f"# {content['title']}\n\n{content['protocol'].strip()}\n\n{body}\n\n"
    document += (
        f"Seeds {', '.join(map(str, content['seeds']))}; mean ± standard deviation over seeds. Reproduce with\n\n"
    )
    document += f"    python -m benchmarks.accuracy {table.name} --data_path=dataset/\n\n"
    if "baseline" in content:
        document += (
            f"Δ is the difference to `{content['baseline']}`, over the seeds that both have; p is the paired t-test's "
            "over users, each with the mean of its seeds, corrected for the number of comparisons (Holm).\n\n"
        )
    if any("search" in row for row in content["rows"].values()):
        document += _choices(table)
    sources = {_source(cell) for cells in found.values() for cell in cells}
    document += "Ran on: " + " | ".join(sorted(sources)) + ". "
    document += "Seconds per epoch are of a shared machine: compare rows, not papers.\n"
    if content.get("plot") and any(found.values()):
        _plot(table, found)
        document += f"\n![{content['report'][-1]} by row]({table.name}.png)\n"
    if content.get("curves") and any(found.values()):
        _curves(table, found)
        document += f"\n![Validation {content['settings']['valid_metric']} by epoch]({table.name}-curves.png)\n"
    if content.get("notes"):
        document += f"\n{content['notes'].strip()}\n"
    (RESULTS / f"{table.name}.md").write_text(document, encoding="utf-8")
    return body


def _dataset(table: Table, dataset: str, rows: dict[str, list[dict[str, Any]]]) -> str:
    metrics, base = shown_metrics(table, rows), table.content.get("baseline")
    validation = bool(table.content.get("show_validation"))
    last = [metric for metric in metrics if kept_name(metric) == kept_name(metrics[-1])]  # one, or its two columns
    pairs = [(row, base) for row in rows if row != base] if base in rows else []
    compared = {metric: _compared(rows, pairs, metric) for metric in last} if base else {}
    lines = []
    for row, cells in rows.items():
        spread = [_mean_and_deviation([cell["test"].get(metric) for cell in cells]) for metric in metrics]
        seconds = statistics.median(cell["seconds_per_epoch"] for cell in cells)
        sizes = [f"{cells[0][key]:,}" for key in ("parameters", "parameters_without_embeddings")]
        delta = [found.get((row, base), "") for found in compared.values()]
        selected = [_mean_and_deviation([max(cell["valid_scores"]) for cell in cells])] if validation else []
        lines.append([row, *selected, *spread, *delta, *sizes, f"{seconds:.1f}", len(cells)])
    open_cells = sum(
        not table.cell(dataset, r, s).exists() for r in table.content["rows"] for s in table.content["seeds"]
    )
    head = [f"test {m}" for m in metrics] + [f"Δ {metric} (p)" for metric in compared]
    head = ["model", *["validation"] * validation, *head, "parameters", "without item tables", "s/epoch", "seeds"]
    text = tabulate(lines, headers=head, tablefmt="github", disable_numparse=True) + _pairs(table, rows)
    told = [row for row, cells in rows.items() if any(cell.get("event_time") == "request" for cell in cells)]
    text += f"\n\n{', '.join(told)}: event_time: {EVENT_TIMES['request']}." if told else ""
    text += _published(table, dataset, metrics)
    return text + (f"\n\n{open_cells} cells are still to run." if open_cells else "")


def _published(table: Table, dataset: str, metrics: list[str]) -> str:
    """What others report under nearly the same protocol, and in what theirs differs."""
    rows = (table.content.get("published") or {}).get(dataset, [])
    if not rows:
        return ""
    there = {metric for row in rows for metric in row}
    both = dict.fromkeys(column for name in metrics for column in (name, name + UNSEEN))
    metrics = [metric for metric in both if metric in there]
    lines = [
        [row["row"], *(f"{row[metric]:.4f}" if metric in row else "-" for metric in metrics), row.get("differs", "")]
        for row in rows
    ]
    head = ["published", *(f"test {metric}" for metric in metrics), "what differs"]
    return f"\n\n{tabulate(lines, headers=head, tablefmt='github', disable_numparse=True)}"


def shown_metrics(table: Table, rows: dict[str, list[dict[str, Any]]]) -> list[str]:
    """The table's ``report``, each followed by the same without seen items if a cell has it: cells from before there
    were two columns have one."""
    metrics = []
    for metric in table.content["report"]:
        metrics.append(metric)
        there = any(metric + UNSEEN in cell["test"] for cells in rows.values() for cell in cells)
        if there and metric + UNSEEN not in table.content["report"]:
            metrics.append(metric + UNSEEN)
    return metrics


def _pairs(table: Table, rows: dict[str, list[dict[str, Any]]]) -> str:
    """The table's ``pairs`` of rows, compared by every reported metric."""
    pairs = [(row, other) for row, other in table.content.get("pairs", []) if row in rows and other in rows]
    if not pairs:
        return ""
    found = {metric: _compared(rows, pairs, metric) for metric in shown_metrics(table, rows)}
    lines = [[row, other, *(found[metric].get((row, other), "") for metric in found)] for row, other in pairs]
    head = ["row", "less row", *(f"Δ {metric} (p)" for metric in found)]
    return f"\n\n{tabulate(lines, headers=head, tablefmt='github', disable_numparse=True)}"


def _compared(
    rows: dict[str, list[dict[str, Any]]], pairs: list[tuple[str, str]], metric: str
) -> dict[tuple[str, str], str]:
    """Row and other row → the difference, and p corrected for the number of pairs."""
    differences, key = {}, "ranks_unseen" if metric.endswith(UNSEEN) else "ranks"
    for row, other in pairs:
        theirs = {cell["seed"]: cell[key] for cell in rows[other] if key in cell}
        both = [(c[key], theirs[c["seed"]]) for c in rows[row] if key in c and c["seed"] in theirs]
        if both:
            values = [[by_user(unpacked(text), metric) for text in side] for side in zip(*both, strict=True)]
            differences[row, other] = difference(values[0], values[1])
    corrected = holm([p for _, p in differences.values()])
    return {
        pair: f"{delta:+.4f} ({f'{p:.3f}' if p >= 0.001 else '< 0.001'})"
        for (pair, (delta, _)), p in zip(differences.items(), corrected, strict=True)
    }


def _choices(table: Table) -> str:
    lines = []
    for dataset in table.datasets:
        for row, spec in table.content["rows"].items():
            if "search" in spec and all(path.exists() for path in table.trials(dataset, row)):
                chosen = ", ".join(f"{key} {value}" for key, value in table.best(dataset, row).items())
                lines.append(f"{row} on {dataset}: {chosen}")
    chosen = "; ".join(lines) or "still to run"
    return f"Tuned on validation, seed {table.content['tuning_seed']}: {chosen}.\n\n"


def _source(cell: dict[str, Any]) -> str:
    packages = ", ".join(f"{k} {cell['versions'][k]}" for k in ("recbole", "torch", "numba") if cell["versions"][k])
    commit = cell["git_commit"]
    # The + of a commit stays: files that git tracks were changed.
    short = "unknown (no checkout)" if commit is None else commit[:8] + ("+" if commit.endswith("+") else "")
    return f"{cell['date'][:10]}; {cell['device']}, {cell['machine']}; {packages}; commit {short}"


def _mean_and_deviation(values: list[float | None]) -> str:
    """A dash where a cell has no such value: a mean of the others would not be the row's."""
    found = [value for value in values if value is not None]
    if len(found) < len(values):
        return "-"
    deviation = f" ± {statistics.stdev(found):.4f}" if len(found) > 1 else ""
    return f"{statistics.mean(found):.4f}{deviation}"


def _plot(table: Table, found: dict[tuple[str, str], list[dict[str, Any]]]) -> None:
    """A panel a data set: the last metric of each row, with the deviation over the seeds."""
    plt = pyplot()
    metric = table.content["report"][-1]
    shown = [dataset for dataset in table.datasets if any(found[dataset, row] for row in table.content["rows"])]
    height = 1.2 + 0.3 * len(table.content["rows"])
    figure, axes = plt.subplots(1, len(shown), figsize=(5.5 * len(shown), height), layout="constrained", squeeze=False)
    for axis, dataset in zip(axes[0], shown, strict=True):
        rows = [row for row in reversed(table.content["rows"]) if found[dataset, row]]
        values = [[cell["test"][metric] for cell in found[dataset, row]] for row in rows]
        means = [statistics.mean(v) for v in values]
        spread = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
        axis.errorbar(means, range(len(rows)), xerr=spread, fmt="o", capsize=3)
        axis.set_yticks(range(len(rows)), rows)
        axis.set(title=dataset, xlabel=f"test {metric}")
        axis.grid(alpha=0.3)
    figure.savefig(RESULTS / f"{table.name}.png", dpi=110)
    plt.close(figure)


def _curves(table: Table, found: dict[tuple[str, str], list[dict[str, Any]]]) -> None:
    """A panel a data set: validation by epoch, the mean over the seeds of each row."""
    plt = pyplot()
    shown = [dataset for dataset in table.datasets if any(found[dataset, row] for row in table.content["rows"])]
    figure, axes = plt.subplots(1, len(shown), figsize=(5.5 * len(shown), 4), layout="constrained", squeeze=False)
    for axis, dataset in zip(axes[0], shown, strict=True):
        for row in table.content["rows"]:
            curves = [cell["valid_scores"] for cell in found[dataset, row] if cell.get("valid_scores")]
            if curves:
                length = min(map(len, curves))
                axis.plot(range(1, length + 1), np.mean([curve[:length] for curve in curves], 0), label=row)
        axis.set(title=dataset, xlabel="epoch", ylabel=f"validation {table.content['settings']['valid_metric']}")
        axis.grid(alpha=0.3)
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside right center")
    figure.savefig(RESULTS / f"{table.name}-curves.png", dpi=110)
    plt.close(figure)


def pyplot() -> Any:
    """matplotlib's, drawing into files."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot
