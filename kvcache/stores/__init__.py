"""Stores: places outside of caches for pages of prefixes, in memory, on disks, on servers."""

from .base import (
    NEVER,
    Corrupt,
    Deadline,
    Deleted,
    Entry,
    Hit,
    Item,
    Label,
    Miss,
    Present,
    Refused,
    Store,
    Stored,
    StoreStats,
    Unavailable,
    Usage,
)
from .memory import MemoryStore

__all__ = [
    "NEVER",
    "Corrupt",
    "Deadline",
    "Deleted",
    "Entry",
    "Hit",
    "Item",
    "Label",
    "MemoryStore",
    "Miss",
    "Present",
    "Refused",
    "Store",
    "StoreStats",
    "Stored",
    "Unavailable",
    "Usage",
]
