"""Spans whose own ends nobody is likely to resume at, as their sequence went on behind them."""

from __future__ import annotations

from collections import OrderedDict
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

    def __len__(self) -> int:
        return len(self._spans)

    @property
    def nbytes(self) -> int:
        """Bytes of memory of the table."""
        return getsizeof(self._spans)

    def file(self, span: Span[P]) -> None:
        """Add `span`, which has a payload, if it belongs here; take it out if it does not."""
        file_span(span, self._spans, span.retention is None and is_superseded(span))

    def drop(self, span: Span[P]) -> None:
        """Take `span` out, if it is here."""
        self._spans.pop(span, None)

    def use(self, span: Span[P]) -> None:
        """Note that `span` was used, if it is here."""
        if span in self._spans:
            self._spans.move_to_end(span)

    def pop_reducible(self) -> tuple[Span[P], P] | None:
        """Take out a span with more than resuming behind it needs; return it and just that.

        None if there is none.
        """
        while self._spans:
            span, _ = self._spans.popitem(last=False)
            reduced = reduced_payload(span)
            if reduced is not None:
                return span, reduced
        return None


def is_superseded(span: Span[P]) -> bool:
    """Return whether one span alone is behind `span`, and no session uses it."""
    return not span.pins and span.children == 1 and len(span.node.children) == 1


def reduced_payload(span: Span[P]) -> P | None:
    """Return what of a superseded span's payload resuming behind the next one needs.

    None for all of it, and where its own end was used later.
    """
    child, payload = span.only_child, span.payload
    if payload is None or child is None or child.payload is None or span.used > child.used:
        return None
    return payload.reduced(child.stop)


def reducible_before(span: Span[P], now: float) -> tuple[Span[P], P] | None:
    """Return a superseded span before `span`, retained no more, as :meth:`pop_reducible` does."""
    for upper in span.path[:-1]:
        payload, retention = upper.payload, upper.retention
        if payload is None or payload.resumable_anywhere or not is_superseded(upper):
            continue
        if retention is not None and retention.level(now) > span.level:
            continue
        reduced = reduced_payload(upper)
        if reduced is not None:
            return upper, reduced
    return None
