"""Events of stored and removed blocks, in the terms of vLLM, for routers.

The three kinds of events and their fields are those of vLLM's KV cache events
(``vllm.distributed.kv_events``): blocks of ``block_size`` tokens, each named by a hash that covers
everything before it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np

from .radix import Tokens
from .stored import StoredSpan

BLOCK_SIZE = 16
"""Tokens of a block, as in vLLM."""


@dataclass(frozen=True)
class BlockStored:
    """Blocks reusable from now on."""

    block_hashes: list[bytes]
    parent_block_hash: bytes | None
    """Hash of the block before the first, None for the first of a sequence."""
    token_ids: list[int]
    block_size: int
    lora_id: int | None = None
    medium: str | None = "GPU"


@dataclass(frozen=True)
class BlockRemoved:
    """Blocks no longer stored."""

    block_hashes: list[bytes]
    medium: str | None = "GPU"


@dataclass(frozen=True)
class AllBlocksCleared:
    """Removal of all blocks at once."""


Event: TypeAlias = BlockStored | BlockRemoved | AllBlocksCleared


class BlockChain(NamedTuple):
    """Full blocks of a sequence, up to the end of a span.

    token_ids: of the whole sequence. first: number of the first block whose last token is in the
    span. hashes: of all blocks.
    """

    token_ids: Tokens
    first: int
    hashes: list[bytes]


class Events:
    """Notification of subscribers. A block is stored with the span of its last token.

    namespace, and the salt of a request, are part of every hash: SHA-256 over both, the hash of
    the block before, and the block's token ids as little-endian int32.
    """

    def __init__(self, namespace: str = "", block_size: int = BLOCK_SIZE) -> None:
        self.block_size = block_size
        self._namespace = namespace
        self._subscribers: list[Callable[[Event], None]] = []

    def subscribe(self, callback: Callable[[Event], None]) -> Callable[[], None]:
        """Call `callback` with every event, in order. Return a function to end the subscription.

        It is called while the prefix cache is locked: it should take note and return.

        Raises: TypeError for no function.
        """
        if not callable(callback):
            raise TypeError(f"a subscriber is a function of one event; got {callback!r}.")
        self._subscribers.append(callback)
        return lambda: self._subscribers.remove(callback)

    def stored(self, span: StoredSpan, salt: str) -> None:
        """Tell of the blocks of `span`, stored just now."""
        if self._subscribers:  # else nothing is hashed
            ids, first, hashes = self._blocks(span, salt)
            if hashes[first:]:
                token_ids = ids[first * self.block_size : len(hashes) * self.block_size].tolist()
                parent = hashes[first - 1] if first else None
                self._tell(BlockStored(hashes[first:], parent, token_ids, self.block_size))

    def removed(self, span: StoredSpan, salt: str) -> None:
        """Tell of the blocks of `span`, about to be removed."""
        if self._subscribers:
            _, first, hashes = self._blocks(span, salt)
            if hashes[first:]:
                self._tell(BlockRemoved(hashes[first:]))

    def cleared(self) -> None:
        """Tell of the removal of everything."""
        self._tell(AllBlocksCleared())

    def _tell(self, event: Event) -> None:
        for callback in list(self._subscribers):  # one may end its subscription meanwhile
            callback(event)

    def _blocks(self, span: StoredSpan, salt: str) -> BlockChain:
        edges = b"".join(part.node.edge for part in span.path)
        width, last = 4 * self.block_size, b""  # bytes of a block's token ids
        hashes = []
        for at in range(0, len(edges) - width + 1, width):
            last = hashlib.sha256(self._seed(salt) + last + edges[at : at + width]).digest()
            hashes.append(last)
        ids = np.frombuffer(edges, "<i4")
        return BlockChain(ids, span.start // self.block_size, hashes)

    def _seed(self, salt: str) -> bytes:
        return hashlib.sha256(repr((self._namespace, salt)).encode()).digest()
