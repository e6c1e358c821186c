"""Checkpoints of per-layer caches, for speculative decoding."""

from __future__ import annotations

from dataclasses import dataclass

from kvcache._types import Int32s

from .buffers import Arrays


@dataclass(frozen=True)
class Update:
    """One update since a checkpoint: its arrays, and the rows displaced by them.

    arrays: copies, ``[B, kv_heads, L, head_dim]``. slots: written to. displaced: copies of the
        earlier content of `slots`.
    """

    arrays: Arrays
    slots: Int32s
    displaced: Arrays


@dataclass(frozen=True)
class Checkpoint:
    """State of a per-layer cache for a rollback to return to; a further update makes a new one.

    offset: tokens seen by then.
    updates: since then, oldest first, in caches that displace tokens. Others need none.
    scheduled: resume points still ahead by then.
    """

    offset: int
    updates: tuple[Update, ...] = ()
    scheduled: frozenset[int] = frozenset()
