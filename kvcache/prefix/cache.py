"""The prefix cache: sessions over any cache, beginning with results of earlier ones."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from sys import getsizeof
from typing import NoReturn

from kvcache._checks import as_budget, as_index, as_indices, as_sizes
from kvcache._interrupts import uninterrupted
from kvcache.errors import NotSupportedError
from kvcache.layers.base import LayerCache
from kvcache.pool.base import Cache
from kvcache.snapshots.snapshot import Snapshot

from .arguments import Clock, as_positions, check_text
from .events import Events
from .index import SpanIndex
from .known import KnownTokens, checked_prompt
from .media import Media, MediaIds
from .policies import EvictionPolicy, make_policy
from .radix import RadixTree, Tokens
from .render import render
from .sequences import LayerSequences, PoolSequences, SequenceSource
from .session import Request, Session
from .spans import Prefix
from .stats import PrefixStats
from .stored import (
    Hit,
    StoredPrefix,
    StoredSnapshot,
    StoredSpan,
    captured,
    close_snapshots,
    contiguous_snapshots,
    find_hit,
)

_MIN_INDEX_BUDGET = 1 << 26


class PrefixCache:
    """Reuse of results of earlier requests, over every kind of cache.

    ::

        prefix = PrefixCache(cache)                    # a multi-sequence cache, initialised
        with prefix.session(tokens) as s:
            ...                                        # run the model on s.remaining, in s.sequence
            s.extend(generated)

    cache: a multi-sequence cache, where a hit shares cells and copies nothing; or a list of empty
        per-layer caches, where every session gets caches of its own, filled by copying.
    budget: bytes stored at most, None for no limit. Cells of the pool count as well; they are
        copied to host memory when the pool needs the room.
    index_budget: bytes of host memory at most for everything else that is remembered: token ids,
        evicted spans, salts, media. None for a sixteenth of `budget`, and no less than 64 MiB.
    policy: choice of what to evict: ``"lru"``, ``"s3fifo"``, ``"cost"``, ``"gittins"`` or a
        :class:`~kvcache.prefix.policies.EvictionPolicy`.
    sequences: ids of the pool for sessions to use, None for all.
    namespace: whatever tells models apart (weights, adapter, RoPE); part of the hashes in events.
    clock: returns seconds, for policies; where it goes backwards, time stands still for them.
    resume_every: keeps resume points at its multiples in every prompt, for models in which a window
        drops tokens or a layer is recurrent. Each costs a window of rows, or a state, which can
        weigh as much as thousands of tokens. None for no such points.

    A hit ends where the caches of all layers can resume. Sessions may begin and end in any
    thread, while one thread runs passes (MLX: in that thread). The sequences named are its own for
    as long as it lives: no other prefix cache may use them, and nobody puts tokens there but for a
    session.

    Raises: ValueError, KVCacheError for sequences of another prefix cache, or that hold tokens.
    """

    def __init__(
        self,
        cache: Cache | Sequence[LayerCache],
        *,
        budget: int | None = 1 << 30,
        index_budget: int | None = None,
        policy: str | EvictionPolicy = "lru",
        sequences: Iterable[int] | None = None,
        namespace: str = "",
        clock: Callable[[], float] = time.monotonic,
        resume_every: int | None = None,
    ) -> None:
        [every] = [None] if resume_every is None else as_sizes(resume_every=resume_every)
        budget, index_budget = as_budget(budget, "bytes"), as_budget(index_budget, "bytes")
        if index_budget is None and budget is not None:
            index_budget = max(_MIN_INDEX_BUDGET, budget // 16)
        chosen_policy = make_policy(policy)
        read_clock = Clock(clock)
        check_text(namespace, "a namespace tells models apart")
        sequences = None if sequences is None else as_indices(sequences, "sequences")
        self._source: SequenceSource
        if isinstance(cache, Cache):
            self._source = PoolSequences(cache, sequences)
        else:
            self._source = LayerSequences(cache)
        self.lock = self._source.lock
        """Held while a session begins or ends."""
        self.events = Events(namespace)
        trees: dict[str, RadixTree[StoredSpan]] = {}  # by salt; none without a span
        media_ids = MediaIds()
        # No reference to this object: it would keep its sequences claimed, once dropped, until the
        # garbage collector comes round.
        self._index: SpanIndex[StoredSnapshot] = SpanIndex(
            chosen_policy,
            budget,
            index_budget=index_budget,
            on_evict=self.events.removed,
            on_empty=lambda tree: trees.pop(tree.salt, None),
            others=lambda: getsizeof(trees) + media_ids.nbytes,
        )
        self._trees, self._media_ids = trees, media_ids
        self._active: set[Request] = set()
        self._dropped: deque[Request] = deque()  # sessions that were dropped before their end
        self._clock, self._resume_every = read_clock, every
        self._sessions = self._tokens = self._matched = 0

    def __reduce__(self) -> NoReturn:
        raise NotSupportedError(
            "a PrefixCache is not copied or pickled: its sessions and spans belong to one cache. "
            "Make another one, PrefixCache(cache.copy()), and save snapshots to files."
        )

    def session(
        self,
        tokens: Sequence[int] | Tokens,
        *,
        salt: str = "",
        media: Media | None = None,
        resume_points: Iterable[int] = (),
    ) -> Session:
        """Begin a request. Return it as a context manager, to end it.

        tokens: ids of the prompt, at least one; a list or, faster, an int32 array.
        salt: requests of different salts share nothing, whatever their tokens.
        media: digest of the image or sound by its placeholder tokens ``[start, stop)``: it takes
            the place of their ids, which are the same for all images. A hit never ends inside.
        resume_points: positions where later requests shall be able to resume though a window or
            ring drops tokens. The end of the prompt always is one, and so is the place where it
            departs from earlier prompts.

        Raises: ValueError, TypeError, CacheFullError if no sequence or not enough cells are free;
            nothing has changed then.
        """
        prompt, places = checked_prompt(tokens, salt, media)
        points = as_positions(resume_points, "resume_points")
        request: Request | None = None
        try:
            with self.lock, uninterrupted():
                self._end_dropped()
                ids, placements = self._media_ids.substitute(prompt, places)
                known = KnownTokens(ids, salt, placements)
                now = self._clock()  # before there is anything to give back: it may raise
                request = Request(self._source.acquire(), known)
                self._begin(request, now, points)
                return Session(
                    request, prompt, self.lock, self._store_open, self._end, self._dropped
                )
        except BaseException:
            if request is not None and request in self._active:  # before Ctrl-C was let through
                self._count(request, -1)
                self._end(request, store=False)
            raise

    def lookup(
        self, tokens: Sequence[int] | Tokens, *, salt: str = "", media: Media | None = None
    ) -> Hit:
        """Return how much of a prompt a :meth:`session` would find; nothing is counted."""
        prompt, places = checked_prompt(tokens, salt, media)
        with self.lock:
            ids, placements = self._media_ids.substitute(prompt, places)
            bounds = [(medium.start, medium.stop) for medium in placements]
            return find_hit(self._follow(salt, ids), ids.size, bounds)

    def insert(
        self,
        tokens: Sequence[int] | Tokens,
        caches: Sequence[LayerCache],
        *,
        salt: str = "",
        media: Media | None = None,
    ) -> None:
        """Store `tokens` from per-layer `caches` that no session has, and take these over.

        tokens: ids of all that the caches hold; these may be a row of ``split()`` of a batch.
        salt, media: as for :meth:`session`.

        Raises: KVCacheError over a pool; ValueError, TypeError for caches of other kinds, with
            another number of tokens, or padded. Nothing has changed then.
        """
        prompt, places = checked_prompt(tokens, salt, media)
        with self._changing():
            self._end_dropped()
            ids, placements = self._media_ids.substitute(prompt, places)
            handle = self._source.adopt(caches, ids.size)
            request = Request(handle, KnownTokens(ids, salt, placements), detached=True)
            try:
                self._store(request)
                request.detached = False  # until here the caches stay as they are
            finally:
                self._release(request)
                self._index.trim(self._clock())

    def _begin(self, request: Request, now: float, resume_points: list[int]) -> None:
        """Restore the longest stored prefix of a prompt and count its request as active.

        On an exception its sequence is released, and nothing stays pinned.
        """
        known = request.known
        ids, media = known.ids, [(medium.start, medium.stop) for medium in known.media]
        try:
            prompt_spans, stored = prefix = self._follow(known.salt, ids)
            hit = find_hit(prefix, ids.size, media)
            if matched := hit.matched:
                hit_spans = [span for span in prompt_spans if span.start < matched]
                request.pinned = hit_spans[-1]
                self._index.pin(hit_spans[-1])
                request.handle.restore(contiguous_snapshots(hit_spans, prompt_spans), matched)
            # One token before the end as well: the same prompt again leaves its last to compute.
            wanted = {ids.size - 1, ids.size, stored, *resume_points}
            if self._resume_every is not None:
                wanted.update(range(0, ids.size, self._resume_every))
            request.handle.schedule(sorted(p for p in wanted if matched < p <= ids.size))
            request.handle.track(known)
            self._index.use(prompt_spans, now)
        except BaseException:
            self._release(request)
            raise
        request.hit = hit
        self._active.add(request)
        self._count(request, 1)

    def _count(self, request: Request, sessions: int) -> None:
        """Add a request to the totals, or take it back with -1; before its tokens change."""
        self._sessions += sessions
        self._tokens += sessions * len(request.known)
        self._matched += sessions * request.hit.matched

    def _store_open(self, request: Request) -> None:
        """Store the tokens of a request that goes on."""
        with self._changing():
            self._store(request)
            self._index.trim(self._clock())

    def _end(self, request: Request, store: bool) -> None:
        """Release a request, after storing its tokens if `store`. Ending it again does nothing."""
        with self._changing():
            if request not in self._active:
                return
            self._active.remove(request)
            try:
                if store:
                    self._store(request)
            finally:
                self._release(request)
                # Last, when the spans of this request are not pinned any more.
                self._index.trim(self._clock())

    def _end_dropped(self) -> None:
        """End the requests of sessions that nobody ended before they were dropped."""
        while self._dropped:
            self._end(self._dropped.popleft(), store=False)

    def _store(self, request: Request) -> None:
        """Store the known tokens held by the sequence of a request, as far as they are not yet.

        All of them, or none if a framework fails.
        """
        request.handle.update_known()
        known = request.known
        ids, held = known.ids, request.handle.held(len(known))
        restored = min(request.hit.matched, known.unchanged)
        if held <= restored or not request.handle.is_whole(held):
            return
        prefix = self._follow(known.salt, ids[:held])
        if prefix.length == held and all(span.complete for span in prefix.spans):
            return
        snapshots = captured(request.handle, prefix, restored, held)
        try:
            spans = self._extended(known, ids[:held], prefix, snapshots)
            new = [span for span in spans if span.start >= prefix.length]
            self._index.use(new, self._clock())  # the others were used when the request began
            for span in spans:
                if span.start in snapshots:
                    self._index.fill(span, StoredSnapshot(snapshots.pop(span.start)))
                    self.events.stored(span)
        finally:  # what a policy that raised has kept from its place
            close_snapshots(snapshots)

    def _extended(
        self, known: KnownTokens, ids: Tokens, prefix: StoredPrefix, snapshots: dict[int, Snapshot]
    ) -> list[StoredSpan]:
        """Return the spans of `ids`; those of `prefix` take what they lack from `snapshots`."""
        replaced: dict[StoredSpan, StoredSnapshot] = {}
        try:
            for span in prefix.spans:
                # Before a span is split, so that both parts get what belongs to them.
                if span.payload is not None and span.start in snapshots:
                    replaced[span] = span.payload
                    self._index.fill(span, StoredSnapshot(snapshots.pop(span.start)))
            tree = self._trees.setdefault(known.salt, RadixTree(known.salt))
            return self._index.extend(tree, ids, known.media)
        except BaseException:
            # A framework cannot split a payload: each span has again what it had.
            for span, previous in list(replaced.items()):
                replaced[span] = span.payload or previous
                self._index.fill(span, previous)
            raise
        finally:
            for payload in replaced.values():
                payload.close()

    def _release(self, request: Request) -> None:
        """Give back what a request holds: all of it, also if a policy raises."""
        pinned, request.pinned, request.ended = request.pinned, None, True
        request.known.media = ()
        try:
            if pinned is not None:
                self._index.pin(pinned, -1)
                self._index.settle(pinned)
        finally:
            if not request.detached:
                request.handle.release()

    # Its content.

    @property
    def stats(self) -> PrefixStats:
        """Totals since it was made, and its state now."""
        with self.lock:
            self._end_dropped()
            active = len(self._active)
            return PrefixStats.of(self._index, self._sessions, active, self._tokens, self._matched)

    def render(
        self,
        *,
        decode: Callable[[list[int]], str] | None = None,
        svg: bool = False,
        width: int = 100,
    ) -> str:
        """Draw the tree as text for a terminal, or as SVG.

        decode: makes text of token ids, to be shown instead. width: columns, 20 to 10,000. Spans
            too deep in the tree for this width are not indented any further.

        Raises: BackendNotAvailableError without the package rich; TypeError, ValueError for other
            arguments.
        """
        with self.lock:
            return render(self._trees, self._index.nbytes, decode, svg, width)

    def trim(self, nbytes: int) -> None:
        """Evict until no more than `nbytes` are stored, or only what is in use; keep the budget.

        Raises: ValueError, TypeError for no number of bytes.
        """
        target, index = as_index(nbytes, "nbytes"), self._index
        with self._changing():
            self._end_dropped()
            budget = index.budget
            try:
                index.budget = target if budget is None else min(target, budget)
                index.trim(self._clock())
            finally:
                index.budget = budget

    def clear(self) -> None:
        """Evict all spans not in use by a session, and forget those evicted before."""
        with self._changing():
            self._end_dropped()
            now, kept = self._clock(), list(self._index.kept)
            # Leaf first: only spans without children are offered to the policy, and can be evicted.
            for span in sorted(kept, key=lambda span: -span.stop):
                if not span.pins:
                    self._index.evict(span, now)
            self._index.forget_ghosts()
            if kept and not self._index.kept:
                self.events.cleared()

    @contextmanager
    def _changing(self) -> Iterator[None]:
        """Change the content under the lock; subscribers hear of it when that is done."""
        with self.lock:
            try:
                with uninterrupted():
                    yield
            finally:
                self.events.deliver()

    def _follow(self, salt: str, ids: Tokens) -> StoredPrefix:
        """Return what is known of `ids`, which begin the tokens of a request."""
        tree = self._trees.get(salt)
        return self._index.follow(tree, ids) if tree is not None else Prefix([], 0)
