"""Snapshots as payloads of spans, and how far a prompt can resume from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol, TypeAlias

from kvcache.snapshots.resuming import last_resumable, last_resumable_of_each, resume_points
from kvcache.snapshots.snapshot import Part, Snapshot

from .spans import Prefix, Span
from .thinning import cut, thinned

_NBYTES, _PART_NBYTES, _ARRAY_NBYTES = 400, 900, 300
"""Bytes of Python objects: of a snapshot, of each part, and of each array of each layer."""


class StoredSnapshot:
    """A snapshot as the payload of a span, and its owner.

    nbytes: bytes of all its rows, resident or on the host, as of its creation. overhead: of what
    tells where and of which positions they are. resumable_inside: False if no request can resume in
    its span, and its rows are of use only to resume behind it; given, it is False in any case.
    """

    __slots__ = ("nbytes", "overhead", "resumable_inside", "snapshot")

    def __init__(self, snapshot: Snapshot, resumable_inside: bool = True) -> None:
        self.snapshot = snapshot
        self.resumable_inside = resumable_inside and has_resume_point(snapshot)
        self.nbytes = snapshot.nbytes
        self.overhead = _NBYTES + sum(_overhead_of(part) for part in snapshot.parts)

    @property
    def resumable_anywhere(self) -> bool:
        """True if a sequence can resume at every position of it, however it is split."""
        return self.snapshot.resumable_anywhere

    def split(self, tokens: int) -> tuple[StoredSnapshot, StoredSnapshot]:
        """Return its first `tokens` and the others as two payloads; this one is closed."""
        lower, upper = self.snapshot.split(self.snapshot.start + tokens)
        inside = self.resumable_inside
        return StoredSnapshot(lower, inside), StoredSnapshot(upper, inside)

    def joins(self, following: StoredSnapshot) -> bool:
        """Return True if the next snapshot can be joined to this one, with no row moved.

        Where a window drops tokens, only rows needed to resume at the end of the next one are.
        """
        return all(
            _joins(part, next_part, following.snapshot.stop)
            for part, next_part in zip(self.snapshot.parts, following.snapshot.parts, strict=True)
        )

    def join(self, following: Sequence[StoredSnapshot]) -> StoredSnapshot | None:
        """Return this and the `following` snapshots as one payload; all of them are closed.

        None, and they stay as they are, where a framework lacks the memory to copy them.
        """
        inside = any(payload.resumable_inside for payload in [self, *following])
        try:
            merged = self.snapshot.merge(*(payload.snapshot for payload in following))
        except Exception:  # noqa: BLE001 - frameworks have errors of their own for it
            return None
        return StoredSnapshot(merged, inside)

    def reduced(self, position: int) -> StoredSnapshot | None:
        """Return only the rows needed to resume at `position`; None if that is all of them."""
        if all(part.needed_at(position).all() for part in self.snapshot.parts):
            return None
        return StoredSnapshot(self.snapshot.needed_at(position), resumable_inside=False)

    def thinned(self, nbytes: int) -> StoredSnapshot | None:
        """Return it without the resume points that go first, for `nbytes` less at least.

        The last one stays. None if so many bytes cannot go.
        """
        less = thinned(self.snapshot, nbytes)
        return None if less is None else StoredSnapshot(less, self.resumable_inside)

    def cut(self, nbytes: int) -> int | None:
        """Return how many tokens at its beginning may stay for `nbytes` less at least.

        Requests can resume behind them; the others go, and what is left is to be thinned. None if
        it has no such place.
        """
        point = cut(self.snapshot, nbytes)
        return None if point is None else point - self.snapshot.start

    def close(self) -> None:
        """Release the rows of the snapshot."""
        self.snapshot.close()


def has_resume_point(snapshot: Snapshot) -> bool:
    """Return whether requests can resume in a snapshot, given what was before it."""
    return snapshot.resumable_anywhere or bool(resume_points(snapshot).size)


def _joins(part: Part, following: Part, stop: int) -> bool:
    """Return True if the rows of both are in one place, and of use to resume at `stop` alone."""
    together = part.rows.place == following.rows.place
    if part.spec.visibility.resumable_anywhere:
        return together
    if not part.rows.positions.size:
        return True
    return together and bool(part.needed_at(stop).all())


def _overhead_of(part: Part) -> int:
    rows = part.rows
    arrays = _ARRAY_NBYTES * rows.arrays + rows.positions.nbytes + rows.slots.nbytes
    return _PART_NBYTES + arrays


StoredSpan: TypeAlias = Span[StoredSnapshot]
StoredPrefix: TypeAlias = Prefix[StoredSnapshot]


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


def last_resume_points(span: StoredSpan, most: int) -> list[int]:
    """Return the last positions in a stored span, `most` of them, at which all caches can go on.

    Ascending.
    """
    path = span.path
    snapshots = contiguous_snapshots(path, path)
    points: list[int] = []
    position = last_resumable(snapshots, span.stop)
    while position > span.start and len(points) < most:
        points.append(position)
        position = last_resumable(snapshots, position - 1)
    return points[::-1]


def close_snapshots(snapshots: Mapping[int, Snapshot]) -> None:
    """Close all of `snapshots`, those of spans by their start."""
    for snapshot in snapshots.values():
        snapshot.close()


class RowSource(Protocol):
    """A sequence with rows to store: of a session, or fetched."""

    def capture(self, start: int, stop: int) -> Snapshot:
        """Return a snapshot of positions ``[start, stop)``, as far as it has them."""


def captured(
    handle: RowSource, prefix: StoredPrefix, restored: int, held: int, cuts: Sequence[int] = ()
) -> dict[int, Snapshot]:
    """Return snapshots to store, by start: of spans behind `restored`, up to `held` tokens.

    handle: has the rows. prefix: what is known of its tokens. Of known spans with a payload the
    snapshots have its rows in addition. Spans of which the sequence has no rows are left out. cuts:
    positions at which new spans part.
    """
    length = prefix.length
    pieces = [(span.start, min(span.stop, length), span.payload) for span in prefix.spans]
    bounds = [length, *(cut for cut in cuts if length < cut < held), held]
    new = [(start, stop, None) for start, stop in pairwise(bounds)]
    snapshots: dict[int, Snapshot] = {}
    try:
        for start, stop, payload in [*pieces, *new]:
            if start < stop and restored < stop:
                snapshot = _captured_span(handle, start, stop, payload)
                if snapshot is not None:
                    snapshots[start] = snapshot
    except BaseException:
        close_snapshots(snapshots)
        raise
    return snapshots


def _captured_span(
    handle: RowSource, start: int, stop: int, stored: StoredSnapshot | None
) -> Snapshot | None:
    """Return a snapshot of the rows a sequence holds of a span, and of those in `stored`.

    None if there are none, or no more than are stored.
    """
    if stored is not None and stored.resumable_anywhere:
        return None  # complete, as no token of it was ever dropped
    snapshot = handle.capture(start, stop)
    if stored is not None:
        # A window that slid past other positions this time may have rows the stored one lacks.
        with snapshot:
            return stored.snapshot.united(snapshot)
    if any(part.rows.positions.size for part in snapshot.parts):
        return snapshot
    snapshot.close()
    return None


class Hit(NamedTuple):
    """The part of a prompt that needs no computing.

    matched: its tokens: every layer can resume after them. stored: tokens of the prompt that are
    stored, matched or not. limited_by: indices of the caches that kept the hit from going deeper.
    """

    matched: int = 0
    stored: int = 0
    limited_by: tuple[int, ...] = ()


NO_HIT = Hit()


class Search(NamedTuple):
    """How the longest hit was found.

    stops: pairs of a limit and the last position up to it where all caches can resume, in the order
    tried: the next limit is where the medium begins that the position before is inside of. span:
    the last stored one of the prompt.
    """

    hit: Hit = NO_HIT
    stops: Sequence[tuple[int, int]] = ()
    span: StoredSpan | None = None


def find_hit(prefix: StoredPrefix, tokens: int, media: Iterable[tuple[int, int]]) -> Hit:
    """Return the longest hit for a prompt of `tokens`, of which one at least is left to compute.

    prefix: what is known of it. media: ranges inside which no hit ends.
    """
    return search(prefix, tokens, media).hit


def search(prefix: StoredPrefix, tokens: int, media: Iterable[tuple[int, int]]) -> Search:
    """Return the hit that :func:`find_hit` returns, and how it was found."""
    spans = prefix.spans
    while spans and spans[-1].payload is None:
        spans = spans[:-1]
    if not spans:
        return Search()
    snapshots = contiguous_snapshots(spans, spans)
    stored = min(prefix.length, spans[-1].stop)
    stops = _stops(snapshots, min(tokens - 1, stored), media)
    matched = stops[-1][1]
    limiting = _limiting(snapshots, matched, min(tokens - 1, stored))
    return Search(Hit(matched, stored, limiting), stops, spans[-1])


def _stops(
    snapshots: Sequence[Snapshot], limit: int, media: Iterable[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Return the stops of a search from `limit` on; the last is inside none of `media`."""
    stops: list[tuple[int, int]] = []
    # Lowered to where a medium starts, the limit may not be a resume point: look again.
    while not stops or limit != stops[-1][1]:
        length = last_resumable(snapshots, limit)
        stops.append((limit, length))
        limit = next((start for start, stop in media if start < length < stop), length)
    return stops


def _limiting(snapshots: Sequence[Snapshot], matched: int, limit: int) -> tuple[int, ...]:
    """Return the indices of the caches that could go on least deep, if one had to stop early."""
    if matched == limit:
        return ()
    alone = last_resumable_of_each(snapshots, limit)
    least = min(alone)
    return tuple(index for index, position in enumerate(alone) if position == least < limit)
