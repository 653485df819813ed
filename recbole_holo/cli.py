"""The command: ``python run_recbole_holo.py --model=HoloMambaRec --dataset=ml-1m [--any_key=value]``."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence

from recbole_holo.bridge.compat import quiet_recbole
from recbole_holo.errors import ConfigError, TrialsFailed
from recbole_holo.openmp import set_waiting


def parser() -> argparse.ArgumentParser:
    """RecBole's own flags, and the search for hyper-parameters."""
    flags = argparse.ArgumentParser(
        prog="run_recbole_holo.py",
        description="Train and test a model of recbole_holo or RecBole; every key of a config file is also a flag.",
        epilog="Any setting can be given as --key=value, e.g. --epochs=20 --MAX_ITEM_LIST_LENGTH=200.",
        allow_abbrev=False,
    )
    flags.add_argument("--model", "-m", default="HoloMambaRec", help="a model of recbole_holo or RecBole")
    flags.add_argument("--dataset", "-d", default="ml-100k", help="a data set in RecBole's atomic files")
    flags.add_argument("--config_files", default="", help='yaml files or presets: "a.yaml HoloMambaRec_paper"')
    flags.add_argument("--search_space", default=None, help="yaml of a search space: tune instead of train")
    flags.add_argument("--search_algo", default="exhaustive", help="exhaustive (grid), random or bayes (tpe)")
    flags.add_argument(
        "--max_evals", type=int, default=None, help="trials at most; by default all of an exhaustive search, else 100"
    )
    flags.add_argument("--search_dir", default=None, help="where the search is kept, default search/MODEL-DATASET")
    flags.add_argument("--search_storage", default=None, help="a file or database URL that several processes share")
    flags.add_argument("--search_seed", type=int, default=2020, help="of what a search draws")
    flags.add_argument("--search_pruner", default="median", help="median: bad trials end early; none: none does")
    flags.add_argument(
        "--search_early_stop", type=int, default=10, help="trials without a better score that end a search; 0: none do"
    )
    flags.add_argument(
        "--profile", action="store_true", help="print parameters, memory and time of every layer instead of training"
    )
    flags.add_argument("--profile_steps", type=int, default=5, help="steps that the times are medians of")
    flags.add_argument("--nproc", type=int, default=1, help="processes on this machine")
    flags.add_argument("--world_size", type=int, default=-1, help="processes on all machines")
    flags.add_argument("--ip", default="localhost", help="address of the first machine")
    flags.add_argument("--port", default="5678", help="port of the first machine")
    flags.add_argument("--group_offset", type=int, default=0, help="rank of this machine's first process")
    return flags


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit status: 2 for input that cannot be used, losses that diverged, a full disk
    or a process of several that died, 130 and 143 when it is stopped by Ctrl-C or SIGTERM, else 0."""
    args, settings = parser().parse_known_args(argv)
    set_waiting()  # before anything that loads PyTorch
    try:
        with quiet_recbole(in_the_command=True):
            return _main(args, settings, sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:  # while PyTorch was loading
        print("stopped by SIGINT: nothing was begun", file=sys.stderr)
        return 130


def _main(args: argparse.Namespace, settings: list[str], words: Sequence[str]) -> int:
    from recbole_holo.training.launch import SAID_IN_A_LINE
    from recbole_holo.training.stopping import Stopped, sigterm_interrupts

    try:
        with sigterm_interrupts():
            _run(args, settings)
    except KeyboardInterrupt as error:
        stopped = error if isinstance(error, Stopped) else Stopped(error, None)
        how = ""
        if stopped.checkpoint and not args.search_space:  # a search goes on by the same command
            how = f"; go on with: {_goes_on(words, stopped.checkpoint)}"
        print(f"{stopped}{how}", file=sys.stderr)
        return 128 + stopped.signal
    except (*SAID_IN_A_LINE, TrialsFailed) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _run(args: argparse.Namespace, settings: list[str]) -> None:
    from recbole_holo.training import launch

    files = args.config_files.split()
    if args.search_space:
        launch.refuse_torchrun("a search")
        from recbole_holo.tuning import tune

        if args.nproc != 1:
            remedy = "a trial is of one process; leave it out, and start the command several times"
            raise ConfigError("nproc", args.nproc, remedy)
        tune(
            args.model,
            args.dataset,
            args.search_space,
            config_file_list=files,
            config_dict=_as_dict(settings),
            algo=args.search_algo,
            max_evals=args.max_evals,
            early_stop=args.search_early_stop or None,
            pruner=args.search_pruner,
            seed=args.search_seed,
            folder=args.search_dir,
            storage=args.search_storage,
        )
    elif args.profile:
        launch.refuse_torchrun("a profile")
        from recbole_holo import profiling

        if args.nproc != 1:
            raise ConfigError("nproc", args.nproc, "a profile is of one process; leave it out")
        profiling.run(args.model, args.dataset, files, steps=args.profile_steps, argv=settings)
    else:
        from recbole_holo.quick_start import run

        run(
            args.model,
            args.dataset,
            files,
            nproc=args.nproc,
            world_size=args.world_size,
            ip=args.ip,
            port=args.port,
            group_offset=args.group_offset,
            argv=settings,
        )


def _goes_on(words: Sequence[str], checkpoint: str) -> str:
    """The command that goes on from a checkpoint."""
    program = {"__main__.py": "python -m recbole_holo", "recbole-holo": "recbole-holo"}.get(
        os.path.basename(sys.argv[0]), f"python {shlex.quote(sys.argv[0])}"
    )
    others = [word for word in words if not word.startswith("--resume=")]
    return f"{program} {shlex.join([*others, f'--resume={checkpoint}'])}"


def _as_dict(words: Sequence[str]) -> dict[str, str]:
    return dict(word[2:].split("=", 1) for word in words if word.startswith("--") and "=" in word)


if __name__ == "__main__":
    sys.exit(main())
