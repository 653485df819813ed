"""How a run becomes several processes: started here (``--nproc``), or by ``torchrun``."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch

from recbole_holo.bridge.checkpoint import CheckpointError
from recbole_holo.errors import ConfigError, DataError, MissingExtra, NonFiniteLoss, ProcessDied

TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# What a user can mend is said in a line, as in a single process.
SAID_IN_A_LINE = (ConfigError, DataError, CheckpointError, FileNotFoundError, MissingExtra, NonFiniteLoss, ProcessDied)
SECONDS_TO_END = 30  # for processes that were asked to


def of_torchrun() -> dict[str, int] | None:
    """The settings by which this process joins the group that ``torchrun`` (or another that sets its variables) has
    started; None where nobody has.

    Raises:
        ConfigError: there is a group, and a variable is lacking or no number.
    """
    found = {name: os.environ.get(name, "") for name in TORCHRUN}
    if found["WORLD_SIZE"] in ("", "1") and not torch.distributed.is_initialized():
        return None
    for name, value in found.items():
        if not (value if name == "MASTER_ADDR" else value.isdecimal()):
            raise ConfigError(
                f"environment: {name}",
                value,
                f"a group's process needs {', '.join(TORCHRUN)}: start it with torchrun, or unset WORLD_SIZE and use "
                "--nproc",
            )
    rank, local_rank = int(found["RANK"]), int(found["LOCAL_RANK"])
    here = os.environ.get("LOCAL_WORLD_SIZE", "")
    return {
        "local_rank": local_rank,
        "nproc": int(here) if here.isdecimal() else local_rank + 1,
        "world_size": int(found["WORLD_SIZE"]),
        "offset": rank - local_rank,
    }


def refuse_torchrun(what: str) -> None:
    """
    Raises:
        ConfigError: this process is one of a group, and ``what`` is of a single one.
    """
    group = of_torchrun()
    if group is not None:
        raise ConfigError("environment: WORLD_SIZE", group["world_size"], f"{what} is of one process; no torchrun")


def together(work: Callable[[int], Any], nproc: int) -> Any:
    """Runs ``work(rank)`` in ``nproc`` new processes, rank 0 to ``nproc - 1``.

    Results pass through files, whatever their size. When a process ends before its work is done, the others, which
    would wait for it, are ended, too: asked, and 30 seconds later forced.

    Args:
        work: it can be pickled, and the processes can import what it needs.

    Returns:
        What rank 0 returned.

    Raises:
        Exception: what a process raised, of the errors that are said in a line.
        ProcessDied: a process was killed, ended without a result, or raised something else; then with its traceback.
    """
    with tempfile.TemporaryDirectory(prefix="recbole_holo-") as folder:
        processes = torch.multiprocessing.spawn(_work, args=(work, folder), nprocs=nproc, join=False).processes
        running = {process.sentinel: process for process in processes}
        try:
            while running:
                for sentinel in wait(list(running)):
                    process = running.pop(sentinel)
                    process.join()
                    if process.exitcode != 0:
                        raise _cause(processes, Path(folder))
        finally:
            _end(list(running.values()))
        result = Path(folder, "result")
        if not result.exists():
            raise ProcessDied("nproc: the first process was interrupted and has no result")
        return pickle.loads(result.read_bytes())


def _work(rank: int, work: Callable[[int], Any], folder: str) -> None:
    try:
        result = work(rank)
    except SAID_IN_A_LINE as error:
        Path(folder, "error").write_bytes(pickle.dumps(error))
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except Exception:
        Path(folder, f"{rank}.traceback").write_text(traceback.format_exc())
        sys.exit(1)
    if rank == 0:
        Path(folder, "result").write_bytes(pickle.dumps(result))


def _cause(processes: Sequence[BaseProcess], folder: Path) -> Exception:
    """Why the first of the processes ended that did: it need not be the first that was seen to end."""
    error, tracebacks = folder / "error", sorted(folder.glob("*.traceback"), key=lambda file: file.stat().st_mtime_ns)
    if error.exists():
        return pickle.loads(error.read_bytes())
    codes = {rank: process.exitcode for rank, process in enumerate(processes) if process.exitcode}
    rank = min(codes, key=lambda rank: (codes[rank] > 0, rank))  # a killed one first: others fail for want of it
    code = codes[rank]
    if code > 0 and tracebacks:
        return ProcessDied(f"nproc: process {tracebacks[0].stem} of {len(processes)}: {tracebacks[0].read_text()}")
    how = f"was ended by signal {-code} ({signal.strsignal(-code)})" if code < 0 else f"ended with status {code}"
    why = " (memory ran out, or somebody killed it)" if code == -signal.SIGKILL else ""
    return ProcessDied(
        f"nproc: process {rank} of {len(processes)} {how}{why}, and the others were stopped; where a checkpoint was "
        "saved, resume goes on from it"
    )


def _end(processes: Sequence[BaseProcess]) -> None:
    for process in processes:
        process.terminate()
    for process in processes:
        process.join(SECONDS_TO_END)
        process.kill()
        process.join()
