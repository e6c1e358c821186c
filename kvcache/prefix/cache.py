"""The prefix cache: sessions over any cache, beginning with results of earlier ones."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import NoReturn, Unpack

from kvcache._checks import as_budget, as_index, as_indices, as_sizes
from kvcache.errors import NotSupportedError
from kvcache.layers.base import LayerCache
from kvcache.pool.base import Cache
from kvcache.stores.base import Store
from kvcache.stores.outcomes import NEVER, Deadline
from kvcache.stores.sealing import Seal

from .arguments import Clock, as_seals, check_text
from .asked import Asked, SessionOptions, as_asked
from .fetching import Answer
from .kept import KeptSpans
from .known import KnownTokens, checked_prompt
from .media import Media
from .policies import EvictionPolicy, make_policy, policy_name
from .quotas import QuotaOf, as_quotas
from .radix import Tokens
from .render import render
from .requests import Requests, sequences_of
from .residency import Residency
from .retention import Retain, as_retained
from .session import Request, Session
from .stats import PrefixStats
from .store_link import StoreLink, open_named
from .stored import Hit, find_hit
from .tiers import StoreTier
from .waiting import wait_for_others

_CLOSE_SECONDS = 10.0


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
        evicted spans, salts, media, hashes for subscribers, keys of a store. None for a sixteenth
        of `budget`, 64 MiB at least; without `budget`, for none but 64 MiB for evicted spans.
    policy: choice of what to evict: ``"lru"``, ``"s3fifo"``, ``"cost"``, ``"gittins"`` or a
        :class:`~kvcache.prefix.policies.EvictionPolicy`.
    sequences: ids of the pool for sessions to use, None for all.
    namespace: whatever tells models apart (weights, adapter, RoPE, and the dtype where per-layer
        caches name none); part of the hashes in events, and of the keys in a store, which needs it.
    clock: returns seconds, for policies; where it goes backwards, time stands still for them.
    resume_every: keeps resume points at its multiples in every prompt, for models in which a window
        drops tokens or a layer is recurrent. Each costs a window of rows, or a state, which can
        weigh as much as thousands of tokens. None for no such points.
    store: a last tier behind memory, for restarts, and for others who share it: a URL, as for
        :func:`kvcache.stores.open_store`, or a store, which stays the caller's to close. What
        sessions store is written there in the background, and what a session lacks is fetched.
    page_tokens: tokens of a page in the store; all who share it use the same number.
    seal: encrypts pages in the store: one for all, or a function that returns the seal for a salt
        (None for pages of no tenant, as they are). What it raises is raised by :meth:`session`.
    quota: bytes that each salt may store, or a function of the salt (None for no limit): a salt
        above it evicts its own spans. What that raises is raised by the end of a session.

    A hit ends where the caches of all layers can resume. Sessions may begin and end in any
    thread, while one thread runs passes (MLX: in that thread). The sequences named are its own for
    as long as it lives: no other prefix cache may use them, and nobody puts tokens there but for a
    session.

    Raises: ValueError, KVCacheError for sequences of another prefix cache, or that hold tokens;
        ValueError for a store without a namespace, StoreError for a URL that leads to none.
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
        store: str | Store | None = None,
        page_tokens: int = 64,
        seal: Seal | Callable[[str], Seal | None] | None = None,
        quota: int | QuotaOf | None = None,
    ) -> None:
        [page_tokens] = as_sizes(page_tokens=page_tokens)
        [every] = [None] if resume_every is None else as_sizes(resume_every=resume_every)
        budget, index_budget = as_budget(budget, "bytes"), as_budget(index_budget, "bytes")
        chosen_policy = make_policy(policy)
        read_clock, seal_of, quota_of = Clock(clock), as_seals(seal), as_quotas(quota)
        check_text(namespace, "a namespace tells models apart")
        opened = None if store is None else open_named(store, namespace)
        sequences = None if sequences is None else as_indices(sequences, "sequences")
        self._source = sequences_of(cache, sequences)
        self.lock = self._source.lock
        """Held while a session begins or ends."""
        # No reference to this object: it would keep its sequences claimed, once dropped, until the
        # garbage collector comes round.
        self._kept = kept = KeptSpans(
            chosen_policy, budget, index_budget, namespace, self._source.medium, quota_of
        )
        self.events, self._index = kept.events, kept.index
        self._trees, self._media_ids = kept.trees, kept.media_ids
        self._requests = requests = Requests(self._source, kept, read_clock, every)
        if opened is not None:
            owned = isinstance(store, str)
            form = namespace, self._source.specs, page_tokens, seal_of
            tier = StoreTier(opened, *form, kept.known_keys, owned=owned)
            requests.store_link = StoreLink(tier, self._source, kept)
            # What is queued is still written, at the end of the program as well.
            weakref.finalize(requests, tier.stop).atexit = False

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
        deadline: Deadline | None = None,
        keep_on_error: bool = True,
        wait: Deadline | float | None = None,
        retain: Retain | None = None,
    ) -> Session:
        """Begin a request. Return it as a context manager, to end it.

        tokens: ids of the prompt, at least one; a list or, faster, an int32 array.
        salt: requests of different salts share nothing, whatever their tokens.
        media: digest of the image or sound by its placeholder tokens ``[start, stop)``: it takes
            the place of their ids, which are the same for all images. A hit never ends inside.
        resume_points: positions where later requests shall be able to resume though a window or
            ring drops tokens. The end of the prompt always is one, and so is the place where it
            departs from earlier prompts.
        deadline: by which pages of a store must have come; None for half a second from now. What
            is late is left out, and computed.
        keep_on_error: whether leaving the session by an exception stores what was computed by then;
            False to store nothing.
        wait: deadline, or seconds, to wait for another session that is computing the same tokens;
            until it has stored some of them, or ends. None to compute them as well.
        retain: pair (priority, seconds) for the tokens that the session stores, or such a pair by
            positions (start, stop), a stop of None being the end. They are evicted after all that
            are not retained, and after those of less priority. It is 1 to 100 when they are stored,
            and falls to 0 within the seconds; for ``math.inf`` it stays. The stops of ranges are
            resume points. Of several retentions of a token, the stronger one counts.

        Raises: ValueError, TypeError, CacheFullError if no sequence or not enough cells are free;
            nothing has changed then.
        """
        asked = as_asked(
            tokens,
            salt=salt,
            media=media,
            resume_points=resume_points,
            deadline=deadline,
            keep_on_error=keep_on_error,
            wait=wait,
            retain=retain,
        )
        return self._begin(asked, self._awaited(asked))

    @asynccontextmanager
    async def async_session(
        self, tokens: Sequence[int] | Tokens, **options: Unpack[SessionOptions]
    ) -> AsyncIterator[Session]:
        """Begin a request for ``async with``: what it waits for leaves the event loop free.

        The waiting for pages of a store, and for other sessions, is done in a thread. The session
        itself begins and ends in the thread of the event loop. A task that is cancelled while it
        waits has begun nothing; one that is cancelled later leaves its session by an exception.

        tokens, options: of :meth:`session`. Raises: as that.
        """
        asked = as_asked(tokens, **options)
        fetched = None
        if asked.wait is not None or self._requests.store_link is not None:
            try:
                fetched = await asyncio.to_thread(self._awaited, asked)
            except BaseException:
                asked.gone = True
                raise
        with self._begin(asked, fetched) as session:
            yield session

    def _awaited(self, asked: Asked) -> Answer | None:
        """Wait for other sessions and for the store; return what that has of the prompt."""
        wait_for_others(self._requests, self._kept, asked)
        store = self._requests.store_link
        if store is None or asked.gone:
            return None
        return store.fetched(asked.prompt, asked.salt, asked.places, asked.deadline)

    def _begin(self, asked: Asked, fetched: Answer | None) -> Session:
        """Begin a request, with what a store had of its prompt."""
        requests = self._requests
        store = requests.store_link
        request: Request | None = None
        try:
            with requests.changing():
                requests.end_dropped()
                ids, placements = self._media_ids.substitute(asked.prompt, asked.places)
                known = KnownTokens(ids, asked.salt, placements)
                now = requests.clock()  # before there is anything to give back: it may raise

                def begin() -> Request:
                    return requests.begin(known, now, asked.points)

                request = begin() if store is None else store.begin(known, fetched, now, begin)
                request.retain = asked.retain
                if fetched is not None and fetched.prefix is not None:
                    self._index.trim(now)  # may raise, so the request is known before
                return Session(
                    request,
                    asked.prompt,
                    self.lock,
                    requests.store,
                    requests.end,
                    requests.drop_branch,
                    requests.dropped,
                    keep_on_error=asked.keep_on_error,
                )
        except BaseException:
            requests.take_back(request)  # where it had begun before Ctrl-C was let through
            raise

    def prefetch(
        self, tokens: Sequence[int] | Tokens, *, salt: str = "", media: Media | None = None
    ) -> None:
        """Begin to fetch what the store has of a prompt, for a session that begins later.

        For a request that waits in a queue, or the beginning of one that is still being typed.
        Returns at once. The session waits for the rest, until its own deadline. Does nothing
        without a store, or while too much is being fetched.

        tokens, salt, media: of the session, or of a beginning of its prompt.
        """
        prompt, places = checked_prompt(tokens, salt, media)
        if self._requests.store_link is not None:
            self._requests.store_link.prefetch(prompt, salt, places)

    def flush(self, deadline: Deadline = NEVER) -> bool:
        """Wait until all that sessions stored so far is in the store, or was given up.

        Return False if the deadline comes first. True without a store.
        """
        link = self._requests.store_link
        return link is None or link.tier.drain(deadline)

    def close(self, deadline: Deadline | None = None) -> bool:
        """Write to the store what waits, and give the store up; sessions go on without it.

        deadline: None for ten seconds from now. A store given as an object stays open. Return
        False if the deadline came before all was written. Closing twice is fine.
        """
        link, self._requests.store_link = self._requests.store_link, None
        limit = Deadline.after(_CLOSE_SECONDS) if deadline is None else deadline
        return link is None or link.tier.close(limit)

    def lookup(
        self, tokens: Sequence[int] | Tokens, *, salt: str = "", media: Media | None = None
    ) -> Hit:
        """Return how much of a prompt a :meth:`session` would find; nothing is counted."""
        prompt, places = checked_prompt(tokens, salt, media)
        with self.lock:
            ids, placements = self._media_ids.substitute(prompt, places)
            bounds = [(medium.start, medium.stop) for medium in placements]
            return find_hit(self._kept.follow(salt, ids), ids.size, bounds)

    def insert(
        self,
        tokens: Sequence[int] | Tokens,
        caches: Sequence[LayerCache],
        *,
        salt: str = "",
        media: Media | None = None,
        retain: Retain | None = None,
    ) -> None:
        """Store `tokens` from per-layer `caches` that no session has, and take these over.

        tokens: ids of all that the caches hold; these may be a row of ``split()`` of a batch.
        salt, media, retain: as for :meth:`session`.

        Raises: KVCacheError over a pool, or for caches of an open session; ValueError, TypeError
            for other kinds or numbers of tokens, or for padding. Nothing has changed then.
        """
        prompt, places = checked_prompt(tokens, salt, media)
        retained = as_retained(retain)
        with self._requests.changing():
            self._requests.end_dropped()
            ids, placements = self._media_ids.substitute(prompt, places)
            handle = self._source.adopt(caches, ids.size)
            self._requests.insert(handle, KnownTokens(ids, salt, placements), retained)

    def drop_branch(
        self,
        tokens: Sequence[int] | Tokens,
        position: int,
        *,
        salt: str = "",
        media: Media | None = None,
    ) -> None:
        """Evict what is stored of a sequence from `position` on, as nobody will ask for it.

        For a turn that was edited, say. What sessions use stays, and what sequences build on that
        part from `tokens` behind `position`; and pages in a store.

        tokens: ids of all of the sequence, the answer included. salt, media: of its session.

        Raises: TypeError, ValueError for a position not of `tokens`; nothing has changed then.
        """
        prompt, places = checked_prompt(tokens, salt, media)
        start = as_index(position, "position")
        if not 0 <= start < prompt.size:
            raise ValueError(
                f"a branch begins at a position of its tokens, 0 to {prompt.size - 1}; got {start}."
            )
        with self._requests.changing():
            self._requests.end_dropped()
            ids, placements = self._media_ids.substitute(prompt, places)
            known, now = KnownTokens(ids, salt, placements), self._requests.clock()
            self._kept.drop_branch(known, start, now)

    # Its content.

    @property
    def stats(self) -> PrefixStats:
        """Totals since it was made, and its state now."""
        with self.lock:
            self._requests.end_dropped()
            return self._requests.stats

    def measure_residency(self) -> Residency:
        """Return histograms of the times that spans are stored and unused, from the first call on.

        They go on counting; :func:`register_metrics` does this for Prometheus.
        """
        with self.lock:
            self._index.residency = self._index.residency or Residency()
            return self._index.residency

    def render(
        self,
        *,
        decode: Callable[[list[int]], str] | None = None,
        svg: bool = False,
        width: int = 100,
    ) -> str:
        """Draw the tree as text for a terminal, or as SVG.

        Spans of which requests cannot reuse any beginning have a mark, and the reason beside them:
        evicted (when, and by which policy), never stored, or stored with few resume points (which,
        and for which caches). A legend says what the marks in the drawing mean.

        decode: makes text of token ids, to be shown instead. width: columns, 20 to 10,000. Spans
            too deep in the tree for this width are not indented any further.

        Raises: BackendNotAvailableError without the package rich; TypeError, ValueError for other
            arguments.
        """
        with self.lock:
            policy = policy_name(self._index.policy)
            return render(self._trees, self._index.nbytes, policy, decode, svg, width)

    def trim(self, nbytes: int) -> None:
        """Evict until no more than `nbytes` are stored, or only what is in use; keep the budget.

        Raises: ValueError, TypeError for no number of bytes.
        """
        target = as_index(nbytes, "nbytes")
        with self._requests.changing():
            self._requests.end_dropped()
            self._kept.trim(target, self._requests.clock())

    def clear(self) -> None:
        """Evict all spans not in use by a session, and forget those evicted before."""
        with self._requests.changing():
            self._requests.end_dropped()
            self._kept.clear(self._requests.clock())
