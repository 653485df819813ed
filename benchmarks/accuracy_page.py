"""One page of all accuracy tables: ``python -m benchmarks.accuracy_page`` writes ``results/accuracy.md``.

It takes the cells that there are and runs nothing. The plot has every row's test score, in the ranking that its epochs
were chosen by, against the seconds that its training took, mean over seeds.
"""

from __future__ import annotations

import json
import statistics

from benchmarks.accuracy import TABLES, Table
from benchmarks.cells import RESULTS
from benchmarks.rendering import pyplot, render

PREFIX = "accuracy-"


def main() -> None:
    tables = [Table.load(path.stem) for path in sorted(TABLES.glob(f"{PREFIX}*.yaml"))]
    parts = [
        "# Accuracy, protocol by protocol",
        "A table a protocol: ours and the baselines under one data pipeline, one loss where the model allows it, and "
        "an equal number of trials; beside them what others report under nearly the same protocol, and in what theirs "
        "differs. What the protocols are is in [docs/protocols.md](../docs/protocols.md), how to match a paper's in "
        "[docs/reproduce.md](../docs/reproduce.md).",
        "    python -m benchmarks.accuracy accuracy-ml-1m --data_path=dataset/    # and so on, cell by cell\n"
        "    python -m benchmarks.accuracy_page",
    ]
    for table in tables:
        body, content = render(table), table.content
        parts += [f"## {content['title']}", f"[{table.name}.md]({table.name}.md)", content["protocol"].strip(), body]
    if _plot(tables):
        parts.append("![Test score against seconds of training](accuracy.png)")
    (RESULTS / "accuracy.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _plot(tables: list[Table]) -> bool:
    """A panel a data set of which there are cells; whether there is one."""
    panels = []
    for table in tables:
        for dataset in table.datasets:
            points = {row: found for row in table.content["rows"] if (found := _point(table, dataset, row))}
            if points:
                panels.append((dataset, points))
    if not panels:
        return False
    plt = pyplot()
    figure, axes = plt.subplots(1, len(panels), figsize=(5 * len(panels), 4), layout="constrained", squeeze=False)
    for axis, (dataset, points) in zip(axes[0], panels, strict=True):
        for row, (seconds, score) in points.items():
            axis.plot(seconds, score, "o")
            axis.annotate(row, (seconds, score), textcoords="offset points", xytext=(4, 4), fontsize=8)
        axis.set(title=dataset, xlabel="seconds of training", ylabel="test NDCG@10", xscale="log")
        axis.grid(alpha=0.3)
    figure.savefig(RESULTS / "accuracy.png", dpi=110)
    plt.close(figure)
    return True


def _point(table: Table, dataset: str, row: str) -> tuple[float, float] | None:
    """Seconds of training and test score, means over the seeds; None without a cell."""
    paths = [path for seed in table.content["seeds"] if (path := table.cell(dataset, row, seed)).exists()]
    if not paths:
        return None
    cells = [json.loads(path.read_text()) for path in paths]
    metric = table.settings(dataset, row, {})["valid_metric"].lower()
    seconds = statistics.mean(cell["seconds_per_epoch"] * len(cell["valid_scores"]) for cell in cells)
    return seconds, statistics.mean(cell["test"][metric] for cell in cells)


if __name__ == "__main__":
    main()
