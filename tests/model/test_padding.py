"""Batches that do not come from this package's data sets: what is not padded on the right is refused, not misread."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from recbole.data.interaction import Interaction
from torch import Tensor

from recbole_holo.bridge.config import Config
from recbole_holo.data.loader import create_dataset, data_preparation
from recbole_holo.errors import DataError
from recbole_holo.model import base

from .conftest import ALL_PRESETS, MODELS, build_tiny

SEQ = torch.tensor([[2, 4, 6, 8], [3, 5, 7, 0]])
LENGTH = torch.tensor([4, 3])
WRONG = {
    "padded on the left": (torch.tensor([[2, 4, 6, 8], [0, 3, 5, 7]]), LENGTH),
    "a pad between items": (torch.tensor([[2, 4, 6, 8], [3, 0, 5, 7]]), LENGTH),
    "shorter than said": (SEQ, torch.tensor([4, 4])),
    "longer than said": (SEQ, torch.tensor([4, 2])),
    "empty": (torch.tensor([[2, 4, 6, 8], [0, 0, 0, 0]]), torch.tensor([4, 0])),
}


def batch(model: base.SequenceRecommender, seq: Tensor, length: Tensor) -> Interaction:
    return Interaction({model.ITEM_SEQ: seq, model.ITEM_SEQ_LEN: length, model.ITEM_ID: torch.tensor([9, 1])})


@pytest.mark.parametrize("call", ["full_sort_predict", "predict", "calculate_loss"])
@pytest.mark.parametrize("preset", ALL_PRESETS)
def test_a_history_padded_on_the_left_is_refused(preset: str, call: str) -> None:
    # The hidden state of a pad, or of pads before items, gives other scores and no error.
    model = build_tiny(preset).eval()
    ask: Callable[[Interaction], Tensor] = getattr(model, call)
    assert ask(batch(model, SEQ, LENGTH)).isfinite().all()
    with pytest.raises(
        DataError, match=r"item_id_list: row 1 is \[0, 3, 5, 7\], item_length = 3; .*pads .0. on the right"
    ):
        ask(batch(model, *WRONG["padded on the left"]))


@pytest.mark.parametrize("what", WRONG)
def test_what_else_is_no_history(what: str) -> None:
    model = build_tiny("RecMamba").eval()
    with pytest.raises(DataError, match="item_id_list: row 1 is"):
        model.full_sort_predict(batch(model, *WRONG[what]))


@pytest.mark.parametrize("steps", [None, 2])
def test_a_window_padded_on_the_left_is_refused(steps: int | None) -> None:
    model = build_tiny("RecMamba")
    seq = WRONG["padded on the left"][0]
    whole = Interaction({model.ITEM_SEQ: seq, model.ITEM_TARGETS: seq.roll(-1, 1).masked_fill(seq == 0, 0)})
    with pytest.raises(DataError, match="item_id_list: row 1 is"):
        model.calculate_loss(whole) if steps is None else list(model.losses_in_parts(whole, steps))


@pytest.mark.parametrize("train_on", ["sequences", "prefixes"])
def test_batches_of_the_data_set_are_not_looked_at(
    train_on: str, cyclic_dataset: str, tiny: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Looking would wait for a GPU in every step.
    config = Config("RecMamba", cyclic_dataset, config_dict={**tiny, "train_on": train_on})
    train, valid, _ = data_preparation(config, create_dataset(config))
    model = MODELS["RecMamba"](config, train.dataset)
    monkeypatch.setattr(base, "check_padding", None)
    model.calculate_loss(next(iter(train))).backward()
    model.full_sort_predict(next(iter(valid))[0])
