"""Events of stored and removed blocks, in the terms of vLLM, for routers.

The three kinds of events and their fields are those of vLLM's KV cache events
(``vllm.distributed.kv_events``): blocks of ``block_size`` tokens, each named by a hash that covers
everything before it.
"""

from __future__ import annotations

import hashlib
import logging
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np

from .media import Placement, within
from .radix import Tokens
from .stored import StoredSpan

_logger = logging.getLogger("kvcache.prefix")
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
    the block before, and the block's token ids as little-endian int32. Where the block has tokens
    of media, their keys follow (SHA-256 of digest and placeholder ids) with their places.
    """

    def __init__(self, namespace: str = "", block_size: int = BLOCK_SIZE) -> None:
        self.block_size = block_size
        self._namespace = namespace
        self._subscribers: dict[object, Callable[[Event], None]] = {}
        self._pending: deque[Event] = deque()
        self._delivering = False

    def subscribe(self, callback: Callable[[Event], None]) -> Callable[[], None]:
        """Call `callback` with every event, in order. Return a function to end the subscription.

        It is called when the change is complete, while the prefix cache is still locked: it should
        take note and return. It may call the prefix cache; events of that come after the present
        ones. An exception it raises is logged (logger ``kvcache.prefix``) and stops nothing.

        Raises: TypeError for no function.
        """
        if not callable(callback):
            raise TypeError(f"a subscriber is a function of one event; got {callback!r}.")
        subscription = object()  # a callback may subscribe several times
        self._subscribers[subscription] = callback

        def leave() -> None:
            self._subscribers.pop(subscription, None)

        return leave

    def stored(self, span: StoredSpan) -> None:
        """Tell of the blocks of `span`, stored just now."""
        if self._subscribers:  # else nothing is hashed
            ids, first, hashes = self._blocks(span)
            if hashes[first:]:
                token_ids = ids[first * self.block_size : len(hashes) * self.block_size].tolist()
                parent = hashes[first - 1] if first else None
                self._tell(BlockStored(hashes[first:], parent, token_ids, self.block_size))

    def removed(self, span: StoredSpan) -> None:
        """Tell of the blocks of `span`, about to be removed."""
        if self._subscribers:
            _, first, hashes = self._blocks(span)
            if hashes[first:]:
                self._tell(BlockRemoved(hashes[first:]))

    def cleared(self) -> None:
        """Tell of the removal of everything."""
        self._tell(AllBlocksCleared())

    def deliver(self) -> None:
        """Call the subscribers with what they have been told of; call it when a change is over."""
        if self._delivering:
            return  # a subscriber made this change, and the call under way goes on with its events
        self._delivering = True
        try:
            while self._pending:
                event = self._pending.popleft()
                for callback in list(self._subscribers.values()):
                    _call(callback, event)
        finally:
            self._delivering = False

    def _tell(self, event: Event) -> None:
        if self._subscribers:
            self._pending.append(event)

    def _blocks(self, span: StoredSpan) -> BlockChain:
        """Return the blocks up to the end of `span`, with the ids of the prompt for all tokens."""
        path = span.path
        ids = np.concatenate([part.node.tokens for part in path])
        media = [placement for part in path for placement in part.media]
        for placement in media:  # one of several may be cut by the end of the span
            place = slice(placement.start, min(placement.stop, ids.size))
            ids[place] = placement.placeholders[: place.stop - place.start]
        seed, last, hashes = self._seed(span.tree.salt), b"", []
        for start in range(0, ids.size - self.block_size + 1, self.block_size):
            stop = start + self.block_size
            names = b"".join(_name_of(placement, start) for placement in within(media, start, stop))
            last = hashlib.sha256(seed + last + ids[start:stop].tobytes() + names).digest()
            hashes.append(last)
        return BlockChain(ids, span.start // self.block_size, hashes)

    def _seed(self, salt: str) -> bytes:
        return hashlib.sha256(repr((self._namespace, salt)).encode()).digest()


def _name_of(placement: Placement, block_start: int) -> bytes:
    """Return what tells a medium in a block from others, in any process."""
    place = np.array([placement.start - block_start, placement.stop - block_start], "<i4")
    return placement.medium.key + place.tobytes()


def _call(callback: Callable[[Event], None], event: Event) -> None:
    try:
        callback(event)
    except Exception:
        # Others are to hear of the event, and whoever ended a session is not to blame.
        _logger.exception("a subscriber of a prefix cache raised; the event was %r", event)
