"""The contract of eviction policies, and a priority queue for their use."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count
from typing import Protocol


class PolicySpan(Protocol):
    """A span as policies see it: :class:`~kvcache.prefix.index.Span` without its tree.

    policy_data: owned by the policy, None at first; both parts of a span that is split have it.
    """

    policy_data: object

    @property
    def start(self) -> int:
        """Position of its first token."""

    @property
    def stop(self) -> int:
        """Position after its last token."""

    @property
    def nbytes(self) -> int:
        """Bytes it takes of the budget, 0 for a ghost."""

    @property
    def uses(self) -> int:
        """Requests for it so far."""

    @property
    def used(self) -> float:
        """Time of the last request for it, in seconds."""

    @property
    def offered(self) -> bool:
        """True if it may be evicted now."""

    @property
    def payload(self) -> object | None:
        """Its data, None for a ghost: an evicted span, its tokens remembered."""


class EvictionPolicy(ABC):
    """Choice among offered spans of the one to evict next. Every call shall cost O(log n).

    A policy serves one index, from when that is made. Times are seconds and never go backwards.
    """

    def use(self, span: PolicySpan, now: float) -> None:  # noqa: B027 - not all need to know
        """Take note of a request for `span`; its `uses` and `used` do not count it yet.

        A ghost (``span.payload is None``) was requested in vain; it is probably kept again soon.
        """

    @abstractmethod
    def offer(self, span: PolicySpan) -> None:
        """Add `span` to the candidates."""

    @abstractmethod
    def withdraw(self, span: PolicySpan) -> None:
        """Remove `span` from the candidates."""

    @abstractmethod
    def victim(self, now: float) -> PolicySpan | None:
        """Return the candidate to evict next, None if there are none. It stays a candidate."""

    def evict(self, span: PolicySpan, now: float) -> None:
        """Take note of the eviction of `span`, a candidate until now."""
        self.withdraw(span)


class Queue:
    """Offered spans in the order of a key, the least first.

    key: of a span; may change while it is queued, but only grow. None: not for this queue.

    A span withdrawn stays in the heap until its turn comes, as a heap finds only its first
    element fast; if it is offered again before, it is still there.
    """

    def __init__(self, key: Callable[[PolicySpan], float | None]) -> None:
        self._key, self._order = key, count()
        # The number decides between equal keys: spans cannot be compared.
        self._heap: list[tuple[float, int, PolicySpan]] = []
        self._queued: set[PolicySpan] = set()

    def add(self, span: PolicySpan) -> None:
        """Queue `span`, unless it is queued already or has no key here."""
        key = self._key(span)
        if key is not None and span not in self._queued:
            self._queued.add(span)
            heappush(self._heap, (key, next(self._order), span))

    def first(self) -> PolicySpan | None:
        """Return the offered span of the least key, None without any. It stays queued."""
        while self._heap:
            key, _, span = self._heap[0]
            if span.offered and self._key(span) == key:
                return span
            heappop(self._heap)
            self._queued.remove(span)
            if span.offered:  # its key has grown since
                self.add(span)
        return None
