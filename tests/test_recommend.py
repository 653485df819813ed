"""The command that recommends."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recbole_holo.inference import Recommendations, Recommender, SQLiteStore, Suggestion
from recbole_holo.quick_start import run
from recbole_holo.recommend import main


@pytest.fixture
def checkpoint(cyclic_dataset: str, tiny: dict[str, Any], write_dataset: Callable[..., str]) -> str:
    """A model that has learned to walk around: after film 4 comes film 5."""
    items = [(f"i{i}", f"The {i}th Film", f"g{i % 3}") for i in range(20)]
    inter = [tuple(line.split("\t")) for line in Path("dataset/cycle/cycle.inter").read_text().splitlines()[1:]]
    write_dataset(inter, "cycle", item=("item_id:token\ttitle:token_seq\tgenre:token", items))
    settings = {
        **tiny,
        "item_attributes": ["genre"],
        "binding": "role",
        "bind_output": True,
        "binding_algebra": "unitary",
    }
    settings |= {"epochs": 40, "learning_rate": 0.02}
    return run("HoloMambaRec", cyclic_dataset, config_dict=settings)["report"]["checkpoint"]


def test_a_history_by_titles_and_ids(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--checkpoint", checkpoint, "--history", "the 3th film (1995)|i4", "--k", "3"]) == 0
    printed = capsys.readouterr()
    assert "history: The 3th Film [i3] | The 4th Film [i4]" in printed.err  # which items were read
    lines = printed.out.splitlines()
    assert lines[0].split() == ["item", "title", "score", "why"]
    assert lines[2].split()[:5] == ["1", "i5", "The", "5th", "Film"]
    assert "genre: g2" in lines[2]
    assert len(lines) == 5


def test_what_the_user_has_is_left_out_or_not_and_said_so(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    history = ["--checkpoint", checkpoint, "--history", "i3|i4", "--k", "18"]
    assert main(history) == 0
    default = capsys.readouterr()
    assert "items that a user has are left out: repeats among the training targets: 0%" in default.err
    assert len(default.out.splitlines()) == 2 + 18
    assert not {"i3", "i4"} & {line.split()[1] for line in default.out.splitlines()[2:]}
    assert main([*history, "--include_seen"]) == 0
    both = capsys.readouterr()
    assert {"i3", "i4"} & {line.split()[1] for line in both.out.splitlines()[2:]}
    assert "items that a user has" not in both.err
    assert main([*history, "--exclude_seen"]) == 0
    assert capsys.readouterr().out == default.out


def test_a_misspelt_title(checkpoint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--checkpoint", checkpoint, "--history", "The 3th Flm"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: 'cycle' has no item with the id or title 'The 3th Flm'; did you mean 'The ")
    assert "'The 3th Film [i3]'" in error


def test_a_stored_user(checkpoint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "states.db"
    Recommender.load(checkpoint, SQLiteStore(path)).update("ann", "i7")
    assert main(["--checkpoint", checkpoint, "--user", "ann", "--store", str(path), "--k", "1"]) == 0
    assert "i8" in capsys.readouterr().out
    assert main(["--checkpoint", checkpoint, "--user", "bob", "--store", str(path)]) == 0
    assert capsys.readouterr().out.startswith("Nothing is known of this user")


def test_a_conversation(checkpoint: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("The 3th Film\nnothing\ni4\n\ni9\n"))
    assert main(["--checkpoint", checkpoint, "--interactive", "--k", "4"]) == 0
    out = capsys.readouterr().out
    assert "after The 3th Film [i3]:" in out
    assert "no item with the id or title 'nothing'" in out
    assert "after The 4th Film [i4]:" in out
    assert "9th Film [i9]:" not in out
    assert "was" in out.split("after The 4th Film [i4]:")[1]


def test_where_items_were() -> None:
    found = Recommendations([Suggestion(item, "", 1.0) for item in "acd"])
    rows = [line.split() for line in found.table(["a", "b", "c"]).splitlines()]
    assert rows[0] == ["was", "item", "score"]
    assert [row[:3] for row in rows[2:]] == [["1", "1", "a"], ["2", "3", "c"], ["3", "new", "d"]]
    assert "was" not in str(found)


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ([], "give one of the three"),
        (["--history", "i1", "--interactive"], "give one of the three"),
        (["--user", "ann", "--store", "typo.db"], "store: 'typo.db' cannot be used: there is no such file"),
        (
            ["--user", "ann", "--store", "x.db", "--times", "1|2"],
            "times: '1|2' cannot be used: they are those of a --history",
        ),
        (["--user", "ann"], "store: None cannot be used: a user's state is in a store"),
    ],
)
def test_words_that_cannot_be_used(words: list[str], error: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--checkpoint", "nowhere.pth", *words]) == 2
    assert error in capsys.readouterr().err


def test_no_checkpoint(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--checkpoint", "nowhere.pth", "--history", "i1"]) == 2
    assert "nowhere.pth" in capsys.readouterr().err
