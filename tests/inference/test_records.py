"""States as bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from recbole_holo.errors import ConfigError
from recbole_holo.inference import Recommender, StateError
from recbole_holo.inference.records import STORAGES, Codec, Record, event_key

from .conftest import served


def a_record(codec: Codec) -> Record:
    numbers = torch.randn(codec.layout.size, generator=torch.Generator().manual_seed(0)).numpy()
    recent, seen = np.array([3, 1], dtype=np.int32), np.array([9, 8, 7], dtype=np.int32)
    return Record(numbers, 12, 1.5, recent, seen, np.array([event_key("x")]))


@pytest.mark.parametrize(("storage", "error"), [("float32", 0.0), ("float16", 5e-4), ("int8", 5e-3)])
def test_there_and_back(storage, error):
    codec = Codec(served(bundle_size=3, bundle_recent=5)[0].state_layout(), storage)
    record, data = a_record(codec), codec.encode(a_record(codec))
    found = codec.decode(data, "a")
    assert (found.events, found.time) == (12, 1.5)
    for name in ("recent", "seen", "ids"):
        np.testing.assert_array_equal(getattr(found, name), getattr(record, name))
    scale = np.abs(np.pad(record.numbers, (0, -len(record.numbers) % 16)).reshape(-1, 16)).max(1).repeat(16)
    assert (np.abs(found.numbers - record.numbers) <= error * scale[: len(record.numbers)]).all()
    assert len(data) < codec.number_bytes + 100


def test_sizes():
    layout = served()[0].state_layout()
    full, half, small = (Codec(layout, storage).number_bytes for storage in STORAGES)
    assert (full, half) == (4 * layout.size, 2 * layout.size)
    assert small == pytest.approx(full * 18 / 64, abs=18)


@pytest.mark.parametrize("storage", ["float16", "int8"])
def test_numbers_beyond_the_range_do_not_become_infinite(storage):
    codec = Codec(served()[0].state_layout(), storage)
    record = a_record(codec)
    record.numbers = np.full(codec.layout.size, -3e7, dtype=np.float32)
    record.numbers[:16] = 0
    found = codec.decode(codec.encode(record), "a").numbers
    assert np.isfinite(found).all()
    assert not found[:16].any()
    assert (found[16:] < -60000).all()


@pytest.mark.parametrize("damage", [0, 3, 4, 20, 200, -1])
def test_a_damaged_record_is_found(damage):
    codec = Codec(served()[0].state_layout())
    data = bytearray(codec.encode(a_record(codec)))
    data[damage] ^= 4
    with pytest.raises(StateError, match=r"user 'a' is damaged .*rebuild"):
        codec.decode(bytes(data), "a")


@pytest.mark.parametrize("length", [0, 10, 500])
def test_a_record_that_is_cut_off(length):
    codec = Codec(served()[0].state_layout())
    with pytest.raises(StateError, match=rf"damaged \({length} bytes\)"):
        codec.decode(codec.encode(a_record(codec))[:length], "a")


def test_of_another_storage_or_size():
    one, other = (Codec(served(**settings)[0].state_layout()) for settings in ({}, {"num_layers": 1}))
    with pytest.raises(StateError, match="bytes, not"):
        other.decode(one.encode(a_record(one)), "a")
    half = Codec(one.layout, "float16")
    with pytest.raises(StateError, match="stored as float16, not as float32"):
        one.decode(half.encode(a_record(half)), "a")
    with pytest.raises(ConfigError, match="storage: 'int4' cannot be used: use float32, float16, int8"):
        Codec(one.layout, "int4")


@pytest.mark.parametrize("storage", ["float16", "int8"])
def test_a_smaller_state_ranks_nearly_alike(storage, histories):
    model, items = served()
    exact, small = Recommender(model, items), Recommender(model, items, storage=storage)
    agree = 0
    for user, history in histories.items():
        for item in history:
            exact.update(user, item)
            small.update(user, item)
        agree += len(set(exact.recommend(user).items) & set(small.recommend(user).items))
    assert agree >= 0.95 * 10 * len(histories)
