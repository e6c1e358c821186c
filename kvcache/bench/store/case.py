"""The case of stores, and the names of its contestants."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from kvcache.stores import Item

MEMCPY = "memcpy"
FILE = "plain file"
STREAM = "TCP stream"
FRESH_STREAM = "TCP stream, fresh"
MEMORY_STORE = "MemoryStore"
FILE_STORE = "FileStore"
FULL_FILE_STORE = "FileStore, full"
REDIS_STORE = "RedisStore"
VALKEY_STORE = "RedisStore, Valkey"
FRESH = {REDIS_STORE: "RedisStore, fresh", VALKEY_STORE: "Valkey, fresh"}
"""Puts to servers that have no memory at hand, by the name of the store."""
BASES = {
    MEMORY_STORE: MEMCPY,
    FILE_STORE: FILE,
    FULL_FILE_STORE: FILE,
    REDIS_STORE: STREAM,
    VALKEY_STORE: STREAM,
    **dict.fromkeys(FRESH.values(), FRESH_STREAM),
}
"""Stores by name, and the ceiling of each: what the machine does without a store."""

PUT, GET = "put", "get"
OPERATIONS = (PUT, GET)


@dataclass(frozen=True)
class StoreCase:
    """Values of one size. directory: an existing one, for files."""

    nbytes: int
    directory: Path

    def value(self) -> npt.NDArray[np.uint8]:
        """Return the bytes of a value, which nothing compresses."""
        return np.random.default_rng(0).integers(0, 256, self.nbytes, np.uint8)

    def items(self) -> Iterator[Item]:
        """Yield items without end, all of one value, each under a key of its own."""
        value, number = self.value().data, 0
        while True:
            yield Item(hashlib.sha256(f"bench {self.nbytes} {number}".encode()).digest(), [value])
            number += 1


def size_name(nbytes: int) -> str:
    """Write the size of a value."""
    for shift, unit in ((20, "MiB"), (10, "KiB")):
        if nbytes >= 1 << shift and not nbytes % (1 << shift):
            return f"{nbytes >> shift:,} {unit}"
    return f"{nbytes:,} B"
