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
    several behind it is none of these.
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
        alone = span.children == 1 and len(span.node.children) == 1
        file_span(span, self._spans, not span.pins and alone)

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
            child, payload = span.only_child, span.payload
            if payload is None or child is None or child.payload is None or span.used > child.used:
                continue
            reduced = payload.reduced(child.stop)
            if reduced is not None:
                return span, reduced
        return None
