"""A run is a guest in its process: what it changes there is put back, and no two are there at once.

RecBole is written for processes of its own. Its runs draw from the random states of Python, NumPy and PyTorch, log
through the root logger, and keep what all loaders share in module variables. Here a run takes the process for itself
(:func:`guest`), logs through this package's logger, as RecBole's modules then do, and leaves what it found.
"""

from __future__ import annotations

import hashlib
import logging
import os
import random
import signal
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import colorlog
import numpy as np
import torch
from recbole.utils import get_local_time
from recbole.utils.logger import RemoveColorFilter, log_colors_config
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data._utils import signal_handling

VISIBLE_DEVICES = "CUDA_VISIBLE_DEVICES"
_logger = logging.getLogger("recbole_holo")
_turn = threading.RLock()  # held by the thread whose run it is


@contextmanager
def guest() -> Iterator[None]:
    """One run, alone in its process: another thread's waits until it is over, and is then what it would be alone.

    At the end the handlers, level and propagation of this package's logger are what they were before, and so are the
    random states, cuDNN's flags, signal handlers, warnings' filters and the devices that are visible. What else is the
    process's is not touched: the root logger, the working directory and numbers of threads.
    """
    if not _turn.acquire(blocking=False):
        _logger.warning(
            "a run waits until another of this process is over: both need its random numbers. Side by side they run in "
            "processes of their own."
        )
        _turn.acquire()
    try:
        with (
            _logger_kept(),
            random_states_kept(),
            _flags_kept(),
            _signals_kept(),
            visible_devices_kept(),
            _filters_kept(),
        ):
            yield
    finally:
        _turn.release()


@contextmanager
def random_states_kept() -> Iterator[None]:
    """The random numbers of Python, NumPy and PyTorch go on behind the block as if nothing had been drawn in it."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.random.fork_rng(devices):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


class drawing_apart(TorchDispatchMode):
    """Inside the block, what this thread draws on a CPU comes from a generator of the block's own: the process's
    random numbers, which another thread may be drawing from, are not touched."""

    def __init__(self) -> None:
        super().__init__()
        self._generator = torch.Generator()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            return func.overloadpacket(*args, **{**(kwargs or {}), "generator": self._generator})
        return func(*args, **(kwargs or {}))


@contextmanager
def visible_devices_kept() -> Iterator[None]:
    """``gpu_id`` is said to CUDA through the environment, which other processes inherit."""
    before = os.environ.get(VISIBLE_DEVICES)
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(VISIBLE_DEVICES, None)


@contextmanager
def _flags_kept() -> Iterator[None]:
    flags = torch.backends.cudnn
    before = flags.benchmark, flags.deterministic
    try:
        yield
    finally:
        flags.benchmark, flags.deterministic = before


@contextmanager
def _filters_kept() -> Iterator[None]:
    """Libraries that are imported late (PyTorch's own parts, SymPy) leave filters of warnings behind."""
    filters: Any = warnings.filters
    before = filters[:]
    try:
        yield
    finally:
        filters[:] = [one for one in filters if one in before]


@contextmanager
def _signals_kept() -> Iterator[None]:
    """The first loader of a process that has workers sets a handler for their end, and leaves it there."""
    before = signal.getsignal(signal.SIGCHLD) if threading.current_thread() is threading.main_thread() else None
    try:
        yield
    finally:
        if before is not None and signal.getsignal(signal.SIGCHLD) is not before:
            signal.signal(signal.SIGCHLD, before)
            signal_handling._SIGCHLD_handler_set = False  # PyTorch's note of it: the next loader sets it again


# ---------------------------------------------------------------------- the log of a run
class _OfARun:
    """Marks the handlers that :func:`start_log` adds."""


class _ToFile(_OfARun, logging.FileHandler):
    pass


class _ToTerminal(_OfARun, logging.StreamHandler):
    pass


class _ToApplication(_OfARun, logging.Handler):
    """What the root logger lets through goes to its handlers, which an application has set up."""

    def emit(self, record: logging.LogRecord) -> None:
        root = logging.getLogger()
        if root.isEnabledFor(record.levelno):
            root.handle(record)


def start_log(config: Any) -> None:
    """A run's lines of ``state`` and above go to a file of its own in ``log/<model>/``, named as RecBole names it, and
    to the application's handlers, or where there are none to the terminal."""
    _end_log()
    settings = "".join(map(str, config.final_config_dict.values()))
    mark = hashlib.md5(settings.encode()).hexdigest()[:6]
    folder = os.path.join("log", config["model"])
    os.makedirs(folder, exist_ok=True)
    name = f"{config['model']}-{config['dataset']}-{get_local_time()}-{mark}.log"
    dates, line = "%a %d %b %Y %H:%M:%S", "%(asctime)-15s %(levelname)s  %(message)s"

    shown: logging.Handler = _ToApplication()
    if not logging.getLogger().handlers:
        shown = _ToTerminal()
        shown.setFormatter(
            colorlog.ColoredFormatter(f"%(log_color)s{line}", "%d %b %H:%M", log_colors=log_colors_config)
        )
    written = _ToFile(os.path.join(folder, name))
    written.setFormatter(logging.Formatter(line, dates))
    written.addFilter(RemoveColorFilter())
    for handler in (shown, written):  # in this order: the filter takes the colours away for all that follow
        _logger.addHandler(handler)
    level = getattr(logging, str(config["state"]).upper(), None)
    _logger.setLevel(level if type(level) is int else logging.INFO)
    _logger.propagate = False


def _end_log() -> None:
    for handler in _logger.handlers[:]:
        if isinstance(handler, _OfARun):
            _logger.removeHandler(handler)
            handler.close()


@contextmanager
def _logger_kept() -> Iterator[None]:
    handlers, level, propagate = _logger.handlers[:], _logger.level, _logger.propagate
    try:
        yield
    finally:
        _end_log()
        _logger.handlers[:], _logger.propagate = handlers, propagate
        _logger.setLevel(level)
