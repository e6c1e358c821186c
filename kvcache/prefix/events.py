"""What is stored and removed, told as vLLM tells it, so that routers can follow.

The three kinds of events and their fields are those of vLLM's KV cache events
(``vllm.distributed.kv_events``): blocks of ``block_size`` tokens, each named by a hash that covers
everything before it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

if TYPE_CHECKING:
    from .index import Span

BLOCK_SIZE = 16
"""Tokens of a block, as in vLLM."""


@dataclass(frozen=True)
class BlockStored:
    """Blocks that a request can reuse from now on."""

    block_hashes: list[bytes]
    parent_block_hash: bytes | None
    """Of the block before the first, None for the first of a sequence."""
    token_ids: list[int]
    block_size: int
    lora_id: int | None = None
    medium: str | None = "GPU"


@dataclass(frozen=True)
class BlockRemoved:
    """Blocks that are gone."""

    block_hashes: list[bytes]
    medium: str | None = "GPU"


@dataclass(frozen=True)
class AllBlocksCleared:
    """Nothing is left but what was stored since."""


Event: TypeAlias = BlockStored | BlockRemoved | AllBlocksCleared


class Events:
    """Tells subscribers. A block counts as stored with the span that its last token is in.

    namespace, and the salt of a request, are part of every hash: SHA-256 over both, the hash of
    the block before, and the block's token ids as little-endian int32.
    """

    def __init__(self, namespace: str = "", block_size: int = BLOCK_SIZE) -> None:
        self.block_size = block_size
        self._namespace = namespace
        self._subscribers: list[Callable[[Event], None]] = []

    def subscribe(self, callback: Callable[[Event], None]) -> Callable[[], None]:
        """Call `callback` with every event, in order; returns what ends that.

        It is called while the prefix cache is locked: it should take note and return.
        """
        self._subscribers.append(callback)
        return lambda: self._subscribers.remove(callback)

    def stored(self, span: Span[Any], salt: str) -> None:
        """`span` has come."""
        if self._subscribers:
            ids, first, hashes = self._blocks(span, salt)
            if hashes[first:]:
                token_ids = ids[first * self.block_size : len(hashes) * self.block_size].tolist()
                parent = hashes[first - 1] if first else None
                self._tell(BlockStored(hashes[first:], parent, token_ids, self.block_size))

    def removed(self, span: Span[Any], salt: str) -> None:
        """`span` is about to go."""
        if self._subscribers:
            _, first, hashes = self._blocks(span, salt)
            if hashes[first:]:
                self._tell(BlockRemoved(hashes[first:]))

    def cleared(self) -> None:
        """Everything is gone."""
        self._tell(AllBlocksCleared())

    def _tell(self, event: Event) -> None:
        for callback in list(self._subscribers):
            callback(event)

    def _blocks(self, span: Span[Any], salt: str) -> tuple[Any, int, list[bytes]]:
        """Up to its end: token ids, number of its first block, hashes of all blocks."""
        edges = b"".join(each.node.edge for each in span.path)
        size, last = 4 * self.block_size, b""
        hashes = []
        for at in range(0, len(edges) - size + 1, size):
            last = hashlib.sha256(self._seed(salt) + last + edges[at : at + size]).digest()
            hashes.append(last)
        return np.frombuffer(edges, "<i4"), span.start // self.block_size, hashes

    def _seed(self, salt: str) -> bytes:
        return hashlib.sha256(repr((self._namespace, salt)).encode()).digest()
