"""Recommendations from a checkpoint, for people.

``python -m recbole_holo.recommend --checkpoint F --history "Toy Story|Heat"`` prints a table; ``--user U`` answers for
a user whose states are in a ``--store``; ``--interactive`` takes items one at a time and shows how the list changes.
Items are given by their title or by their id in the data set's files.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterable, Sequence

from recbole_holo.bridge.checkpoint import CheckpointError
from recbole_holo.data.ids import numbers_in
from recbole_holo.errors import ConfigError, DataError, MissingExtra
from recbole_holo.inference.recommender import Recommendations, Recommender
from recbole_holo.inference.records import StateError
from recbole_holo.inference.stores import SQLiteStore, StoreError

ERRORS = (ConfigError, DataError, CheckpointError, FileNotFoundError, MissingExtra, StateError, StoreError)


def main(argv: Sequence[str] | None = None) -> int:
    """The command; exit status 2 for input that cannot be used."""
    flags = argparse.ArgumentParser(
        prog="python -m recbole_holo.recommend", description="Recommendations from a checkpoint."
    )
    flags.add_argument("--checkpoint", required=True, help="file written by a run")
    flags.add_argument("--history", help='items, oldest first, by title or id: "Toy Story|Heat"')
    flags.add_argument("--times", help="of the history's events, for a model that reads them: 978300019|978300055")
    flags.add_argument("--user", help="a user whose states are in the store")
    flags.add_argument("--store", help="file of an SQLiteStore")
    flags.add_argument("--interactive", action="store_true", help="take items one at a time, from the keyboard")
    flags.add_argument("--k", type=int, default=10, help="items to recommend")
    seen = flags.add_mutually_exclusive_group()
    seen.add_argument("--include_seen", action="store_true", help="recommend what the user has, too")
    seen.add_argument("--exclude_seen", action="store_true", help="leave out what the user has")
    args = flags.parse_args(argv)
    try:
        if (args.history is None) + (args.user is None) + (not args.interactive) != 2:
            raise ConfigError("history, user, interactive", None, "give one of the three")
        if args.times is not None and args.history is None:
            raise ConfigError("times", args.times, "they are those of a --history: give one, or leave them out")
        if args.user is not None and args.store is None:
            raise ConfigError("store", None, "a user's state is in a store: name its file, or give a --history")
        if args.store is not None and not os.path.isfile(args.store):
            raise ConfigError("store", args.store, "there is no such file")
        store = None if args.store is None else SQLiteStore(args.store)
        recommender = Recommender.load(args.checkpoint, store)
        asked = args.include_seen or args.exclude_seen
        settings = {"k": args.k, "exclude_seen": args.exclude_seen if asked else None, "why": binds(recommender)}
        history = [token_of(recommender, text) for text in args.history.split("|")] if args.history is not None else []
        if history:
            read = (recommender.catalogue.named(recommender.catalogue.number(item)) for item in history)
            print(f"history: {' | '.join(read)}", file=sys.stderr)
        if not asked:
            print(recommender.about_seen_items(), file=sys.stderr)
        if args.interactive:
            converse(recommender, sys.stdin, **settings)
        elif args.user is not None:
            print(with_basis(recommender.recommend(args.user, **settings)))
        else:
            times = None if args.times is None else numbers_in(args.times, "times")
            print(with_basis(recommender.recommend(history=history, timestamps=times, **settings)))
    except ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def binds(recommender: Recommender) -> bool:
    """Whether the model's vectors can be read back, so that there are reasons to show."""
    binding = getattr(recommender.model, "binding", None)
    return binding is not None and binding.form != "concat"


def token_of(recommender: Recommender, text: str) -> str:
    """An item's id, by its id or title."""
    return recommender.catalogue.tokens[recommender.catalogue.find(text.strip())]


def with_basis(found: Recommendations) -> str:
    """The table, and where nothing is known of the user a line that says so."""
    note = "" if found.basis == "history" else "Nothing is known of this user: what most users have.\n"
    return f"{note}{found}"


def converse(recommender: Recommender, lines: Iterable[str], k: int, exclude_seen: bool | None, why: bool) -> None:
    """Reads items line by line; after each the new list, with the ranks that changed. An empty line ends it."""
    before, user = None, "you"
    print("An item by title or id, one a line; an empty line ends.")
    for line in lines:
        if not line.strip():
            break
        try:
            token = token_of(recommender, line)
        except DataError as error:
            print(error)
            continue
        recommender.update(user, token)
        found = recommender.recommend(user, k, exclude_seen=exclude_seen, why=why)
        print(f"\nafter {recommender.catalogue.named(recommender.catalogue.number(token))}:\n{found.table(before)}")
        before = found.items
    recommender.forget([user])


if __name__ == "__main__":
    sys.exit(main())
