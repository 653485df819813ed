"""Says once a run that training waits for cores which other processes use, and what helps.

Processor time does not show it: OpenMP's idle threads spin, and spinning is processor time. What shows it is how long
threads that are ready to run stand in the queue for a core, which Linux counts. Where nobody counts, what is left is
the time in which no thread of the process ran at all: a step never sleeps, one of its threads always has work.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from time import perf_counter, process_time

import torch

WINDOW = 5.0  # seconds of training that are looked at together
SHARE = 0.5  # of these, for threads to have waited: on an idle machine it is below 0.05
TASKS = Path("/proc/self/task")


class Contention:
    """Looks at training, window by window, until it has said something.

    Call :meth:`begin` before some steps, :meth:`step` after each of them and :meth:`end` after the last.

    Args:
        say: what gets the sentence.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say: Callable[[str], None] | None = say
        self._steps, self._seconds, self._waited = 0, 0.0, 0.0
        self._begun, self._before = 0.0, Waiting()

    def begin(self) -> None:
        self._begun, self._before = perf_counter(), Waiting()

    def step(self) -> None:
        self._steps += 1
        if self._say is not None and perf_counter() - self._begun >= WINDOW:
            self.end()
            self.begin()

    def end(self) -> None:
        if self._say is None:
            return
        seconds = perf_counter() - self._begun
        self._seconds += seconds
        self._waited += Waiting().since(self._before, seconds)
        if self._seconds < WINDOW:
            return
        if self._waited >= SHARE * self._seconds:
            self._say(advice(self._steps, self._seconds, self._waited))
            self._say = None
        self._steps, self._seconds, self._waited = 0, 0.0, 0.0


class Waiting:
    """How long this process has waited for a core, up to now."""

    def __init__(self) -> None:
        self.processor = process_time()
        self.queued = _queued()

    def since(self, before: Waiting, seconds: float) -> float:
        """Seconds that threads waited, added up, of the ``seconds`` between the two."""
        if self.queued and before.queued:
            return sum(max(now - before.queued.get(task, 0.0), 0.0) for task, now in self.queued.items())
        return max(seconds - (self.processor - before.processor), 0.0)


def _queued() -> dict[str, float]:
    """Of each thread the seconds that it was ready to run and had no core; empty where nobody counts them."""
    found = {}
    try:
        for task in os.listdir(TASKS):
            try:
                found[task] = int((TASKS / task / "schedstat").read_text().split()[1]) * 1e-9
            except ProcessLookupError:
                continue  # a thread that has ended
    except (OSError, IndexError, ValueError):
        return {}
    return found


def advice(steps: int, seconds: float, waited: float) -> str:
    """The sentence."""
    remedies = []
    if os.environ.get("OMP_WAIT_POLICY", "").lower() != "passive":
        remedies.append("OMP_WAIT_POLICY=passive has idle threads leave the cores to those that work")
    if torch.get_num_threads() > 1:
        remedies.append("OMP_NUM_THREADS=1 has no thread wait for another (sums then differ in their last bits)")
    return (
        f"training waits for cores that other processes use: in {seconds:.0f} s, {steps} steps, its threads stood "
        f"{waited:.0f} s in the queue. " + ("Set before the start, " + "; ".join(remedies) if remedies else "")
    ).strip()
