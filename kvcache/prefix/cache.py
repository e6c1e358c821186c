"""The prefix cache: sessions that begin with what earlier ones have computed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import numpy as np

from kvcache.errors import KVCacheError
from kvcache.layers.growing import KVCache
from kvcache.pool.base import Cache
from kvcache.snapshots.snapshot import Snapshot, last_resumable

from .events import Events
from .index import Span, SpanIndex
from .policies import Policy, policy
from .radix import RadixTree, Tokens, as_tokens
from .render import render
from .sequences import LayerSequences, PoolSequences, SequenceSource

Media = Mapping[tuple[int, int], bytes | str]


class StoredSnapshot:
    """The payload of a span: its snapshot, and what that takes of the budget."""

    __slots__ = ("size", "snapshot")

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.size = snapshot.nbytes

    @property
    def resumable_anywhere(self) -> bool:
        return self.snapshot.resumable_anywhere

    def split(self, tokens: int) -> tuple[StoredSnapshot, StoredSnapshot]:
        lower, upper = self.snapshot.split(self.snapshot.start + tokens)
        return StoredSnapshot(lower), StoredSnapshot(upper)

    def close(self) -> None:
        self.snapshot.close()


StoredSpan = Span[StoredSnapshot]


@dataclass(frozen=True)
class PrefixStats:
    """What a prefix cache has done and holds. Tokens and bytes are totals since it was made."""

    sessions: int
    """Sessions that were begun."""
    active: int
    """Those that have not ended."""
    tokens: int
    """Tokens of all prompts."""
    matched: int
    """Those of them that did not have to be computed."""
    nbytes: int
    """What is stored takes now, in a cache or in host memory."""
    budget: int | None
    """The most it may take, None for no limit."""
    pinned: int
    """Bytes of it that sessions use now."""
    resident: int
    """Bytes of it that are in the memory of the cache."""
    spans: int
    """Spans that are stored now."""
    evictions: int
    """Spans that had to go."""

    @property
    def hit_rate(self) -> float:
        """Share of the prompts' tokens that did not have to be computed."""
        return self.matched / self.tokens if self.tokens else 0.0


class Session:
    """One request: what is there of it already, and what is to be computed.

    matched: tokens of the prompt that the sequence holds. remaining: the others, at least one.
    sequence: its sequence in the pool. caches: its per-layer caches.
    """

    def __init__(self, owner: PrefixCache, ids: Tokens, tokens: Tokens, handle: Any) -> None:
        self._owner, self._ids, self._tokens, self._handle = owner, [ids], tokens, handle
        self.matched = 0
        self._tree: RadixTree[StoredSpan] = RadixTree()
        self._pinned: StoredSpan | None = None

    @property
    def remaining(self) -> Tokens:
        """Tokens of the prompt to be computed, int32."""
        return self._tokens[self.matched :]

    @property
    def sequence(self) -> int:
        """Its sequence in the cache."""
        if isinstance(self._handle, int):
            return self._handle
        raise KVCacheError("sessions over per-layer caches have no sequence id. Use caches.")

    @property
    def caches(self) -> list[KVCache]:
        """Its caches, one per layer, for this session alone."""
        if isinstance(self._handle, list):
            return self._handle
        raise KVCacheError("sessions over a pool share its cache. Use sequence.")

    def extend(self, tokens: Sequence[int] | Tokens) -> None:
        """Say which tokens came behind the prompt; those of them that were computed are stored."""
        ids = as_tokens(tokens)
        _check_ids(ids, {})
        self._ids.append(ids)

    def schedule(self, positions: Iterable[int]) -> None:
        """Keep what it takes to go on at `positions`, where a window or ring would drop it."""
        with self._owner.lock:
            self._owner._source.schedule(self._handle, positions)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._owner._end(self, store=kind is None)


class PrefixCache:
    """Reuses what earlier requests have computed, over every kind of cache.

    ::

        prefix = PrefixCache(cache)                    # a multi-sequence cache, initialised
        with prefix.session(tokens) as s:
            ...                                        # run the model on s.remaining, in s.sequence
            s.extend(generated)

    cache: a multi-sequence cache, where a hit shares cells and copies nothing; or a list of empty
        per-layer caches, where every session gets caches of its own, filled by copying.
    budget: bytes that all that is stored may take, None for no limit. What lies in the cells of
        the pool counts, too; it moves to host memory when the pool needs the cells.
    policy: what goes first: ``"lru"``, ``"s3fifo"``, ``"cost"``, ``"gittins"`` or a
        :class:`~kvcache.prefix.policies.Policy`.
    sequences: those of the pool that sessions may use, None for all.
    namespace: whatever tells models apart (weights, adapter, RoPE); part of the hashes in events.
    clock: seconds, for policies.

    A hit goes as deep as every layer's cache can go on from. Sessions may begin and end in any
    thread, while one thread runs passes (MLX: in that thread). A sequence holds the output of one
    encoder run; of several images of a request only the last is found again.
    """

    def __init__(
        self,
        cache: Cache | Sequence[KVCache],
        *,
        budget: int | None = 1 << 30,
        policy: str | Policy = "lru",
        sequences: Iterable[int] | None = None,
        namespace: str = "",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if budget is not None and budget < 0:
            raise ValueError(f"a budget is bytes >= 0, or None for no limit; got {budget}.")
        self._source: SequenceSource
        if isinstance(cache, Cache):
            self._source = PoolSequences(cache, sequences)
        else:
            self._source = LayerSequences(cache)
        self.lock = self._source.lock
        """Held while a session begins or ends."""
        self.events = Events(namespace)
        self._index: SpanIndex[StoredSnapshot] = SpanIndex(
            _made(policy), budget, on_evict=self._on_evict
        )
        self._trees: dict[str, RadixTree[StoredSpan]] = {}
        self._salts: dict[int, str] = {}
        self._active: set[Session] = set()
        self._media: dict[tuple[bytes, int], int] = {}
        self._clock = clock
        self._sessions = self._tokens = self._matched = 0

    def session(
        self,
        tokens: Sequence[int] | Tokens,
        *,
        salt: str = "",
        media: Media | None = None,
        resume_points: Iterable[int] = (),
    ) -> Session:
        """Begin a request; a context manager that ends it.

        tokens: ids of the prompt, at least one; a list or, faster, an int32 array.
        salt: requests of different salts share nothing, whatever their tokens.
        media: digest of the image or sound that the tokens ``[start, stop)`` stand for: it takes
            the place of their ids, which are the same for all images. A hit never ends inside.
        resume_points: positions to be able to go on at later, where a window or ring drops tokens.
            The end of the prompt is always one, and so is where it parts from earlier ones.

        Leaving with an exception stores nothing. Raises: ValueError, CacheFullError if no sequence
        or not enough cells are free; nothing has changed then.
        """
        plain = as_tokens(tokens)
        if not plain.size:
            raise ValueError("a prompt has at least one token; got none.")
        spans = _checked_media(media or {}, plain.size)
        with self.lock:
            ids = self._with_media(plain, spans)
            return self._begin(
                Session(self, ids, plain, self._source.acquire()), salt, spans, resume_points
            )

    def _begin(
        self, session: Session, salt: str, media: Media, resume_points: Iterable[int]
    ) -> Session:
        tree = self._trees.get(salt) or self._new_tree(salt)
        [ids] = session._ids
        asked = self._index.follow(tree, ids)
        common, depth = (asked[-1].stop if asked else 0), self._depth(asked, ids.size, media)
        try:
            if depth:
                found = self._index.follow(tree, ids[:depth])
                self._index.pin(found[-1])
                session._pinned = found[-1]
                self._source.restore(session._handle, _contiguous_snapshots(found, asked))
            places = {ids.size - 1, ids.size, common, *resume_points}
            self._source.schedule(
                session._handle, sorted(p for p in places if depth < p <= ids.size)
            )
        except BaseException:
            self._release(session)
            raise
        self._index.use(self._index.follow(tree, ids), self._clock())
        session._tree, session.matched = tree, depth
        self._active.add(session)
        self._sessions += 1
        self._tokens += ids.size
        self._matched += depth
        return session

    def _depth(self, spans: list[StoredSpan], size: int, media: Media) -> int:
        """How many tokens of a prompt a hit brings: every layer can go on behind them."""
        while spans and spans[-1].payload is None:
            spans = spans[:-1]
        chain, depth, limit = _contiguous_snapshots(spans, spans), 0, size - 1
        while chain and depth != limit:
            depth = limit = last_resumable(chain, limit)
            for start, stop in media:
                if start < depth < stop:
                    limit = start
        return depth

    def _end(self, session: Session, store: bool) -> None:
        with self.lock:
            if session not in self._active:
                return
            self._active.remove(session)
            try:
                if store:
                    self._store(session)
            finally:
                self._release(session)
                self._index.trim(self._clock())

    def _store(self, session: Session) -> None:
        ids, held = np.concatenate(session._ids), self._source.length(session._handle)
        if held > ids.size:
            raise KVCacheError(
                f"the cache holds {held} tokens of this session, which knows {ids.size}. "
                "Say which came behind the prompt: extend(tokens)."
            )
        if held <= session.matched:
            return
        known = session._pinned.stop if session._pinned is not None else 0
        asked = self._index.follow(session._tree, ids[:held])
        spans = self._index.extend(session._tree, ids[:held])
        self._index.use(spans[len(asked) :], self._clock())
        for span in spans:
            if span.stop > known:
                self._add(session, span)

    def _add(self, session: Session, span: StoredSpan) -> None:
        """Store what a session holds of a span, if that is more than is stored."""
        before = span.payload
        if before is not None and before.resumable_anywhere:
            return
        snapshot = self._source.capture(session._handle, span.start, span.stop)
        if before is not None:
            snapshot = before.snapshot.union(snapshot)
        if any(part.rows.positions.size for part in snapshot.parts):
            self._index.fill(span, StoredSnapshot(snapshot))
            if before is None:
                self.events.stored(span, self._salt_of(span))
        else:
            snapshot.close()

    def _release(self, session: Session) -> None:
        if session._pinned is not None:
            self._index.pin(session._pinned, -1)
            session._pinned = None
        self._source.release(session._handle)

    # What there is.

    @property
    def stats(self) -> PrefixStats:
        """What it has done, and holds now."""
        with self.lock:
            spans = self._index.kept
            return PrefixStats(
                sessions=self._sessions,
                active=len(self._active),
                tokens=self._tokens,
                matched=self._matched,
                nbytes=self._index.size,
                budget=self._index.budget,
                pinned=sum(span.size for span in spans if span.pins),
                resident=sum(span.size for span in spans if _resident(span)),
                spans=len(spans),
                evictions=self._index.evictions,
            )

    def render(
        self,
        *,
        decode: Callable[[list[int]], str] | None = None,
        svg: bool = False,
        width: int = 100,
    ) -> str:
        """The tree as text for a terminal, or as SVG. decode: shows text instead of token ids.

        Raises: BackendNotAvailableError without the package rich.
        """
        with self.lock:
            return render(self._trees, self._index.size, decode, svg, width)

    def clear(self) -> None:
        """Give up all that no session uses."""
        with self.lock:
            now = self._clock()
            for span in sorted(self._index.kept, key=lambda span: -span.stop):
                if not span.pins:
                    self._index.evict(span, now)
            if not self._active:
                self._index.drop_ghosts()
                self._trees, self._salts, self._media = {}, {}, {}
            if not self._index.kept:
                self.events.cleared()

    def _spans(self) -> Iterable[StoredSpan]:
        for tree in self._trees.values():
            for node in tree.root.below():
                if node.value is not None:
                    yield node.value

    # Keys.

    def _new_tree(self, salt: str) -> RadixTree[StoredSpan]:
        tree: RadixTree[StoredSpan] = RadixTree()
        self._trees[salt] = tree
        self._salts[id(tree.root)] = salt
        return tree

    def _salt_of(self, span: StoredSpan) -> str:
        node = span.node
        while node.parent is not None:
            node = node.parent
        return self._salts[id(node)]

    def _on_evict(self, span: StoredSpan) -> None:
        self.events.removed(span, self._salt_of(span))

    def _with_media(self, tokens: Tokens, media: Media) -> Tokens:
        """`tokens` with ids of the media in their places: negative ones, which no token has."""
        _check_ids(tokens, media)
        if media:
            tokens = tokens.copy()
        for (start, stop), digest in media.items():
            # In another length it is another rendering of the same, or two of it in a row.
            name = digest.encode() if isinstance(digest, str) else bytes(digest), stop - start
            tokens[start:stop] = self._media.setdefault(name, -1 - len(self._media))
        return tokens


def _contiguous_snapshots(spans: list[StoredSpan], known: list[StoredSpan]) -> list[Snapshot]:
    """Snapshots of `spans` without gaps: of nothing, as those of `known`, where nothing is kept.

    A hit may end in such a gap: where a chunk begins, nothing before it is needed.
    """
    kept = [span.payload.snapshot for span in known if span.payload is not None]
    return [
        span.payload.snapshot
        if span.payload is not None
        else kept[0].empty_like(span.start, span.stop)
        for span in spans
    ]


def _check_ids(tokens: Tokens, media: Media) -> None:
    """Raise ValueError for negative ids, but for those that media stand in for."""
    bad = tokens < 0
    for start, stop in media:
        bad[start:stop] = False
    if bad.any():
        raise ValueError(
            f"token ids are >= 0 where no media are; got {tokens[bad][0]}. Name the media there."
        )


def _resident(span: StoredSpan) -> bool:
    return span.payload is not None and span.payload.snapshot.resident


def _made(given: str | Policy) -> Policy:
    return policy(given)


def _checked_media(media: Media, size: int) -> Media:
    end = 0
    for start, stop in sorted(media):
        if not end <= start < stop <= size:
            raise ValueError(
                f"media stand for tokens [start, stop) of the {size} of the prompt, one after the "
                f"other; got {sorted(media)}."
            )
        if not isinstance(media[start, stop], bytes | str):
            raise TypeError(f"a digest is bytes or str; got {media[start, stop]!r}.")
        end = stop
    return media
