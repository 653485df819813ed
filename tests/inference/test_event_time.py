"""Serving a model that reads the time between events: what streams in is what the offline evaluation reads."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from recbole_holo.data.event_time import GapBuckets
from recbole_holo.errors import ConfigError
from recbole_holo.explain import explain
from recbole_holo.inference.compression import Compression, compress
from recbole_holo.inference.recommender import Event, Recommender
from recbole_holo.quick_start import compress_checkpoint, load_data_and_model, run
from recbole_holo.recommend import main

from .conftest import N_ITEMS, served

START = 1_717_000_000.0
BUCKETS = GapBuckets(12, 0.5, 1.5)
TIMED = {"event_time": "gap", "event_time_buckets": 12, "MAX_ITEM_LIST_LENGTH": 40}
BUNDLED = {"bundle_size": 3, "bundle_recent": 5}
STATE_SPACE = ["HoloMambaRec", "Hydra", "RecMamba", "Mamba4Rec"]


def timed(name: str = "RecMamba", **settings: Any) -> tuple[Any, Any]:
    model, catalogue = served(name, **TIMED, **settings)
    torch.nn.init.normal_(model.event_time.vectors, std=0.5)
    return model, replace(catalogue, gap_buckets=BUCKETS)


@pytest.fixture
def users() -> dict[str, tuple[list[str], list[float]]]:
    """Items and times; ties, fractions and long breaks among them."""
    rng = np.random.default_rng(7)
    lengths = rng.integers(1, 30, 8)
    return {
        f"u{u}": (
            [f"i{n}" for n in rng.integers(1, N_ITEMS, n)],
            (START + rng.choice([0, 0.25, 1, 60, 3600, 1e6], n).cumsum()).tolist(),
        )
        for u, n in enumerate(lengths)
    }


def offline(model: Any, items: list[str], times: list[float]) -> torch.Tensor:
    numbers = torch.tensor([[int(item[1:]) for item in items]])
    gaps = torch.from_numpy(BUCKETS(np.diff(times, prepend=np.nan)))[None]
    with torch.no_grad():
        return model.score_all(model.forward(numbers, torch.tensor([len(items)]), gaps))[0]


def assert_as_offline(recommender: Recommender, users: dict[str, tuple[list[str], list[float]]]) -> None:
    found = recommender.recommend_many(list(users), k=5, exclude_seen=False)
    for answer, (items, times) in zip(found, users.values(), strict=True):
        scores = offline(recommender.model, items, times)
        given = torch.tensor([one.score for one in answer.suggestions])
        torch.testing.assert_close(given, scores[1:].topk(5).values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", STATE_SPACE)
@pytest.mark.parametrize("settings", [{}, BUNDLED], ids=["plain", "bundled"])
def test_events_one_by_one_and_in_batches_and_rebuilt(name: str, settings: dict[str, Any], users: Any) -> None:
    model, catalogue = timed(name, **settings)
    one_by_one, many, rebuilt = (Recommender(model, catalogue) for _ in range(3))
    events = [Event(u, *pair) for u, own in users.items() for pair in zip(*own, strict=True)]
    events.sort(key=lambda event: event.timestamp or 0.0)  # of all users; stable, so that ties stay in order
    for event in events:
        assert one_by_one.update(event.user, event.item, event.timestamp) == "applied"
    many.update_many(events, 40)
    rebuilt.rebuild([(u, i[:3], t[:3]) for u, (i, t) in users.items()], show_progress=False)
    later = [zip([u] * len(i), i[3:], t[3:], strict=False) for u, (i, t) in users.items()]
    rebuilt.update_many([Event(*one) for own in later for one in own])
    for recommender in (one_by_one, many, rebuilt):
        assert_as_offline(recommender, users)
    items, times = max(users.values(), key=lambda own: len(own[0]))
    at_once = one_by_one.recommend(history=items, timestamps=times, exclude_seen=False)
    scores = offline(model, items, times)
    assert at_once.suggestions[0].score == pytest.approx(float(scores[1:].max()), rel=1e-3)
    assert not torch.allclose(scores, offline(model, items, [START] * len(items)), rtol=1e-2)


def test_late_first_and_timeless_events(users: Any, caplog: pytest.LogCaptureFixture) -> None:
    model, catalogue = timed()
    recommender, read = Recommender(model, catalogue), []
    step = model.step
    model.step = lambda items, state, **given: read.append(given["gaps"].tolist()) or step(items, state, **given)
    logging.getLogger("recbole_holo").setLevel("INFO")
    for timestamp in (START, START + 4, START + 2, START + 4.6, None, START + 104.6):
        recommender.update("ann", "i3", timestamp)
    known = BUCKETS(np.array([4.0, 0.6, 100.0])).tolist()
    assert read == [[0], [known[0]], [1], [known[1]], [0], [known[2]]]
    told = [record for record in caplog.records if "without timestamps" in record.message]
    assert len(told) == 1


def test_what_cannot_be_served() -> None:
    model, catalogue = timed()
    with pytest.raises(ConfigError, match="the training split"):
        Recommender(model, replace(catalogue, gap_buckets=None))
    with pytest.raises(ConfigError, match="timestamps"):
        Recommender(model, catalogue).recommend(history=["i1", "i2"], timestamps=[1.0])
    asked, items = served("RecMamba", **{**TIMED, "event_time": "request"})
    with pytest.raises(ConfigError, match="event_time"):
        Recommender(asked, replace(items, gap_buckets=BUCKETS))


def test_a_checkpoint_has_all_that_serving_needs(
    write_dataset: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained, saved, reloaded with data and without, compressed, and asked by the command: the same scores."""
    rng = np.random.default_rng(3)
    rows = []
    for u in range(20):
        times = START + rng.choice([0.0, 1.0, 7.0, 90.0], 12).cumsum() * 1000  # milliseconds, so to say
        rows += [(f"u{u}", f"i{(u + n) % 9}", repr(t)) for n, t in enumerate(times.tolist())]
    settings = {"hidden_size": 16, "epochs": 1, "topk": [3], "valid_metric": "NDCG@3", "event_time_form": "role"}
    settings |= {"event_time": "gap", "show_progress": False, "state": "ERROR", "learning_rate": 0.01}
    settings |= {"load_col": {"inter": ["user_id", "item_id", "timestamp"]}, "train_batch_size": 4}
    report = run("RecMamba", write_dataset(rows), config_dict=settings)["report"]
    assert report["event_time"] == "gap"
    path = report["checkpoint"]
    assert "event_time gap: the time since the event before" in " ".join(capsys.readouterr().out.split())
    _, model, _, train, _, test = load_data_and_model(path, state="ERROR")
    compress_checkpoint(path, "small.pth", Compression(table_bits=8, weight_bits=16))
    recommender, small = Recommender.load(path), Recommender.load("small.pth")
    assert recommender.catalogue.gap_buckets == train.dataset.gap_buckets == small.catalogue.gap_buckets
    assert recommender.catalogue.gap_buckets.unit == 1000
    row = test.dataset[slice(0, 1)]
    with torch.no_grad():
        scores = model.full_sort_predict(row)[0]
    user = test.dataset.id2token("user_id", int(row["user_id"]))
    own = sorted((float(t), n, i) for n, (u, i, t) in enumerate(rows) if u == user)[:-1]
    for each, tolerance in ((recommender, 1e-4), (small, 0.05)):
        for t, _, item in own:
            each.update(user, item, t)
        answer = each.recommend(user, k=9, exclude_seen=False)
        for one in answer.suggestions:
            expected = float(scores[each.catalogue.number(one.item)])
            assert one.score == pytest.approx(expected, rel=tolerance, abs=tolerance)
    history, times = "|".join(item for _, _, item in own), "|".join(repr(t) for t, _, _ in own)
    asked = ["--checkpoint", path, "--history", history, "--include_seen", "--k", "1", "--times"]
    assert main([*asked, times]) == 0
    best = recommender.recommend(user, k=1, exclude_seen=False).suggestions[0]
    assert f"{best.score:.3f}" in capsys.readouterr().out
    assert main([*asked, "noon"]) == 2


def test_histories_are_explained_with_their_times(capsys: pytest.CaptureFixture[str]) -> None:
    """What a history holds was read as if nothing were known of its times."""
    model, catalogue = timed("HoloMambaRec", binding="role", binding_algebra="unitary", bind_output=True)
    items, times = ["i1", "i2", "i3"], [START, START + 1, START + 1e6]
    seen, forward = [], model.forward
    model.forward = lambda *given, **times: seen.append(times.get("gaps")) or forward(*given, **times)
    found = [explain(model, catalogue, history=items, timestamps=given) for given in (None, times, (t for t in times))]
    gaps = BUCKETS(np.array([np.nan, 1.0, 1e6 - 1])).tolist()
    assert [None if one is None else one.tolist() for one in seen] == [None, [gaps], [gaps]]
    assert found[0] != found[1] == found[2]
    for wrong in ([1.0], [1.0, 2.0, "3"], "123"):
        with pytest.raises(ConfigError, match="timestamp"):
            explain(model, catalogue, history=items, timestamps=wrong)


def test_states_are_judged_with_the_histories_times() -> None:
    """Which states matter most was judged by what no history reads."""
    model, _ = timed("RecMamba")
    rng = np.random.default_rng(0)
    histories, gaps = (torch.from_numpy(rng.integers(1, high, (6, 9))) for high in (N_ITEMS, 12))
    with pytest.raises(ConfigError, match="gaps: None cannot be used: the model reads times"):
        compress(model, Compression(states=3), histories)
    read: list[torch.Tensor] = []
    hidden_states = type(model).hidden_states

    def watched(self: Any, items: torch.Tensor, *given: Any, **times: Any) -> torch.Tensor:
        read.append(times["gaps"])
        return hidden_states(self, items, *given, **times)

    type(model).hidden_states = watched
    try:
        compress(model, Compression(32, 32, states=3), histories, gaps)
    finally:
        type(model).hidden_states = hidden_states
    assert read[0].equal(gaps)


@pytest.mark.parametrize("late", ["append", "skip"])
def test_a_rebuilt_history_is_read_as_its_events_were(late: str) -> None:
    """Events without a time and late ones among the others: a rebuilt user read other gaps than one who streamed in,
    and the next event others again."""
    model, catalogue = timed()
    items, times = ["i1", "i2", "i3", "i4", "i5"], [START, None, START + 60, START + 2, START + 61]
    streamed, rebuilt = (Recommender(model, catalogue) for _ in range(2))
    for item, timestamp in zip(items, times, strict=True):
        streamed.update("a", item, timestamp)
    rebuilt.rebuild([("a", items, times)], show_progress=False)
    one, other = (r.codec.decode(r.store.get(["a"])[0], "a") for r in (streamed, rebuilt))
    np.testing.assert_allclose(other.numbers, one.numbers, rtol=1e-3, atol=1e-4)
    assert other.time == one.time == START + 61
    short = Recommender(model, catalogue, late=late)
    short.rebuild([("a", items[:4], times[:4])], show_progress=False)
    assert short.codec.decode(short.store.get(["a"])[0], "a").time == START + 60
    assert short.update("a", "i6", START + 30).endswith("late")
