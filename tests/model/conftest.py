"""Models without RecBole's data pipeline: a config filled from the shipped yaml files, and a stub data set."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from recbole_holo.data.attributes import ItemAttribute
from recbole_holo.model.holomambarec import HoloMambaRec
from recbole_holo.model.hydra import Hydra
from recbole_holo.model.linrec import LinRec
from recbole_holo.model.mamba4rec import Mamba4Rec
from recbole_holo.model.recmamba import RecMamba
from recbole_holo.model.sequence_sasrec import SequenceSASRec

PROPERTIES = Path(__file__).resolve().parents[2] / "properties"
STATE_SPACE = {model.__name__: model for model in (HoloMambaRec, Hydra, RecMamba, Mamba4Rec)}
MODELS = STATE_SPACE | {model.__name__: model for model in (LinRec, SequenceSASRec)}
ALL_PRESETS = [name + suffix for name in MODELS for suffix in ("", "_paper")]
NOT_CAUSAL = ("LinRec_paper",)  # trains on prefixes only
PRESETS = [name for name in ALL_PRESETS if name not in NOT_CAUSAL]

RECBOLE = {
    "USER_ID_FIELD": "user_id",
    "ITEM_ID_FIELD": "item_id",
    "LIST_SUFFIX": "_list",
    "ITEM_LIST_LENGTH_FIELD": "item_length",
    "NEG_PREFIX": "neg_",
    "MAX_ITEM_LIST_LENGTH": 50,
    "device": torch.device("cpu"),
}
# Small enough for many tests, uneven enough to cross the borders of chunks and heads; no dropout, so runs compare.
TINY = {
    "hidden_size": 16,
    "d_state": 8,
    "headdim": 4,
    "chunk_size": 4,
    "num_negatives": 32,
    "MAX_ITEM_LIST_LENGTH": 12,
    "dropout_prob": 0.0,
    "layer_dropout_prob": 0.0,
    "hidden_dropout_prob": 0.0,
    "attn_dropout_prob": 0.0,
}


class Config(dict):
    """What a model reads of RecBole's Config: a missing key gives None."""

    def __missing__(self, key: str) -> None:
        return None


class Dataset:
    """What a model reads of a data set."""

    def __init__(self, n_items: int, attribute: ItemAttribute | None = None) -> None:
        self.n_items = n_items
        self.item_attributes = {} if attribute is None else {attribute.name: attribute}

    def num(self, field: str) -> int:
        assert field == "item_id"
        return self.n_items


def read_yaml(name: str) -> dict:
    return yaml.safe_load((PROPERTIES / name).read_text())


def make_config(preset: str, **overrides) -> Config:
    return Config({**RECBOLE, **read_yaml("overall.yaml"), **read_yaml(f"model/{preset}.yaml"), **overrides})


def one_value_attribute(n_items: int, n_values: int) -> ItemAttribute:
    index = torch.arange(n_items) % (n_values - 1) + 1
    index[0] = 0
    return ItemAttribute("genre", index, n_values, [str(v) for v in range(n_values)])


def build(preset: str, n_items: int = 30, n_values: int | None = 5, seed: int = 0, **overrides):
    """A full-size model in evaluation mode, with an attribute unless ``n_values`` is None."""
    torch.manual_seed(seed)
    attribute = None if n_values is None else one_value_attribute(n_items, n_values)
    model = MODELS[preset.removesuffix("_paper")](make_config(preset, **overrides), Dataset(n_items, attribute))
    return model.eval()


def build_tiny(preset: str, **overrides):
    return build(preset, **{**TINY, **overrides})


@pytest.fixture(params=PRESETS)
def preset(request) -> str:
    """A model that may be trained on whole sequences."""
    return request.param


@pytest.fixture(params=ALL_PRESETS)
def any_preset(request) -> str:
    return request.param
