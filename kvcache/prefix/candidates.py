"""Candidates: spans that may be evicted, and the order among those that a policy does not choose.

A retained span is offered to no policy. While there are others, it stays; after them, the least
retained goes first. The spans of a salt with a quota are in an order of their own as well.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from heapq import heapify, heappop, heappush
from itertools import count
from sys import getsizeof
from typing import Generic

from .policies.base import EvictionPolicy, Queue
from .quotas import LimitedTree, Quotas, by_level
from .retention import Retention
from .spans import P, Span, as_offered

_MAX_STALE = 64
_STEP_NBYTES = getsizeof((0.5, 0, None, None)) + getsizeof(0.5) + getsizeof(1 << 20)


class Steps(Generic[P]):
    """Times at which the levels of retained spans fall.

    A heap finds only its first element fast, so the entry of a span whose retention was replaced
    stays until its turn comes: it has another retention than the span. There are never more of
    these than others, but for a few.
    """

    def __init__(self) -> None:
        self._order = count()  # decides between equal times: spans cannot be compared
        self._heap: list[tuple[float, int, Span[P], Retention]] = []
        self._live = 0  # spans whose level will fall

    @property
    def nbytes(self) -> int:
        """Bytes of memory it takes, spans aside."""
        return getsizeof(self._heap) + len(self._heap) * _STEP_NBYTES

    @property
    def next(self) -> float:
        """Time at which the next one may fall; infinite if none will."""
        return self._heap[0][0] if self._heap else math.inf

    def add(self, span: Span[P], retention: Retention, level: int) -> None:
        """Note when `level` of a span ends, if it ever does, as it has got this retention."""
        if not math.isinf(retention.expires):
            self._live += 1
            self.renew(span, retention, level)

    def renew(self, span: Span[P], retention: Retention, level: int) -> None:
        """Note when the next `level` ends of a span that :meth:`due` gave."""
        heappush(self._heap, (retention.until(level), next(self._order), span, retention))

    def drop(self, retention: Retention) -> None:
        """Take note that a span has lost its retention."""
        if math.isinf(retention.expires):
            return
        self._live -= 1
        if len(self._heap) > 2 * self._live + _MAX_STALE:
            self._heap = [entry for entry in self._heap if entry[2].retention is entry[3]]
            heapify(self._heap)

    def due(self, now: float) -> Iterator[tuple[Span[P], Retention]]:
        """Take out, one by one, the spans whose level has fallen since their entry was made."""
        while self.next <= now:
            _, _, span, retention = heappop(self._heap)
            if span.retention is retention:
                yield span, retention


class Candidates(Generic[P]):
    """Spans that may be evicted: offered to `policy`, or retained.

    quotas: of trees, whose candidates are also in queues of their own. Its methods but
    :meth:`victim` are called where :attr:`Span.offered` changes.
    """

    def __init__(self, policy: EvictionPolicy, quotas: Quotas[P]) -> None:
        self.policy, self.quotas = policy, quotas
        self.steps: Steps[P] = Steps()
        self.now = -math.inf
        """Time up to which levels have fallen."""
        self._retained: Queue[Span[P], tuple[int, float]] = Queue(by_level)
        self.any_retained = False
        """True once a span was retained; in most prefix caches, none ever is."""

    @property
    def nbytes(self) -> int:
        """Bytes of memory it takes, that of the policy included."""
        own = self.steps.nbytes + self._retained.nbytes if self.any_retained else 0
        return self.policy.nbytes + self.quotas.nbytes + own

    def offer(self, span: Span[P]) -> None:
        """Add a span, where it belongs by its retention."""
        retention = span.retention
        span.level = 0 if retention is None else retention.level(self.now)
        if span.level:
            self._retained.add(span)
        else:
            self.policy.offer(span)
        if isinstance(span.tree, LimitedTree):  # last, because the policy may raise
            self.quotas.offer(span, span.tree)

    def withdraw(self, span: Span[P]) -> None:
        """Take a span out."""
        if not span.level:
            self.policy.withdraw(span)
        self._take_out(span)

    def evict(self, span: Span[P], now: float) -> None:
        """Take out a span that is evicted."""
        if not span.level:
            self.policy.evict(span, now)  # first, because it may raise
        self._take_out(span)

    def _take_out(self, span: Span[P]) -> None:
        """Take a span out of all queues but those of the policy."""
        if span.level:
            self._retained.withdraw(span)
        if isinstance(span.tree, LimitedTree):
            self.quotas.withdraw(span, span.tree)
        span.level = 0

    def lower(self, span: Span[P], level: int) -> None:
        """Move a retained candidate to a lower level."""
        self._take_out(span)
        span.level = level
        self._retained.add(span)
        if isinstance(span.tree, LimitedTree):
            self.quotas.offer(span, span.tree)

    def victim(self, now: float) -> Span[P] | None:
        """Return the span that the policy chooses, or else the least retained; None without any.

        Raises: KVCacheError if the policy chooses a span it was not offered.
        """
        span = self.policy.victim(now)
        return self._retained.first() if span is None else as_offered(span, self.policy)
