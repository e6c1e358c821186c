"""The store behind a prefix cache: what memory has lost, another process computed, or a restart.

A prefix cache has three tiers. Spans are in the memory of the cache, then on the host (a pool that
needs its cells spills them), both within the budget of the index; and behind them in a store:

*Written behind.* What a session stores is cut into pages and states (:mod:`.paging`) as soon as it
is in the index, on the thread of the session, as backends may be used there alone. Putting them
into the store is a job of a background thread. Its queue has a limit in bytes; what exceeds it is
dropped and counted, and never delays a session.

*Fetched.* Before a session begins, and without the lock of its prefix cache, the keys of the pages
behind the hit in memory are looked up. The deepest place is chosen where all caches can resume,
that pays (:mod:`.costs`), and that should arrive before the deadline; its pages are read, decoded
and checked in a background thread, and the session waits until its deadline at most. They become
spans of the index in host memory, as if a session had stored them. So everything behind that,
hits, pins, budget, eviction and restoring, is the same for spans of all tiers.

*Trouble.* A store that is gone, late, full or damaged is a miss: counted, and logged once. Nothing
of it is raised by a session.

Nothing is read when a prefix cache is made: keys are computed from tokens, so what a store has is
found when somebody asks for it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import numpy as np

from kvcache.snapshots.snapshot import CacheSpec, Snapshot
from kvcache.stores.base import Store
from kvcache.stores.keys import KeyChain, Namespace
from kvcache.stores.outcomes import Deadline

from .arguments import SealOf
from .fetching import Answer, Fetcher, Wanted
from .known import KnownTokens
from .known_keys import KnownKeys
from .radix import Tokens
from .tier_stats import TierRecord, TierStats
from .writing_behind import WriteBehind


class StoreTier:
    """A store as the last tier of a prefix cache.

    model: fingerprint of the model and its weights. specs: of the caches, as far as they are known
    before their first tokens. page_tokens: of a page; all who share the store use the same number.
    seal_of: seal for the pages of a salt, or None. keys: those not to be put again. owned: whether
    to close the store in the end.
    """

    def __init__(
        self,
        store: Store,
        model: str,
        specs: list[CacheSpec],
        page_tokens: int,
        seal_of: SealOf,
        keys: KnownKeys,
        *,
        owned: bool,
    ) -> None:
        self._store, self._page_tokens, self._owned = store, page_tokens, owned
        self._seal_of = seal_of
        self._namespace = _namespace_of(model, specs)
        self.record = TierRecord(store, keys)
        whole = all(spec.visibility.resumable_anywhere for spec in specs)
        self._writer = WriteBehind(store, self.record, whole=whole)
        self._fetcher = Fetcher(store, self.record, specs, page_tokens)

    @property
    def stats(self) -> TierStats:
        """A copy of the totals so far."""
        return self.record.stats

    def put(
        self, known: KnownTokens, held: int, snapshots: Sequence[Snapshot], points: set[int]
    ) -> None:
        """Queue what `snapshots` hold of the first `held` tokens, to be written behind.

        points: positions to resume at, of which states are put where all caches can.
        """
        chain = self._chain_of(known, known.ids[:held])
        self._writer.put(chain, snapshots, {*points, held}, partial(self._seal_of, known.salt))

    def wanted(
        self, known: KnownTokens, matched: int, media: tuple[tuple[int, int], ...]
    ) -> Wanted:
        """Return what a session for `known` would fetch behind its hit in memory."""
        seal = self._seal_of(known.salt)
        return Wanted(self._chain_of(known, known.ids), matched, len(known) - 1, media, seal)

    def prefetch(self, wanted: Wanted) -> None:
        """Begin to fetch for a session that is to come; does nothing if too much is under way."""
        self._fetcher.prefetch(wanted)

    def fetch(self, wanted: Wanted, deadline: Deadline) -> Answer:
        """Return what the store has of a prompt behind its hit in memory, until the deadline."""
        return self._fetcher.fetch(wanted, deadline)

    def drain(self, deadline: Deadline) -> bool:
        """Wait until all that is queued was written; return False if the deadline comes first."""
        return self._writer.queue.drain(deadline)

    def stop(self) -> None:
        """Take no more work; what is queued is still done."""
        self._writer.queue.stop()
        self._fetcher.queue.stop()

    def close(self, deadline: Deadline) -> bool:
        """Write what waits, stop, and close the store if it is owned; return :meth:`drain`."""
        written = self.drain(deadline)
        self.stop()
        self.record.keys.clear()
        if self._owned:
            self._store.close()
        return written

    def _chain_of(self, known: KnownTokens, ids: Tokens) -> KeyChain:
        """Return the keys of `ids`, which begin the known ones."""
        media = [medium for medium in known.media if medium.start < ids.size]
        if media:
            ids = np.array(ids)
        for medium in media:  # stand-in ids are of this process only
            place = slice(medium.start, min(medium.stop, ids.size))
            ids[place] = medium.placeholders[: place.stop - place.start]
        chain = KeyChain(replace(self._namespace, salt=known.salt), self._page_tokens)
        chain.extend(ids, {(medium.start, medium.stop): medium.medium.key for medium in media})
        return chain


def _namespace_of(model: str, specs: list[CacheSpec]) -> Namespace:
    """Return the namespace of all pages of these caches, but for the salt."""
    dtypes = "/".join(
        spec.dtype if isinstance(spec.dtype, str) else "+".join(spec.dtype) for spec in specs
    )
    layout = repr([(spec.kind, tuple(spec.visibility)) for spec in specs])
    return Namespace(model, dtype=dtypes, layout=hashlib.sha256(layout.encode()).hexdigest())
