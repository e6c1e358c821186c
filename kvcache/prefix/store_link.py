"""The link of a prefix cache to its store: fetched pages become spans, and spans pages."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

from kvcache.errors import CacheFullError, KVCacheError
from kvcache.stores.base import Store, describe
from kvcache.stores.outcomes import Deadline
from kvcache.stores.urls import open_store

from .fetching import Answer, Wanted
from .kept import KeptSpans
from .known import KnownTokens
from .media import Media
from .paging import FetchedPrefix
from .radix import Tokens
from .sequences import SequenceSource
from .session import Request
from .stored import StoredSpan, captured, contiguous_snapshots, find_hit
from .tiers import StoreTier

_WAIT_SECONDS = 0.5
"""Time that a session waits for pages of a store, where no deadline is given."""


def open_named(store: str | Store, namespace: str) -> Store:
    """Return an open store for pages of a model. Raises: ValueError unless that is named."""
    if not namespace:
        raise ValueError(
            "what is stored for others names the model it is of; got no namespace. "
            "Give a fingerprint of model and weights."
        )
    return open_store(store)


class Filed(NamedTuple):
    """Spans filled with pages of a store, behind a hit in memory of `matched` tokens."""

    spans: list[StoredSpan]
    matched: int


class StoreLink:
    """The way between spans in memory and a store. source: makes the sequences of sessions."""

    def __init__(self, tier: StoreTier, source: SequenceSource, kept: KeptSpans) -> None:
        self.tier, self.kept, self._source = tier, kept, source

    # Before a session begins; without the lock of the prefix cache, which passes take as well.

    def fetched(
        self, prompt: Tokens, salt: str, places: Media, deadline: Deadline | None
    ) -> Answer | None:
        """Return what the store has of a prompt behind its hit in memory; None for nothing."""
        # Before the lock is waited for: the time of the caller runs.
        limit = Deadline.after(_WAIT_SECONDS) if deadline is None else deadline
        wanted = self._wanted(prompt, salt, places)
        return None if wanted is None else self.tier.fetch(wanted, limit)

    def prefetch(self, prompt: Tokens, salt: str, places: Media) -> None:
        """Begin to fetch for a session that is to come."""
        wanted = self._wanted(prompt, salt, places)
        if wanted is not None:
            self.tier.prefetch(wanted)

    def _wanted(self, prompt: Tokens, salt: str, places: Media) -> Wanted | None:
        """Return what to ask the store for; None if all is in memory, or caches cannot take it."""
        with self._source.lock:
            if not self._source.restorable:
                return None
            ids, placements = self.kept.media_ids.substitute(prompt, places)
            bounds = tuple((medium.start, medium.stop) for medium in placements)
            matched = find_hit(self.kept.follow(salt, ids), ids.size, bounds).matched
        if matched == ids.size - 1:
            return None
        return self.tier.wanted(KnownTokens(ids, salt, placements), matched, bounds)

    # Under the lock.

    def begin(
        self,
        known: KnownTokens,
        answer: Answer | None,
        now: float,
        begin: Callable[[], Request],
    ) -> Request:
        """Return the request that `begin` begins, with the prefix of an answer in memory.

        Caches that do not take its rows begin without. The budget may be exceeded afterwards.
        """
        if answer is None:
            return begin()
        fetched = answer.prefix
        filed = None if fetched is None else self._admitted(known, fetched, now)
        try:
            request = begin()
        except KVCacheError as error:
            if filed is None:
                raise
            self._refuse(filed, error, now)
            request, filed = begin(), None
        request.lacks = answer.lacks
        if filed is not None:
            self.tier.record.count("fetched_tokens", request.hit.matched - filed.matched)
        return request

    def _admitted(self, known: KnownTokens, fetched: FetchedPrefix, now: float) -> Filed | None:
        """Keep a fetched prefix of a prompt as if a session had stored it.

        None where what was in memory before it has gone meanwhile, or reaches as far by now.
        """
        held = fetched.stop
        prefix = self.kept.follow(known.salt, known.ids[:held])
        bounds = [(medium.start, medium.stop) for medium in known.media]
        matched = find_hit(prefix, held + 1, bounds).matched
        if not fetched.start <= matched < held:
            return None
        try:
            snapshots = captured(fetched, prefix, matched, held)
        except Exception as error:  # noqa: BLE001 - rows that do not go with those in memory
            self.tier.record.failed(describe(error))
            return None
        return Filed(self.kept.file(known, held, prefix, snapshots, now), matched)

    def _refuse(self, filed: Filed, error: KVCacheError, now: float) -> None:
        """Evict spans whose rows the caches did not take, or have no room for."""
        if not isinstance(error, CacheFullError):
            self.tier.record.failed(describe(error))
        for span in sorted(filed.spans, key=lambda span: -span.stop):
            if span.offered:  # else others use it
                self.kept.index.evict(span, now)

    def put(self, request: Request, held: int) -> None:
        """Queue the first `held` tokens of a request, which are in memory, for the store."""
        known = request.known
        if request.begun is not None and held >= request.prompt:
            until = time.monotonic() if request.answered is None else request.answered
            computed = request.prompt - request.hit.matched
            self.tier.record.gate.note_computed(computed, until - request.begun)
            request.begun = None
        spans = self.kept.follow(known.salt, known.ids[:held]).spans
        if any(span.payload is not None for span in spans):
            self.tier.put(known, held, contiguous_snapshots(spans, spans), request.points)
