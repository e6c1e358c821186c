"""Fetching: what a store has of a prompt behind the hit in memory, read in the background."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import takewhile
from typing import NamedTuple, TypeAlias

from kvcache._locks import Lock
from kvcache.errors import PageError
from kvcache.snapshots.snapshot import CacheSpec
from kvcache.stores.base import Store, describe
from kvcache.stores.keys import KeyChain
from kvcache.stores.outcomes import (
    ContainsOutcome,
    Corrupt,
    Deadline,
    Hit,
    Key,
    Miss,
    Present,
    Unavailable,
)
from kvcache.stores.pages import Page, decode_page
from kvcache.stores.sealing import Seal

from .background import Background
from .paging import FetchedPrefix, check_forms, check_page, check_specs, forms_of, specs_of
from .reasons import Why
from .tier_stats import TierRecord

_READERS = 4
_QUEUED_READS = 64
_READ_AT_ONCE = 8
"""Pages of one call: each call measures the store, and a deadline keeps those before it."""
_DELETE_SECONDS = 1.0
_PREFETCH_SECONDS = 30.0
_PREFETCHED = 16
"""Prefetched prompts that no session has asked for yet."""


class Wanted(NamedTuple):
    """A prompt that begins in memory up to `matched`.

    chain: keys of its tokens. limit: last position to resume at. media: ranges without one inside.
    seal: of its pages, if they are sealed.
    """

    chain: KeyChain
    matched: int
    limit: int
    media: tuple[tuple[int, int], ...]
    seal: Seal | None


class Target(NamedTuple):
    """A position to resume at. pages: full ones to read. state: whether one is to be read too."""

    position: int
    pages: int
    state: bool


class Reading:
    """Pages read so far of a prompt. first: number of the first page. present: pages behind."""

    def __init__(self, wanted: Wanted, first: int, present: int) -> None:
        self.wanted, self.first, self.present = wanted, first, present
        self.pages: list[Page] = []
        self.damaged = False
        """Whether a value came that cannot be used."""
        self.lacks: Lacks = {}

    @property
    def deepest(self) -> int:
        """Number of the page behind the last one that can be had."""
        return self.first + self.present


Lacks: TypeAlias = dict[int, Why]
"""Why tokens did not come that the store has, or may have, by the position they reach to.

A token has the reason of the least position behind it.
"""


class Answer(NamedTuple):
    """Pages that came from the store for a session, None for none, and why others did not."""

    prefix: FetchedPrefix | None
    lacks: Lacks


class Fetch:
    """A prefix on its way from the store.

    result: None if there is none, or not yet. counter: field of the statistics for the session that
    asked, should there be none. lacks: of that session, should it wait no longer.
    """

    def __init__(self, wanted: Wanted) -> None:
        self.wanted = wanted
        self.result: FetchedPrefix | None = None
        self.counter = "missed"
        self.lacks = _unanswered(wanted)
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

    def fetch(self, wanted: Wanted, deadline: Deadline) -> Answer:
        """Return what the store has of a prompt behind its hit in memory, until the deadline."""
        counter, lacks = "late", _unanswered(wanted)
        for begin in (self._taken, partial(self._begun, deadline=deadline)):
            fetch = begin(wanted)
            if fetch is not None:
                done = fetch.done.wait(min(deadline.left, threading.TIMEOUT_MAX))
                lacks = fetch.lacks
                if not done:
                    break
                counter = fetch.counter
                if fetch.result is not None:
                    return Answer(fetch.result, lacks)
                if counter != "late":  # else the store did not answer when it was prefetched
                    break
        self._record.count(counter)
        return Answer(None, lacks)

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
        except Exception as error:  # noqa: BLE001 - a store of the user's own
            self._record.warn("it does not answer", describe(error))
            fetch.counter = "late"
        finally:
            fetch.done.set()

    def _fetched(self, fetch: Fetch, deadline: Deadline) -> FetchedPrefix | None:
        """Return the deepest prefix that pays and arrives whole before the deadline."""
        wanted = fetch.wanted
        reading = Reading(wanted, wanted.matched // self._size, self._present(fetch, deadline))
        reach = reading.deepest * self._size
        if fetch.counter == "late":
            reading.lacks = _unanswered(wanted)
        reading.lacks[reach] = "no_resume_point"  # unless a target is found
        fetch.lacks = {**reading.lacks, reach: "late"}
        try:
            return self._deepest(fetch, reading, deadline)
        finally:
            fetch.lacks = reading.lacks

    def _deepest(self, fetch: Fetch, reading: Reading, deadline: Deadline) -> FetchedPrefix | None:
        """Do :meth:`_fetched` where it is known which pages follow each other in the store."""
        wanted, gate = fetch.wanted, self._record.gate
        for target in self._targets(reading, deadline):
            missing = target.pages - len(reading.pages)
            seconds = gate.seconds_to_fetch(missing, target.state)
            if not gate.pays(target.position - wanted.matched, missing, target.state):
                fetch.counter = reading.lacks[target.position] = "gated"
            elif seconds is not None and seconds > deadline.left:
                fetch.counter = reading.lacks[target.position] = "gated"
                if self._whole:  # the pages that come before are of use alone
                    within = gate.pages_within(deadline.left, missing)
                    reading.present = min(reading.present, len(reading.pages) + within)
            else:
                fetch.counter = reading.lacks[target.position] = "late"  # unless it comes
                fetched = self._arrived(reading, target, deadline)
                if fetched is not None:
                    return fetched
                if reading.damaged:
                    reading.lacks[target.position] = "failed"
        return None

    def _present(self, fetch: Fetch, deadline: Deadline) -> int:
        """Return how many pages follow each other in the store behind the hit in memory."""
        wanted = fetch.wanted
        keys = wanted.chain.page_keys[wanted.matched // self._size : wanted.limit // self._size]
        found = self._found(keys, deadline)
        if any(isinstance(outcome, Unavailable) for outcome in found):
            fetch.counter = "late"
        return sum(1 for _ in takewhile(_is_present, found))

    def _found(self, keys: Sequence[Key], deadline: Deadline) -> list[ContainsOutcome]:
        """Return which keys the store has; a session may put the others again."""
        found = self._store.contains(keys, deadline=deadline)
        outcomes = zip(keys, found, strict=True)
        self._record.keys.discard(key for key, outcome in outcomes if isinstance(outcome, Miss))
        return found

    def _targets(self, reading: Reading, deadline: Deadline) -> Iterator[Target]:
        """Yield positions to resume at by what the store has, the deepest first.

        Where `reading` finds that fewer pages can be had, positions behind them are left out.
        """
        size, wanted, first = self._size, reading.wanted, reading.first
        stop, at_once = wanted.limit, size
        while True:
            stop = min(stop, (reading.deepest + 1) * size - 1)
            least = max(wanted.matched, reading.deepest * size if self._whole else 0)
            if stop <= least:
                break
            positions = range(stop, max(least, stop - at_once), -1)
            for position in self._states_at(reading, positions, deadline):
                if position // size <= reading.deepest:
                    yield Target(position, position // size - first, True)
            stop, at_once = positions[-1] - 1, 4 * at_once
        while self._whole and reading.deepest * size > wanted.matched:
            present = reading.present
            yield Target(reading.deepest * size, present, False)
            if reading.present == present:
                return

    def _arrived(
        self, reading: Reading, target: Target, deadline: Deadline
    ) -> FetchedPrefix | None:
        """Return the prefix up to a position; None if something of it does not come."""
        wanted, size = reading.wanted, self._size
        state: list[Page] = []
        if target.state:
            place = (target.position // size * size, target.position)
            key = wanted.chain.state_key(target.position)
            state = self._read(reading, [key], [place], deadline, state=True)
            if not state:
                return None
        self._read_pages(reading, target.pages, deadline)
        values = [*reading.pages[: target.pages], *state]
        if len(reading.pages) < target.pages or not values:
            return None
        try:
            return FetchedPrefix(reading.first * size, values)
        except PageError as error:
            self._record.failed(describe(error))
            reading.damaged = True
            return None

    def _states_at(
        self, reading: Reading, positions: Sequence[int], deadline: Deadline
    ) -> Iterator[int]:
        """Yield those of `positions` at which the store has a state, in their order."""
        wanted = reading.wanted
        allowed = [
            position
            for position in positions
            if not any(start < position < stop for start, stop in wanted.media)
        ]
        keys = [wanted.chain.state_key(position) for position in allowed]
        outcomes = self._found(keys, deadline)
        if any(isinstance(outcome, Unavailable) for outcome in outcomes):
            reading.lacks |= _unanswered(wanted)
        for position, outcome in zip(allowed, outcomes, strict=True):
            if isinstance(outcome, Present):
                yield position

    def _read_pages(self, reading: Reading, count: int, deadline: Deadline) -> None:
        """Read on until `count` pages are there; where one does not come, no more can be had."""
        size, keys = self._size, reading.wanted.chain.page_keys
        while (read := len(reading.pages)) < count:
            begin = reading.first + read
            numbers = range(begin, min(reading.first + count, begin + _READ_AT_ONCE))
            places = [(n * size, (n + 1) * size) for n in numbers]
            asked = [keys[n] for n in numbers]
            reading.pages += self._read(reading, asked, places, deadline, state=False)
            if len(reading.pages) < read + len(numbers):
                reading.present = len(reading.pages)
                return

    def _read(
        self,
        reading: Reading,
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
        broken = {key for key, out in zip(keys, outcomes, strict=True) if isinstance(out, Corrupt)}
        self._record.count("failed", len(broken))  # the store has warned of them, and removed them
        self._record.keys.discard(broken)
        reading.damaged = reading.damaged or bool(broken)
        pages: list[Page] = []
        for key, hit, (start, stop) in zip(keys, hits, places, strict=False):
            page = self._decoded(reading.wanted.seal, key, hit, start, stop, state=state)
            if page is None:
                reading.damaged = True
                break
            self._record.gate.note_sizes(hit.value.nbytes, state=state)
            self._record.keys.add(key)
            pages.append(page)
        self._record.count("fetched", len(pages))
        return pages

    def _decoded(
        self, seal: Seal | None, key: Key, hit: Hit, start: int, stop: int, *, state: bool
    ) -> Page | None:
        """Return the page in a value; None, and the value is gone, for one that cannot be used."""
        try:
            page = check_page(decode_page(hit, key, seal=seal), start, stop, state=state)
            check_specs(specs_of(page.parts), self._specs)
            check_forms(forms_of(page.parts), self._record.forms)
        except PageError as error:
            self._record.failed(describe(error))
            if seal is None:  # a sealed one may be fine, and the secret of this process wrong
                self._store.delete([key], deadline=Deadline.after(_DELETE_SECONDS))
            self._record.keys.discard([key])
            return None
        return page


def _unanswered(wanted: Wanted) -> Lacks:
    """Return why nothing came of a prompt while it is not known what the store has."""
    return {wanted.limit + 1: "late"}


def _is_present(outcome: object) -> bool:
    return isinstance(outcome, Present)


def _is_hit(outcome: object) -> bool:
    return isinstance(outcome, Hit)
