"""What processes of the tests do, in a module that is imported quickly."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

from recbole_holo.errors import ConfigError


def work(rank: int, kind: str) -> Any:
    """What a process of the tests does; the others wait for the one that dies, as they would in a collective."""
    if kind == "large":
        return {"ranks": bytes(4_000_000), "rank": rank}
    if rank == 1:
        if kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "refused":
            raise ConfigError("topk", 2000, "use fewer")
        raise KeyError("a bug")
    signal.signal(signal.SIGTERM, lambda *_: None)  # as one that is busy in C++
    time.sleep(600)
    return None
