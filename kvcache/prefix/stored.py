"""Snapshots as payloads of spans, and how far a prompt can resume from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

from kvcache.snapshots.snapshot import Snapshot, last_resumable

from .index import Span


class StoredSnapshot:
    """A snapshot as the payload of a span, and its owner.

    nbytes: bytes of all its rows, resident or on the host, as of its creation.
    """

    __slots__ = ("nbytes", "snapshot")

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot
        self.nbytes = snapshot.nbytes

    @property
    def resumable_anywhere(self) -> bool:
        """True if a sequence can resume at every position of it, however it is split."""
        return self.snapshot.resumable_anywhere

    def split(self, tokens: int) -> tuple[StoredSnapshot, StoredSnapshot]:
        """Return its first `tokens` and the others as two payloads; this one is closed."""
        lower, upper = self.snapshot.split(self.snapshot.start + tokens)
        return StoredSnapshot(lower), StoredSnapshot(upper)

    def close(self) -> None:
        """Release the rows of the snapshot."""
        self.snapshot.close()


StoredSpan: TypeAlias = Span[StoredSnapshot]


def is_resident(span: StoredSpan) -> bool:
    """Return True if some rows of `span` are in the memory of the cache."""
    return span.payload is not None and span.payload.snapshot.resident


def contiguous_snapshots(
    spans: Sequence[StoredSpan], prompt_spans: Sequence[StoredSpan]
) -> list[Snapshot]:
    """Return the snapshots of `spans`, with empty ones for spans without a payload.

    prompt_spans: all spans of the prompt, one of which has a payload: empty snapshots get its
        kinds and dtypes.

    A hit may cross such a gap: where a chunk begins, nothing before it is needed.
    """
    kept = [span.payload.snapshot for span in prompt_spans if span.payload is not None]
    return [
        span.payload.snapshot
        if span.payload is not None
        else kept[0].empty_like(span.start, span.stop)
        for span in spans
    ]


def close_snapshots(snapshots: Mapping[int, Snapshot]) -> None:
    """Close all of `snapshots`, those of spans by their stop."""
    for snapshot in snapshots.values():
        snapshot.close()


def resumable_length(
    spans: Sequence[StoredSpan], tokens: int, media: Iterable[tuple[int, int]]
) -> int:
    """Return how many tokens of a prompt need no computing: every layer can resume after them.

    spans: the spans a prompt of `tokens` begins with. At least one token is left to compute, and
    the result is never inside one of the ranges `media`.
    """
    while spans and spans[-1].payload is None:
        spans = spans[:-1]
    snapshots = contiguous_snapshots(spans, spans)
    length, limit = 0, tokens - 1
    # Lowered to where a medium starts, the limit may not be a resume point: look again.
    while snapshots and length != limit:
        length = limit = last_resumable(snapshots, limit)
        for start, stop in media:
            if start < length < stop:
                limit = start
    return length
