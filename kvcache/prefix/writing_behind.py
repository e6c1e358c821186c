"""Writing behind: what sessions store, put into a store in the background."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

from kvcache.snapshots.resuming import last_resumable
from kvcache.snapshots.snapshot import Snapshot
from kvcache.stores.base import Store, describe
from kvcache.stores.keys import KeyChain
from kvcache.stores.outcomes import Deadline, Item, Key, PutOutcome, Stored, Unavailable
from kvcache.stores.pages import Page, encode_page
from kvcache.stores.sealing import Seal

from .background import Background
from .paging import forms_of, page_of, state_of
from .tier_stats import TierRecord

_QUEUED_NBYTES = 1 << 28
"""Bytes of pages that wait to be written."""
_WRITE_SECONDS = 30.0
"""Seconds that a put may take before its page is given up."""


class WriteBehind:
    """Pages and states on their way to a store.

    whole: whether no cache drops rows.
    """

    def __init__(self, store: Store, record: TierRecord, *, whole: bool) -> None:
        self._store, self._record, self._whole = store, record, whole
        self.queue = Background(1, _QUEUED_NBYTES)

    def put(
        self,
        chain: KeyChain,
        snapshots: Sequence[Snapshot],
        points: set[int],
        seal_of: Callable[[], Seal | None],
    ) -> None:
        """Queue what `snapshots` hold of the tokens of a chain, and the store need not have yet.

        points: positions to resume at, of which states are put where all caches can. seal_of:
        returns the seal for all of them, None to put them as they are.
        """
        try:
            seal = seal_of()
            for key, parent, page in self._pages_of(chain, snapshots, points):
                self._record.note_forms(forms_of(page.parts))
                self._put_one(key, page, partial(encode_page, page, key, parent, seal))
        except Exception as error:  # noqa: BLE001 - a session that ends is not to blame
            self._record.warn("pages cannot be cut", describe(error))

    def _pages_of(
        self, chain: KeyChain, snapshots: Sequence[Snapshot], points: set[int]
    ) -> Iterator[tuple[Key, Key, Page]]:
        """Yield key, parent and content of each page and state to put."""
        size, held = chain.page_tokens, len(chain)
        for number, key in enumerate(chain.page_keys):
            start = number * size
            if self._is_new(key):
                page = page_of(snapshots, start, start + size)
                if page is not None:
                    self._record.gate.note_sizes(page.nbytes, state=False)
                    yield key, chain.parent_of(start), page
        for position in sorted({*points, held}):
            if not 0 < position <= held or (self._whole and position % size == 0):
                continue
            key = chain.state_key(position)
            if self._is_new(key) and last_resumable(snapshots, position) == position:
                state = state_of(snapshots, position, position // size * size)
                if state is not None:
                    self._record.gate.note_sizes(state.nbytes, state=True)
                    yield key, chain.parent_of(position), state

    def _is_new(self, key: Key) -> bool:
        """Return whether to put a key, and there is room; count it as dropped if there is none."""
        if key in self._record.keys:
            return False
        room = self.queue.has_room()
        self._record.count("dropped", not room)
        return room

    def _put_one(self, key: Key, page: Page, encode: Callable[[], Item]) -> None:
        self._record.keys.add(key)  # first: it is forgotten when the put fails
        if not self.queue.submit(partial(self._write, key, encode), page.nbytes):
            self._drop(key)

    def _write(self, key: Key, encode: Callable[[], Item]) -> None:
        """Put one page into the store, in the background, where encryption is no session's time."""
        try:
            outcome: PutOutcome
            [outcome] = self._store.put([encode()], deadline=Deadline.after(_WRITE_SECONDS))
        except Exception as error:  # noqa: BLE001 - a store of the user's own
            outcome = Unavailable(describe(error))
            self._record.warn("it does not take pages", outcome.reason)
        if isinstance(outcome, Stored):
            self._record.count("written")
        else:
            self._drop(key)

    def _drop(self, key: Key) -> None:
        """Count a page that was not put, so that a later session puts it."""
        self._record.keys.discard([key])
        self._record.count("dropped")
