"""The contract of eviction policies, and a priority queue for their use."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Sequence
from heapq import heapify, heappop, heappush
from itertools import count
from sys import getsizeof
from typing import Generic, NamedTuple, Protocol, TypeVar


class PolicySpan(Protocol):
    """A span as policies see it: :class:`~kvcache.prefix.spans.Span` without its tree.

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

    @property
    def complete(self) -> bool:
        """True if it can be evicted in part, from its end: no token of it was ever dropped."""


class EndedRequest(NamedTuple):
    """A request as policies see it at its end.

    spans: of all its tokens that are known, in order; the last may go on behind them. stop:
    position after its last token. answered: tokens of its answer. asked: the times at which it used
    spans; where one was last used at another time, a later request has used it since.
    """

    spans: Sequence[PolicySpan]
    stop: int
    answered: int
    asked: Collection[float]


class EvictionPolicy(ABC):
    """Choice among offered spans of the one to evict next. Every call shall cost O(log n).

    A policy serves one index, from when that is made. Times are seconds and never go backwards.
    """

    data_nbytes: int = 0
    """Bytes of memory that `policy_data` of one span takes."""
    position_tokens: int = 1
    """Tokens that one position of a span stands for; set by a replay, which has blocks for it."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory that the policy takes, `policy_data` aside; counted in statistics."""
        return 0

    def use(self, span: PolicySpan, now: float) -> None:  # noqa: B027 - not all need to know
        """Take note of a request for `span`; its `uses` and `used` do not count it yet.

        A ghost (``span.payload is None``) was requested in vain; it is probably kept again soon.
        """

    def ended(self, request: EndedRequest, now: float) -> None:  # noqa: B027 - as above
        """Take note of the end of a request, before which nothing is known of its answer."""

    @abstractmethod
    def offer(self, span: PolicySpan) -> None:
        """Add `span` to the candidates."""

    @abstractmethod
    def withdraw(self, span: PolicySpan) -> None:
        """Remove `span` from the candidates."""

    @abstractmethod
    def victim(self, now: float) -> PolicySpan | None:
        """Return the candidate to evict next, None if there are none. It stays a candidate."""

    def tail(self, span: PolicySpan) -> int:
        """Return how many tokens at the end of `span`, the victim, are to go before it asks again.

        No more go than the budget needs, and all of a span that is not `complete`.
        """
        return span.stop - span.start

    def evict(self, span: PolicySpan, now: float) -> None:
        """Take note of the eviction of `span`, a candidate until now."""
        self.withdraw(span)

    def alike(self, upper: PolicySpan, lower: PolicySpan) -> bool:
        """Return True if the two parts of a sequence, used at the same time, may be one again.

        The span of both has `uses` and `policy_data` of `lower`.
        """
        return upper.uses == lower.uses and upper.policy_data == lower.policy_data

    def join(self, upper: PolicySpan, lower: PolicySpan, now: float) -> None:  # noqa: B027 - as above
        """Take note that `upper` becomes part of `lower` right behind it, no candidate meanwhile.

        They may have been used at different times: where room for the index is short, a turn of a
        conversation in which nobody can resume any more becomes part of the next one.
        """


_MAX_STALE = 64
"""Entries without a span that are left in a queue in any case."""
_ENTRY_NBYTES = getsizeof((0.5, 0, [])) + getsizeof([None]) + getsizeof(0.5) + getsizeof(1 << 20)


S = TypeVar("S", bound=PolicySpan)
Key = TypeVar("Key", float, tuple[int, float])


class Queue(Generic[S, Key]):
    """Offered spans in the order of a key, the least first.

    key: of a span; may change while it is queued, but only grow. None: not for this queue.

    A heap finds only its first element fast. So the entry of a span withdrawn stays until its
    turn comes, without the span; there are never more of these than others, but for a few.
    """

    def __init__(self, key: Callable[[S], Key | None]) -> None:
        self._key: Callable[[S], Key | None] = key
        self._order = count()
        # The number decides between equal keys: spans cannot be compared. A span is in a list of
        # its own, to be taken out of its entry wherever that is in the heap.
        self._heap: list[tuple[Key, int, list[S]]] = []
        self._places: dict[S, list[S]] = {}
        self.least: Key | None = None
        """Key of the last result of :meth:`first`, None before it."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory it takes, spans aside."""
        tables = getsizeof(self._heap) + getsizeof(self._places)
        return tables + len(self._heap) * _ENTRY_NBYTES

    def add(self, span: S) -> None:
        """Queue `span`, unless it has no key here."""
        key = self._key(span)
        if key is not None:
            self._places[span] = place = [span]
            heappush(self._heap, (key, next(self._order), place))

    def withdraw(self, span: S) -> None:
        """Take `span` out, if it is queued."""
        place = self._places.pop(span, None)
        if place is None:
            return
        heap = self._heap
        if heap[0][2] is place:  # as for every victim
            heappop(heap)
        else:
            place.clear()
            if len(heap) > 2 * len(self._places) + _MAX_STALE:
                self._compact()

    def first(self) -> S | None:
        """Return the span of the least key, None without any. It stays queued."""
        heap = self._heap
        while heap:
            key, _, place = heap[0]
            if not place:
                heappop(heap)
                continue
            [span] = place
            if not span.offered:  # left here by a withdrawal that raised
                heappop(heap)
                if self._places.get(span) is place:
                    del self._places[span]
                continue
            if self._key(span) == key:
                self.least = key
                return span
            heappop(heap)
            self.add(span)  # its key has grown since
        return None

    def _compact(self) -> None:
        """Drop entries without a span, and the table, which kept its size when spans went."""
        self._places = dict(self._places)
        self._heap = [entry for entry in self._heap if entry[2]]
        heapify(self._heap)
