"""Resume points of a snapshot that go, where not all have room, and tokens behind the last."""

from __future__ import annotations

from bisect import bisect_left
from heapq import heapify, heappop, heappush

import numpy as np

from kvcache._types import Int32s
from kvcache.snapshots.resuming import resume_points
from kvcache.snapshots.snapshot import Snapshot

_SHARE = 8
"""Part of the points that goes at once at least: each time, all of them are looked at."""


def thinned(snapshot: Snapshot, nbytes: int) -> Snapshot | None:
    """Return `snapshot` without the resume points that go first, for `nbytes` less at least.

    The last point stays. None if so many bytes cannot go.
    """
    points, room = resume_points(snapshot), snapshot.nbytes - nbytes
    if not points.size:
        return None
    order = np.array(_in_order(points.tolist(), snapshot.start), np.int32)

    def fits(gone: int) -> bool:
        return _nbytes_for(snapshot, np.sort(order[gone:]), snapshot.stop) <= room

    counts = range(order.size // _SHARE, order.size)
    enough = bisect_left(counts, True, key=fits)
    if enough == len(counts):
        return None
    return snapshot.needed_by(np.sort(order[counts[enough] :]))


def cut(snapshot: Snapshot, nbytes: int) -> int | None:
    """Return the last resume point up to which `snapshot` takes `nbytes` less, with no other one.

    None if there is none before its stop.
    """
    points, room = resume_points(snapshot), snapshot.nbytes - nbytes
    before = points[points < snapshot.stop]

    def exceeds(index: int) -> bool:
        return _nbytes_for(snapshot, before[index : index + 1], int(before[index])) > room

    fitting = bisect_left(range(before.size), True, key=exceeds)
    return int(before[fitting - 1]) if fitting else None


def _nbytes_for(snapshot: Snapshot, points: Int32s, stop: int) -> int:
    """Return the bytes of the rows before `stop` that one of `points` needs."""
    nbytes = 0
    for part in snapshot.parts:
        needed = part.needed_by(points) & (part.rows.positions < stop)
        nbytes += part.rows.nbytes * int(np.count_nonzero(needed)) // max(1, needed.size)
    return nbytes


def _in_order(points: list[int], start: int) -> list[int]:
    """Return `points`, ascending, in the order in which they go.

    First the one behind which the fewest tokens would have to be computed again, from the point
    before it, or from `start`; of equal ones the first. The last point is the last to go.
    """
    last = len(points) - 1
    before, behind = list(range(-1, last)), list(range(1, last + 2))
    places = [*points, start]  # at -1, that of no point

    def tokens(point: int) -> int:
        return places[point] - places[before[point]]

    heap = [(tokens(point), point) for point in range(last)]
    heapify(heap)
    order: list[int] = []
    while heap:
        loss, point = heappop(heap)
        if loss < tokens(point):  # one before it has gone since
            heappush(heap, (tokens(point), point))
            continue
        order.append(points[point])
        before[behind[point]] = before[point]
        if before[point] >= 0:
            behind[before[point]] = behind[point]
    return [*order, points[last]]
