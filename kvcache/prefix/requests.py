"""Requests of one prefix cache: how they begin, store what was computed, and end."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from kvcache._interrupts import uninterrupted
from kvcache.layers.base import LayerCache
from kvcache.pool.base import Cache

from .arguments import Clock
from .explain import note
from .kept import KeptSpans
from .known import KnownTokens
from .layer_sequences import LayerSequences
from .pool_sequences import PoolSequences
from .retention import RetainedRange, cuts_of
from .sequences import SequenceHandle, SequenceSource
from .session import Request
from .stats import PrefixStats
from .store_link import StoreLink
from .stored import captured, contiguous_snapshots, search


class Requests:
    """Requests over the sequences of one source, and the spans that they share.

    resume_every: distance of the positions to resume at in every prompt, None for none. Use it
    within :meth:`changing`, or under the lock of `source`.

    dropped: sessions that were dropped before their end. store_link: way to a store, if any.
    """

    def __init__(
        self, source: SequenceSource, kept: KeptSpans, clock: Clock, resume_every: int | None
    ) -> None:
        self.lock, self.clock = source.lock, clock
        self.dropped: deque[Request] = deque()
        self.store_link: StoreLink | None = None
        self._source, self._kept, self._index = source, kept, kept.index
        self._resume_every = resume_every
        self._active: set[Request] = set()
        self.ended_or_stored = threading.Condition(self.lock)
        """Notified when a request ends, or stores its tokens and goes on."""
        self._sessions = self._tokens = self._matched = 0

    @contextmanager
    def changing(self) -> Iterator[None]:
        """Change the content under the lock; subscribers hear of it when that is done."""
        with self.lock:
            try:
                with uninterrupted():
                    yield
            finally:
                self._kept.events.deliver()

    @property
    def stats(self) -> PrefixStats:
        """Totals so far, and the state now."""
        totals = self._sessions, len(self._active), self._tokens, self._matched
        store = None if self.store_link is None else self.store_link.tier.stats
        return PrefixStats.of(self._index, *totals, store, dict(self._kept.explained))

    def begin(self, known: KnownTokens, now: float, resume_points: list[int]) -> Request:
        """Restore the longest stored prefix of a prompt; return its request, counted as active.

        On an exception its sequence is released, and nothing stays pinned.
        """
        request = Request(self._source.acquire(), known)
        ids, media = known.ids, [(medium.start, medium.stop) for medium in known.media]
        try:
            prompt_spans, stored = prefix = self._kept.follow(known.salt, ids)
            searched = search(prefix, ids.size, media)
            hit = searched.hit
            request.noted = note(self._kept, ids, prefix, searched)
            if matched := hit.matched:
                hit_spans = [span for span in prompt_spans if span.start < matched]
                request.pinned = hit_spans[-1]
                self._index.pin(hit_spans[-1])
                request.handle.restore(contiguous_snapshots(hit_spans, prompt_spans), matched)
            # One token before the end as well: the same prompt again leaves its last to compute.
            wanted = {ids.size - 1, ids.size, stored, *resume_points}
            if self._resume_every is not None:
                wanted.update(range(0, ids.size, self._resume_every))
            request.points = {p for p in wanted if matched < p <= ids.size}
            request.handle.schedule(sorted(request.points))
            request.handle.track(known)
            request.asked.add(now)
            self._index.use(prompt_spans, now)
        except BaseException:
            self._release(request)
            raise
        request.hit, request.prompt = hit, ids.size
        self._active.add(request)
        self._count(request, 1)
        return request

    def at_work(self, salt: str) -> list[Request]:
        """Return the requests of a salt that have begun and not ended, nor been dropped."""
        return [
            request
            for request in self._active
            if request.known.salt == salt and request not in self.dropped
        ]

    def take_back(self, request: Request | None) -> None:
        """End a request that just began, as if it never had."""
        if request is not None and request in self._active:
            self._count(request, -1)
            self.end(request, store=False)

    def _count(self, request: Request, sessions: int) -> None:
        """Add a request to the totals, or take it back with -1; before its tokens change."""
        self._sessions += sessions
        self._tokens += sessions * len(request.known)
        self._matched += sessions * request.hit.matched

    def insert(
        self, handle: SequenceHandle, known: KnownTokens, retain: tuple[RetainedRange, ...]
    ) -> None:
        """Store the tokens of a sequence that no session has; release it unless that fails."""
        request = Request(handle, known, detached=True, retain=retain)
        try:
            self._store(request)
            request.detached = False  # until here the caches stay as they are
        finally:
            self._release(request)
            self._index.trim(self.clock())

    def store(self, request: Request) -> None:
        """Store the tokens of a request that goes on."""
        with self.changing():
            self._store(request)
            self.ended_or_stored.notify_all()
            self._index.trim(self.clock())

    def drop_branch(self, request: Request, position: int) -> None:
        """Declare the tokens of a request from `position` on dead."""
        with self.changing():
            self._kept.drop_branch(request.known, position, self.clock())
            if request.dropped is None or position < request.dropped:
                request.dropped = position

    def end(self, request: Request, store: bool, cut: bool = False) -> None:
        """Release a request, after storing its tokens if `store`. Ending it again does nothing.

        cut: whether its last pass may have been cut short.
        """
        with self.changing():
            if request not in self._active:
                return
            self._active.remove(request)
            try:
                if store:
                    self._store(request, cut=cut)
                spans = self._kept.follow(request.known.salt, request.known.ids).spans
                request.tell_end(self._index.policy, spans, self.clock())
            finally:
                self.ended_or_stored.notify_all()
                self._release(request)
                # Last, when the spans of this request are not pinned any more.
                now = self.clock()
                if request.dropped is not None:
                    self._kept.drop_branch(request.known, request.dropped, now)
                self._index.trim(now)

    def end_dropped(self) -> None:
        """End the requests of sessions that nobody ended before they were dropped."""
        while self.dropped:
            self.end(self.dropped.popleft(), store=False)

    def _store(self, request: Request, *, cut: bool = False) -> None:
        """Store the known tokens held by the sequence of a request, as far as they are not yet.

        All of them, or none if a framework fails. cut: whether its last pass may be incomplete.
        """
        request.handle.update_known()
        known = request.known
        held = request.handle.held(len(known))
        restored = min(request.hit.matched, known.unchanged)
        if cut:
            held = request.handle.surely_held(held, restored)
        elif held > restored:
            request.handle.settle()
        if request.dropped is not None:
            held = min(held, request.dropped)
        if held > restored:
            if request.handle.is_whole(held):
                self._store_held(request, held, restored)
        elif request.retain:
            self._kept.parted(known, held, cuts_of(request.retain, held))
            self._kept.retain(known, held, request.retain, self.clock())

    def _store_held(self, request: Request, held: int, restored: int) -> None:
        """Store the first `held` tokens of a request, and retain what is to be retained."""
        known, cuts = request.known, cuts_of(request.retain, held)
        prefix = self._kept.parted(known, held, cuts)
        now = self.clock()  # first: it may raise
        if prefix.length < held or not all(span.complete for span in prefix.spans):
            request.asked.add(now)
            snapshots = captured(request.handle, prefix, restored, held, cuts)
            before = {span for span in prefix.spans if span.payload is not None}
            filled = self._kept.file(known, held, prefix, snapshots, now, cuts)
            new = [span for span in filled if span not in before]
            request.created += sum(map(request.prompt_tokens_in, new))
        if request.retain:
            self._kept.retain(known, held, request.retain, now)
        if self.store_link is not None:
            self.store_link.put(request, held)

    def _release(self, request: Request) -> None:
        """Give back what a request holds: all of it, also if a policy raises."""
        pinned, request.pinned, request.ended = request.pinned, None, True
        request.known.media = ()
        try:
            if pinned is not None:
                self._index.pin(pinned, -1)
                self._index.settle(pinned)
        finally:
            request.handle.release(keep=request.detached)


def sequences_of(
    cache: Cache | Sequence[LayerCache], sequences: Iterable[int] | None
) -> SequenceSource:
    """Return the sequences for sessions over a cache. sequences: of a pool, None for all.

    Raises: as :class:`PoolSequences` and :class:`LayerSequences`.
    """
    if isinstance(cache, Cache):
        return PoolSequences(cache, sequences)
    return LayerSequences(cache)
