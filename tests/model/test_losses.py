"""Losses by name: one from outside, and the calibrated one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from recbole_holo import losses
from recbole_holo.errors import ConfigError

from .conftest import build_tiny

HINGE = """
import torch
from recbole_holo.losses.base import Loss
from recbole_holo.losses.negatives import one_negative_each


class Hinge(Loss):
    def forward(self, positions):
        negatives, _ = one_negative_each(positions)
        table = positions.table()
        gap = (positions.query * (table[positions.targets] - table[negatives])).sum(-1)
        return (1 - gap).clamp(min=0).mean()
"""


def test_a_loss_of_ones_own_takes_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hinge.py").write_text(HINGE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(losses, "LOSSES", dict(losses.LOSSES))
    losses.register_loss("Hinge", "hinge")
    model = build_tiny("RecMamba", loss_type="Hinge").train()
    hidden, targets = torch.zeros(5, 16, requires_grad=True), torch.arange(1, 6)
    loss = model.loss(hidden, targets)
    assert loss.item() == 1.0
    loss.backward()
    assert hidden.grad.abs().sum() > 0


@pytest.mark.parametrize("t", [0.0, 0.75, 1.0])
def test_of_all_items_a_calibrated_loss_has_nothing_to_calibrate(t: float) -> None:
    model = build_tiny("RecMamba", loss_type="gBCE", num_negatives=28, gbce_t=t)  # of 29 items, the target one of them
    assert model.criterion.beta == pytest.approx(1.0)


def test_calibration_gives_the_confidence_back_that_a_sample_takes_away() -> None:
    """An item is the target with chance p, and a negative, where not, with chance α. The loss β p log σ + α (1 - p)
    log(1 - σ) is least at σ = β p / (β p + α (1 - p)): with t = 1 at p, with t = 0 above it."""
    for t, learned in ((1.0, 0.1), (0.0, 0.1 / (0.1 + 0.1 * 0.9))):
        model = build_tiny("RecMamba", loss_type="gBCE", num_negatives=4, gbce_t=t, n_items=42)
        rare, drawn, beta = 0.1, 4 / 40, model.criterion.beta
        assert beta * rare / (beta * rare + drawn * (1 - rare)) == pytest.approx(learned)


@pytest.mark.parametrize("t", [-0.1, 1.5, "high", True])
def test_a_calibration_out_of_its_range_is_named(t: object) -> None:
    with pytest.raises(ConfigError, match="gbce_t"):
        build_tiny("RecMamba", loss_type="gBCE", gbce_t=t)


def test_an_unknown_loss_is_offered_the_nearest() -> None:
    with pytest.raises(ConfigError, match="InfoNCE"):
        build_tiny("RecMamba", loss_type="InfoNce")
