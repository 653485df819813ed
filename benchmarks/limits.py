"""What the processor can do at most, measured by loops of bare instructions (benchmarks/limits.cpp).

They are compiled as the package's kernels are. Each is the best of many short runs: what else the machine does only
slows it. Threads are measured together, so beside busy processes the limit of several comes out too low.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

from recbole_holo.ops import native

RUNS, SECONDS = 100, 0.002


class Limits(NamedTuple):
    """A second, all threads together."""

    fma: float  # floating point operations of float32, by fused multiply-adds
    exponentials: float
    pairs: float  # floating point operations of bfloat16 by products of pairs; 0 where the processor has none
    tiles: float  # and by products of tiles

    def products(self, half: bool) -> float:
        """The most floating point operations of matrix products, with factors in bfloat16 if ``half``."""
        return max(self.fma, self.pairs, self.tiles) if half else self.fma

    def __str__(self) -> str:
        names = ("fused multiply-adds", "exponentials", "pairs of bfloat16", "tiles of bfloat16")
        parts = [f"{name} {rate / 1e9:,.1f}" for name, rate in zip(names, self, strict=True) if rate]
        return "the machine's limits, 10⁹ a second (two for a multiply-add): " + ", ".join(parts)


class Work(NamedTuple):
    """The least that an operation has to do."""

    products: float = 0  # floating point operations
    exponentials: float = 0

    def seconds(self, limits: Limits, half: bool = False) -> float:
        """At the machine's limits, one after the other."""
        return self.products / limits.products(half) + self.exponentials / limits.exponentials


def measure(threads: int) -> Limits:
    """Of this machine, now."""
    library = ctypes.CDLL(str(native.build([Path(__file__).with_name("limits.cpp")], "limits")))
    return Limits(*(_rate(library, name, threads) for name in NAMES))


NAMES = ("fma_operations", "exponentials", "pair_operations", "tile_operations")


def _rate(library: ctypes.CDLL, name: str, threads: int) -> float:
    run = getattr(library, name)
    run.restype = ctypes.c_double
    times, best = 1000, 0.0
    for _ in range(RUNS):
        while True:
            begun = perf_counter()
            done = run(threads, ctypes.c_int64(times))
            seconds = perf_counter() - begun
            if not done or seconds >= SECONDS:
                break
            times *= 2
        best = max(best, done / seconds)
    return best
