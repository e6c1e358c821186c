"""Stores: places outside of caches for pages of prefixes, in memory, on disks, on servers."""

from .base import Store
from .files import FileStore
from .keys import KeyChain, Namespace
from .memory import MemoryStore
from .objects import ObjectStore
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
from .pages import Page, decode_page, encode_page
from .sealing import Seal
from .urls import open_store

__all__ = [
    "NEVER",
    "Corrupt",
    "Deadline",
    "Deleted",
    "Entry",
    "FileStore",
    "Hit",
    "Item",
    "KeyChain",
    "Label",
    "MemoryStore",
    "Miss",
    "Namespace",
    "ObjectStore",
    "Page",
    "Present",
    "Refused",
    "Seal",
    "Store",
    "StoreStats",
    "Stored",
    "Unavailable",
    "Usage",
    "decode_page",
    "encode_page",
    "open_store",
]
