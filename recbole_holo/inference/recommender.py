"""A trained checkpoint as a recommender that a service can hold: an event in, the best items out, at constant cost."""

from __future__ import annotations

import hashlib
import os
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from logging import getLogger
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor
from tqdm import tqdm

from recbole_holo.data.catalogue import Catalogue
from recbole_holo.data.event_time import GapBuckets, since_latest
from recbole_holo.data.ids import UNITS, as_count, as_id, as_ids, as_list, as_time
from recbole_holo.errors import ConfigError
from recbole_holo.explain import readings_of
from recbole_holo.inference.compression import Compression, compress
from recbole_holo.inference.records import Codec, Record, StateError, check_finite, event_key
from recbole_holo.inference.retrieval import FaissIndex, best_of, top_items
from recbole_holo.inference.stores import Conflict, MemoryStore, StateStore
from recbole_holo.layers.event_time import EventTime
from recbole_holo.model.stepping import State, Stepping

LATE = ("append", "skip")
EVENT_IDS = 64  # of a user's latest events that a repeated one is looked for among
TOGETHER = 32  # events of one user that are read in one pass
POSITIONS = 2**17  # of histories that are encoded at a time
ATTEMPTS = 5  # at a state that another process stores, too
REPEATED = 0.05  # part of the training targets from which on items are taken to be met again


@dataclass(frozen=True)
class Event:
    """A user and an item, by their ids: strings, or whole numbers, which are the strings of their digits.

    Args:
        timestamp: any numbers that grow with time, or datetimes (``time_unit`` of the recommender says what they count
            in); None = now, whatever the events before had. A model with ``event_time`` reads it, and needs it in the
            data set's own unit; None tells it that nothing is known of the time since the event before.
        id: of the event, a string or a whole number; one that the user's latest 64 events have changes nothing.

    Raises:
        ConfigError: what is no id or no time, see docs/serving.md.
    """

    user: str
    item: str
    timestamp: float | datetime | np.datetime64 | None = None
    id: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "user", as_id(self.user, "user"))
        object.__setattr__(self, "item", as_id(self.item, "item"))
        if self.id is not None:
            object.__setattr__(self, "id", as_id(self.id, "event_id"))
        as_time(self.timestamp)


class Suggestion(NamedTuple):
    """One recommended item."""

    item: str
    title: str
    score: float
    why: str = ""


@dataclass(frozen=True)
class Recommendations:
    """What is recommended, the best first.

    Attributes:
        basis: ``history``; or ``popularity`` where nothing is known of the user: the items that most users have.
        unknown: items of the given history that the model does not know, and left out.
        problem: why the user's state cannot be used, where it cannot, and what to do; "" where it can.
    """

    suggestions: list[Suggestion]
    basis: str = "history"
    user: str | None = None
    unknown: list[str] = field(default_factory=list)
    problem: str = ""

    @property
    def items(self) -> list[str]:
        """Their ids."""
        return [one.item for one in self.suggestions]

    def __str__(self) -> str:
        return self.table()

    def table(self, before: Sequence[str] | None = None) -> str:
        """For people; with the list ``before`` also where each item was in it."""
        columns: dict[str, list[Any]] = {
            "": list(range(1, len(self.suggestions) + 1)),
            "was": [before.index(item) + 1 if item in before else "new" for item in self.items] if before else [],
            "item": self.items,
            "title": [one.title for one in self.suggestions],
            "score": [f"{one.score:.3f}" for one in self.suggestions],
            "why": [one.why for one in self.suggestions],
        }
        shown = {name: values for name, values in columns.items() if any(values)}
        return tabulate(shown, headers="keys", disable_numparse=True)


class _History(NamedTuple):
    """Of one user, oldest first, what the model knows of it."""

    items: np.ndarray  # numbers, int32
    gaps: np.ndarray  # the time before each in the data set's unit, nan = unknown
    time: float  # of the latest, nan = unknown


class _Wanted(NamedTuple):
    """Of a list of recommendations."""

    k: int
    exclude_seen: bool
    candidates: np.ndarray | None  # numbers, each once
    why: bool


class Recommender:
    """Keeps a state of constant size for each user, and answers from it.

    Thread-safe: calls may come from several threads, and of several recommenders; updates of one take turns.

    **Ids** are strings; a whole number is the string of its digits, whatever store there is. What is no id, no time or
    no list is a ConfigError before anything is stored (docs/serving.md has the table).

    **Unknown items** are skipped and reported, never guessed. **Unknown users** are recommended what most users have,
    and the answer says so. Items that have no event in the training data are recommended by their attributes where the
    model has learned to (``bind_output``, ``cold_items: attributes``).

    **Order.** A state is moved on in the order in which events arrive. An event that is older than the user's latest is
    *late*: ``append`` reads it as if it came now, ``skip`` leaves it out; either way it is counted. Only
    :meth:`rebuild` puts history into its true order.

    **Times.** A model with ``event_time: gap`` reads how long after the user's latest event an event came, in the
    buckets of its training data. A late event is read as if no time had passed, a user's first event and one without a
    timestamp (the log says so once) as if nothing were known; after the latter, times count from the event with one.

    **Repetition.** An event with the id of one of the user's latest 64 events changes nothing.

    **Seen items.** The latest ``remember`` distinct items of a user are kept beside the state, so that they need not be
    recommended again. Unless a call says otherwise they are left out (:attr:`excludes_seen`), but for a model that was
    trained on data in which people come back to items (5 % of the training targets or more were repeats) and not for
    rankings without seen items (``seen_items: excluded``). Everything that is kept has a fixed size, and so has the
    time of a call.

    Args:
        model: of this package, one that carries a state.
        items: their catalogue, or the data set that the model was trained on.
        store: where states are kept; None = in memory.
        storage: of the numbers of a state, see :class:`~recbole_holo.inference.records.Codec`.
        remember: items, see above.
        late: ``append`` or ``skip``.
        index: None = exact; or an index for a large catalogue.
        time_unit: what a datetime is counted in, s, ms, us, ns, m, h or D: that of the data set's times.

    A store with states of another model, version or layout is not touched, also where another process made it so
    meanwhile: ``stale`` is True then, and what needs a state raises a StoreError until :meth:`rebuild`.

    Raises:
        ConfigError: a model without a state, one that reads the time of the request, or a setting that cannot be used.
    """

    def __init__(
        self,
        model: Any,
        items: Any,
        store: StateStore | None = None,
        storage: str = "float32",
        remember: int = 1000,
        late: str = "append",
        index: FaissIndex | None = None,
        time_unit: str = "s",
    ) -> None:
        if not isinstance(model, Stepping):
            remedy = "it reads the whole history for every answer; HoloMambaRec, Hydra, RecMamba and Mamba4Rec do not"
            raise ConfigError("model", type(model).__name__, remedy)
        if late not in LATE:
            raise ConfigError("late", late, f"use {' or '.join(LATE)}")
        as_count(remember, "remember", 0)
        if time_unit not in UNITS:
            raise ConfigError("time_unit", time_unit, f"use {', '.join(UNITS)}")
        self.model: Any = model.eval()
        self.catalogue = Catalogue.of(items)
        self._buckets = self._gap_buckets()
        self._told = False  # that an event had no time
        self.store = MemoryStore() if store is None else store
        self.version = self._version(storage)
        leaves = not isinstance(self.store, MemoryStore)
        self.codec = Codec(model.state_layout(), storage, checked=leaves, version=self.version)
        self.remember, self.late, self.index, self.time_unit = int(remember), late, index, time_unit
        self.excludes_seen = bool(model.excludes_seen) or (self.catalogue.repeats or 0.0) < REPEATED
        getLogger("recbole_holo").info("%s", self.about_seen_items())
        self._device = next(model.parameters()).device
        self._popular = self.catalogue.popularity[1:].argsort(descending=True, stable=True).numpy() + 1
        self._lock = threading.RLock()
        self.store.begin(self.version)

    @property
    def stale(self) -> bool:
        """Whether the store holds states of another version."""
        return self.store.version != self.version

    def _gap_buckets(self) -> GapBuckets | None:
        """In which the model reads the time between events, if it does."""
        part: EventTime | None = self.model.event_time
        if part is None:
            return None
        if part.kind == "request":
            remedy = "a state would have to wait for the time of the next request: serve a model with event_time: gap"
            raise ConfigError("event_time", part.kind, remedy)
        if self.catalogue.gap_buckets is None:
            remedy = "the model reads times: pass the training split (train_data.dataset), which knows the buckets"
            raise ConfigError("items", self.catalogue.dataset_name, remedy)
        if self.model.state_layout().recent and self.model.n_items * part.numbers >= 2**31:
            remedy = f"{self.model.n_items:,} items in {part.numbers} buckets are too many for a bundled state: use 1"
            raise ConfigError("bundle_inference", self.model.bundling.size, remedy)
        return self.catalogue.gap_buckets

    @classmethod
    def load(
        cls,
        checkpoint: str | os.PathLike[str],
        store: StateStore | None = None,
        device: str | torch.device | None = None,
        index: str | None = None,
        effort: int | None = None,
        compression: Compression | None = None,
        **options: Any,
    ) -> Recommender:
        """From a checkpoint alone: ids, titles and attributes of the items are in it.

        Args:
            device: None = a GPU where there is one.
            index: kind of :class:`~recbole_holo.inference.retrieval.FaissIndex`, with its ``effort``.
            compression: of the model, to serve from less memory; states that are to be left out need histories, so
                compress such a model yourself.
            options: as of the class.

        Raises:
            CheckpointError: not a checkpoint, or one without the items' ids, from before these were kept.
        """
        from recbole_holo.quick_start import load_model

        model, catalogue = load_model(checkpoint, device)
        if compression is not None:
            model = compress(model, compression)
        built = None if index is None else FaissIndex(model, index, effort)
        return cls(model, catalogue, store, index=built, **options)

    def about_seen_items(self) -> str:
        """Whether items that a user has are recommended again where a call does not say, and why."""
        verb = "left out" if self.excludes_seen else "recommended, too"
        if self.model.excludes_seen:
            why = "the model was trained for rankings without them (seen_items: excluded)"
        else:
            share = self.catalogue.repeats
            why = "not known" if share is None else f"{share:.0%}"
            why = f"repeats among the training targets: {why}"
        return f"items that a user has are {verb}: {why}"

    # ------------------------------------------------------------------ events in
    def update(self, user: str, item: str, timestamp: Any = None, event_id: str | None = None) -> str:
        """One :class:`Event`. Returns what became of it: ``applied``, ``late`` (and applied), ``skipped: late``,
        ``skipped: repeated`` or ``skipped: unknown item``. When this returns, the state is stored.

        Raises:
            ConfigError: what is no id or no time; nothing is stored.
            StateError: the user's state is damaged, or of another version.
            StoreError: it could not be stored; the state is as before.
        """
        return self._apply([Event(user, item, timestamp, event_id)])[0]

    def update_many(self, events: Iterable[Event], batch_size: int = 512, show_progress: bool = False) -> Counter[str]:
        """Events in the order given, in batches of ``batch_size``, each stored at once: how many became what.

        The events of a user whose state is damaged are left out as ``skipped: damaged state``, and the log says whose.

        Raises:
            ConfigError: something is no :class:`Event`; of a list before anything is stored, else with the batches
                before it stored.
        """
        as_count(batch_size, "batch_size", of="events")
        if isinstance(events, Sequence):
            _check_events(events)
        elif not isinstance(events, Iterable):
            raise ConfigError("events", events, f"it is one value, not a list of them: [{events!r}]")
        outcomes: Counter[str] = Counter()
        for batch in _batches(tqdm(events, desc="events", unit="event", disable=not show_progress), batch_size):
            _check_events(batch)
            outcomes.update(self._apply_sound(batch))
        return outcomes

    def rebuild(
        self,
        histories: Iterable[tuple[str, Sequence[str]] | tuple[str, Sequence[str], Sequence[float]]],
        total: int | None = None,
        show_progress: bool = True,
        keep_others: bool = False,
    ) -> Counter[str]:
        """States from whole histories ``(user, items in the order of time)``, or with their times ``(user, items,
        timestamps)``, encoded in parallel, in the place of all states in the store; until all are made, the store is as
        before. What other processes apply meanwhile is replaced with the rest.

        With ``keep_others`` only these users' states are replaced, some thousands at a time.

        Histories have no event ids, so that what comes next repeats nothing: leave out what will be sent again. Without
        times what comes next is late for nobody, and a model with ``event_time`` knows of no time.

        Returns:
            how many events were ``applied``, and ``skipped: unknown item``.

        Raises:
            ConfigError: something is no history, or a user is there twice.
            StoreError: another process began to rebuild meanwhile; or with ``keep_others``, the store is of another
                version.
        """
        outcomes: Counter[str] = Counter()
        bar = tqdm(histories, desc="histories", unit="user", total=total, disable=not show_progress)
        known: set[str] = set()
        made = (self._encoded(part, known, outcomes) for part in _batches(bar, 4096))
        with self._lock:
            if not keep_others:
                self.store.replace(self.version, made)
                return outcomes
            for records in made:
                with self.store.holding(list(records)):
                    self.store.put(records, self.version)
        return outcomes

    # ------------------------------------------------------------------ recommendations out
    def recommend(
        self,
        user: str | None = None,
        k: int = 10,
        history: Iterable[str] | None = None,
        exclude_seen: bool | None = None,
        candidates: Iterable[str] | None = None,
        why: bool = False,
        timestamps: Iterable[Any] | None = None,
    ) -> Recommendations:
        """The k best items for a user whose events came before, or for a history of items, oldest first.

        Args:
            timestamps: of the history's events, each as an :class:`Event` has it, for a model with ``event_time``.
            exclude_seen: leave out what the user has (of a stored user, the latest ``remember`` items); None: as the
                model was trained, :attr:`excludes_seen`.
            candidates: only these; one that is there twice counts once.
            why: with what each item has of what the state holds most strongly (models with bound attributes).

        Raises:
            ConfigError: neither a user nor a history, or both; what is no id, no list or no number of items.
            DataError: a candidate that the model does not know.
            StateError: the user's state is damaged, or of another version.
            StoreError: the store cannot be read, or is of another version.
        """
        if (user is None) == (history is None):
            raise ConfigError("user, history", (user, history), "give one of the two")
        wanted = self._wanted(k, exclude_seen, candidates, why)
        if history is None:
            (answer,), problems = self._recommend_users([as_id(user, "user")], wanted)
            for error in problems.values():
                raise error
            return answer
        items = as_ids(history, "history", ordered=True)
        unknown = [item for item in items if item not in self.catalogue.numbers]
        known = self._known(items, timestamps)
        (answer,) = self._answer([None], self._hidden_of([known]), [known.items], [len(known.items) > 0], wanted)
        return replace(answer, unknown=unknown)

    def recommend_many(
        self,
        users: Iterable[str],
        k: int = 10,
        exclude_seen: bool | None = None,
        candidates: Iterable[str] | None = None,
        why: bool = False,
    ) -> list[Recommendations]:
        """As :meth:`recommend`, of many users in one pass.

        A user whose state is damaged or of another version is recommended what most users have, and ``.problem`` of
        that answer says so, as does the log.
        """
        users = as_ids(users, "users")
        answers, problems = self._recommend_users(users, self._wanted(k, exclude_seen, candidates, why))
        for error in problems.values():
            getLogger("recbole_holo").error("%s", error)
        both = zip(users, answers, strict=True)
        return [replace(one, problem=str(problems[u])) if u in problems else one for u, one in both]

    def similar_items(self, item: str, k: int = 10) -> list[Suggestion]:
        """The items whose vectors point most nearly where this item's does (cosine).

        Raises:
            DataError: no such item.
        """
        number = self.catalogue.number(as_id(item, "item"))
        k = as_count(k, "k")
        with torch.no_grad():
            table = F.normalize(self.model.item_vectors(), dim=-1)
            cosines = table @ table[number]
        cosines[torch.tensor([0, number], device=cosines.device)] = -torch.inf
        best = cosines.topk(min(k, len(table) - 2))
        return [self._suggestion(*pair) for pair in zip(best.indices.tolist(), best.values.tolist(), strict=True)]

    def forget(self, users: Iterable[str]) -> None:
        """Deletes all that is kept of users, whatever version it is of."""
        gone = as_ids(users, "users")
        with self._lock:
            self.store.delete(gone)

    # ------------------------------------------------------------------ inside: events
    def _apply_sound(self, events: Sequence[Event]) -> list[str]:
        """:meth:`_apply` without the users whose states cannot be used."""
        damaged: set[str] = set()
        while True:
            try:
                done = iter(self._apply([event for event in events if event.user not in damaged]))
                break
            except StateError as error:  # nothing of this batch is stored yet
                damaged.add(error.user)
                getLogger("recbole_holo").error("%s", error)
        return ["skipped: damaged state" if event.user in damaged else next(done) for event in events]

    def _apply(self, events: Sequence[Event]) -> list[str]:
        users = list(dict.fromkeys(event.user for event in events))
        with self._lock:
            for attempt in range(ATTEMPTS):
                try:
                    return self._apply_to(users, events)
                except Conflict:
                    if attempt == ATTEMPTS - 1:
                        raise
        raise AssertionError  # pragma: no cover

    def _apply_to(self, users: Sequence[str], events: Sequence[Event]) -> list[str]:
        with self.store.holding(users):
            stored = dict(zip(users, self.store.get(users, self.version), strict=True))
            records = {user: self._decoded(data, user) or self._empty() for user, data in stored.items()}
            new: dict[str, list[tuple[int, float]]] = {}
            outcomes = [self._outcome(event, records[event.user], new) for event in events]
            if new:
                self._read({user: records[user] for user in new}, list(new.values()))
                self.store.put({user: self.codec.encode(records[user]) for user in new}, self.version, stored)
        return outcomes

    def _outcome(self, event: Event, record: Record, new: dict[str, list[tuple[int, float]]]) -> str:
        """What becomes of an event; one that is read is noted in the record and added to ``new`` with the time since
        the event before."""
        number = self.catalogue.numbers.get(event.item)
        if number is None:
            return "skipped: unknown item"
        key = None if event.id is None else event_key(event.id)
        if key is not None and (record.ids == key).any():
            return "skipped: repeated"
        time = as_time(event.timestamp, self.time_unit)
        late = time is not None and time < record.time  # never so of nan
        if late and self.late == "skip":
            return "skipped: late"
        if key is not None:
            record.ids = np.append(record.ids[1 - EVENT_IDS :], key)
        since = np.nan if time is None else time - record.time
        if time is not None and not late:
            record.time = time
        if time is None and self._buckets is not None:
            self._tell_of_times()
        record.seen = _with(record.seen, number, self.remember)
        new.setdefault(event.user, []).append((number, since))
        return "late" if late else "applied"

    @torch.no_grad()
    def _read(self, records: dict[str, Record], events: list[list[tuple[int, float]]]) -> None:
        """Moves the states of ``records`` on by ``events`` each, items and the times before them."""
        most = max(map(len, events))
        for start in range(0, most, TOGETHER):
            parts = {user: own[start : start + TOGETHER] for user, own in zip(records, events, strict=True)}
            parts = {user: part for user, part in parts.items() if part}
            state = self._state(parts, [records[user] for user in parts])
            batch, gaps = self._batch([tuple(np.array(part).T) for part in parts.values()])
            if batch.shape[1] == 1:
                since = None if gaps is None else gaps[:, 0]
                _, state = self.model.step(batch[:, 0], state, in_place=True, gaps=since)
            else:
                _, state = self.model.advance(batch, state, in_place=True, gaps=gaps)
            self._note(state, parts, [records[user] for user in parts])

    def _batch(self, histories: Sequence[tuple[Any, ...]]) -> tuple[Tensor, Tensor | None]:
        """Items ``[B, L]`` of histories of items and gaps, pads on the right, and what the model reads of the times."""
        padded = np.zeros((len(histories), max([1, *(len(items) for items, *_ in histories)])), dtype=np.int64)
        since = np.full(padded.shape, np.nan)
        for row, times, (items, gaps, *_) in zip(padded, since, histories, strict=True):
            row[: len(items)], times[: len(items)] = items, gaps
        read = None if self._buckets is None else torch.from_numpy(self._buckets(since)).to(self._device)
        return torch.from_numpy(padded).to(self._device), read

    def _tell_of_times(self) -> None:
        if not self._told:
            self._told = True
            getLogger("recbole_holo").warning("events without timestamps: the model reads times (event_time: gap)")

    def _state(self, users: Iterable[str], records: list[Record]) -> State:
        layout = self.codec.layout
        numbers = np.empty((len(records), layout.size), dtype=np.float32)
        recent = np.zeros((len(records), layout.recent), dtype=np.int64)
        for row, record in enumerate(records):
            numbers[row] = record.numbers
            recent[row, : len(record.recent)] = record.recent
        check_finite(numbers, list(users), "in the store")
        events = np.array([record.events for record in records], dtype=np.int64)
        return State(*(torch.from_numpy(array).to(self._device) for array in (events, recent, numbers)))

    def _note(self, state: State, users: Iterable[str], records: list[Record]) -> None:
        events, recent, numbers = (tensor.cpu().numpy() for tensor in state)
        check_finite(numbers, list(users), "after this event")
        for row, record in enumerate(records):
            record.events, record.numbers = int(events[row]), numbers[row]
            if recent.shape[1]:
                record.recent = recent[row][recent[row] > 0].astype(np.int32)

    def _empty(self) -> Record:
        return Record(np.zeros(self.codec.layout.size, dtype=np.float32))

    def _decoded(self, data: bytes | None, user: str) -> Record | None:
        return None if data is None else self.codec.decode(data, user)

    def _encoded(self, histories: Sequence[Any], users_before: set[str], outcomes: Counter[str]) -> dict[str, bytes]:
        """Records of whole histories, those of like lengths together; adds their users to ``users_before``."""
        known: dict[str, _History] = {}
        for history in histories:
            if not isinstance(history, (tuple, list)) or len(history) not in (2, 3):
                raise ConfigError("histories", history, "use (user, items) or (user, items, timestamps) for each")
            user, items = as_id(history[0], "user"), as_ids(history[1], "history", ordered=True)
            if user in users_before:
                raise ConfigError("histories", user, "the user is there twice: give all events in one history")
            users_before.add(user)
            known[user] = self._known(items, *history[2:])
            outcomes["applied"] += len(known[user].items)
            outcomes["skipped: unknown item"] += len(items) - len(known[user].items)
        made: dict[str, bytes] = {}
        for users in _alike({user: history.items for user, history in known.items()}):
            records = [self._empty() for _ in users]
            self._note(self._encode([known[user] for user in users]), users, records)
            for user, record in zip(users, records, strict=True):
                record.seen, record.time = _latest_distinct(known[user].items, self.remember), known[user].time
                made[user] = self.codec.encode(record)
        return made

    def _known(self, items: Sequence[str], timestamps: Iterable[Any] | None = None) -> _History:
        """A history without the items that the model does not know."""
        if timestamps is None:
            if self._buckets is not None and len(items):
                self._tell_of_times()
            timestamps = [None] * len(items)
        given = [as_time(time, self.time_unit) for time in as_list(timestamps, "timestamps", ordered=True)]
        if len(given) != len(items):
            raise ConfigError("timestamps", len(given), f"give one for each of the {len(items)} items")
        numbers = np.array([self.catalogue.numbers.get(item, 0) for item in items], dtype=np.int32)
        times = np.array([np.nan if time is None else time for time in given])[numbers > 0]
        return _History(numbers[numbers > 0], since_latest(times), float(np.fmax.reduce(times, initial=np.nan)))

    def _encode(self, histories: Sequence[_History]) -> State:
        items, gaps = self._batch(histories)
        return self.model.encode(items, gaps)

    def _hidden_of(self, histories: Sequence[_History]) -> Tensor:
        return self.model.last_hidden(self._encode(histories))

    # ------------------------------------------------------------------ inside: answers
    def _wanted(self, k: int, exclude_seen: bool | None, candidates: Iterable[str] | None, why: bool) -> _Wanted:
        numbers = None
        if candidates is not None:
            numbers = np.unique([self.catalogue.number(item) for item in as_ids(candidates, "candidates")]).astype(int)
        if exclude_seen not in (None, False, True):
            raise ConfigError("exclude_seen", exclude_seen, "use True, False or None")
        return _Wanted(
            as_count(k, "k"), self.excludes_seen if exclude_seen is None else bool(exclude_seen), numbers, why
        )

    def _recommend_users(
        self, users: Sequence[str], wanted: _Wanted
    ) -> tuple[list[Recommendations], dict[str, StateError]]:
        """Answers, and of the users whose states cannot be used why."""
        numbers = np.zeros((len(users), self.model.hidden_size), dtype=np.float32)
        seen, known, problems = [np.zeros(0, np.int32)] * len(users), [False] * len(users), {}
        for i, (user, data) in enumerate(zip(users, self.store.get(users, self.version), strict=True)):
            try:
                record = self._decoded(data, user)
                if record is not None and record.events:
                    row = record.numbers[: numbers.shape[1]]
                    check_finite(row[None], [user], "in the store")
                    numbers[i], seen[i], known[i] = row, record.seen, True
            except StateError as error:
                problems[user] = error
        return self._answer(users, torch.from_numpy(numbers).to(self._device), seen, known, wanted), problems

    @torch.no_grad()
    def _answer(
        self,
        users: Sequence[str | None],
        hidden: Tensor,
        seen: Sequence[np.ndarray],
        known: Sequence[bool],
        wanted: _Wanted,
    ) -> list[Recommendations]:
        k, candidates = wanted.k, wanted.candidates
        excluded = seen if wanted.exclude_seen else [seen_by[:0] for seen_by in seen]
        if candidates is None:
            found = top_items(self.model, hidden, k, excluded, self.index)
        else:
            left = [torch.from_numpy(candidates[~np.isin(candidates, gone)]).to(self._device) for gone in excluded]
            found = [best_of(self.model, row, k, own) for row, own in zip(hidden, left, strict=True)]
        answers = []
        for row, (user, (items, scores)) in enumerate(zip(users, found, strict=True)):
            if not known[row]:
                popular = self._popular if candidates is None else self._popular[np.isin(self._popular, candidates)]
                items = popular[:k].tolist()
                scores = self.catalogue.popularity[items].tolist()
            reasons = self._reasons(hidden[row], items) if wanted.why and known[row] else [""] * len(items)
            basis = "history" if known[row] else "popularity"
            suggestions = [self._suggestion(*each) for each in zip(items, scores, reasons, strict=True)]
            answers.append(Recommendations(suggestions, basis, user))
        return answers

    def _suggestion(self, number: int, score: float, why: str = "") -> Suggestion:
        return Suggestion(self.catalogue.tokens[number], self.catalogue.titles[number], score, why)

    def _reasons(self, hidden: Tensor, items: Sequence[int]) -> list[str]:
        """Of each item, those of its attribute values that the state holds most strongly."""
        binding = getattr(self.model, "binding", None)
        if binding is None or binding.form == "concat":
            return [""] * len(items)
        held = {(r.attribute, r.value): r.similarity for r in readings_of(self.model, hidden, k=5)}
        reasons = []
        for item in items:
            own = [
                (v.name, v.labels[value]) for v in binding.attributes for value in v.index[item].reshape(-1).tolist()
            ]
            mine = sorted({pair for pair in own if pair in held}, key=lambda pair: -held[pair])
            reasons.append(", ".join(f"{name}: {value}" for name, value in mine))
        return reasons

    # ------------------------------------------------------------------ inside: versions
    def _version(self, storage: str) -> str:
        """What states depend on, as a short hash: a state of another version means nothing to this model."""
        digest = hashlib.blake2b(digest_size=16)
        parts = [type(self.model).__name__, str(self.model.state_layout()), storage]
        digest.update("\0".join([*parts, *self.catalogue.tokens]).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()


def _check_events(events: Sequence[Any]) -> None:
    for event in events:
        if not isinstance(event, Event):
            raise ConfigError("events", event, "it is no Event: use Event(user, item, timestamp, id)")


def _with(seen: np.ndarray, item: int, most: int) -> np.ndarray:
    """``seen`` with an item as the latest, at most so many."""
    if (seen == item).any():
        seen = seen[seen != item]
    return np.concatenate([seen, np.array([item], np.int32)])[max(len(seen) + 1 - most, 0) :]


def _latest_distinct(items: np.ndarray, most: int) -> np.ndarray:
    """The latest ``most`` distinct items, in the order of their last occurrence."""
    _, first = np.unique(items[::-1], return_index=True)
    return items[np.sort(len(items) - 1 - first)][-most:] if most else items[:0]


def _batches(values: Iterable[Any], size: int) -> Iterator[list[Any]]:
    batch = []
    for value in values:
        batch.append(value)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


def _alike(histories: dict[str, np.ndarray]) -> Iterator[list[str]]:
    """Users in batches of like lengths and at most POSITIONS positions, if a history is not longer by itself."""
    batch: list[str] = []
    for user in sorted(histories, key=lambda user: len(histories[user])):
        if batch and (len(batch) + 1) * len(histories[user]) > POSITIONS:
            yield batch
            batch = []
        batch.append(user)
    if batch:
        yield batch
