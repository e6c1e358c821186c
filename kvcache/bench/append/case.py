"""The case of an append, and the names of our contestants in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from kvcache.bench.harness.contest import Case

MEMMOVE = "memmove"
RAW_VIEWS = "raw + views"
SLICE_UPDATE = "slice_update"
UPDATE = "KVCache.update"
ROTATING = "RotatingKVCache.update"
OURS = (SLICE_UPDATE, UPDATE, ROTATING)


@dataclass(frozen=True)
class AppendCase(Case):
    """One layer, its cache of `tokens` capacity nearly full; a step appends one token."""

    longest_block: ClassVar[int] = 256
