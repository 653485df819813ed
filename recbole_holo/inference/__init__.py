"""Models as they are served: smaller than they were trained, and with a state for each user."""

from recbole_holo.inference.compression import Compression, compress, stored_bytes, truncate_states
from recbole_holo.inference.recommender import Event, Recommendations, Recommender, Suggestion
from recbole_holo.inference.records import StateError
from recbole_holo.inference.retrieval import FaissIndex
from recbole_holo.inference.stores import MemoryStore, RedisStore, SQLiteStore, StateStore, StoreError

__all__ = [
    "Compression",
    "Event",
    "FaissIndex",
    "MemoryStore",
    "Recommendations",
    "Recommender",
    "RedisStore",
    "SQLiteStore",
    "StateError",
    "StateStore",
    "StoreError",
    "Suggestion",
    "compress",
    "stored_bytes",
    "truncate_states",
]
