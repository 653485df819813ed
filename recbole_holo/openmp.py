"""How idle threads wait for the next parallel region, which OpenMP is told before PyTorch is loaded.

Between regions, and at the end of one, a thread that has nothing to do spins for a while before it sleeps. Where every
thread has a core of its own that saves the time to wake it. Where the cores are shared it takes them away from those
who have something to do, the other threads of the region among them: GCC's OpenMP, which PyTorch has on Linux, spins
for some milliseconds by default, and small operators then take many times as long (results/busy-cpu.md).
"""

from __future__ import annotations

import os
import sys

SPIN_COUNT = "30000"  # by results/busy-cpu.md: nothing lost alone; GCC's default is 300,000
VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")  # by which a user says it, of either OpenMP


def set_waiting() -> None:
    """Has idle threads sleep soon, in this process and those that it starts.

    Does nothing if the environment says how they wait, or if PyTorch, which has read the environment, is loaded.
    """
    if "torch" not in sys.modules and not any(name in os.environ for name in VARIABLES):
        os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT
