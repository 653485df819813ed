"""The accuracy tables: what runs, what is chosen by, and what is said of a difference."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from scipy import stats

from benchmarks import accuracy, rendering
from benchmarks.accuracy import Table, missing, run_cell
from benchmarks.rendering import by_user, difference, holm, packed, render, unpacked
from recbole_holo.training.trainer import HoloTrainer


@pytest.fixture
def table(tmp_path: Path, tiny: dict[str, Any], cyclic_dataset: str, monkeypatch: pytest.MonkeyPatch) -> Table:
    settings = {**tiny, "epochs": 2, "metrics": ["Hit", "NDCG"], "topk": [5], "valid_metric": "NDCG@5"}
    content = {
        "title": "Tiny",
        "protocol": "For the test.",
        "datasets": {cyclic_dataset: {"item_attributes": ["genre"]}},
        "settings": {key: value for key, value in settings.items() if key != "device"},
        "seeds": [1, 2],
        "tuning_seed": 7,
        "report": ["hit@5", "ndcg@5"],
        "baseline": "plain",
        "pairs": [["bound", "shuffled"]],
        "plot": True,
        "curves": True,
        "rows": {
            "plain": {"model": "HoloMambaRec", "settings": {"binding": None}},
            "bound": {"model": "HoloMambaRec", "search": {"learning_rate": [1e-9, 0.02]}},
            "shuffled": {"base": "bound", "settings": {"attribute_shuffle": True}},
        },
    }
    (tmp_path / "tables").mkdir()
    (tmp_path / "tables" / "tiny.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    monkeypatch.setattr(accuracy, "TABLES", tmp_path / "tables")
    for module in (accuracy, rendering):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    return Table.load("tiny")


def run_all(table: Table, count: int | None = None) -> None:
    for dataset, row, seed, choice in missing(table)[:count]:
        run_cell(table, dataset, row, seed, choice, str(Path("dataset").resolve()))


def test_a_table_runs_what_is_missing_tunes_on_validation_and_renders(table: Table) -> None:
    (dataset,) = table.datasets
    jobs = missing(table)
    assert len(jobs) == 2 + 6  # two trials, whose choice two rows have
    run_all(table, 3)
    assert missing(table) == jobs[3:]

    trials = {path: json.loads(path.read_text()) for path in table.trials(dataset, "bound")}
    assert all(trial["test"] is None and "ranks" not in trial and trial["seed"] == 7 for trial in trials.values())
    by_rate = {trial["config"]["learning_rate"]: trial["valid"]["ndcg@5"] for trial in trials.values()}
    assert by_rate[0.02] > by_rate[1e-9]
    assert table.best(dataset, "bound") == {"learning_rate": 0.02}
    assert table.settings(dataset, "shuffled", None)["learning_rate"] == 0.02
    assert table.settings(dataset, "shuffled", None)["attribute_shuffle"]

    run_all(table)
    assert missing(table) == []
    cell = json.loads(table.cell(dataset, "bound", 2).read_text())
    assert cell["config"]["learning_rate"] == 0.02
    assert cell["attributes"]["genre"]["alpha"]
    for metric in table.content["report"]:
        for kind, key in (("", "ranks"), (" (unseen)", "ranks_unseen")):
            found = by_user(unpacked(cell[key]), metric + kind).mean()
            assert found == pytest.approx(cell["test"][metric + kind], abs=1e-4)

    text = render(table)
    assert text.count("\n") == 4 + 4
    means = [
        np.mean([json.loads(table.cell(dataset, row, seed).read_text())["test"]["hit@5"] for seed in (1, 2)])
        for row in ("bound", "shuffled")
    ]
    delta = means[0] - means[1]
    assert f"| bound | shuffled   | {delta:+.4f} (" in text
    head = text.splitlines()[0]
    for column in ("test hit@5", "test ndcg@5", "Δ ndcg@5"):
        assert f"{column} (unseen)" in head
    document = (rendering.RESULTS / "tiny.md").read_text()
    assert "bound on" in document
    assert "learning_rate 0.02" in document
    assert len(cell["valid_scores"]) == 2
    for name in ("tiny.png", "tiny-curves.png"):
        assert (rendering.RESULTS / name).stat().st_size > 1000


def test_a_trial_that_falls_behind_the_best_is_stopped_and_never_chosen(table: Table) -> None:
    (dataset,) = table.datasets
    table.content["settings"]["epochs"] = 4
    table.content.update(stop_trials={"after": 0.5, "below": 0.9}, show_validation=True)
    table.content["spaces"] = {"rates": [{"learning_rate": 0.02}, {"learning_rate": 1e-9}]}
    table.content["rows"]["bound"]["search"] = "rates"
    trials = [job for job in missing(table) if job[3]]
    for job in trials:
        run_cell(table, *job, str(Path("dataset").resolve()))
    good, bad = (json.loads(path.read_text()) for path in table.trials(dataset, "bound"))
    assert len(good["valid_scores"]) == 4
    assert bad["stopped_after"] == 2
    assert bad["valid_score"] < 0.9 * max(good["valid_scores"][:2])
    assert not [job for job in missing(table) if job[3]]
    assert table.best(dataset, "bound") == {"learning_rate": 0.02}
    run_cell(table, dataset, "bound", 1, None, str(Path("dataset").resolve()))
    cell = json.loads(table.cell(dataset, "bound", 1).read_text())
    assert f"{max(cell['valid_scores']):.4f}" in render(table)


@pytest.mark.parametrize(
    ("epoch", "score", "ends"),
    [(0, 0.0, False), (1, 0.44, True), (1, 0.46, False), (2, 0.71, True), (3, 0.0, False)],
)
def test_a_trial_is_compared_at_the_same_part_of_its_run(epoch: int, score: float, ends: bool) -> None:
    """Of 4 epochs, with one of 8 that had its best score of the first half at .5; never at its end."""
    best = 0.9 * np.maximum.accumulate([0.1, 0.2, 0.5, 0.4, 0.7, 0.8, 0.8, 0.9])
    judge = accuracy.StopsTrials(epochs=4, after=0.5, best=best)
    if ends:
        with pytest.raises(accuracy.TrialStopped, match=f"after {epoch + 1} epochs"):
            judge(epoch, score)
    else:
        judge(epoch, score)


def test_rows_from_outside_are_shown_and_not_run_and_choices_are_shared(table: Table) -> None:
    (dataset,) = table.datasets
    table.content["datasets"]["other order"] = {"data": dataset, "tuned_on": dataset, "ties": "item"}
    table.content["rows"]["theirs"] = {"outside": "rectools_sasrec"}
    table.content["published"] = {"other order": [{"row": "Somebody's", "ndcg@5 (unseen)": 0.5, "differs": "all"}]}
    jobs = missing(table)
    assert len(jobs) == 2 + 6 + 6  # the two trials once
    assert "theirs" not in {row for _, row, _, _ in jobs}
    assert table.data("other order") == dataset
    settings = table.settings("other order", "plain", None)
    assert settings["ties"] == "item"
    assert not {"data", "tuned_on"} & settings.keys()
    assert table.trials("other order", "bound") == table.trials(dataset, "bound")
    rendering.RESULTS.mkdir()
    assert "| Somebody's  | 0.5000                 | all            |" in render(table)


def test_cells_with_one_column_are_rendered_as_before_and_beside_new_ones(table: Table) -> None:
    (dataset,) = table.datasets
    (rendering.RESULTS / "cells").mkdir(parents=True)
    ranks = {"old": np.array([1, 2, 0, 4]), "new": np.array([2, 0, 0, 1])}

    def cell(row: str, seed: int, unseen: bool) -> None:
        test = dict.fromkeys(table.content["report"], 0.25)
        made: dict[str, Any] = {"seed": seed, "test": test, "ranks": packed(ranks["old"])}
        if unseen:
            test |= {f"{metric} (unseen)": 0.5 + seed / 10 for metric in table.content["report"]}
            made["ranks_unseen"] = packed(ranks["new"])
        made |= {"parameters": 10, "parameters_without_embeddings": 5, "seconds_per_epoch": 1.0, "date": "2026-01-01"}
        made |= {"versions": {"recbole": "1", "torch": "2", "numba": "0"}, "git_commit": None, "device": "cpu"}
        path = table.cell(dataset, row, seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({**made, "machine": "m"}))

    table.content.update(plot=False, curves=False)
    for row in ("plain", "shuffled"):
        for seed in (1, 2):
            cell(row, seed, unseen=False)
    assert "unseen" not in render(table)
    for seed in (1, 2):
        cell("plain", seed, unseen=True)
    cell("shuffled", 1, unseen=True)
    lines = render(table).splitlines()
    assert lines[0].count("(unseen)") == 3
    assert [line.count("0.6500 ± 0.0707") for line in lines if line.startswith("| plain")] == [2]
    (shuffled,) = (line for line in lines if line.startswith("| shuffled"))
    assert "0.2500 ± 0.0000 | -" in shuffled  # one of two seeds has the second column
    assert "0.6" not in shuffled


def test_a_run_that_was_stopped_goes_on(table: Table, monkeypatch: pytest.MonkeyPatch) -> None:
    (dataset,) = table.datasets
    table.content["settings"]["lr_scheduler"] = None  # so that every epoch of the few improves, and is saved
    job = (dataset, "plain", 1, None, str(Path("dataset").resolve()))
    undisturbed = run_cell(table, *job)
    table.cell(dataset, "plain", 1).unlink()

    trained: list[int] = []
    stops: list[int] = []
    train_epoch = HoloTrainer._train_epoch

    def stopped(self: HoloTrainer, data: Any, epoch: int, *others: Any, **more: Any) -> Any:
        if epoch == 1 and not stops:
            stops.append(epoch)
            raise KeyboardInterrupt
        trained.append(epoch)
        return train_epoch(self, data, epoch, *others, **more)

    monkeypatch.setattr(HoloTrainer, "_train_epoch", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_cell(table, *job)
    assert missing(table, rows=["plain"], seeds=[1])
    continued = run_cell(table, *job)
    assert trained == [0, 1]
    for name in ("test", "ranks", "valid_scores"):
        assert continued[name] == undisturbed[name], name
    assert continued["config"].keys() == undisturbed["config"].keys()


def test_choices_may_be_listed_instead_of_combined(table: Table) -> None:
    (dataset,) = table.datasets
    choices = [{"binding": "role", "bind_output": True}, {"binding": "both", "bind_output": "added"}]
    table.content["rows"]["bound"]["search"] = choices
    trials = table.trials(dataset, "bound")
    assert list(trials.values()) == choices
    assert len(trials) == 2
    for path, score in zip(trials, (0.1, 0.2), strict=True):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"valid": {"ndcg@5": score}, "config": {"valid_metric": "NDCG@5"}}))
    assert table.settings(dataset, "shuffled", None)["bind_output"] == "added"


def test_unknown_rows_are_named(table: Table) -> None:
    with pytest.raises(SystemExit, match="tiny has no plane; it has plain, bound"):
        missing(table, rows=["plane"])


def test_ranks_are_packed_and_metrics_of_users_are_those_of_their_ranks() -> None:
    ranks = np.array([0, 1, 2, 10, 11, 300])
    assert unpacked(packed(ranks)).tolist() == [0, 1, 2, 10, 11, 255]
    np.testing.assert_allclose(by_user(ranks, "hit@10"), [0, 1, 1, 1, 0, 0])
    np.testing.assert_allclose(by_user(ranks, "ndcg@10"), [0, 1, 1 / np.log2(3), 1 / np.log2(11), 0, 0])
    np.testing.assert_allclose(by_user(ranks, "mrr@2"), [0, 1, 0.5, 0, 0, 0])


def test_a_difference_is_paired_over_users() -> None:
    """Users differ far more than rows do: unpaired, the same difference would be nothing."""
    generator = np.random.default_rng(0)
    theirs = [generator.random(2000) for _ in range(3)]
    ours = [values + 0.005 + 0.01 * generator.standard_normal(2000) for values in theirs]
    delta, p = difference(ours, theirs)
    assert delta == pytest.approx(0.005, abs=1e-3)
    assert p < 1e-6
    assert stats.ttest_ind(np.mean(ours, 0), np.mean(theirs, 0)).pvalue > 0.1


def test_holm() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])


def test_a_page_says_which_rows_know_when_they_are_asked(table: Table) -> None:
    cell = {"test": {"hit@5": 0.5, "ndcg@5": 0.3}, "seed": 1, "seconds_per_epoch": 1.0, "parameters": 2}
    cell["parameters_without_embeddings"] = 1
    rows = {"plain": [cell], "bound": [{**cell, "event_time": "gap"}], "shuffled": [{**cell, "event_time": "request"}]}
    (dataset,) = table.datasets
    page = rendering._dataset(table, dataset, rows)
    assert re.search(r"^shuffled: .*THE TIME OF THE EVENT TO BE PREDICTED", page, re.MULTILINE)
    del rows["shuffled"]
    assert "TIME OF THE EVENT" not in rendering._dataset(table, dataset, rows)
