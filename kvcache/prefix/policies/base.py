"""What a policy is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from kvcache.prefix.index import Span

AnySpan: TypeAlias = "Span[Any]"


class Policy(ABC):
    """Chooses among the spans that it is offered. Every call is to cost O(log n).

    A policy serves one index, from when that is made. Times are seconds and never go backwards.
    """

    def use(self, span: AnySpan, now: float) -> None:  # noqa: B027 - not all need to know
        """`span` was asked for; `span.uses` and `span.used` still say what was before.

        A ghost (``span.payload is None``) was asked for in vain; it is probably kept again soon.
        """

    @abstractmethod
    def offer(self, span: AnySpan) -> None:
        """`span` may be chosen from now on."""

    @abstractmethod
    def withdraw(self, span: AnySpan) -> None:
        """`span`, which was offered, may not be chosen any more."""

    @abstractmethod
    def victim(self, now: float) -> AnySpan | None:
        """The span to go next of those offered, None if there are none. It stays offered."""

    def evict(self, span: AnySpan, now: float) -> None:
        """`span` is evicted; it was offered, and is not any more."""
        self.withdraw(span)


class Queue:
    """Spans that are offered, the one with the least key first.

    key: of a span; may change while it waits, but only grow. None: it is not for this queue.
    """

    def __init__(self, key: Callable[[AnySpan], float | None]) -> None:
        self._key, self._order = key, count()
        self._heap: list[tuple[float, int, AnySpan]] = []
        self._queued: set[AnySpan] = set()

    def add(self, span: AnySpan) -> None:
        """Let `span` wait its turn, until which it may be withdrawn and come back for nothing."""
        key = self._key(span)
        if key is not None and span not in self._queued:
            self._queued.add(span)
            heappush(self._heap, (key, next(self._order), span))

    def first(self) -> AnySpan | None:
        """Whose turn it is."""
        while self._heap:
            key, _, span = self._heap[0]
            if span.offered and self._key(span) == key:
                return span
            heappop(self._heap)
            self._queued.remove(span)
            if span.offered:
                self.add(span)
        return None
