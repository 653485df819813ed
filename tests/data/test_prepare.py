"""Raw downloads to atomic files: every event that should be there, in order, and nothing half done."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tracemalloc
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from recbole_holo.bridge import resources
from recbole_holo.bridge.config import Config
from recbole_holo.data.loader import create_dataset, data_preparation
from recbole_holo.data.prepare import Options, Source, convert, kuairand, lfm1b
from recbole_holo.data.prepare import __main__ as command
from recbole_holo.data.prepare.conversion import Published
from recbole_holo.data.prepare.ids import CountsById, Ids, KindsById
from recbole_holo.data.prepare.partitions import Partitions
from recbole_holo.errors import ConfigError, DataError
from recbole_holo.quick_start import run

ROOT = Path(__file__).resolve().parents[2]
QUIET: dict[str, Any] = {"progress": False}
LOG_HEADER = (
    "user_id,video_id,date,hourmin,time_ms,is_click,is_like,is_follow,is_comment,is_forward,is_hate,long_view,"
    "play_time_ms,duration_ms,profile_stay_time,comment_stay_time,is_profile_enter,is_rand,tab"
)
START = 1_649_340_000_000  # milliseconds
Event = tuple[int, int, int]  # raw user, raw item, raw time


# ---------------------------------------------------------------------- raw data in the original formats
def log_line(user: int, video: int, time: int, click: Any = 1, long_view: Any = 0) -> str:
    return f"{user},{video},20220408,1200,{time},{click},0,0,0,0,0,{long_view},5000,10000,0,0,0,0,1"


def write_log(path: Path, lines: Iterable[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([LOG_HEADER, *lines]) + "\n", encoding="utf-8")


def write_kuairand(folder: Path, version: str, events: Sequence[str]) -> Path:
    """The version's logs in ``folder/data``, the events dealt out to them in turn."""
    names = [name for kind in (kuairand.STANDARD, kuairand.RANDOM) for name in kuairand._LOGS[version][kind]]
    for i, name in enumerate(names):
        write_log(folder / "data" / name, events[i :: len(names)])
    return folder


def write_lfm(folder: Path, events: Iterable[Sequence[Any]]) -> Path:
    """Events of (user, track, time); every track is of album track + 1 and artist track + 2."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{user}\t{track + 2}\t{track + 1}\t{track}\t{time}\n" for user, track, time in events]
    (folder / lfm1b.EVENTS).write_text("".join(lines), encoding="utf-8")
    return folder


def many_events(n: int = 600, users: int = 25, items: int = 60, seed: int = 0) -> list[Event]:
    """Skewed and unsorted, with ties of time, immediate and later repeats; ids begin with 0 and have wide gaps."""
    rng = np.random.default_rng(seed)
    user = (rng.random(n) ** 2 * users).astype(int) * 7
    item = (rng.random(n) ** 3 * items).astype(int) ** 2 * 1000
    time = 1_200_000_000 + rng.integers(0, 40, n) * 30
    return list(zip(user.tolist(), item.tolist(), time.tolist(), strict=True))


def read_back(folder: Path, name: str) -> list[Event]:
    """The events of the atomic files with raw ids, in their order."""

    def rows(suffix: str) -> list[list[str]]:
        text = (folder / name / f"{name}.{suffix}").read_text(encoding="utf-8")
        return [line.split("\t") for line in text.split("\n")[1:-1]]

    user, item = ({row[0]: int(row[1]) for row in rows(suffix)} for suffix in ("user", "item"))
    return [(user[u], item[i], int(time)) for u, i, time in rows("inter")]


# ---------------------------------------------------------------------- the same, one event at a time
def oracle(
    events: list[Event], k_core: int = 0, min_history: int = 0, deduplicate: str = "none", unit: int = 60
) -> list[Event]:
    start = min(time for _, _, time in events)
    events = sorted(events, key=lambda event: (event[0], event[2]))  # stable

    def least(least_user: int, least_item: int) -> None:
        nonlocal events
        while True:
            users, items = Counter(e[0] for e in events), Counter(e[1] for e in events)
            left = [e for e in events if users[e[0]] >= least_user and items[e[1]] >= least_item]
            if left == events:
                return
            events = left

    least(min_history, 0)
    if deduplicate == "consecutive":
        events = [e for i, e in enumerate(events) if i == 0 or events[i - 1][:2] != e[:2]]
    elif deduplicate == "first":
        seen: set[tuple[int, int]] = set()
        events = [e for e in events if not (e[:2] in seen or seen.add(e[:2]))]  # type: ignore[func-returns-value]
    least(min_history, 0)
    least(max(k_core, min_history) if k_core else 0, k_core)
    return [(user, item, (time - start) // unit) for user, item, time in events]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"k_core": 5},
        {"min_history": 20},
        {"k_core": 8, "min_history": 20},
        {"deduplicate": "consecutive"},
        {"deduplicate": "first", "min_history": 10},
        {"deduplicate": "first", "k_core": 4, "min_history": 9},
    ],
    ids=str,
)
def test_equals_the_same_done_one_event_at_a_time(options: dict[str, Any], tmp_path: Path) -> None:
    events = many_events()
    raw = write_lfm(tmp_path / "raw", events)
    expected = oracle(events, **options)
    assert len(expected) > 0
    assert not options or len(expected) < len(events)

    report = convert(lfm1b.source(raw), tmp_path / "out", Options(**options, **QUIET))
    assert read_back(tmp_path / "out", "lfm-1b") == expected
    last = report.steps[-1]
    assert (last.users, last.items, last.events) == (
        len({e[0] for e in expected}),
        len({e[1] for e in expected}),
        len(expected),
    )
    assert report.longest == max(Counter(e[0] for e in expected).values())


@pytest.mark.parametrize("options", [{}, {"k_core": 4, "deduplicate": "first"}, {"max_users": 5}], ids=str)
def test_blocks_and_parts_do_not_show_in_the_result(options: dict[str, Any], tmp_path: Path) -> None:
    raw = write_lfm(tmp_path / "raw", many_events())
    (raw / "LFM-1b_tracks.txt").write_text("".join(f"{i * i * 1000}\tSong {i}\t{i % 9}\n" for i in range(0, 60, 5)))
    small = {"block_bytes": 50, "part_events": 7, "chunk_rows": 3}
    convert(lfm1b.source(raw), tmp_path / "large", Options(**options, **QUIET))
    convert(lfm1b.source(raw), tmp_path / "small", Options(**options, **QUIET, **small))
    for suffix in ("inter", "user", "item"):
        large, little = ((tmp_path / size / "lfm-1b" / f"lfm-1b.{suffix}").read_bytes() for size in ("large", "small"))
        assert large == little
        assert large.count(b"\n") > 5


def test_the_core_is_a_fixpoint_that_needs_many_passes(tmp_path: Path) -> None:
    """A chain that unravels from one end, user by item by user, beside a square that is its own core."""
    chain = [(user, item, 0) for user in range(10) for item in (user, user + 1)]
    square = [(user, item, 0) for user in (100, 101) for item in (200, 201)]
    raw = write_lfm(tmp_path / "raw", chain + square)
    report = convert(lfm1b.source(raw), tmp_path / "out", Options(k_core=2, **QUIET))
    assert read_back(tmp_path / "out", "lfm-1b") == square
    assert report.steps[-1].events == 4


# ---------------------------------------------------------------------- KuaiRand
def test_all_logs_are_read_and_a_click_is_a_number(tmp_path: Path) -> None:
    """A text is true when it is not empty, so "0" would pass as a click."""
    lines = [
        log_line(user, 10 * user + n, START + 1000 * n, click) for user in range(4) for n, click in enumerate("0101")
    ]
    raw = write_kuairand(tmp_path / "raw", "27k", lines)
    source = kuairand.source(raw)
    assert [log.path.name for log in source.logs] == [
        "log_standard_4_08_to_4_21_27k_part1.csv",
        "log_standard_4_08_to_4_21_27k_part2.csv",
        "log_standard_4_22_to_5_08_27k_part1.csv",
        "log_standard_4_22_to_5_08_27k_part2.csv",
        "log_random_4_22_to_5_08_27k.csv",
    ]
    convert(source, tmp_path / "out", Options(**QUIET))
    clicks = [(user, 10 * user + n, n - 1) for user in range(4) for n in (1, 3)]  # the first click is at second 1
    assert read_back(tmp_path / "out", "kuairand-27k") == clicks


@pytest.mark.parametrize(
    ("keep", "logs", "expected"),
    [
        ("clicked", "all", {1, 3, 5}),
        ("long_view", "all", {2, 3, 5}),
        ("all", "all", {0, 1, 2, 3, 4, 5}),
        ("all", "standard", {0, 1, 2, 3}),
        ("clicked", "random", {5}),
    ],
)
def test_kinds_of_event_and_log(keep: str, logs: str, expected: set[int], tmp_path: Path) -> None:
    flags = [(0, 0), (1, 0), ("0.0", "1.0"), (1, 1), (0, 0), ("1.0", 1)]  # "0.0": a program that wrote floats
    lines = [log_line(1, video, START + video, click, view) for video, (click, view) in enumerate(flags)]
    for name, part in zip(
        ("log_standard_4_08_to_4_21", "log_standard_4_22_to_5_08"), (lines[:2], lines[2:4]), strict=True
    ):
        write_log(tmp_path / f"{name}_1k.csv", part)
    write_log(tmp_path / "log_random_4_22_to_5_08_1k.csv", lines[4:])
    convert(kuairand.source(tmp_path, logs=logs, keep=keep), tmp_path / "out", Options(**QUIET))
    assert {item for _, item, _ in read_back(tmp_path / "out", "kuairand-1k")} == expected


def test_kuairand_is_found_in_the_archive_or_its_data_folder(tmp_path: Path) -> None:
    raw = write_kuairand(tmp_path / "KuaiRand-1K", "1k", [log_line(1, i, START) for i in range(6)])
    assert kuairand.source(raw).logs == kuairand.source(raw / "data").logs
    write_kuairand(raw, "pure", [log_line(1, i, START) for i in range(6)])
    with pytest.raises(DataError, match=r"several versions of KuaiRand.*1k in .*pure in .*name one"):
        kuairand.source(raw)
    assert kuairand.source(raw, version="pure").name == "kuairand-pure"


def test_absent_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"no logs of KuaiRand-27K.*log_standard_4_08_to_4_21_27k_part1.csv, .*log_random"
    ):
        kuairand.source(tmp_path)
    raw = write_kuairand(tmp_path / "raw", "27k", [log_line(1, i, START) for i in range(6)])
    (raw / "data/log_standard_4_22_to_5_08_27k_part2.csv").unlink()
    (raw / "data/log_random_4_22_to_5_08_27k.csv").unlink()
    lacking = "lacks log_standard_4_22_to_5_08_27k_part2.csv, log_random_4_22_to_5_08_27k.csv: .*KuaiRand-27K"
    with pytest.raises(DataError, match=lacking):
        kuairand.source(raw)
    with pytest.raises(DataError, match=r"LFM-1b_LEs.txt is not there.*Schedl"):
        lfm1b.source(tmp_path)


# ---------------------------------------------------------------------- order, time, repeats, users
def test_ties_keep_the_order_of_the_files(tmp_path: Path) -> None:
    videos = [9, 3, 7, 1, 8, 2, 6, 4, 5, 0]
    lines = [log_line(5, video, START) for video in videos]
    for i, name in enumerate(kuairand._LOGS["27k"][kuairand.STANDARD] + kuairand._LOGS["27k"][kuairand.RANDOM]):
        write_log(tmp_path / name, lines[2 * i : 2 * i + 2])
    convert(kuairand.source(tmp_path), tmp_path / "out", Options(**QUIET, block_bytes=10))
    assert [item for _, item, _ in read_back(tmp_path / "out", "kuairand-27k")] == videos


def test_times_are_whole_units_and_events_within_one_keep_their_order(tmp_path: Path) -> None:
    events = [(1, 10, 1_300_000_059), (1, 11, 1_300_000_000), (1, 12, 1_300_000_061), (1, 13, 1_300_000_030)]
    convert(lfm1b.source(write_lfm(tmp_path / "raw", events)), tmp_path / "out", Options(**QUIET))
    assert read_back(tmp_path / "out", "lfm-1b") == [(1, 11, 0), (1, 13, 0), (1, 10, 0), (1, 12, 1)]


def test_a_clock_that_is_wrong_is_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ten_years = [(1, 1, 1_100_000_000), (1, 2, 1_400_000_000)]
    convert(lfm1b.source(write_lfm(tmp_path / "raw", ten_years)), tmp_path / "out", Options(**QUIET))
    assert "float32" not in caplog.text
    since_1970 = [(1, 1, 0), (1, 2, 1_400_000_000)]
    convert(lfm1b.source(write_lfm(tmp_path / "raw", since_1970)), tmp_path / "out2", Options(**QUIET))
    assert "16,777,216 minutes after the first (1970-01-01" in caplog.text


@pytest.mark.parametrize(("deduplicate", "expected"), [("none", "AABBAAC"), ("consecutive", "ABAC"), ("first", "ABC")])
def test_repeats(deduplicate: str, expected: str, tmp_path: Path) -> None:
    other = [(2, ord("A"), 0), (2, ord("C"), 1), (2, ord("C"), 2)]  # user 2 begins with what user 1 ended with
    history = [(1, ord(letter), time) for time, letter in enumerate("AABBAAC")]
    raw = write_lfm(tmp_path / "raw", [*other, *history])
    convert(lfm1b.source(raw), tmp_path / "out", Options(deduplicate=deduplicate, **QUIET))
    found = defaultdict(str)
    for user, item, _ in read_back(tmp_path / "out", "lfm-1b"):
        found[user] += chr(item)
    assert found == {1: expected, 2: "ACC" if deduplicate == "none" else "AC"}


def test_a_draw_of_users_is_seeded_and_keeps_whole_histories(tmp_path: Path) -> None:
    events = many_events()
    raw = write_lfm(tmp_path / "raw", events)
    draws = []
    for folder, seed in (("a", 1), ("b", 1), ("c", 2)):
        report = convert(lfm1b.source(raw), tmp_path / folder, Options(max_users=6, min_history=15, seed=seed, **QUIET))
        assert [step.users for step in report.steps][-1] == 6
        draws.append(read_back(tmp_path / folder, "lfm-1b"))
    assert draws[0] == draws[1]
    users = [{user for user, _, _ in draw} for draw in draws]
    assert users[0] != users[2]
    for draw, chosen in zip(draws, users, strict=True):
        assert [(u, i) for u, i, _ in draw] == [(u, i) for u, i, _ in oracle(events) if u in chosen]
        assert min(Counter(u for u, _, _ in draw).values()) >= 15


@pytest.mark.parametrize(
    ("field", "value"),
    [("k_core", -1), ("max_users", 0), ("deduplicate", "frist"), ("name", "a/b"), ("name", ".hidden"), ("name", "")],
)
def test_options_out_of_range_are_named(field: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"{field}: {value!r} cannot be used"):
        Options(**{field: value})
    for wrong in ({"keep": "click"}, {"logs": "both"}, {"version": "27K"}):
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))}: "):
            kuairand.source("anywhere", **wrong)
    with pytest.raises(ConfigError, match=r"item: 'song'.*track"):
        lfm1b.source("anywhere", item="song")


def test_nothing_left_is_an_error(tmp_path: Path) -> None:
    raw = write_lfm(tmp_path / "raw", [(1, 1, 0), (2, 2, 0)])
    with pytest.raises(DataError, match=r"LFM-1b: no event is left \(5-core\)"):
        convert(lfm1b.source(raw), tmp_path / "out", Options(k_core=5, **QUIET))
    with pytest.raises(DataError, match=r"no event is left \(users with 5\+ events\)"):
        convert(lfm1b.source(raw), tmp_path / "out", Options(min_history=5, **QUIET))
    unclicked = write_kuairand(tmp_path / "kuai", "1k", [log_line(1, i, START, click=0) for i in range(5)])
    with pytest.raises(DataError, match=r"KuaiRand-1K: no event is left \(is_click is not 0\)"):
        convert(kuairand.source(unclicked), tmp_path / "out", Options(**QUIET))


# ---------------------------------------------------------------------- broken files
GOOD = "7\t3\t2\t1\t1300000000\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD * 5 + "7\t3\t2\t1\t13000", r"line 6: the last line is not finished: '7\\t3\\t2\\t1\\t13000'.*cut"),
        (GOOD * 5 + "7\t3\t2\t1\n" + GOOD, r"line 6: 4 columns instead of 5 \(user_id, .*timestamp\): '7\\t3\\t2\\t1'"),
        (GOOD * 5 + "7\t3\t2\t1\t5\t6\n", r"line 6: 6 columns instead of 5"),
        (GOOD + "\n" + "x7\t3\t2\t1\t5\n" + GOOD, r"line 3: user_id is not a whole number: 'x7"),
        (GOOD + "7\t3\t2\t1\t1.5\n", r"line 2: timestamp is not a whole number"),
        (GOOD + "7\t3\t2\t1\t99999999999999999999\n", r"line 2: timestamp is not a whole number"),
        (GOOD + "7\t3\t2\t1\t1300000000000\n", r"line 2: timestamp is above 4,102,444,800"),
        (GOOD + "7\t3\t2\t-\t5\n", r"line 2: track_id is not a whole number"),
        (GOOD + "\t3\t2\t1\t5\n", r"line 2: user_id is missing"),
        (GOOD + "-7\t3\t2\t1\t5\n", r"line 2: user_id is negative"),
        (GOOD + "7\t3\t2\t987654321\t5\n", r"line 2: track_id is above 268,435,455"),
        ("", r"LEs.txt is empty"),
    ],
)
@pytest.mark.parametrize("block_bytes", [1, 1 << 20])
def test_broken_lines_are_named(text: str, message: str, block_bytes: int, tmp_path: Path) -> None:
    (tmp_path / lfm1b.EVENTS).write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=message):
        convert(lfm1b.source(tmp_path), tmp_path / "out", Options(**QUIET, block_bytes=block_bytes))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("start", "message"),
    [(b"\x1f\x8b", "compressed by gzip"), (b"PK\x03\x04", "zip archive"), ("\ufeff7\t".encode("utf-16-le"), "UTF-16")],
)
def test_files_that_are_no_text_are_recognised(start: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / lfm1b.EVENTS).write_bytes(start + b"...\n")
    with pytest.raises(DataError, match=message):
        convert(lfm1b.source(tmp_path), tmp_path / "out", Options(**QUIET))


def test_a_log_cut_short_is_recognised(tmp_path: Path) -> None:
    raw = write_kuairand(tmp_path / "raw", "1k", [log_line(1, i, START) for i in range(9)])
    path = raw / "data/log_standard_4_22_to_5_08_1k.csv"
    whole = path.read_bytes()
    path.write_bytes(whole[:-30])
    with pytest.raises(DataError, match=r"4_22_to_5_08_1k.csv, line 4: the last line is not finished: '1,7,20220408"):
        convert(kuairand.source(raw), tmp_path / "out", Options(**QUIET))
    path.write_bytes(whole.replace(b"is_click", b"is_clicked"))
    with pytest.raises(DataError, match=r"4_22_to_5_08_1k.csv, line 1: no column 'is_click'.*is_clicked"):
        convert(kuairand.source(raw), tmp_path / "out", Options(**QUIET))


def test_blank_lines_other_line_ends_a_byte_order_mark_and_other_column_orders(tmp_path: Path) -> None:
    text = "\ufeff7\t3\t2\t1\t60\r\n\r\n7\t3\t2\t5\t120\r\n\n"
    (tmp_path / lfm1b.EVENTS).write_bytes(text.encode())
    convert(lfm1b.source(tmp_path), tmp_path / "out", Options(**QUIET))
    assert read_back(tmp_path / "out", "lfm-1b") == [(7, 1, 0), (7, 5, 1)]

    for name in kuairand._LOGS["1k"][kuairand.STANDARD]:
        (tmp_path / name).write_bytes("\ufeffis_click,time_ms,more,video_id,user_id\r\n1,5,x,30,40\r\n".encode())
    convert(kuairand.source(tmp_path, logs="standard"), tmp_path / "out", Options(**QUIET))
    assert read_back(tmp_path / "out", "kuairand-1k") == [(40, 30, 0)] * 2


def test_events_without_an_item_are_left_out_and_counted(tmp_path: Path) -> None:
    lines = ["1\t1\t-1\t1\t60", "1\t1\t\t2\t120", "1\t1\t4\t3\t180", "1\t1\t5\t4\t240"]
    (tmp_path / lfm1b.EVENTS).write_text("\n".join(lines) + "\n", encoding="utf-8")
    report = convert(lfm1b.source(tmp_path, item="album"), tmp_path / "out", Options(**QUIET))
    assert read_back(tmp_path / "out", "lfm-1b-album") == [(1, 4, 0), (1, 5, 1)]
    assert [(step.what, step.events) for step in report.steps] == [("in the raw data", 4), ("album_id is known", 2)]


# ---------------------------------------------------------------------- published counts
def test_counts_other_than_the_published_ones(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [log_line(user, video, START, click=0) for user in range(3) for video in range(4)]
    lines[0] = log_line(0, 0, START, click=1)
    raw = write_kuairand(tmp_path / "raw", "1k", lines)  # 8 events in the standard logs, 4 in the random one
    (raw / "data/user_features_1k.csv").write_text("user_id\n")
    (raw / "data/video_features_basic_1k.csv").write_text("video_id\n")
    with pytest.raises(
        DataError, match=r"KuaiRand-1K is not as published.*standard logs: 8 events found, 11,713,045 pub"
    ):
        convert(kuairand.source(raw), tmp_path / "out", Options(strict=True, **QUIET))
    assert not (tmp_path / "out").exists()
    report = convert(kuairand.source(raw), tmp_path / "out", Options(**QUIET))
    assert "random logs: 4 events found, 43,028 published" in caplog.text
    assert "random logs: 4 events found, 43,028 published" in report.mismatches

    caplog.clear()
    right = {
        "standard": Published(events=(8,), users=(3,)),
        "random": Published(events=(4,)),
        "all": Published(users=(3,), items=(5, 4), events=(12,)),
    }
    monkeypatch.setitem(kuairand._PUBLISHED, "1k", right)
    strict = Options(strict=True, **QUIET)
    assert convert(kuairand.source(raw), tmp_path / "out2", strict).mismatches == []
    assert "published" not in caplog.text
    convert(kuairand.source(raw, logs="standard"), tmp_path / "out3", strict)  # "all" is not compared with a part


# ---------------------------------------------------------------------- the output folder
def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_an_interruption_leaves_nothing_or_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = lfm1b.source(write_lfm(tmp_path / "raw", many_events(50)))
    out = tmp_path / "a" / "b"

    def interrupted(*args: Any, **kwargs: Any) -> None:
        assert list(out.glob(".lfm-1b-*/part-*"))  # work was under way
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("recbole_holo.data.prepare.conversion.write_table", interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert(source, out, Options(**QUIET))
        assert not (tmp_path / "a").exists()
    convert(source, out, Options(**QUIET))
    before = files_in(out)
    assert set(before) == {f"lfm-1b/lfm-1b.{suffix}" for suffix in ("inter", "item", "user", "json")}
    overwrite = Options(overwrite=True, k_core=2, **QUIET)
    with monkeypatch.context() as patch:
        patch.setattr("recbole_holo.data.prepare.conversion.write_table", interrupted)
        with pytest.raises(KeyboardInterrupt):
            convert(source, out, overwrite)
    assert files_in(out) == before

    rename = Path.rename

    def broken(path: Path, target: Path) -> Path:
        if path.name == "new":
            raise KeyboardInterrupt
        return rename(path, target)

    with monkeypatch.context() as patch:  # between the two renames
        patch.setattr(Path, "rename", broken)
        with pytest.raises(KeyboardInterrupt):
            convert(source, out, overwrite)
    assert files_in(out) == before


def test_an_existing_data_set_is_replaced_only_when_told_to(tmp_path: Path) -> None:
    source = lfm1b.source(write_lfm(tmp_path / "raw", many_events()))
    convert(source, tmp_path / "out", Options(**QUIET))
    with pytest.raises(DataError, match=r"out/lfm-1b exists .*lfm-1b.inter.*overwrite"):
        convert(source, tmp_path / "out", Options(k_core=5, **QUIET))
    convert(source, tmp_path / "out", Options(k_core=5, overwrite=True, **QUIET))
    assert read_back(tmp_path / "out", "lfm-1b") == oracle(many_events(), k_core=5)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["lfm-1b"]

    (tmp_path / "out" / "lfm-1b" / "notes.txt").write_text("mine")
    with pytest.raises(DataError, match=r"other files than lfm-1b's \(notes.txt\)"):
        convert(source, tmp_path / "out", Options(overwrite=True, **QUIET))
    convert(source, tmp_path / "out", Options(name="mine", **QUIET))
    assert (tmp_path / "out" / "mine" / "mine.inter").is_file()
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written to"):
        convert(source, tmp_path / "file" / "below", Options(**QUIET))


def test_a_full_disk_is_noticed_before_events_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = lfm1b.source(write_lfm(tmp_path / "raw", many_events()))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**9, 10**9, 10**4))
    with pytest.raises(DataError, match=r"600 events need about .* GB"):
        convert(source, tmp_path / "out", Options(**QUIET))
    assert not (tmp_path / "out").exists()


def test_what_was_done_is_written_down(tmp_path: Path) -> None:
    raw = write_kuairand(tmp_path / "raw", "1k", [log_line(1, i, START + i) for i in range(6)])
    report = convert(kuairand.source(raw), tmp_path / "out", Options(max_users=9, **QUIET))
    done = json.loads((tmp_path / "out/kuairand-1k/kuairand-1k.json").read_text())
    assert done["source"] == "KuaiRand-1K"
    assert done["options"]["max_users"] == 9
    assert done["first_event"] == "2022-04-07T14:00:00.000+00:00"
    assert set(done["logs"]) == {log.path.name for log in kuairand.source(raw).logs}
    assert done["steps"][-1] == {"what": "is_click is not 0", "users": 1, "items": 6, "events": 6}
    for text in (
        "is_click is not 0",
        "removed",
        "longest history",
        "mean history",
        "density",
        "seconds since 2022-04-07",
    ):
        assert text in str(report)


# ---------------------------------------------------------------------- memory
def test_counts_grow_with_the_ids() -> None:
    counts, kinds = CountsById(), KindsById(["a", "b"])
    for ids in ([3, 3, 5], [200_000, 3], [], [4_000_000]):
        counts.add(np.array(ids, dtype=np.int64))
        kinds.add(np.array(ids, dtype=np.int64), "a" if 5 in ids else "b")
    found = Ids.of(counts)
    assert found.ids.tolist() == [3, 5, 200_000, 4_000_000]
    assert found.events.tolist() == [3, 1, 1, 1]
    assert (kinds.count("a"), kinds.count("b"), kinds.count()) == (2, 3, 4)
    numbers = found.chosen(np.array([1, 3])).numbers()
    assert numbers[[5, 4_000_000]].tolist() == [0, 1]
    assert (numbers >= 0).sum() == 2


def test_parts_are_small_and_hold_whole_users(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    user = rng.integers(0, 50, 5000)
    user[:800] = 13  # more than fits a part
    parts = Partitions(tmp_path, np.bincount(user), 1, lambda what, size: pytest.fail(what), part_events=500)
    for events in np.array_split(np.arange(5000), 7):
        parts.append(user[events], np.zeros(len(events), int), events)
    users_of_part = []
    for path in tmp_path.iterdir():
        events = np.fromfile(path, dtype=[("user", "i4"), ("item", "i4"), ("time", "i8")])
        users_of_part.append(set(events["user"].tolist()))
        assert len(events) < 500 + np.bincount(user)[events["user"]].max()
        for one in users_of_part[-1]:
            assert (events["time"][events["user"] == one] == np.flatnonzero(user == one)).all()
    assert sum(map(len, users_of_part)) == len(set().union(*users_of_part)) == 50
    assert len(users_of_part) >= 8


def test_memory_does_not_grow_with_the_events(tmp_path: Path) -> None:
    block = "".join(f"{u}\t1\t1\t{u * 31 % 4000}\t{1_300_000_000 + u}\n" for u in range(2000))
    options = Options(k_core=2, block_bytes=1 << 16, part_events=1 << 13, **QUIET)
    peaks = []
    for n in (20, 20, 160):  # 40,000 and 320,000 events; the first run compiles
        raw = tmp_path / f"raw{n}"
        raw.mkdir(exist_ok=True)
        (raw / lfm1b.EVENTS).write_text(block * n)
        tracemalloc.start()
        convert(lfm1b.source(raw), tmp_path / f"out{len(peaks)}", options)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[2] < 1.2 * peaks[1]


# ---------------------------------------------------------------------- tables
@pytest.mark.parametrize("chunk_rows", [1, 1000])
def test_video_and_user_features(chunk_rows: int, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    raw = write_kuairand(tmp_path / "raw", "1k", [log_line(u, v, START) for u in range(3) for v in range(5)])
    (raw / "data/video_features_basic_1k.csv").write_text(
        "video_id,author_id,video_type,upload_dt,upload_type,visible_status,video_duration,server_width,server_height,"
        "music_id,music_type,tag\n"
        '4,70,NORMAL,2022-01-01,ShortImport,1,17200.0,720,1280,989206467.0,4.0,"12,65"\n'
        "0,71.0,AD,2022-01-02,UNKNOWN,1,,0,0,,,\n"
        "2,72,NORMAL,2022-01-03,Web,1,1000.0,1,1,5,9.0,34\n"
        "2,99,NORMAL,2022-01-03,Web,1,1000.0,1,1,5,9.0,34\n"  # once more
        "77,73,NORMAL,2022-01-03,Web,1,1000.0,1,1,5,9.0,34\n"  # in no log
        "1,73,NORMAL,2022-01-03,Web,1,1000.0,1,1,5,9.0,34,1\n"  # a column too many
    )
    (raw / "data/user_features_1k.csv").write_text(
        "user_id,user_active_degree,follow_user_num\n2,full_active,5\n1,UNKNOWN,0\n"
    )
    convert(kuairand.source(raw), tmp_path / "out", Options(chunk_rows=chunk_rows, **QUIET))
    items = (tmp_path / "out/kuairand-1k/kuairand-1k.item").read_text().split("\n")
    assert items[0].split("\t") == [
        *("item_id:token", "raw_item_id:token", "author_id:token", "video_type:token", "upload_dt:token"),
        *("upload_type:token", "video_duration:float", "server_width:float", "server_height:float"),
        *("music_id:token", "music_type:token", "tag:token_seq"),
    ]
    assert items[1:] == [
        "5\t4\t70\tNORMAL\t2022-01-01\tShortImport\t17.2\t720\t1280\t989206467\t4\t12 65",
        "1\t0\t71\tAD\t2022-01-02\t\t\t\t\t\t\t",
        "3\t2\t72\tNORMAL\t2022-01-03\tWeb\t1\t1\t1\t5\t9\t34",
        "2\t1" + "\t" * 10,
        "4\t3" + "\t" * 10,
        "",
    ]
    assert "1 of 7 lines are broken" in caplog.text
    assert "has no row for 2 of the 5 items" in caplog.text
    users = (tmp_path / "out/kuairand-1k/kuairand-1k.user").read_text().split("\n")
    header = "user_id:token\traw_user_id:token\tuser_active_degree:token\tfollow_user_num:float"
    assert users == [header, "3\t2\tfull_active\t5", "2\t1\t\t0", "1\t0\t\t", ""]
    assert "user_features_1k.csv has no column is_lowactive_period" in caplog.text


def test_tracks_and_listeners(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    raw = write_lfm(tmp_path / "raw", [(user, track, 0) for user in (8, 9, 30_000_000) for track in range(1, 8)])
    (raw / "LFM-1b_tracks.txt").write_bytes(
        b'1\t"Heroes"\t500\n'
        b"2\tCaf\xc3\xa9  del \rMar\t501\n"
        b"3\tlatin \xe9\t502\n"  # not UTF-8
        b"4\ta tab\tinside\t503\n"
        b"x5\tno number\t504\n"
        b'6\t"open\t505\n'
        b"7\n"
    )
    (raw / "LFM-1b_users.txt").write_text(
        "user_id\tcountry\tage\tgender\tplaycount\tregistered_unixtime\n"
        "8\tNA\t-1\tn\t123\t1035849600\n9\t\t33\tf\t\t\n30000000\tUS\t0\tm\t20000\t0\n"
    )
    convert(lfm1b.source(raw), tmp_path / "out", Options(**QUIET))
    assert (tmp_path / "out/lfm-1b/lfm-1b.item").read_text(encoding="utf-8").split("\n") == [
        "item_id:token\traw_item_id:token\tname:token_seq\tartist_id:token",
        "1\t1\t'Heroes'\t500",
        "2\t2\tCafé del Mar\t501",
        "3\t3\tlatin �\t502",
        "6\t6\t'open\t505",
        "7\t7\t\t",
        "4\t4\t\t",
        "5\t5\t\t",
        "",
    ]
    assert "LFM-1b_tracks.txt: 2 of 7 lines are broken" in caplog.text
    assert (tmp_path / "out/lfm-1b/lfm-1b.user").read_text().split("\n") == [
        "user_id:token\traw_user_id:token\tcountry:token\tage:float\tgender:token\tplaycount:float\tregistered_day:float",
        "1\t8\tna\t\t\t123\t11989",
        "2\t9\t\t33\tf\t\t",
        "3\t30000000\tus\t\tm\t20000\t",
        "",
    ]
    (raw / "LFM-1b_users.txt").write_text("id\tcountry\n8\tNA\n")
    with pytest.raises(DataError, match=r"LFM-1b_users.txt, line 1: no column 'user_id' among id, country"):
        convert(lfm1b.source(raw), tmp_path / "out2", Options(**QUIET))


def test_absent_tables_are_reported_and_raw_ids_remain(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    raw = write_lfm(tmp_path / "raw", [(8, 0, 0), (9, 7, 0)])
    convert(lfm1b.source(raw, item="artist"), tmp_path / "out", Options(**QUIET))
    assert "LFM-1b_users.txt, " in caplog.text
    assert "LFM-1b_artists.txt: not there" in caplog.text
    with pytest.raises(DataError, match=r"LFM-1b_users.txt, .*LFM-1b_artists.txt: not there; unpack all of LFM-1b"):
        convert(lfm1b.source(raw, item="artist"), tmp_path / "out2", Options(strict=True, **QUIET))
    items = (tmp_path / "out/lfm-1b-artist/lfm-1b-artist.item").read_text()
    assert items == "item_id:token\traw_item_id:token\n1\t2\n2\t9\n"


# ---------------------------------------------------------------------- the package reads what was written
def kuairand_1k(folder: Path, convert_to: str = "dataset") -> list[Event]:
    """12 users who walk around 15 videos, as raw data and, converted, in ``dataset/``; ids begin with 0."""
    events = [(user, (user + 2 * step) % 15, START + 700 * step) for user in range(12) for step in range(8 + user)]
    raw = write_kuairand(folder / "raw", "1k", [log_line(*event) for event in events])
    tags = [f'{video},7,NORMAL,2022-01-01,Web,1,1000,1,1,1,1,"{video % 3},{video % 2}"' for video in range(1, 15)]
    header = "video_id,author_id,video_type,upload_dt,upload_type,visible_status,video_duration,server_width,"
    header += "server_height,music_id,music_type,tag"
    (raw / "data/video_features_basic_1k.csv").write_text("\n".join([header, *tags]) + "\n")
    convert(kuairand.source(raw), convert_to, Options(**QUIET))
    return events


def test_no_raw_id_becomes_the_pad(tmp_path: Path, tiny: dict[str, Any]) -> None:
    events = kuairand_1k(tmp_path)
    config = Config("RecMamba", "kuairand-1k", config_dict={**tiny, "MAX_ITEM_LIST_LENGTH": 50})
    dataset = create_dataset(config)
    assert (dataset.user_num, dataset.item_num) == (13, 16)  # 12 and 15, and the pad of each
    raw_item = dict(
        line.split("\t")[:2] for line in Path("dataset/kuairand-1k/kuairand-1k.item").read_text().split("\n")[1:-1]
    )
    raw_user = dict(
        line.split("\t")[:2] for line in Path("dataset/kuairand-1k/kuairand-1k.user").read_text().split("\n")[1:-1]
    )
    _, _, test = data_preparation(config, dataset)
    rows = test.dataset[slice(None)]
    assert len(rows) == 12
    for user, history, length, target in zip(
        rows["user_id"].tolist(),
        rows["item_id_list"].tolist(),
        rows["item_length"].tolist(),
        rows["item_id"].tolist(),
        strict=True,
    ):
        ids = [*history[:length], target]
        assert 0 not in ids
        raw = int(raw_user[dataset.id2token("user_id", user)])
        found = [int(raw_item[dataset.id2token("item_id", i)]) for i in ids]
        assert found == [item for u, item, _ in events if u == raw]


@pytest.mark.parametrize("protocol", ["full", "uni1000"])
def test_models_train_on_the_result(protocol: str, tmp_path: Path, tiny: dict[str, Any]) -> None:
    kuairand_1k(tmp_path)
    files = [ROOT / "dataset_configs" / "kuairand-1k_uni1000.yaml"] if protocol == "uni1000" else []
    settings = {k: v for k, v in tiny.items() if k not in ("metrics", "topk", "valid_metric", "load_col")}
    short = {"topk": [3], "valid_metric": "Hit@3"}
    for model in ("RecMamba", "HoloMambaRec"):
        result = run(model, "kuairand-1k", files, config_dict={**settings, **short, "epochs": 1}, saved=False)
        assert 0 <= result["test_result"]["hit@3"] <= 1
        assert result["report"]["config"]["eval_args"]["mode"]["test"] == protocol


# ---------------------------------------------------------------------- settings of the data sets
SETS = [f"kuairand-{version}" for version in kuairand.VERSIONS] + [item.name for item in lfm1b.ITEMS.values()]


@pytest.mark.parametrize("name", SETS)
def test_every_data_set_has_settings(name: str) -> None:
    config = Config("RecMamba", name, config_dict={"state": "ERROR"})
    assert config["load_col"]["inter"] == ["user_id", "item_id", "timestamp"]
    assert config["MAX_ITEM_LIST_LENGTH"] == (50 if name == "kuairand-pure" else 2000)
    assert config["eval_args"]["mode"] == {"valid": "full", "test": "full"}
    fields = {column.field.partition(":")[0] for column in _item_columns(name)}
    chosen = yaml.safe_load(resources.dataset_config(name).read_text())["item_attributes"]
    assert set(chosen) <= fields


@pytest.mark.parametrize("name", ["kuairand-27k", "kuairand-1k", "lfm-1b"])
def test_the_papers_protocol_is_a_config_file(name: str) -> None:
    theirs = Config("RecMamba", name, ["RecMamba_paper"], {"state": "ERROR"})
    ours = Config("RecMamba", name, [resources.dataset_config(f"{name}_uni1000")], {"state": "ERROR"})
    assert ours["eval_args"]["mode"] == {"valid": "uni1000", "test": "uni1000"}
    for key in ("eval_args", "metrics", "topk", "valid_metric", "train_windows", "MAX_ITEM_LIST_LENGTH"):
        assert ours[key] == theirs[key], key


def _item_columns(name: str) -> Any:
    if name.startswith("kuairand"):
        return kuairand._VIDEO_COLUMNS
    return next(item.columns for item in lfm1b.ITEMS.values() if item.name == name)


# ---------------------------------------------------------------------- the command
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = write_kuairand(tmp_path / "raw", "1k", [log_line(u, v, START, v % 2) for u in range(4) for v in range(9)])
    words = ["kuairand", str(raw), str(tmp_path / "out"), "--quiet"]
    assert command.main([*words, "--logs=standard", "--keep=all", "--min-history=5", "--name=trial"]) == 0
    assert "in the raw data" in capsys.readouterr().out
    assert {user for user, _, _ in read_back(tmp_path / "out", "trial")} == {0, 1, 2, 3}
    assert command.main([*words, "--k-core=99"]) == 2
    assert "error: KuaiRand-1K: no event is left (99-core)" in capsys.readouterr().err
    assert command.main([*words, "--max-users=0"]) == 2
    assert "error: max_users: 0 cannot be used" in capsys.readouterr().err
    assert command.main(["lfm1b", str(raw), str(tmp_path / "out")]) == 2
    assert "LFM-1b_LEs.txt is not there" in capsys.readouterr().err


def test_the_command_in_a_process_of_its_own(tmp_path: Path) -> None:
    """Progress in bytes of the files, and no torch, whose memory alone would be more than the converter's."""
    raw = write_lfm(tmp_path / "raw", many_events())
    code = (
        "import runpy, sys; sys.argv[0] = 'prepare'\n"
        "try: runpy.run_module('recbole_holo.data.prepare', run_name='__main__')\n"
        "except SystemExit as end: sys.exit(end.code or 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "lfm1b", str(raw), str(tmp_path / "out"), "--k-core=5"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    size = (raw / lfm1b.EVENTS).stat().st_size
    for bar in ("reading, pass 1 of 2", "reading, pass 2 of 2", "sorting", "filtering, pass 1", "writing .inter"):
        assert f"{bar}: 100%" in done.stderr
    assert f"{size / 1000:.1f}k/{size / 1000:.1f}k" in done.stderr
    assert "5-core" in done.stdout


def test_an_interrupted_command_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(source: Source, *args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command, "convert", interrupted)
    raw = write_lfm(tmp_path / "raw", [(1, 1, 0)])
    assert command.main(["lfm1b", str(raw), str(tmp_path / "out")]) == 130
    assert "nothing was written" in capsys.readouterr().err
