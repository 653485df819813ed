"""The time between events: exact buckets of any unit, and batches that carry them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch

from recbole_holo.bridge.config import Config
from recbole_holo.data import GAPS
from recbole_holo.data.catalogue import Catalogue
from recbole_holo.data.event_time import GapBuckets
from recbole_holo.data.loader import create_dataset, data_preparation
from recbole_holo.errors import ConfigError
from recbole_holo.quick_start import prepare

SECONDS = 1_717_000_000  # of today; a float32 there has a grid of 128
COLUMNS = {"load_col": {"inter": ["user_id", "item_id", "timestamp"]}}
SMALL = {"hidden_size": 8, "MAX_ITEM_LIST_LENGTH": 5, "window_stride": 2, "train_batch_size": 4}
TOP = {"topk": [3], "valid_metric": "NDCG@3"}


def prepared(dataset: str, model: str = "RecMamba", **settings: Any) -> tuple[Any, ...]:
    config = Config(model, dataset, config_dict={"state": "ERROR", **COLUMNS, **SMALL, **TOP, **settings})
    return data_preparation(config, create_dataset(config))


@pytest.fixture
def timed(write_dataset: Callable[..., str]) -> tuple[str, dict[str, list[float]]]:
    """A data set whose events are seconds, fractions and nothing apart, rows in no order; times by user."""
    rng = np.random.default_rng(4)
    steps = [0.0, 0.25, 1.0, 1.0, 3.0, 59.0, 64.0, 3601.0, 86400.0, 2.0**24 - 1, 2.0**25]
    times = {f"u{u}": (SECONDS + np.cumsum(rng.choice(steps, size=4 + u))).tolist() for u in range(9)}
    rows = [(u, f"i{1 + (len(u) + n) % 11}", repr(t)) for u, own in times.items() for n, t in enumerate(own)]
    # Ties keep the order of the file, so whole users are exchanged and events of different times.
    order = sorted(range(len(rows)), key=lambda i: (float(rows[i][2]), i), reverse=False)
    return write_dataset([rows[i] for i in order]), times


def expected(buckets: GapBuckets, times: list[float]) -> list[int]:
    """One by one, in Python's floats."""
    found = [0]
    for gap in (b - a for a, b in pairwise(times)):
        below = [i for i in range(buckets.count - 2) if buckets.unit * 2.0 ** (buckets.octaves * i) <= gap]
        found.append(2 + below[-1] if below else 1)
    return found


# ---------------------------------------------------------------------- buckets
def test_seconds_have_an_octave_each() -> None:
    gaps = np.r_[np.nan, 0, np.arange(1, 5000), 2.0 ** np.arange(30), 2.0 ** np.arange(1, 30) - 1, 2.0**40]
    buckets = GapBuckets.of(gaps[gaps < 2**27], 32)
    assert buckets == GapBuckets(32, 1.0, 1.0)
    with np.errstate(divide="ignore"):
        wanted = np.where(gaps < 1, 1, np.minimum(2 + np.floor(np.log2(gaps)), 31))
    wanted[0] = 0
    assert buckets(gaps).tolist() == wanted.tolist()


@pytest.mark.parametrize("unit", [1e-3, 1.0, 86400.0, 1 / 3])
def test_buckets_do_not_depend_on_the_unit_of_time(unit: float) -> None:
    gaps = np.array([0, 1, 1, 2, 3, 7, 100, 5e4, 2.0**26])
    assert GapBuckets.of(gaps * unit, 32)(gaps * unit).tolist() == GapBuckets.of(gaps, 32)(gaps).tolist()


@pytest.mark.parametrize(("largest", "count"), [(2.0**38, 32), (2.0**26, 8), (2.0**31 - 1, 32), (1.0, 3), (7.0, 3)])
def test_long_gaps_are_not_thrown_together(largest: float, count: int) -> None:
    buckets = GapBuckets.of(np.array([1.0, largest]), count)
    found = buckets(np.array([1.0, largest / 2, largest, 4 * largest])).tolist()
    assert found[0] == 2
    assert found[2] <= found[3] == count - 1
    if largest > 2.0**30:
        assert found[1] < found[2] or buckets.octaves > 1


def test_data_without_a_gap_has_buckets() -> None:
    assert GapBuckets.of(np.array([np.nan, 0.0, -1.0]), 32)(np.array([np.nan, 0.0, -5.0])).tolist() == [0, 1, 1]


# ---------------------------------------------------------------------- batches
@pytest.mark.parametrize("settings", [{}, {"train_on": "prefixes"}], ids=["sequences", "prefixes"])
def test_batches_carry_exact_gaps_also_where_windows_begin(timed: Any, settings: dict[str, Any]) -> None:
    name, times = timed
    loaders = prepared(name, event_time="gap", **settings)
    data = loaders[0]._dataset
    buckets = {user: expected(data.gap_buckets, own) for user, own in times.items()}
    began_late = 0
    for loader in loaders:
        for batch in loader:
            batch = batch if loader is loaders[0] else batch[0]
            for user, n, row, items in zip(
                *(batch[field].tolist() for field in ("user_id", "item_length", GAPS, "item_id_list")), strict=True
            ):
                own = buckets[data.id2token("user_id", user)]
                assert row[n:] == [0] * (len(row) - n) == items[n:]
                starts = [i for i in range(len(own) - n + 1) if own[i : i + n] == row[:n]]
                assert starts
                began_late += starts[0] > 0
            assert torch.equal(batch[GAPS] > -1, batch["item_id_list"] > -1)  # of one shape
    assert began_late


def test_request_has_the_gap_after_beside_the_gap_before(timed: Any) -> None:
    name, times = timed
    before, after = (prepared(name, event_time=kind)[2]._dataset for kind in ("gap", "request"))
    numbers, n = after.gap_numbers, after.gap_buckets.count
    assert torch.equal(numbers % n, before.gap_numbers)
    same_user = after._events["user_id"][1:] == after._events["user_id"][:-1]
    assert torch.equal((numbers // n)[:-1], torch.where(same_user, before.gap_numbers[1:], 0))
    assert numbers[-1] < n
    assert (after.gap_buckets, len(times)) == (before.gap_buckets, len(after))


def test_the_unit_is_found_in_the_training_events(write_dataset: Callable[..., str]) -> None:
    """Each user's last gaps, validation's and test's, are the shortest."""
    rows = [(f"u{u}", f"i{n + u % 2}", t) for u in range(6) for n, t in enumerate([0, 60, 180, 420, 421, 421.5])]
    buckets = prepared(write_dataset(rows), event_time="gap")[0]._dataset.gap_buckets
    assert buckets.unit == 60


def test_no_other_model_sees_them(timed: Any) -> None:
    for model, settings in (("SASRec", {"event_time": "gap", "loss_type": "CE"}), ("RecMamba", {})):
        for loader in prepared(timed[0], model, **settings):
            for batch in loader:
                assert GAPS not in (batch if loader.__class__.__name__.endswith("TrainLoader") else batch[0])
                break


def test_a_catalogue_keeps_the_buckets(timed: Any) -> None:
    catalogue = Catalogue.of(prepared(timed[0], event_time="gap")[0]._dataset)
    assert catalogue.gap_buckets is not None
    again = Catalogue.from_plain(catalogue.plain())
    assert again.gap_buckets == catalogue.gap_buckets
    older = {name: value for name, value in catalogue.plain().items() if name != "gap_buckets"}
    assert Catalogue.from_plain(older).gap_buckets is None


# ---------------------------------------------------------------------- benchmark files
def benchmark(write_dataset: Callable[..., str], times: bool = True) -> dict[str, Any]:
    columns = ["user_id:token", "item_id_list:token_seq", "item_id:token", "timestamp:float"]
    columns += ["timestamp_list:float_seq"] if times else []
    written: dict[str, Any] = {}
    for part, shift in (("train", 0), ("valid", 1), ("test", 2)):
        rows = []
        for u in range(4):
            own = [SECONDS + x for x in (0, 1, 1, 5, 5 + 3600)][: 3 + shift]
            items = [f"i{1 + (u + n) % 5}" for n in range(len(own))]
            row = [f"u{u}", " ".join(items[:-1]), items[-1], own[-1]]
            rows.append([*row, " ".join(map(str, own[:-1]))] if times else row)
        written[f"{part}.inter"] = ("\t".join(columns), rows)
    write_dataset([], "files", **written)
    return {
        "benchmark_filename": ["train", "valid", "test"],
        "alias_of_item_id": ["item_id_list"],
        "load_col": {"inter": [column.split(":")[0] for column in columns]},
    }


def test_benchmark_files_give_the_gaps_of_their_lists(write_dataset: Callable[..., str]) -> None:
    loaders = prepared("files", event_time="gap", **benchmark(write_dataset))
    buckets = loaders[0]._dataset.gap_buckets
    assert (buckets.unit, buckets.octaves) == (1, 1)
    for loader, wanted in zip(loaders, ([0, 2], [0, 2, 1], [0, 2, 1, 4]), strict=True):
        batch = next(iter(loader))
        batch = batch if loader is loaders[0] else batch[0]
        assert {tuple(filter(None, row)) for row in batch[GAPS].tolist()} == {tuple(wanted[1:])}
        assert batch[GAPS].shape == batch["item_id_list"].shape
    last = next(iter(prepared("files", event_time="request", **benchmark(write_dataset))[2]))[0]
    assert {tuple(row[:4]) for row in last[GAPS].tolist()} == {(32 * 2, 2 + 32 * 1, 1 + 32 * 4, 4 + 32 * 13)}


def test_benchmark_files_without_times_are_refused(write_dataset: Callable[..., str]) -> None:
    with pytest.raises(ConfigError, match=r"event_time.*timestamp_list"):
        prepared("files", event_time="gap", **benchmark(write_dataset, times=False))


def test_benchmark_files_of_two_scales_are_refused(write_dataset: Callable[..., str]) -> None:
    # RecBole normalizes the times of targets and those of histories each by its own smallest and largest.
    with pytest.raises(ConfigError, match=r"event_time.*two scales"):
        prepared("files", event_time="gap", normalize_all=True, **benchmark(write_dataset))


@pytest.mark.parametrize("kind", ["gap", "request"])
def test_sampled_candidates_are_scored_with_the_gaps(timed: Any, kind: str) -> None:
    arguments = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "uni3"}
    settings = {"event_time": kind, "eval_args": arguments, "metrics": ["Hit"], "valid_metric": "Hit@3"}
    config = Config("RecMamba", timed[0], config_dict={"state": "ERROR", **COLUMNS, **SMALL, **TOP, **settings})
    trainer, _, _, test = prepare(config)
    trainer.tot_item_num, model = test.dataset.item_num, trainer.model.eval()
    torch.nn.init.normal_(model.event_time.vectors)
    histories, scores, _, _ = trainer._neg_sample_batch_eval(next(iter(test)))
    expected = model.full_sort_predict(histories)
    drawn = scores > -np.inf
    assert drawn.any(1).all()
    torch.testing.assert_close(scores[drawn], expected[drawn], rtol=1e-4, atol=1e-5)
    histories[GAPS] = torch.zeros_like(histories[GAPS])
    assert not torch.allclose(model.full_sort_predict(histories)[drawn], scores[drawn], rtol=1e-2)


def test_saved_data_without_the_gaps_are_made_anew(timed: Any) -> None:
    name, _ = timed
    prepared(name, save_dataset=True, save_dataloaders=True, checkpoint_dir="kept")
    paths = {"dataset_save_path": f"kept/{name}-SequenceDataset.pth"}
    paths["dataloaders_save_path"] = f"kept/{name}-for-RecMamba-dataloader.pth"
    for settings in (paths, {"dataset_save_path": paths["dataset_save_path"]}):
        for count in (8, 9):
            train, *_ = prepared(name, **settings, event_time="gap", event_time_buckets=count)
            assert train.dataset.gap_buckets.count == count
            assert GAPS in next(iter(train))


def test_a_time_that_is_discretized_too_has_exact_gaps(timed: Any) -> None:
    name, _ = timed
    plain = prepared(name, event_time="gap")[0].dataset
    buckets = {"timestamp": {"method": "ED", "bucket": 3}}
    other = prepared(name, event_time="gap", numerical_features=["timestamp"], discretization=buckets)[0].dataset
    assert other.gap_buckets == plain.gap_buckets
    assert torch.equal(other.gap_numbers, plain.gap_numbers)
