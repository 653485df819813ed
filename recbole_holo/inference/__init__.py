"""Models as they are served: smaller than they were trained."""

from recbole_holo.inference.compression import Compression, compress, stored_bytes, truncate_states

__all__ = ["Compression", "compress", "stored_bytes", "truncate_states"]
