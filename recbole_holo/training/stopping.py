"""Runs that are stopped, or that cannot write, say which checkpoint is good and how to go on."""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from recbole_holo.bridge.checkpoint import NotWritten

DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)  # full, or failing


class Terminated(KeyboardInterrupt):
    """SIGTERM, in a command that asked for it (:func:`sigterm_interrupts`)."""


class Stopped(KeyboardInterrupt):
    """A run that was interrupted.

    Attributes:
        signal: that did it.
        checkpoint: the last one that was written, or gone on from; None: there is none.
    """

    def __init__(self, by: KeyboardInterrupt, checkpoint: str | None) -> None:
        self.signal = signal.SIGTERM if isinstance(by, Terminated) else signal.SIGINT
        self.checkpoint = checkpoint
        where = f"the last checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint to go on from"
        super().__init__(f"stopped by {self.signal.name}: {where}")


@contextmanager
def stoppable(trainer: Any) -> Iterator[None]:
    """Around training and evaluation.

    Raises:
        Stopped: in the place of a KeyboardInterrupt.
        NotWritten: a file could not be written, a checkpoint's or another.
    """
    try:
        yield
    except KeyboardInterrupt as error:
        raise Stopped(error, last_checkpoint(trainer)) from error
    except NotWritten as error:
        raise NotWritten(f"{error}. {_go_on(trainer)}") from error
    except OSError as error:
        if error.errno not in DISK:
            raise
        where = f" ({error.filename})" if error.filename else ""
        raise NotWritten(f"the run stopped: {error.strerror}{where}. {_go_on(trainer)}") from error


def last_checkpoint(trainer: Any) -> str | None:
    """The checkpoint that a run has written, or gone on from, if there is one."""
    return trainer.saved_model_file if os.path.isfile(trainer.saved_model_file) else None


def _go_on(trainer: Any) -> str:
    good = last_checkpoint(trainer)
    return (
        f"The last good checkpoint is {good}: go on with --resume={good}" if good else "No checkpoint was written yet"
    )


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """SIGTERM raises :class:`Terminated` inside the block, so that what is being written is finished or removed.

    For commands: a library leaves signals to its host. Without effect outside of the main thread.
    """

    def interrupt(*_: Any) -> None:
        raise Terminated

    before = None
    with suppress(ValueError):  # not the main thread
        before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
