"""Events of stored and removed blocks, in the terms of vLLM, for routers.

The three kinds of events and their fields are those of vLLM's KV cache events
(``vllm.distributed.kv_events``): blocks of ``block_size`` tokens, each named by a hash that covers
everything before it.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from sys import getsizeof
from typing import NamedTuple, SupportsIndex, TypeAlias

import numpy as np

from kvcache._checks import as_sizes
from kvcache.errors import KVCacheError

from .block_hashes import (
    SEED,
    BlockKeys,
    ExtraKey,
    Tenant,
    chained_hashes,
    keys_of_blocks,
    seed_hash,
    valid_text,
)
from .media import Placement
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
    """Place of the blocks: "GPU" for the memory of a pool, "CPU" for that of the host."""
    lora_name: str | None = None
    """Adapter of :func:`adapter_salt`, None for none."""
    extra_keys: list[tuple[ExtraKey, ...] | None] | None = None
    """Besides token ids, the content of the hash of each block, None for none: the name of the
    adapter; the digest of each medium in the block, with its offset from the first token of the
    block; in the first block of a sequence, the salt."""


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
    """Full blocks whose last token is in one span.

    token_ids: of these blocks, as the prompt has them. parent: hash of the block before them, None
    for the first of a sequence.
    """

    token_ids: Tokens
    parent: bytes | None
    hashes: list[bytes]
    keys: list[BlockKeys | None]


class SpanHashes(NamedTuple):
    """Hashes known of one span.

    last: of the last full block up to its end, None before the first. hashes: of blocks whose last
    token is in it, the last ones of these at least.
    """

    last: bytes | None
    hashes: list[bytes]

    @property
    def nbytes(self) -> int:
        """Bytes of memory it takes."""
        own = len(self.hashes) or self.last is not None  # the last one is among them, if any are
        return _HASHES_NBYTES + getsizeof(self.hashes) + own * _HASH_NBYTES


_HASH_NBYTES, _HASHES_NBYTES = getsizeof(bytes(32)), getsizeof(SpanHashes(None, []))


class Events:
    """Notification of subscribers. A block is stored with the span of its last token.

    Blocks are named as vLLM 0.32 names them with ``--prefix-caching-hash-algo sha256_cbor``: by the
    SHA-256 of the canonical CBOR of the hash of the block before, the token ids, and the extra
    keys: adapter, digests of media with their offsets, salt. namespace: stands in the place of
    vLLM's ``PYTHONHASHSEED``; "" for vLLM's default. medium: of all events. limit: bytes of hashes
    to remember at most, None for no limit: others are computed again when they are needed.
    """

    def __init__(self, namespace: str = "", medium: str = "GPU", limit: int | None = None) -> None:
        self._block_size, self._medium = BLOCK_SIZE, medium
        self._seed = seed_hash(valid_text(namespace) or SEED)
        self._subscribers: dict[object, Callable[[Event], None]] = {}
        self._pending: deque[Event] = deque()
        self._delivering = False
        # Hashes of stored spans that were told of. The tokens up to the end of a span stay the same
        # for as long as there is the span, however it is split or joined.
        self._hashed: dict[StoredSpan, SpanHashes] = {}
        self._limit = limit
        self.nbytes = self._entries = 0
        """Bytes of memory that the hashes take."""

    @property
    def block_size(self) -> int:
        """Tokens of a block, 16 unless set: before anybody subscribes.

        Raises: KVCacheError with subscribers, to whom the size would change; TypeError, ValueError
            for anything but a positive integer.
        """
        return self._block_size

    @block_size.setter
    def block_size(self, tokens: SupportsIndex) -> None:
        [size] = as_sizes(block_size=tokens)
        if self._subscribers:
            raise KVCacheError(
                f"the size of blocks stays while somebody subscribes; got {size} with "
                f"{len(self._subscribers)} subscribers. Set it first."
            )
        self._block_size = size
        self.forget(list(self._hashed))

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
            ids, parent, hashes, keys = self._blocks(span)
            if hashes:
                told = [None if block is None else block.told for block in keys]
                event = BlockStored(
                    hashes,
                    parent,
                    ids.tolist(),
                    self._block_size,
                    medium=self._medium,
                    lora_name=Tenant.of(span.tree.salt).adapter,
                    extra_keys=told if any(told) else None,
                )
                self._pending.append(event)

    def removed(self, span: StoredSpan) -> None:
        """Tell of the blocks of `span`, about to be removed."""
        if self._subscribers:
            hashes = self._hashes(span)
            if hashes:
                self._pending.append(BlockRemoved(hashes, self._medium))
        if self._hashed:  # also of subscribers that have left
            self.forget((span,))

    def forget(self, spans: Iterable[StoredSpan]) -> None:
        """Forget the hashes of `spans`: of those that are no more, say."""
        for span in spans:
            known = self._hashed.pop(span, None)
            if known is not None:
                self._entries -= known.nbytes
        self._measure()

    def cleared(self) -> None:
        """Tell of the removal of everything."""
        if self._subscribers:
            self._pending.append(AllBlocksCleared())

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

    def _hashes(self, span: StoredSpan) -> list[bytes]:
        """Return the hashes of the blocks of `span`, remembered or computed again."""
        known = self._hashed.get(span)
        count = span.stop // self._block_size - span.start // self._block_size
        if known is None or count > len(known.hashes):  # it was joined to those before it
            return self._blocks(span).hashes
        return known.hashes[len(known.hashes) - count :]  # the others are of a part split off

    def _blocks(self, span: StoredSpan) -> BlockChain:
        size, hashed = self._block_size, self._hashed
        known = span.parent
        while known is not None and known not in hashed:
            known = known.parent
        begin = 0 if known is None else known.stop // size
        parent = None if known is None else hashed[known].last
        ids, media = _tokens_of(span, begin * size)
        ids = ids[: ids.size - ids.size % size]
        tenant = Tenant.of(span.tree.salt)
        keys = keys_of_blocks(tenant, media, begin * size, ids.size // size, size)
        hashes = list(chained_hashes(parent or self._seed, ids, keys, size))
        before = span.start // size - begin  # blocks of the spans before it
        last = hashes[-1] if hashes else parent
        parent = hashes[before - 1] if before else parent
        self._remember(span, SpanHashes(last, hashes[before:]))
        before_it = span.parent
        if before_it is not None and before_it is not known and before_it.payload is not None:
            self._remember(before_it, SpanHashes(parent, []))
        return BlockChain(ids[before * size :], parent, hashes[before:], keys[before:])

    def _remember(self, span: StoredSpan, hashes: SpanHashes) -> None:
        self.forget((span,))
        added = hashes.nbytes
        if self._limit is not None and self.nbytes + added > self._limit:
            self.forget(list(self._hashed))
            self._hashed = {}  # a dict without entries keeps its size
            if added > self._limit:
                return
        self._hashed[span] = hashes
        self._entries += added
        self._measure()

    def _measure(self) -> None:
        # As a number, as it is asked for with every span that is evicted.
        self.nbytes = self._entries + getsizeof(self._hashed)


def _tokens_of(span: StoredSpan, start: int) -> tuple[Tokens, list[Placement]]:
    """Return the ids in the prompt of positions from `start` to the end of `span`, and the media.

    start: in `span`, or in one before it.
    """
    parts: list[StoredSpan] = []
    part: StoredSpan | None = span
    while part is not None and part.stop > start:
        parts.append(part)
        part = part.parent
    parts.reverse()
    first = parts[0].start
    ids = np.concatenate([part.node.tokens for part in parts])
    # A medium that was split is in several spans, perhaps as given by several requests.
    media = list({placed.start: placed for part in parts for placed in part.media}.values())
    for placement in media:
        begin, end = max(placement.start, first), min(placement.stop, span.stop)
        own = placement.placeholders[begin - placement.start : end - placement.start]
        ids[begin - first : end - first] = own
    return ids[start - first :], media


def _call(callback: Callable[[Event], None], event: Event) -> None:
    try:
        callback(event)
    except Exception:
        # Others are to hear of the event, and whoever ended a session is not to blame.
        _logger.exception("a subscriber of a prefix cache raised; the event was %r", event)
