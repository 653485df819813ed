"""From logs of any length to RecBole's atomic files, in memory that does not grow with the number of events.

The logs are read twice. The first pass checks every line, counts users and items, and compares with the published
counts. The second writes the events that are kept to temporary files beside the output, 16 bytes an event, each with
a range of users and small enough to be sorted in memory. Sorting and filtering go over these files. Memory holds
counts by user and item (4 bytes for each id up to the largest), one of the temporary files, and a block of text.

**Order of the steps.** Events of the wrong kind and events without an item are left out; users with fewer than
``min_history`` events are dropped, and ``max_users`` of the others are drawn; each user's events are sorted by time,
ties in the order of the files; repeated items are dropped; users who now have fewer than ``min_history`` events are
dropped; users and items with fewer than ``k_core`` events are dropped until none is left, and users with fewer than
``min_history`` with them, so that both hold at the end.

**Numbers.** Users and items are numbered from 1 in the order of their raw ids, without gaps. RecBole takes these for
names and numbers them again, with 0 for padding, so no raw id can be mistaken for the pad; nor can these numbers, for
those who read the files without RecBole. The raw ids are in the ``.user`` and ``.item`` files (``raw_user_id``,
``raw_item_id``).

**Time.** RecBole holds a ``float`` field in float32, whose 24 bits round milliseconds since 1970 to 131,072 of them
and seconds to 128. So times are whole units since the first kept event, in a unit in which they stay below 2²⁴ and
are exact. The fraction of a unit is lost, the order is not: lines are in the order of the raw times, and sorts by time
that keep the order of ties (RecBole's do) leave it so.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime, timezone
from logging import getLogger
from pathlib import Path

import numpy as np
from tabulate import tabulate
from tqdm import tqdm

from recbole_holo import __version__
from recbole_holo.data.prepare.ids import CountsById, Ids, KindsById
from recbole_holo.data.prepare.lines import BLOCK_BYTES, MAX_ID, Log, check_logs, read_numbers
from recbole_holo.data.prepare.partitions import EVENT, PARTITION_EVENTS, Partitions
from recbole_holo.data.prepare.tables import CHUNK_ROWS, Table, write_table
from recbole_holo.errors import ConfigError, DataError, nearest

_logger = getLogger("recbole_holo")

DEDUPLICATE = ("none", "consecutive", "first")
ALL_KINDS = "all"
EXACT_IN_FLOAT32 = 1 << 24
LATEST_SECOND = 4_102_444_800  # the year 2100: no event is later, but a line may be broken
INTER_LINE_BYTES = 26  # of the .inter file, about


@dataclass(frozen=True)
class Published:
    """Published counts of a data set or of one kind of its logs; where sources differ, all that are right."""

    users: tuple[int, ...] = ()
    items: tuple[int, ...] = ()
    events: tuple[int, ...] = ()


@dataclass(frozen=True)
class Source:
    """A raw data set.

    Args:
        title: what messages call it.
        name: of the atomic files.
        logs: files of events, in the order in which events of the same time are kept.
        user, item, time: columns of the logs.
        kept_by: column whose number is not 0 in events that are kept; None = all are.
        ticks_per_second: units of the raw times a second.
        unit, ticks_per_unit: name of the unit of the written times, and units of the raw times in it.
        published: counts before anything is left out, by kind of log, and under ``ALL_KINDS`` of all logs together.
        users, items: tables for the ``.user`` and ``.item`` files; None = raw ids only.
    """

    title: str
    name: str
    logs: Sequence[Log]
    user: str
    item: str
    time: str
    kept_by: str | None
    ticks_per_second: int
    unit: str
    ticks_per_unit: int
    published: Mapping[str, Published]
    users: Table | None
    items: Table | None

    @property
    def required(self) -> list[str]:
        """Columns in which every event has a number."""
        return [self.user, self.time, *([self.kept_by] if self.kept_by else [])]


@dataclass(frozen=True)
class Options:
    """What to keep, and how to work.

    Args:
        k_core: users and items have at least that many events.
        min_history: users have at least that many events.
        max_users: draw that many users; None = all.
        seed: of the draw.
        deduplicate: ``none``; ``consecutive`` drops an event with the item of the event just before; ``first`` keeps
            only a user's first event with each item.
        strict: other counts than the published ones and absent tables are errors, not warnings.
        overwrite: replace the data set if it exists.
        name: of the atomic files; None = the source's.
        progress: show progress bars.
        block_bytes, part_events, chunk_rows: what is held in memory at a time; the result does not depend on them.

    Raises:
        ConfigError: a value out of range.
    """

    k_core: int = 0
    min_history: int = 0
    max_users: int | None = None
    seed: int = 2020
    deduplicate: str = "none"
    strict: bool = False
    overwrite: bool = False
    name: str | None = None
    progress: bool = True
    block_bytes: int = BLOCK_BYTES
    part_events: int = PARTITION_EVENTS
    chunk_rows: int = CHUNK_ROWS

    def __post_init__(self) -> None:
        for option, least in (("k_core", 0), ("min_history", 0), ("max_users", 1), ("seed", 0)):
            value = getattr(self, option)
            if value is not None and value < least:
                raise ConfigError(option, value, f"use a whole number of at least {least}")
        if self.deduplicate not in DEDUPLICATE:
            raise ConfigError("deduplicate", self.deduplicate, nearest(self.deduplicate, DEDUPLICATE))
        if self.name is not None and (Path(self.name).name != self.name or self.name[:1] in ("", ".")):
            raise ConfigError("name", self.name, "use a plain name, such as my-data: a folder and its files get it")


@dataclass(frozen=True)
class Step:
    """What is left after a step; items are None where they were not counted."""

    what: str
    users: int
    items: int | None
    events: int


@dataclass
class Report:
    """What was done, and the shape of the result."""

    name: str
    unit: str
    steps: list[Step] = field(default_factory=list)
    longest: int = 0
    first_event: str = ""
    mismatches: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        removed = [
            None,
            *(before.events - step.events for before, step in zip(self.steps, self.steps[1:], strict=False)),
        ]
        rows = [[s.what, s.users, s.items, s.events, gone] for s, gone in zip(self.steps, removed, strict=True)]
        table = tabulate(rows, [self.name, "users", "items", "events", "removed"], intfmt=",")
        last = self.steps[-1]
        facts = {
            "longest history": f"{self.longest:,}",
            "mean history": f"{last.events / last.users:,.1f}",
            "density": f"{last.events / last.users / (last.items or 1):.4%}",
            "timestamp": f"{self.unit}s since {self.first_event}",
        }
        return f"{table}\n\n{tabulate(facts.items(), tablefmt='plain', disable_numparse=True)}"


def convert(source: Source, out_dir: str | os.PathLike[str], options: Options | None = None) -> Report:
    """Writes ``<name>.inter``, ``.item``, ``.user`` and ``.json`` (what was done) into ``out_dir/<name>/``.

    They are complete or not there at all: they are made in a hidden folder in ``out_dir``, which gets its name at the
    end, and is removed after an error or an interruption. ``.user`` and ``.item`` have a row for every user and item.

    Raises:
        DataError: a raw file that cannot be used; counts that differ, with ``strict``; an output that exists; too
            little room on the disk; nothing left.
    """
    options = options or Options()
    target = Path(out_dir) / (options.name or source.name)
    _check_target(target, options.overwrite)
    check_logs(source.logs, [*source.required, source.item])
    absent = [str(t.path) for t in (source.users, source.items) if t and not t.path.is_file()]
    if absent and options.strict:
        raise DataError(f"{', '.join(absent)}: not there; unpack all of {source.title}, or convert without strict.")
    if absent:
        _logger.warning(f"{', '.join(absent)}: not there, so .user or .item will have raw ids only")
    with _work_folder(target) as work:
        report = _Conversion(source, options, target.name, work).run()
        _publish(work / "new", target, work / "old")
    return report


class _Conversion:
    """The passes of one conversion."""

    def __init__(self, source: Source, options: Options, name: str, work: Path) -> None:
        self.source, self.options, self.name, self.work = source, options, name, work
        self.report = Report(name, source.unit)

    def run(self) -> Report:
        source, options, new = self.source, self.options, self.work / "new"
        users, items, first_time = self._count()
        users = self._choose(users)
        parts = self._partition(users, items)
        self._filter(parts)

        new.mkdir()
        user_token, item_token = _numbered(parts.users > 0), _numbered(parts.items > 0)
        with (new / f"{self.name}.inter").open("wb") as file:
            file.write(b"user_id:token\titem_id:token\ttimestamp:float\n")
            parts.write(file, user_token, item_token, lambda time: (time - first_time) // source.ticks_per_unit)
        for table, kind, ids, tokens in (
            (source.users, "user", users.ids, user_token),
            (source.items, "item", items.ids, item_token),
        ):
            kept, path = tokens > 0, new / f"{self.name}.{kind}"
            write_table(table, path, kind, ids[kept], tokens[kept], self._bar, options.chunk_rows)
        self.report.longest = int(parts.users.max())
        done = {
            "recbole_holo": __version__,
            "source": source.title,
            "logs": {log.path.name: log.path.stat().st_size for log in source.logs},
            "kept_by": source.kept_by,
            "options": asdict(options),
            **asdict(self.report),
        }
        (new / f"{self.name}.json").write_text(json.dumps(done, indent=1) + "\n", encoding="utf-8")
        return self.report

    # ------------------------------------------------------------------ passes over the logs
    def _count(self) -> tuple[Ids, Ids, int]:
        """Users and items of the events to keep, and the time of the first."""
        source = self.source
        kinds = sorted({log.kind for log in source.logs})
        read = dict.fromkeys(kinds, 0)
        seen_users, seen_items = KindsById(kinds), KindsById(kinds)
        users, items = CountsById(), CountsById()
        first, last = np.iinfo(np.int64).max, 0
        for log, block in self._blocks("reading, pass 1 of 2"):
            user, item, kept = block[source.user], block[source.item], self._kept(block)
            read[log.kind] += len(user)
            seen_users.add(user, log.kind)
            seen_items.add(item[item >= 0], log.kind)
            users.add(user[kept])
            items.add(item[kept])
            first = min(first, int(block[source.time][kept].min(initial=first)))
            last = max(last, int(block[source.time][kept].max(initial=last)))

        self._compare(read, seen_users, seen_items)
        self._step("in the raw data", seen_users.count(), seen_items.count(), sum(read.values()))
        kept_users, kept_items = Ids.of(users), Ids.of(items)
        events = int(kept_users.events.sum(dtype=np.int64))
        if source.kept_by or events < sum(read.values()):
            what = f"{source.kept_by} is not 0" if source.kept_by else f"{source.item} is known"
            self._step(what, len(kept_users.ids), len(kept_items.ids), events)
        moment = datetime.fromtimestamp(first / source.ticks_per_second, timezone.utc)
        self.report.first_event = moment.isoformat(timespec="milliseconds")
        if (last - first) // source.ticks_per_unit >= EXACT_IN_FLOAT32:
            _logger.warning(
                f"{source.title}: the last event is more than {EXACT_IN_FLOAT32:,} {source.unit}s after the first "
                f"({self.report.first_event}), so float32 rounds late times. Is a clock wrong in the data?"
            )
        return kept_users, kept_items, first

    def _partition(self, users: Ids, items: Ids) -> Partitions:
        """The events of ``users`` on disk, users and items by their position."""
        source = self.source
        events = int(users.events.sum(dtype=np.int64))
        needed, free = events * (EVENT.itemsize + INTER_LINE_BYTES), shutil.disk_usage(self.work).free
        if free < needed:
            raise DataError(
                f"{self.work.parent}: {events:,} events need about {needed / 1e9:,.1f} GB there, and "
                f"{free / 1e9:,.1f} GB are free; choose another place or a smaller max_users."
            )
        parts = Partitions(self.work, users.events, len(items.ids), self._bar, self.options.part_events)
        user_number, item_number = users.numbers(), items.numbers()
        for _, block in self._blocks("reading, pass 2 of 2"):
            kept = np.flatnonzero(self._kept(block))
            user = user_number[block[source.user][kept]]
            kept, user = kept[user >= 0], user[user >= 0]
            parts.append(user, item_number[block[source.item][kept]], block[source.time][kept])
        return parts

    def _blocks(self, what: str) -> Iterator[tuple[Log, dict[str, np.ndarray]]]:
        source = self.source
        limits = {source.user: MAX_ID, source.item: MAX_ID, source.time: LATEST_SECOND * source.ticks_per_second}
        with self._bar(what, sum(log.path.stat().st_size for log in source.logs)) as bar:
            for log in source.logs:
                for block in read_numbers(log, source.required, [source.item], limits, bar, self.options.block_bytes):
                    yield log, block

    def _kept(self, block: dict[str, np.ndarray]) -> np.ndarray:
        has_item = block[self.source.item] >= 0
        return has_item & (block[self.source.kept_by] != 0) if self.source.kept_by else has_item

    def _compare(self, read: dict[str, int], seen_users: KindsById, seen_items: KindsById) -> None:
        """Warns, or with ``strict`` raises, where counts are not the published ones."""
        for kind, published in self.source.published.items():
            one = None if kind == ALL_KINDS else kind
            found = {
                "users": seen_users.count(one),
                "items": seen_items.count(one),
                "events": sum(read.values()) if one is None else read[kind],
            }
            for what, number in found.items():
                right = getattr(published, what)
                if right and number not in right:
                    expected = " or ".join(f"{n:,}" for n in right)
                    self.report.mismatches.append(f"{kind} logs: {number:,} {what} found, {expected} published")
        if self.report.mismatches:
            message = (
                f"{self.source.title} is not as published, so this copy may be incomplete: "
                + "; ".join(self.report.mismatches)
                + "."
            )
            if self.options.strict:
                raise DataError(f"{message} Get it again, or convert without strict.")
            _logger.warning(message)

    # ------------------------------------------------------------------ choosing and filtering
    def _choose(self, users: Ids) -> Ids:
        """Users with enough events, and of these a draw; what cannot be told before events are sorted comes later."""
        least, most = self.options.min_history, self.options.max_users
        if least > 1:
            users = users.chosen(users.events >= least)
            self._step(f"users with {least:,}+ events", len(users.ids), None, int(users.events.sum(dtype=np.int64)))
        if most is not None and most < len(users.ids):
            drawn = np.random.default_rng(self.options.seed).choice(len(users.ids), most, replace=False)
            users = users.chosen(np.sort(drawn))
            self._step(f"a draw of {most:,} users", most, None, int(users.events.sum(dtype=np.int64)))
        return users

    def _filter(self, parts: Partitions) -> None:
        options = self.options

        def step(what: str) -> None:
            users, items = int(np.count_nonzero(parts.users)), int(np.count_nonzero(parts.items))
            self._step(what, users, items, int(parts.users.sum(dtype=np.int64)))

        parts.arrange(options.deduplicate)
        if (last := self.report.steps[-1]).items is None:  # dropping repeats takes no item away
            self.report.steps[-1] = replace(last, items=int(np.count_nonzero(parts.items)))
        if options.deduplicate != "none":
            step({"consecutive": "consecutive repeats dropped", "first": "first of each item"}[options.deduplicate])
            if parts.keep_frequent(options.min_history, 0):
                step(f"users with {options.min_history:,}+ events")
        if options.k_core > 1:
            parts.keep_frequent(max(options.k_core, options.min_history), options.k_core)
            step(f"{options.k_core:,}-core")

    def _step(self, what: str, users: int, items: int | None, events: int) -> None:
        self.report.steps.append(Step(what, users, items, events))
        if events == 0:
            raise DataError(f"{self.source.title}: no event is left ({what}); keep more.")

    def _bar(self, what: str, size: int) -> tqdm:
        return tqdm(total=size, desc=what, unit="B", unit_scale=True, disable=not self.options.progress)


def _numbered(kept: np.ndarray) -> np.ndarray:
    """1, 2, … where ``kept``, 0 elsewhere."""
    return np.where(kept, np.cumsum(kept, dtype=np.int32), np.int32(0))


# ---------------------------------------------------------------------- the output folder
def _check_target(target: Path, overwrite: bool) -> None:
    if not target.exists():
        return
    if not target.is_dir():
        raise DataError(f"{target} exists and is no folder; choose another place or name.")
    there = sorted(path.name for path in target.iterdir())
    if not overwrite:
        raise DataError(f"{target} exists (with {', '.join(there) or 'nothing in it'}); say overwrite to replace it.")
    foreign = [name for name in there if not name.startswith(f"{target.name}.")]
    if foreign:
        raise DataError(f"{target} holds other files than {target.name}'s ({', '.join(foreign)}); move them away.")


@contextmanager
def _work_folder(target: Path) -> Iterator[Path]:
    """A hidden folder beside ``target``, removed at the end with the folders that had to be made for it, if empty."""
    made = [folder for folder in target.parents if not folder.exists()]  # innermost first
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent)
    except OSError as error:
        raise DataError(f"{target.parent} cannot be written to ({error.strerror}); choose another place.") from error
    try:
        yield Path(work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
        for folder in made:
            with suppress(OSError):  # not empty: the data set is there
                folder.rmdir()


def _publish(new: Path, target: Path, old: Path) -> None:
    """Puts ``new`` in the place of ``target``; where that is interrupted, ``target`` stays as it was."""
    try:
        if target.exists():
            target.rename(old)
        new.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        raise
