"""Models with a catalogue, as if trained, and every kind of store."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from recbole_holo.data.catalogue import Catalogue
from recbole_holo.inference import MemoryStore, RedisStore, SQLiteStore, StateStore
from tests.model.conftest import STATE_SPACE, TINY, make_config, one_value_attribute

N_ITEMS = 40
Make = Callable[..., StateStore]


def catalogue(n_items: int = N_ITEMS, attribute: bool = True) -> Catalogue:
    return Catalogue(
        "toy",
        "item_id",
        ["[PAD]", *(f"i{n}" for n in range(1, n_items))],
        ["", *(f"The {n}th Film" if n % 2 else "" for n in range(1, n_items))],
        torch.arange(n_items) * 7 % n_items,
        {"genre": one_value_attribute(n_items, 5)} if attribute else {},
    )


def served(name: str = "HoloMambaRec", n_items: int = N_ITEMS, seed: int = 0, **settings: Any) -> tuple[Any, Catalogue]:
    """A model and its items."""
    torch.manual_seed(seed)
    items = catalogue(n_items)
    return STATE_SPACE[name.removesuffix("_paper")](make_config(name, **{**TINY, **settings}), items).eval(), items


@pytest.fixture
def histories() -> dict[str, list[str]]:
    generator = torch.Generator().manual_seed(5)
    lengths = torch.randint(1, 30, (12,), generator=generator).tolist()
    return {
        f"u{u}": [f"i{n}" for n in torch.randint(1, N_ITEMS, (length,), generator=generator).tolist()]
        for u, length in enumerate(lengths)
    }


# ------------------------------------------------------------------ stores
@pytest.fixture(scope="session")
def redis_server() -> Iterator[str]:
    """The socket of a Redis of the tests' own."""
    import redis

    server = shutil.which("redis-server")
    if server is None:
        pytest.skip("there is no redis-server: apt install redis-server")
    folder = tempfile.mkdtemp(dir="/tmp")  # a socket's path may have 107 characters
    socket = f"{folder}/socket"
    options = ["--port", "0", "--unixsocket", socket, "--save", "", "--appendonly", "no", "--dir", folder]
    process = subprocess.Popen([server, *options], stdout=subprocess.DEVNULL)
    try:
        for _ in range(200):
            if Path(socket).exists() and redis.Redis(unix_socket_path=socket).ping():
                break
            time.sleep(0.05)
        yield socket
    finally:
        process.terminate()
        process.wait()
        shutil.rmtree(folder)


@pytest.fixture(params=["fake", "server"])
def make_redis(request: pytest.FixtureRequest) -> Make:
    """A function that opens the same Redis again, as another process would; its settings are RedisStore's."""
    return redis_opener(request)


def redis_opener(request: pytest.FixtureRequest) -> Make:
    if request.param == "fake":
        import fakeredis

        fake = fakeredis.FakeServer()
        return lambda **settings: RedisStore(fakeredis.FakeRedis(server=fake), **settings)
    import redis

    url = f"unix://{request.getfixturevalue('redis_server')}"
    redis.Redis.from_url(url).flushall()
    return lambda **settings: RedisStore(url, **settings)


@pytest.fixture(params=["memory", "sqlite", "fake", "server"])
def make(request: pytest.FixtureRequest, tmp_path: Path) -> Make:
    """A function that opens the same store again, as another process would."""
    if request.param == "memory":
        store = MemoryStore()
        return lambda: store
    if request.param == "sqlite":
        return lambda: SQLiteStore(tmp_path / "states.db")
    return redis_opener(request)
