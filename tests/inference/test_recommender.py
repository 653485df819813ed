"""The recommender: what it answers is what the model says of the whole history, whatever the order of calls."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from recbole_holo.bridge.checkpoint import CheckpointError
from recbole_holo.errors import ConfigError, DataError
from recbole_holo.inference import (
    Compression,
    Event,
    FaissIndex,
    MemoryStore,
    Recommender,
    SQLiteStore,
    StateError,
    StoreError,
    compress,
    stored_bytes,
)
from recbole_holo.quick_start import compress_checkpoint, load_data_and_model, load_model, run

from .conftest import N_ITEMS, served

BUNDLED = {"bundle_size": 3, "bundle_recent": 5}


def expected(model: Any, items: list[str], k: int = 5, exclude: bool = True) -> tuple[list[str], list[float]]:
    """By the pass that training and evaluation use."""
    numbers = torch.tensor([[int(item[1:]) for item in items]])
    with torch.no_grad():
        scores = model.score_all(model.forward(numbers, torch.tensor([len(items)])))[0]
    scores[0] = -torch.inf
    if exclude:
        scores[numbers[0]] = -torch.inf
    best = scores.topk(k)
    return [f"i{n}" for n in best.indices.tolist()], best.values.tolist()


def assert_says(found: Any, wanted: tuple[list[str], list[float]]) -> None:
    np.testing.assert_allclose([one.score for one in found.suggestions], wanted[1], rtol=1e-3, atol=1e-4)
    assert found.items == wanted[0]


@pytest.mark.parametrize(
    ("trained", "repeats", "left_out"),
    [("kept", 0.0, True), ("kept", 0.049, True), ("kept", 0.4, False), ("excluded", 0.4, True)],
)
def test_seen_items_are_treated_as_the_model_was_trained(trained, repeats, left_out, histories, caplog):
    model, items = served(seen_items=trained)
    with caplog.at_level("INFO"):
        recommender = Recommender(model, replace(items, repeats=repeats))
    assert ("left out" if left_out else "recommended, too") in caplog.text
    user, history = next(iter(histories.items()))
    for item in history:
        recommender.update(user, item)
    for found in (recommender.recommend(user, k=5), recommender.recommend(history=history, k=5)):
        assert_says(found, expected(model, history, exclude=left_out))
    assert_says(recommender.recommend(user, k=5, exclude_seen=not left_out), expected(model, history, 5, not left_out))


@pytest.mark.parametrize("name", ["HoloMambaRec", "Hydra", "RecMamba", "Mamba4Rec"])
@pytest.mark.parametrize("settings", [{}, BUNDLED], ids=["plain", "bundled"])
def test_events_one_by_one_and_histories_give_the_models_ranking(name, settings, histories):
    model, items = served(name, **settings)
    recommender = Recommender(model, items)
    for user, history in histories.items():
        for item in history:
            assert recommender.update(user, item) == "applied"
    for user, history in histories.items():
        wanted = expected(model, history)
        assert_says(recommender.recommend(user, k=5), wanted)
        assert_says(recommender.recommend(history=history, k=5), wanted)
        assert_says(recommender.recommend(user, k=5, exclude_seen=False), expected(model, history, exclude=False))
    together = recommender.recommend_many(list(histories), k=5)
    for user, found in zip(histories, together, strict=True):
        assert found.user == user
        assert_says(found, expected(model, histories[user]))


@pytest.mark.parametrize("batch_size", [1, 7, 1000])
@pytest.mark.parametrize("settings", [{}, BUNDLED], ids=["plain", "bundled"])
def test_batches_of_events(batch_size, settings, histories):
    model, items = served(**settings)
    recommender = Recommender(model, items)
    histories["long"] = [f"i{1 + n % (N_ITEMS - 1)}" for n in range(150)]
    # Round robin, with the long history's events in one run at the end.
    events = [Event(u, h[t]) for t in range(30) for u, h in histories.items() if t < len(h) and u != "long"]
    events += [Event("long", item) for item in histories["long"]]
    assert recommender.update_many(events, batch_size) == Counter(applied=len(events))
    for user, history in histories.items():
        assert_says(recommender.recommend(user, k=5, exclude_seen=False), expected(model, history, exclude=False))


def test_rebuilding_from_histories(histories):
    model, items = served()
    one, other = Recommender(model, items), Recommender(model, items)
    one.update_many(Event(user, item) for user, history in histories.items() for item in history)
    other.update("gone", "i3")
    known = {user: [*history, "nothing"] for user, history in histories.items()}
    outcomes = other.rebuild(known.items(), show_progress=False)
    assert outcomes == Counter({"applied": sum(map(len, histories.values())), "skipped: unknown item": len(histories)})
    assert sorted(other.store) == sorted(histories)
    for user in histories:
        a, b = (r.codec.decode(r.store.get([user])[0], user) for r in (one, other))
        assert a.events == b.events
        assert a.seen.tolist() == b.seen.tolist()
        np.testing.assert_allclose(a.numbers, b.numbers, rtol=1e-3, atol=1e-4)


def test_unknown_items_and_users():
    model, items = served()
    recommender = Recommender(model, items)
    assert recommender.update("a", "nothing") == "skipped: unknown item"
    nobody = recommender.recommend("a", k=3)
    assert nobody.basis == "popularity"
    popularity = {f"i{n}": int(items.popularity[n]) for n in range(1, N_ITEMS)}
    assert nobody.items == sorted(popularity, key=popularity.__getitem__, reverse=True)[:3]
    assert (
        recommender.recommend("a", k=2, candidates=["i9", "i4", "i8"]).items
        == sorted(["i9", "i4", "i8"], key=popularity.__getitem__, reverse=True)[:2]
    )
    mixed = recommender.recommend(history=["i3", "nothing", "i5"], k=5)
    assert mixed.unknown == ["nothing"]
    assert_says(mixed, expected(model, ["i3", "i5"]))
    assert recommender.recommend(history=["nothing"]).basis == "popularity"
    with pytest.raises(DataError, match="no item 'i99'; did you mean i9"):
        recommender.recommend("a", candidates=["i99"])


def test_repeated_ids_change_nothing():
    model, items = served()
    recommender = Recommender(model, items)
    assert recommender.update("a", "i1", event_id="x") == "applied"
    before = recommender.store.get(["a"])
    assert recommender.update("a", "i2", event_id="x") == "skipped: repeated"
    assert recommender.store.get(["a"]) == before
    assert recommender.update("b", "i2", event_id="x") == "applied"  # ids are a user's own
    for n in range(70):
        recommender.update("a", f"i{2 + n % 9}", event_id=str(n))
    assert recommender.update("a", "i2", event_id=str(69 - 63)) == "skipped: repeated"
    assert recommender.update("a", "i2", event_id="x") == "applied"  # longer ago than ids are kept
    same = recommender.update_many([Event("c", "i1", id="y"), Event("c", "i2", id="y"), Event("c", "i3")])
    assert same == Counter({"applied": 2, "skipped: repeated": 1})
    assert_says(recommender.recommend("c", k=5), expected(model, ["i1", "i3"]))


@pytest.mark.parametrize("late", ["append", "skip"])
def test_late_events(late):
    model, items = served()
    recommender = Recommender(model, items, late=late)
    assert recommender.update("a", "i1", 10.0) == "applied"
    assert recommender.update("a", "i2", 10.0) == "applied"  # not older
    assert recommender.update("a", "i3", 9.5) == ("late" if late == "append" else "skipped: late")
    assert recommender.update("a", "i4") == "applied"
    assert recommender.update("a", "i5", 9.9).endswith("late" if late == "append" else "skipped: late")
    assert recommender.update("a", "i6", 11.0) == "applied"
    history = ["i1", "i2", "i3", "i4", "i5", "i6"] if late == "append" else ["i1", "i2", "i4", "i6"]
    assert_says(recommender.recommend("a", k=5), expected(model, history))


def test_the_latest_distinct_items_are_remembered():
    model, items = served()
    recommender = Recommender(model, items, remember=3)
    for item in ("i1", "i2", "i3", "i1", "i4"):
        recommender.update("a", item)
    record = recommender.codec.decode(recommender.store.get(["a"])[0], "a")
    assert record.seen.tolist() == [3, 1, 4]
    everything = recommender.recommend("a", k=N_ITEMS)
    assert len(everything.items) == N_ITEMS - 1 - 3
    assert not {"i1", "i3", "i4"} & set(everything.items)
    size = len(recommender.store.get(["a"])[0])
    for n in range(200):
        recommender.update("a", f"i{1 + n % 39}")
    assert len(recommender.store.get(["a"])[0]) == size


@pytest.mark.parametrize("remember", [0, 1])
def test_remembering_nearly_nothing(remember):
    model, items = served()
    recommender = Recommender(model, items, remember=remember)
    recommender.update("a", "i1")
    recommender.update("a", "i2")
    assert len(recommender.recommend("a", k=N_ITEMS).items) == N_ITEMS - 1 - remember


def test_candidates_and_similar_items():
    model, items = served()
    recommender = Recommender(model, items)
    recommender.update_many([Event("a", "i1"), Event("a", "i2")])
    ranking = expected(model, ["i1", "i2"], k=N_ITEMS - 3)[0]
    wanted = [item for item in ranking if item in ("i7", "i8", "i9")]
    assert recommender.recommend("a", candidates=["i9", "i8", "i7", "i2"]).items == wanted
    table = model.item_vectors().detach()
    cosine = torch.cosine_similarity(table[5], table, dim=-1)
    cosine[[0, 5]] = -1
    assert [one.item for one in recommender.similar_items("i5", k=4)] == [f"i{n}" for n in cosine.topk(4).indices]


def test_reasons_are_attributes_of_the_items():
    model, items = served(binding="role", binding_algebra="unitary", bind_output=True)
    found = Recommender(model, items).recommend(history=["i1", "i5"], k=8, why=True)
    genres = items.item_attributes["genre"]
    for one in found.suggestions:
        value = genres.labels[int(genres.index[int(one.item[1:])])]
        assert one.why in ("", f"genre: {value}")
    assert any(one.why for one in found.suggestions)
    assert "why" in str(found)
    assert "why" not in str(Recommender(model, items).recommend(history=["i1"], k=2))


def test_states_of_another_model_are_refused_and_rebuilt(tmp_path, histories):
    model, items = served()
    store = SQLiteStore(tmp_path / "states.db")
    Recommender(model, items, store).update("a", "i1")
    before = store.get(["a"])
    for other in (
        Recommender(served(seed=1)[0], items, store),
        Recommender(model, items, store, storage="float16"),
        Recommender(served(num_layers=1)[0], items, store),
    ):
        for call in (lambda r=other: r.update("a", "i2"), lambda r=other: r.recommend("a")):
            with pytest.raises(StoreError, match=r"states of version .*call rebuild\(\)"):
                call()
        assert store.get(["a"]) == before
        assert other.recommend(history=["i1"]).items  # needs no state
    assert Recommender(model, items, store).recommend("a", k=1).basis == "history"
    other.rebuild(histories.items(), show_progress=False)
    assert sorted(store) == sorted(histories)
    assert other.recommend("u0").basis == "history"
    with pytest.raises(StoreError, match="version"):
        Recommender(model, items, store).recommend("u0")


def test_a_state_that_another_process_wrote_with_another_model():
    model, items = served()
    store, other = MemoryStore(), Recommender(served(seed=1)[0], items)
    recommender = Recommender(model, items, store)
    other.update("a", "i1")
    store.put({"a": other.store.get(["a"])[0]})
    with pytest.raises(StateError, match="user 'a' is of another model or version"):
        recommender.recommend("a")


def test_a_state_that_is_not_finite_is_refused_and_nothing_else_lost(caplog):
    model, items = served()
    recommender = Recommender(model, items)
    recommender.update_many([Event("a", "i1"), Event("b", "i2")])
    record = recommender.codec.decode(recommender.store.get(["a"])[0], "a")
    record.numbers = record.numbers.copy()
    record.numbers[70] = np.nan
    recommender.store.put({"a": recommender.codec.encode(record)})
    good = recommender.store.get(["b"])
    with pytest.raises(StateError, match=r"user 'a' in the store is not finite.*rebuild"):
        recommender.update("a", "i3")
    assert recommender.store.get(["b"]) == good
    events = [Event("b", "i3"), Event("a", "i3"), Event("c", "i4"), Event("b", "i5"), Event("a", "i3")]
    with caplog.at_level("ERROR"):
        assert recommender.update_many(events) == Counter({"applied": 3, "skipped: damaged state": 2})
    assert "user 'a'" in caplog.text
    assert_says(recommender.recommend("b", k=5), expected(model, ["i2", "i3", "i5"]))
    good = recommender.store.get(["b"])
    with torch.no_grad():
        model.item_embedding.weight[7] = torch.nan
    model.unfold()
    with pytest.raises(StateError, match="user 'b' after this event is not finite"):
        recommender.update("b", "i7")
    assert recommender.store.get(["b"]) == good


def test_many_threads(histories):
    model, items = served()
    recommender = Recommender(model, items)
    errors: list[BaseException] = []

    def work(user: str) -> None:
        try:
            for item in histories[user]:
                recommender.update(user, item)
                recommender.update("shared", "i1")
                recommender.recommend(user, k=3)
        except BaseException as error:  # pragma: no cover
            errors.append(error)

    threads = [threading.Thread(target=work, args=(user,)) for user in histories]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for user, history in histories.items():
        assert_says(recommender.recommend(user, k=5), expected(model, history))
    total = sum(map(len, histories.values()))
    assert recommender.codec.decode(recommender.store.get(["shared"])[0], "shared").events == total


@pytest.mark.parametrize("settings", [{}, {"similarity": "cosine"}], ids=["dot", "cosine"])
def test_an_index_of_everything_is_exact(settings, histories):
    model, items = served("RecMamba", **settings)
    exact, indexed = Recommender(model, items), Recommender(model, items, index=FaissIndex(model, "Flat"))
    for recommender in (exact, indexed):
        recommender.update_many(Event(user, item) for user, history in histories.items() for item in history)
    for one, other in zip(*(r.recommend_many(list(histories), 5) for r in (exact, indexed)), strict=True):
        assert_says(other, (one.items, [each.score for each in one.suggestions]))
    with pytest.raises(ConfigError, match="index: 'HNXW' cannot be used"):
        FaissIndex(model, "HNXW")


def test_settings_that_cannot_be_used():
    from tests.model.conftest import build_tiny

    model, items = served()
    with pytest.raises(ConfigError, match=r"model: 'SequenceSASRec' .* reads the whole history"):
        Recommender(build_tiny("SequenceSASRec"), items)
    for setting in ({"late": "never"}, {"storage": "int4"}, {"remember": -1}):
        with pytest.raises(ConfigError, match=next(iter(setting))):
            Recommender(model, items, **setting)
    recommender = Recommender(model, items)
    with pytest.raises(ConfigError, match="give one of the two"):
        recommender.recommend()
    with pytest.raises(ConfigError, match="k: 0"):
        recommender.recommend(history=["i1"], k=0)


@pytest.mark.parametrize("model_name", ["HoloMambaRec", "Hydra", "RecMamba", "Mamba4Rec"])
def test_from_a_checkpoint_without_its_data(model_name, cyclic_dataset, tiny, tmp_path):
    """Titles, ids and attributes travel in the checkpoint; the ranking is that of the offline evaluation."""
    settings = {**tiny, "item_attributes": ["genre", "tags", "price"], "binding": "both", "loss_type": "SampledCE"}
    saved = run(model_name, cyclic_dataset, config_dict=settings)["report"]["checkpoint"]
    _, model, data, _, _, test = load_data_and_model(saved)
    (tmp_path / "dataset").rename(tmp_path / "elsewhere")
    recommender = Recommender.load(saved)
    batch = test.dataset[:]
    with torch.no_grad():
        scores = model.full_sort_predict(batch)
    scores[:, 0] = -torch.inf
    tokens = data.field2id_token["item_id"]
    for row, length, wanted in zip(batch["item_id_list"], batch["item_length"], scores, strict=True):
        history = [tokens[n] for n in row[:length]]
        found = recommender.recommend(history=history, k=4, exclude_seen=False)
        best = wanted.topk(4)
        np.testing.assert_allclose([s.score for s in found.suggestions], best.values, rtol=1e-3, atol=1e-4)
        assert found.items == [tokens[n] for n in best.indices]
    assert recommender.catalogue.item_attributes["genre"].labels[1:] == ["g0", "g1", "g2"]
    small = Recommender.load(saved, compression=Compression(table_bits=16, weight_bits=16))
    assert stored_bytes(small.model) < 0.6 * stored_bytes(recommender.model)
    best = [{one.item: one.score for one in r.recommend(history=history).suggestions} for r in (recommender, small)]
    assert sum(item in best[1] for item in best[0]) >= 9


@pytest.mark.parametrize(
    ("model_name", "settings", "wanted"),
    [
        ("HoloMambaRec", {"binding": "item"}, Compression(6, 8, fold=False)),
        ("HoloMambaRec", {"binding": "role", "bind_output": True}, Compression(4, 4, rank=6, states=3)),
        ("Hydra", {"similarity": "cosine"}, Compression(16, 6)),
        ("RecMamba", {}, Compression(32, 32)),
    ],
)
def test_a_compressed_checkpoint(model_name, settings, wanted, cyclic_dataset, tiny, tmp_path):
    """The file is the compressed model, with and without the data; it is small, and no training goes on from it."""
    settings = {**tiny, "item_attributes": ["genre", "tags", "price"], **settings, "hidden_size": 32}
    saved, small_file = (
        run(model_name, cyclic_dataset, config_dict=settings)["report"]["checkpoint"],
        tmp_path / "s.pth",
    )
    histories = torch.randint(1, 15, (4, 9))
    compress_checkpoint(saved, small_file, wanted, histories)
    expected = compress(load_model(saved, "cpu")[0], wanted, histories)
    found, catalogue = load_model(small_file, "cpu")
    evaluated = load_data_and_model(small_file)[1]
    with torch.no_grad():
        for model in (found, evaluated):
            for one in (expected, model):
                one.scores = one.score_all(one.hidden_states(histories)[:, -1])
            torch.testing.assert_close(model.scores, expected.scores, rtol=0, atol=0)
    assert stored_bytes(found) == stored_bytes(expected)
    bare = tmp_path / "bare.pth"
    torch.save({"catalogue": catalogue.plain(), "config": torch.load(small_file, weights_only=True)["config"]}, bare)
    # Beside numbers a file has a name and some 300 bytes a tensor.
    held = small_file.stat().st_size - bare.stat().st_size
    assert held < stored_bytes(found) + 500 * (2 * len(found.state_dict()) + 10)
    history = ["i1", "i2", "i3"]
    loaded = Recommender.load(small_file, device="cpu")
    assert loaded.recommend(history=history) == Recommender(expected, catalogue).recommend(history=history)
    with pytest.raises(ConfigError, match=r"target: .*there is no folder"):
        compress_checkpoint(saved, tmp_path / "nowhere" / "s.pth", wanted, histories)
    with pytest.raises(CheckpointError, match="is compressed already"):
        compress_checkpoint(small_file, tmp_path / "t.pth", wanted, histories)
    with pytest.raises(CheckpointError, match="is of a compressed model"):
        run(model_name, cyclic_dataset, config_dict={**settings, "resume": str(small_file)})


def test_forgetting_a_user():
    model, items = served()
    recommender = Recommender(model, items)
    recommender.update("a", "i1")
    recommender.forget(["a", "b"])
    assert recommender.recommend("a").basis == "popularity"
    assert len(recommender.store) == 0


def test_a_compressed_model_serves(histories):
    model, items = served(binding="role", bind_output=True)
    small = compress(model, Compression(table_bits=8, weight_bits=8))
    recommender = Recommender(small, items)
    recommender.update_many(Event(user, item) for user, history in histories.items() for item in history)
    for user, history in histories.items():
        assert_says(recommender.recommend(user, k=5), expected(small, history))


def test_items_without_an_event_are_recommended_by_their_attributes(cyclic_dataset, tiny, write_dataset):
    """Genre g1 follows g0: items of the right genre that nobody ever had come before those of another."""
    inter = [tuple(line.split("\t")) for line in Path("dataset/cycle/cycle.inter").read_text().splitlines()[1:]]
    inter = [row for row in inter if row[1] not in ("i18", "i19")]
    genres = [(f"i{n}", f"g{n % 3}") for n in range(18)] + [(f"new{g}{n}", f"g{g}") for g in range(3) for n in range(3)]
    write_dataset(inter, "cycle", item=("item_id:token\tgenre:token", genres))
    settings = {**tiny, "item_attributes": ["genre"], "binding": "role", "bind_output": True, "epochs": 30}
    settings |= {"cold_items": "attributes", "keep_unseen_items": True, "learning_rate": 0.02}
    recommender = Recommender.load(run("HoloMambaRec", cyclic_dataset, config_dict=settings)["report"]["checkpoint"])
    new = [f"new{g}{n}" for g in range(3) for n in range(3)]
    right = 0
    for start in range(10):
        found = recommender.recommend(history=[f"i{start + t}" for t in range(4)], k=3, candidates=new)
        right += all(item.startswith(f"new{(start + 4) % 3}") for item in found.items)
    assert right >= 6
    assert recommender.update("a", "new11") == "applied"
