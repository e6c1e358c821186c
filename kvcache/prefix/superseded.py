"""Spans whose own ends nobody is likely to resume at, as their sequence went on behind them."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from sys import getsizeof
from typing import Generic

from .spans import P, Span, file_span


class Superseded(Generic[P]):
    """Spans with one kept span behind them, the longest idle first.

    Where a window drops tokens, or a state is kept, a conversation goes on from the end of the next
    span. The end of the former is of use only to requests that part exactly there; a span with
    several behind it is none of these, and a retained one is to be kept for its own sake.
    """

    def __init__(self) -> None:
        self._spans: OrderedDict[Span[P], None] = OrderedDict()
        self._reduced: OrderedDict[Span[P], None] = OrderedDict()
        """Those without rows to release: all that is left to give up is being a span."""

    def __len__(self) -> int:
        return len(self._spans) + len(self._reduced)

    @property
    def nbytes(self) -> int:
        """Bytes of memory of the tables."""
        return getsizeof(self._spans) + getsizeof(self._reduced)

    def file(self, span: Span[P]) -> None:
        """Add `span`, which has a payload, if it belongs here; take it out if it does not."""
        self._reduced.pop(span, None)
        file_span(span, self._spans, span.retention is None and is_superseded(span))

    def drop(self, span: Span[P]) -> None:
        """Take `span` out, if it is here."""
        self._spans.pop(span, None)
        self._reduced.pop(span, None)

    def use(self, span: Span[P]) -> None:
        """Note that `span` was used, if it is here."""
        for spans in (self._spans, self._reduced):
            if span in spans:
                spans.move_to_end(span)

    def pop(self) -> Span[P] | None:
        """Take out a span of which nobody used the end later than the next one; None without any.

        Those without rows to release come first.
        """
        for spans in (self._reduced, self._spans):
            while spans:
                span, _ = spans.popitem(last=False)
                if not is_resumed(span):
                    return span
        return None

    def pop_reducible(self) -> tuple[Span[P], P] | None:
        """Return a span with more than resuming behind it needs, and just that; None without any.

        It is found once.
        """
        while self._spans:
            span, _ = self._spans.popitem(last=False)
            self._reduced[span] = None
            reduced = reduced_payload(span)
            if reduced is not None:
                return span, reduced
        return None


def is_superseded(span: Span[P]) -> bool:
    """Return whether one span alone is behind `span`, and no session uses it."""
    return not span.pins and span.children == 1 and len(span.node.children) == 1


def is_resumed(span: Span[P]) -> bool:
    """Return whether the end of a superseded span was used later than the next one."""
    child = span.only_child
    return child is None or child.payload is None or span.used > child.used


def reduced_payload(span: Span[P]) -> P | None:
    """Return what of a superseded span's payload resuming behind the next one needs.

    None for all of it, and where its own end was used later.
    """
    child, payload = span.only_child, span.payload
    if payload is None or child is None or is_resumed(span):
        return None
    return payload.reduced(child.stop)


def superseded_before(span: Span[P], now: float) -> Iterator[Span[P]]:
    """Yield the superseded spans before `span` that are retained no more than it."""
    for upper in span.path[:-1]:
        payload, retention = upper.payload, upper.retention
        if payload is None or payload.resumable_anywhere or not is_superseded(upper):
            continue
        if retention is None or retention.level(now) <= span.level:
            yield upper


def reducible_before(span: Span[P], now: float) -> tuple[Span[P], P] | None:
    """Return a superseded span before `span`, retained no more, as :meth:`pop_reducible` does."""
    for upper in superseded_before(span, now):
        reduced = reduced_payload(upper)
        if reduced is not None:
            return upper, reduced
    return None
