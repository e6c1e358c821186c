"""Fetching: what a store has of a prompt behind the hit in memory, read in the background."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import takewhile
from typing import NamedTuple

from kvcache._locks import Lock
from kvcache.errors import PageError
from kvcache.snapshots.snapshot import CacheSpec
from kvcache.stores.base import Store, describe
from kvcache.stores.keys import KeyChain
from kvcache.stores.outcomes import Deadline, Hit, Key, Miss, Present, Unavailable
from kvcache.stores.pages import Page, decode_page

from .background import Background
from .paging import FetchedPrefix, check_forms, check_page, forms_of
from .tier_stats import TierRecord

_READERS = 4
_QUEUED_READS = 64
_READ_AT_ONCE = 8
"""Pages of one call: each call measures the store, and a deadline keeps those before it."""
_PREFETCH_SECONDS = 30.0
_PREFETCHED = 16
"""Prefetched prompts that no session has asked for yet."""


class Wanted(NamedTuple):
    """A prompt that begins in memory up to `matched`.

    chain: keys of its tokens. limit: last position to resume at. media: ranges without one inside.
    """

    chain: KeyChain
    matched: int
    limit: int
    media: tuple[tuple[int, int], ...]


class Target(NamedTuple):
    """A position to resume at. pages: full ones to read. state: whether one is to be read too."""

    position: int
    pages: int
    state: bool


class Fetch:
    """A prefix on its way from the store.

    result: None if there is none, or not yet. counter: field of the statistics for the session that
    asked, should there be none.
    """

    def __init__(self, wanted: Wanted) -> None:
        self.wanted = wanted
        self.result: FetchedPrefix | None = None
        self.counter = "missed"
        self.done = threading.Event()


class Fetcher:
    """Prefixes on their way from a store.

    specs: of the caches, a dtype empty until it is known. page_tokens: of a page.
    """

    def __init__(
        self, store: Store, record: TierRecord, specs: list[CacheSpec], page_tokens: int
    ) -> None:
        self._store, self._record, self._specs, self._size = store, record, specs, page_tokens
        self._whole = all(spec.visibility.resumable_anywhere for spec in specs)
        self._prefetched: OrderedDict[tuple[Key, int], Fetch] = OrderedDict()
        self._lock = Lock()
        self.queue = Background(_READERS, _QUEUED_READS)

    def prefetch(self, wanted: Wanted) -> None:
        """Begin to fetch for a session that is to come; does nothing if too much is under way."""
        fetch = self._begun(wanted, Deadline.after(_PREFETCH_SECONDS))
        if fetch is not None:
            length = len(wanted.chain)
            with self._lock:
                self._prefetched[wanted.chain.state_key(length), length] = fetch
                while len(self._prefetched) > _PREFETCHED:
                    self._prefetched.popitem(last=False)

    def fetch(self, wanted: Wanted, deadline: Deadline) -> FetchedPrefix | None:
        """Return what the store has of a prompt behind its hit in memory, until the deadline."""
        fetch = self._taken(wanted) or self._begun(wanted, deadline)
        counter = "late"
        if fetch is not None and fetch.done.wait(min(deadline.left, threading.TIMEOUT_MAX)):
            if fetch.result is not None:
                return fetch.result
            counter = fetch.counter
        self._record.count(counter)
        return None

    def _taken(self, wanted: Wanted) -> Fetch | None:
        """Take the longest prefetch that a prompt begins with and that goes on behind its hit."""
        chain = wanted.chain
        with self._lock:
            waiting = sorted(self._prefetched, key=lambda place: -place[1])
            for key, length in waiting:
                if wanted.matched < length <= len(chain) and chain.state_key(length) == key:
                    return self._prefetched.pop((key, length))
        return None

    def _begun(self, wanted: Wanted, deadline: Deadline) -> Fetch | None:
        """Begin to fetch in the background; None if too much is under way."""
        fetch = Fetch(wanted)
        return fetch if self.queue.submit(partial(self._run, fetch, deadline), 1) else None

    def _run(self, fetch: Fetch, deadline: Deadline) -> None:
        try:
            fetch.result = self._fetched(fetch, deadline)
        except PageError as error:
            self._record.failed(describe(error))
        except Exception as error:  # noqa: BLE001 - a store of the user's own
            self._record.warn("it does not answer", describe(error))
            fetch.counter = "late"
        finally:
            fetch.done.set()

    def _fetched(self, fetch: Fetch, deadline: Deadline) -> FetchedPrefix | None:
        """Return the deepest prefix that pays, as far as it comes before the deadline."""
        wanted, target = fetch.wanted, self._target(fetch, deadline)
        if target is None:
            return None
        fetch.counter = "late"  # unless enough of it comes
        chain, first = wanted.chain, wanted.matched // self._size
        state: list[Page] = []
        if target.state:
            place = (target.position // self._size * self._size, target.position)
            state = self._read([chain.state_key(target.position)], [place], deadline, state=True)
            if not state and not self._whole:
                return None
        pages = self._read_pages(chain, first, first + target.pages, deadline)
        complete = len(pages) == target.pages
        if not complete and not self._whole:
            return None
        values = [*pages, *(state if complete else [])]
        start = first * self._size
        if not values or values[-1].stop <= wanted.matched:
            return None
        fetched = FetchedPrefix(start, values)
        self._check_specs(fetched.specs)
        return fetched

    def _target(self, fetch: Fetch, deadline: Deadline) -> Target | None:
        """Return the deepest position to resume at that pays; None if there is none."""
        wanted = fetch.wanted
        first = wanted.matched // self._size
        keys = wanted.chain.page_keys[first : wanted.limit // self._size]
        found = self._store.contains(keys, deadline=deadline)
        present = sum(1 for _ in takewhile(_is_present, found))
        if any(isinstance(outcome, Unavailable) for outcome in found):
            fetch.counter = "late"
        for key, outcome in zip(keys, found, strict=True):
            if isinstance(outcome, Miss):  # evicted there, say: a session may put it again
                self._record.forget_key(key)
        for target in self._targets(wanted, present, deadline):
            tokens = target.position - wanted.matched
            if self._record.gate.pays(tokens, target.pages, target.state):
                within = self._record.gate.pages_within(deadline.left, target.pages)
                if within == target.pages:
                    return target
                if self._whole and within:
                    return Target((first + within) * self._size, within, False)
            fetch.counter = "gated"
        return None

    def _targets(self, wanted: Wanted, present: int, deadline: Deadline) -> Iterator[Target]:
        """Yield positions to resume at by what the store has, the deepest first.

        present: pages that follow each other behind the hit in memory.
        """
        size = self._size
        first = wanted.matched // size
        deepest = first + present
        least = max(wanted.matched, deepest * size if self._whole else 0)
        stop = min(wanted.limit, (deepest + 1) * size - 1)
        at_once = size
        while stop > least:
            positions = range(stop, max(least, stop - at_once), -1)
            for position in self._states_at(wanted, positions, deadline):
                yield Target(position, position // size - first, True)
            stop, at_once = positions[-1] - 1, 4 * at_once
        if self._whole and deepest * size > wanted.matched:
            yield Target(deepest * size, present, False)

    def _states_at(
        self, wanted: Wanted, positions: Sequence[int], deadline: Deadline
    ) -> Iterator[int]:
        """Yield those of `positions` at which the store has a state, in their order."""
        allowed = [
            position
            for position in positions
            if not any(start < position < stop for start, stop in wanted.media)
        ]
        keys = [wanted.chain.state_key(position) for position in allowed]
        found = self._store.contains(keys, deadline=deadline)
        for position, outcome in zip(allowed, found, strict=True):
            if isinstance(outcome, Present):
                yield position

    def _read_pages(self, chain: KeyChain, first: int, last: int, deadline: Deadline) -> list[Page]:
        """Return the pages from `first` up to `last`, or as many as come."""
        pages: list[Page] = []
        size = self._size
        for number in range(first, last, _READ_AT_ONCE):
            numbers = range(number, min(last, number + _READ_AT_ONCE))
            keys = [chain.page_keys[n] for n in numbers]
            places = [(n * size, (n + 1) * size) for n in numbers]
            read = self._read(keys, places, deadline, state=False)
            pages += read
            if len(read) < len(keys):
                break
        return pages

    def _read(
        self,
        keys: Sequence[Key],
        places: Sequence[tuple[int, int]],
        deadline: Deadline,
        *,
        state: bool,
    ) -> list[Page]:
        """Return the values under `keys`, checked, up to the first that does not come.

        places: positions ``[start, stop)`` that each must be of.
        """
        begun = time.monotonic()
        outcomes = self._store.get(keys, deadline=deadline)
        seconds = time.monotonic() - begun
        hits = [outcome for outcome in takewhile(_is_hit, outcomes) if isinstance(outcome, Hit)]
        self._record.gate.note_transfer(sum(hit.value.nbytes for hit in hits), seconds)
        pages: list[Page] = []
        for key, hit, (start, stop) in zip(keys, hits, places, strict=False):
            try:
                page = check_page(decode_page(hit, key), start, stop, state=state)
                check_forms(forms_of(page.parts), self._record.forms)
            except PageError as error:
                self._record.failed(describe(error))
                break
            self._record.gate.note_sizes(hit.value.nbytes, state=state)
            self._record.note_key(key)
            pages.append(page)
        self._record.count("fetched", len(pages))
        return pages

    def _check_specs(self, specs: list[CacheSpec]) -> None:
        """Raise PageError for rows of other caches. Those without a dtype yet take any."""
        own = [
            spec._replace(dtype=spec.dtype or got.dtype)
            for spec, got in zip(self._specs, specs, strict=False)
        ]
        if own != specs:
            raise PageError(f"pages are of {own}; got {specs}")


def _is_present(outcome: object) -> bool:
    return isinstance(outcome, Present)


def _is_hit(outcome: object) -> bool:
    return isinstance(outcome, Hit)
