"""Models with a catalogue, as if trained."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from recbole_holo.data.catalogue import Catalogue
from tests.model.conftest import STATE_SPACE, TINY, make_config, one_value_attribute

N_ITEMS = 40


def catalogue(n_items: int = N_ITEMS, attribute: bool = True) -> Catalogue:
    return Catalogue(
        "toy",
        "item_id",
        ["[PAD]", *(f"i{n}" for n in range(1, n_items))],
        ["", *(f"The {n}th Film" if n % 2 else "" for n in range(1, n_items))],
        torch.arange(n_items) * 7 % n_items,
        {"genre": one_value_attribute(n_items, 5)} if attribute else {},
    )


def served(name: str = "HoloMambaRec", n_items: int = N_ITEMS, seed: int = 0, **settings: Any) -> tuple[Any, Catalogue]:
    """A model and its items."""
    torch.manual_seed(seed)
    items = catalogue(n_items)
    return STATE_SPACE[name.removesuffix("_paper")](make_config(name, **{**TINY, **settings}), items).eval(), items


@pytest.fixture
def histories() -> dict[str, list[str]]:
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, 30, (12,), generator=generator).tolist()
    return {
        f"u{u}": [f"i{n}" for n in torch.randint(1, N_ITEMS, (length,), generator=generator).tolist()]
        for u, length in enumerate(lengths)
    }
