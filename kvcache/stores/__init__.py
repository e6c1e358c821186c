"""Stores: places outside of caches for pages of prefixes, in memory, on disks, on servers."""

from .base import Store
from .files import FileStore
from .memory import MemoryStore
from .objects import ObjectStore
from .opening import open_store
from .outcomes import (
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
    Stored,
    StoreStats,
    Unavailable,
    Usage,
)

__all__ = [
    "NEVER",
    "Corrupt",
    "Deadline",
    "Deleted",
    "Entry",
    "FileStore",
    "Hit",
    "Item",
    "Label",
    "MemoryStore",
    "Miss",
    "ObjectStore",
    "Present",
    "Refused",
    "Store",
    "StoreStats",
    "Stored",
    "Unavailable",
    "Usage",
    "open_store",
]
