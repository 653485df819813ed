"""Items by their titles: one of several items is never taken silently."""

from __future__ import annotations

import io

import pytest
import torch

from recbole_holo.data.catalogue import Catalogue
from recbole_holo.errors import DataError
from recbole_holo.inference import Recommender
from recbole_holo.recommend import converse, token_of

from .conftest import served

TITLES = ["", "Sabrina", "Heat (1995)", "Sabrina", "Heat (1986)", "Fargo (1996)", "2", "", "Kolya", "SABRINA"]


def films() -> Catalogue:
    tokens = ["[PAD]", *map(str, range(1, 10))]
    return Catalogue("films", "item_id", tokens, TITLES, torch.arange(10) * 3)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1", 1),
        ("2", 2),  # an id, though item 6 is called so
        ("heat (1995)", 2),
        ("HEAT (1986)", 4),
        ("Fargo", 5),
        ("Fargo (1996)", 5),
        ("Kolya (1996)", 8),  # titles without years may be given one
    ],
)
def test_a_text_that_is_one_item(text: str, number: int) -> None:
    assert films().find(text) == number


# Of 22 titles of MovieLens 100K that several items have, the last one was taken.
@pytest.mark.parametrize(
    ("text", "offered"),
    [
        (
            "Sabrina",
            r"title of 3 items .*Sabrina \[1\] of 3 users, Sabrina \[3\] of 9 users, SABRINA \[9\]",
        ),
        ("sabrina (1954)", "the title of 3 items"),
        ("Heat", r"Heat \(1995\) \[2\] of 6 users, Heat \(1986\) \[4\] of 12 users; give an id"),
    ],
)
def test_a_title_of_several_items_is_asked_about(text: str, offered: str) -> None:
    with pytest.raises(DataError, match=offered):
        films().find(text)


@pytest.mark.parametrize("text", ["Fargo (1997)", "Fragoo", "10", "0", "[PAD]", ""])
def test_a_text_that_is_no_item(text: str) -> None:
    with pytest.raises(DataError, match="has no item with the id or title"):
        films().find(text)


def test_the_nearest_are_offered_with_their_ids() -> None:
    with pytest.raises(DataError, match=r"did you mean 'Sabrina \[1\]' or 'Sabrina \[3\]' or 'SABRINA \[9\]'"):
        films().find("Sabrinna")


def test_a_conversation_says_which_item_it_read(capsys: pytest.CaptureFixture[str]) -> None:
    model, _ = served(n_items=10)
    recommender = Recommender(model, films())
    assert token_of(recommender, " 3 ") == "3"
    converse(recommender, io.StringIO("Sabrina\n3\n"), k=2, exclude_seen=None, why=False)
    out = capsys.readouterr().out
    assert "'Sabrina' is the title of 3 items" in out
    assert "after Sabrina [3]:" in out
