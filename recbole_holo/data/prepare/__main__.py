"""The command: ``python -m recbole_holo.data.prepare kuairand|lfm1b RAW_DIR OUT_DIR [options]``."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
from collections.abc import Sequence

from recbole_holo.data.prepare import kuairand, lfm1b
from recbole_holo.data.prepare.conversion import DEDUPLICATE, Options, convert
from recbole_holo.errors import ConfigError, DataError


def parser() -> argparse.ArgumentParser:
    """The flags of both data sets."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("raw_dir", help="the unpacked archive")
    shared.add_argument("out_dir", help="where the folder with the atomic files goes: RecBole's data_path")
    defaults = Options()
    add = shared.add_argument
    add("--k-core", type=int, default=defaults.k_core, help="users and items have at least that many events")
    add("--min-history", type=int, default=defaults.min_history, help="users have at least that many events")
    add("--max-users", type=int, help="draw that many users, for a smaller trial")
    add("--seed", type=int, default=defaults.seed, help="of the draw (default %(default)s)")
    add(
        "--deduplicate",
        choices=DEDUPLICATE,
        default=defaults.deduplicate,
        help="drop an item that follows itself, or all but a user's first event with it (default %(default)s)",
    )
    add("--name", help="of the data set that is written")
    add("--strict", action="store_true", help="an incomplete copy is an error: other counts than published, no tables")
    add("--overwrite", action="store_true", help="replace the data set if it exists")
    add("--quiet", action="store_true", help="no progress bars")

    program = argparse.ArgumentParser(
        prog="python -m recbole_holo.data.prepare",
        description="Convert a public download to RecBole's atomic files, in bounded memory. The disk of OUT_DIR needs "
        "room for 16 bytes an event besides the files.",
    )
    sets = program.add_subparsers(dest="data_set", required=True)
    kuai = sets.add_parser("kuairand", parents=[shared], help="KuaiRand-27K, -1K or -Pure", allow_abbrev=False)
    kuai.add_argument("--version", choices=kuairand.VERSIONS, help="by default the one that is there")
    kuai.add_argument("--logs", choices=kuairand.LOGS, default="all", help="kinds of log (default %(default)s)")
    kuai.add_argument("--keep", choices=kuairand.KEEP, default="clicked", help="kinds of event (default %(default)s)")
    lfm = sets.add_parser("lfm1b", parents=[shared], help="LFM-1b", allow_abbrev=False)
    lfm.add_argument("--item", choices=lfm1b.ITEMS, default="track", help="what is an item (default %(default)s)")
    return program


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; exit status 2 for input that cannot be used, 130 for an interruption, else 0."""
    args = parser().parse_args(argv)
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        options = Options(
            k_core=args.k_core,
            min_history=args.min_history,
            max_users=args.max_users,
            seed=args.seed,
            deduplicate=args.deduplicate,
            strict=args.strict,
            overwrite=args.overwrite,
            name=args.name,
            progress=not args.quiet,
        )
        if args.data_set == "kuairand":
            source = kuairand.source(args.raw_dir, args.version, args.logs, args.keep)
        else:
            source = lfm1b.source(args.raw_dir, args.item)
        print(convert(source, args.out_dir, options))
    except (ConfigError, DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # cleans up as for Ctrl-C
    sys.exit(main())
