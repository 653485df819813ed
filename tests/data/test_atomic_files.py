"""Atomic files that are not as RecBole wants them: read as they are written, or one line that says what and where.

The random cases: 1,000 in the suite; by hand more, ``FUZZ_FROM=1000 FUZZ_CASES=9000 pytest
tests/data/test_atomic_files.py -k random``.
"""

from __future__ import annotations

import csv
import logging
import os
import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from recbole_holo.bridge.config import Config
from recbole_holo.data import atomic_files
from recbole_holo.data.atomic_files import Form, check_file, read_header
from recbole_holo.data.catalogue import item_titles
from recbole_holo.data.loader import create_dataset, data_preparation
from recbole_holo.errors import ConfigError, DataError

CASES = int(os.environ.get("FUZZ_CASES", "1000"))
HEADER = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
ITEM_HEADER = "item_id:token\ttitle:token\ttags:token_seq\tprice:float\tvector:float_seq"
USER_HEADER = "user_id:token\tage:float\tjob:token"
BASE = {"show_progress": False, "state": "ERROR", "load_col": None, "filter_inter_by_user_or_item": False}
BASE |= {"metrics": ["NDCG"], "topk": [1], "valid_metric": "NDCG@1"}


def good_files() -> dict[str, str]:
    events = [(f"u{u}", f"i{(u + t) % 7}", 1 + t % 5, 1_700_000_000 + 10 * t + u) for u in range(5) for t in range(4)]
    items = [(f"i{i}", f"Títle {i}", f"a{i % 2} b{i % 3}", i * 1.5, f"{i} 0.5") for i in range(7)]
    users = [(f"u{u}", 20 + u, f"job{u % 2}") for u in range(5)]
    lines = {"inter": [HEADER], "item": [ITEM_HEADER], "user": [USER_HEADER]}
    for suffix, rows in (("inter", events), ("item", items), ("user", users)):
        lines[suffix] += ["\t".join(map(str, row)) for row in rows]
    return {suffix: "\n".join(own) + "\n" for suffix, own in lines.items()}


def written(folder: Path, name: str = "toy", **files: str | bytes) -> str:
    (folder / name).mkdir(parents=True, exist_ok=True)
    for suffix, content in {**good_files(), **files}.items():
        raw = content if isinstance(content, bytes) else content.encode()
        (folder / name / f"{name}.{suffix}").write_bytes(raw)
    return name


def loaded(name: str, **settings: Any) -> Any:
    return create_dataset(Config("RecMamba", name, config_dict={**BASE, **settings}))


def events_of(dataset: Any) -> Counter:
    """(user, item, time, rating) as RecBole has them."""
    feat = dataset.inter_feat
    users = dataset.id2token("user_id", feat["user_id"].to_numpy())
    items = dataset.id2token("item_id", feat["item_id"].to_numpy())
    return Counter(zip(users.tolist(), items.tolist(), feat["timestamp"].tolist(), strict=True))


def titles_of(dataset: Any) -> dict[str, str]:
    items = dataset.id2token("item_id", dataset.item_feat["item_id"].to_numpy())
    titles = dataset.id2token("title", dataset.item_feat["title"].to_numpy().astype(int))
    return dict(zip(items.tolist(), titles.tolist(), strict=True))


def rows_of(path: Path, encoding: str = "utf-8-sig", separator: str = "\t") -> list[dict[str, str]]:
    """An independent reader."""
    lines = path.read_bytes().decode(encoding).replace("\r\n", "\n").split("\n")
    header = [column.split(":")[0] for column in lines[0].split(separator)]
    rows = []
    for line in lines[1:]:
        if separator in line or line.strip():
            cells = next(csv.reader([line], delimiter=separator))
            if cells == [""]:  # two quotation marks
                continue
            assert len(cells) == len(header)
            rows.append(dict(zip(header, cells, strict=True)))
    return rows


# ---------------------------------------------------------------------- what is read
def test_byte_order_marks_and_windows_line_ends_are_read(tmp_path: Path) -> None:
    """A byte order mark was part of the first column's name, and the run ended in a KeyError."""
    plain = events_of(loaded(written(tmp_path / "dataset")))
    files = {suffix: b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode() for suffix, text in good_files().items()}
    other = loaded(written(tmp_path / "dataset", "windows", **files))
    assert events_of(other) == plain
    assert titles_of(other)["i3"] == "Títle 3"
    assert item_titles(other)["i3"] == "Títle 3"
    short = Config("RecMamba", "windows", config_dict={"state": "ERROR"})  # reads the header, to find the time
    assert short["load_col"] == {"inter": ["user_id", "item_id", "timestamp"]}


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16", "UTF8"])
def test_other_encodings_are_read_when_they_are_named(encoding: str, tmp_path: Path) -> None:
    files = {suffix: text.encode(encoding) for suffix, text in good_files().items()}
    assert titles_of(loaded(written(tmp_path / "dataset", **files), encoding=encoding))["i3"] == "Títle 3"


def test_quotes_blank_lines_and_other_separators_are_read(tmp_path: Path) -> None:
    plain = events_of(loaded(written(tmp_path / "dataset")))
    quoted = (
        re.sub(r"^u(\d)\t", r'"u\1"' "\t", good_files()["inter"], flags=re.MULTILINE).replace("\nu", "\n\nu") + "\n"
    )
    assert '"u1"' in quoted
    assert events_of(loaded(written(tmp_path / "dataset", "quoted", inter=quoted))) == plain
    for name, separator in (("commas", ","), ("colons", "::")):
        files = {suffix: text.replace("\t", separator) for suffix, text in good_files().items()}
        assert events_of(loaded(written(tmp_path / "dataset", name, **files), field_separator=separator)) == plain


def test_parts_of_a_file_are_as_the_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic_files, "PART", 7)
    test_byte_order_marks_and_windows_line_ends_are_read(tmp_path)
    test_other_encodings_are_read_when_they_are_named("utf-16", tmp_path)
    with pytest.raises(DataError, match=r"toy\.inter, line 9, column 'timestamp': 'x'"):
        loaded(written(tmp_path / "dataset", inter=changed(9, 3, "x")))


def changed(line: int, column: int, value: str, suffix: str = "inter") -> str:
    lines = [line.split("\t") for line in good_files()[suffix].split("\n")]
    lines[line - 1][column] = value
    return "\n".join("\t".join(cells) for cells in lines)


# ---------------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"inter": good_files()["inter"].encode("utf-16")}, r"toy\.inter is UTF-16.*encoding: utf-16"),
        (
            {"item": good_files()["item"].encode("latin-1")},
            r"toy\.item, line 2, column 2: byte 0xed \('í' in Latin-1\) is no utf-8; set encoding: latin-1",
        ),
        ({"inter": changed(5, 1, '"i2')}, r"line 5, column 'item_id': '\"i2' opens a quotation mark.*not close"),
        ({"inter": "\n".join(good_files()["inter"].split("\n")[1:])}, r"line 1: 'u0' is no column with its type"),
        ({"inter": changed(1, 2, "timestamp:float")}, "line 1: the column 'timestamp' is there twice"),
        ({"inter": changed(1, 2, "rating:number")}, "line 1: 'rating:number' is no column with its type"),
        ({"inter": changed(1, 2, "rating:flaot")}, "Did you mean float"),
        ({"inter": changed(1, 0, "user_id:float")}, "user_id.*of type float; make them user_id:token"),
        ({"inter": ""}, r"toy\.inter is empty"),
        ({"item": ""}, r"toy\.item is empty"),
        ({"inter": HEADER + "\n"}, "has a header and no line"),
        ({"item": ITEM_HEADER}, "has a header and no line"),
        ({"inter": good_files()["inter"].replace("\t", ",")}, "line 1: .*field_separator"),
        (
            {"inter": good_files()["inter"][:-12]},
            r"line 21: 'u4\\ti0\\t4\\t?\d*'? has 3 columns, and the header 4|line 21",
        ),
        ({"inter": changed(4, 3, "1\t2")}, r"line 4: .* has 5 columns, and the header 4"),
        ({"inter": changed(4, 3, "soon")}, r"line 4, column 'timestamp': 'soon' is no number"),
        (
            {"inter": changed(4, 3, "1,5")},
            r"line 4, column 'timestamp': '1,5' is no number; write numbers with a point",
        ),
        ({"inter": changed(4, 3, "")}, r"line 4, column 'timestamp': '' is no time"),
        ({"inter": changed(4, 3, "nan")}, r"line 4, column 'timestamp': 'nan' is no time"),
        ({"inter": changed(4, 2, "inf")}, r"line 4, column 'rating': 'inf' is beyond"),
        ({"inter": changed(4, 0, "")}, r"line 4, column 'user_id': '' is empty"),
        ({"inter": changed(4, 1, "NA")}, r"line 4, column 'item_id': 'NA' is read as no id"),
        ({"inter": changed(4, 1, "[PAD]")}, r"line 4, column 'item_id': '\[PAD\]' is read as no id"),
        ({"item": changed(3, 4, "1 x", "item")}, r"toy\.item, line 3, column 'vector': '1 x' holds 'x'"),
        ({"item": changed(3, 3, "dear", "item")}, r"toy\.item, line 3, column 'price': 'dear' is no number"),
        ({"inter": changed(6, 1, "i\0")}, "line 6: it holds a NUL byte"),
        ({"inter": good_files()["inter"].replace("\n", "\r")}, r"line 1: a carriage return"),
        ({"inter": changed(6, 1, "i" * 140_000)}, "line 6, column 'item_id': .* longer than 131,072"),
        ({"item": changed(1, 1, "rating:token", "item")}, r"column 'rating' is also one of toy\.inter"),
        ({"item": changed(1, 0, "product:token", "item")}, "no use without its column of ids, 'item_id'"),
    ],
)
def test_what_cannot_be_read_is_one_line(files: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Tracebacks out of RecBole and pandas, or worse: a line cut off got the mean of all times, a quotation mark
    swallowed lines, an item NA was dropped, a column of both files was read from one."""
    with pytest.raises(DataError, match=message) as caught:
        loaded(written(tmp_path / "dataset", **files))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"encoding": "klingon"}, "encoding: 'klingon'.*Python knows no such encoding"),
        ({"encoding": "hex"}, "encoding: 'hex'"),
        ({"field_separator": ";"}, "line 1: .*separated by '\\\\t'"),
        ({"field_separator": r"\t"}, "field_separator"),
        ({"USER_ID_FIELD": "who"}, "USER_ID_FIELD: .*without a column 'who'"),
        ({"load_col": {"inter": ["user_id", "timestamp"]}}, "ITEM_ID_FIELD: .*without a column 'item_id'"),
        ({"load_col": {"item": ["item_id"]}}, "USER_ID_FIELD: .*without a column 'user_id'.*loaded: nothing"),
        ({"normalize_field": ["rtaing"]}, "normalize_field: .*no column 'rtaing' was loaded"),
        ({"numerical_features": ["title"]}, "numerical_features: .*'title' is of type token"),
        ({"threshold": {"stars": 3}}, "threshold: .*no column 'stars'"),
        ({"val_interval": {"rating": ["3"]}}, "val_interval: .*rating: give numbers as an interval"),
        ({"val_interval": {"title": "[3,4]"}}, "val_interval: .*title"),
        ({"preload_weight": {"item_id": "vectr"}}, "preload_weight: .*no column 'vectr'"),
        ({"alias_of_user_id": ["buyer"]}, "alias_of_user_id: .*no column 'buyer'"),
        ({"discretization": {"cost": {"method": "LD"}}}, "discretization: .*list 'cost' in numerical_features"),
    ],
)
def test_settings_that_do_not_fit_the_files_are_one_line(
    settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises((ConfigError, DataError), match=message) as caught:
        loaded(written(tmp_path / "dataset"), **settings)
    assert "\n" not in str(caught.value)


def test_columns_that_are_not_loaded_may_hold_anything(tmp_path: Path) -> None:
    name = written(tmp_path / "dataset", inter=changed(4, 2, "five"))
    loaded(name, load_col={"inter": ["user_id", "item_id", "timestamp"]})
    loaded(name, unload_col={"inter": ["rating"]})
    with pytest.raises(DataError, match="'five' is no number"):
        loaded(name)


def test_items_described_twice_are_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The second line was dropped silently."""
    again = good_files()["item"] + "i3\tOther\ta0\t1\t1\n"
    with caplog.at_level(logging.WARNING):
        assert titles_of(loaded(written(tmp_path / "dataset", item=again)))["i3"] == "Títle 3"
    assert "toy.item: 1 of 8 lines are of a item_id that has one before (e.g. 'i3'); the first counts" in caplog.text


def test_a_file_that_cannot_be_opened_says_why(tmp_path: Path) -> None:
    (tmp_path / "folder.inter").mkdir()
    for read in (read_header, check_file):
        with pytest.raises(DataError, match=r"folder\.inter cannot be read: Is a directory"):
            read(tmp_path / "folder.inter", Form())


# ---------------------------------------------------------------------- random cases
WORDS = ("", " ", "nan", "inf", "-1", "1e400", "1_0", "NA", "None", "[PAD]", '"', '""', '"a', 'a"b', "é", "\u2028", "'")
WORDS += ("\x1f", "\x0b", "0x10", "True", "１２", "user_id:token", "item_id_list", "x" * 200, "\ufeff", "-", "1 2 x")


def mutate(raw: bytes, draw: random.Random) -> bytes:
    """One change of a file."""
    lines, at = raw.split(b"\n"), draw.randrange(len(raw) + 1)
    row = draw.randrange(len(lines))
    cells = lines[row].split(b"\t")
    kind = draw.randrange(24)
    if kind == 0:
        return raw[:at]
    if kind == 1:
        return raw[:at] + bytes([draw.randrange(256)]) + raw[at + 1 :]
    if kind == 2:
        return raw[:at] + draw.choice([b"\0", b"\r", b"\n", b"\t", b'"', b"\xe9", b"\xff", b"\\", b"\t\t"]) + raw[at:]
    if kind == 3:
        return raw.replace(b"\n", draw.choice([b"\r\n", b"\r", b"\n\n", b"\n \n", b"\t\n"]))
    if kind == 4:
        return draw.choice([b"\xef\xbb\xbf", b"\xff\xfe", b"\n", b"#\n"]) + raw
    if kind == 5:
        return raw.decode("utf-8", "ignore").encode(draw.choice(["utf-16", "latin-1", "utf-32", "cp1252"]), "ignore")
    if kind == 6:
        return raw.replace(b"\t", draw.choice([b",", b" ", b";", b"|", b"::"]))
    if kind == 7:
        return draw.choice([b"", lines[0], lines[0] + b"\n", b"\n".join(lines[1:]), b"\0" * 100])
    if kind in (8, 9):
        del lines[row]
    elif kind == 10:
        lines.insert(row, draw.choice(lines))
    elif kind == 11:
        del cells[draw.randrange(len(cells))]
    elif kind == 12:
        cells.insert(draw.randrange(len(cells) + 1), draw.choice(WORDS).encode())
    elif kind == 13:
        column = draw.randrange(len(cells))
        return b"\n".join(b"\t".join(line.split(b"\t")[:column]) for line in lines)
    elif kind == 14:
        other = [
            b"user_id:token",
            b"item_id:token",
            b"timestamp:token",
            b"rating:token_seq",
            b"price:float",
            b"x:float",
        ]
        head = lines[0].split(b"\t")
        head[draw.randrange(len(head))] = draw.choice(
            [*other, b"title:token_seq", b"x", b":", b"a:b:c", b"rating:float"]
        )
        return b"\n".join([b"\t".join(head), *lines[1:]])
    elif kind == 15:
        return raw.rstrip(b"\n") + draw.choice([b"", b"\n\n\n", b" ", b"\t", b"\x1a"])
    else:
        cells[draw.randrange(len(cells))] = draw.choice(WORDS).encode()
    if row < len(lines):
        lines[row] = b"\t".join(cells) if kind > 10 else lines[row]
    return b"\n".join(lines)


def outcome(config: Config, seed: int) -> tuple[tuple[Counter, dict[str, str]] | None, str | None]:
    """Events and titles as they were read, or the line that says why not."""
    try:
        dataset = create_dataset(config)
        titles = titles_of(dataset) if "title" in dataset.item_feat else {}
        found = (events_of(dataset), titles) if "timestamp" in dataset.inter_feat else None
        data_preparation(config, dataset)  # which needs the times
    except (DataError, ConfigError) as error:
        return None, str(error)
    except Exception as error:  # for the number of the case
        raise AssertionError(f"case {seed}: {type(error).__name__}: {error}") from error
    return found, None


def test_random_changes_are_read_as_written_or_one_line(tmp_path: Path) -> None:
    """660 changed files ended 277 times in a traceback out of RecBole or pandas; others were read half, silently."""
    config = Config("RecMamba", "toy", config_dict={**BASE, "MAX_ITEM_LIST_LENGTH": 10})
    folder, refused = tmp_path / "dataset", 0
    for seed in range(int(os.environ.get("FUZZ_FROM", "0")), CASES):
        draw = random.Random(seed)
        files = {suffix: text.encode() for suffix, text in good_files().items()}
        for _ in range(draw.choice((1, 1, 1, 2, 3))):
            suffix = draw.choice(("inter", "inter", "item", "user"))
            files[suffix] = mutate(files[suffix], draw)
        name = written(folder, **files)
        found, error = outcome(config, seed)
        if error is not None:
            refused += 1
            assert "\n" not in error, seed
            assert re.search(r"toy|TIME_FIELD|topk|eval_args|item_attributes", error), (seed, error)
            continue
        assert found is not None, seed
        events, titles = found
        rows = rows_of(folder / name / "toy.inter")
        assert events == Counter((r["user_id"], r["item_id"], float(r["timestamp"])) for r in rows), seed
        described: dict[str, str] = {}
        for row in rows_of(folder / name / "toy.item"):
            described.setdefault(row["item_id"], row.get("title", ""))
        for item, title in titles.items():
            wanted = described.get(item, "")
            assert title == wanted or (title == "[PAD]" and wanted in atomic_files.NO_IDS), (seed, item)
    assert 0.3 * CASES < refused < 0.95 * CASES


def test_ten_million_lines_cost_little(tmp_path: Path) -> None:
    """Looked through in parts of one size: what is read does not grow with the file."""
    import tracemalloc

    draws = np.random.default_rng(0).integers(1_000_000, size=(300_000, 3))
    path = tmp_path / "large.inter"
    np.savetxt(
        path, draws, fmt="%d", delimiter="\t", header="user_id:token\titem_id:token\ttimestamp:float", comments=""
    )
    tracemalloc.start()
    check_file(path, Form(), ids=("user_id", "item_id"), time="timestamp")
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < 25 * atomic_files.PART
