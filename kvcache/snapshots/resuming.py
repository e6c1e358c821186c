"""Snapshots of one sequence that follow each other: the positions to resume at behind them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvcache._checks import as_index
from kvcache._types import Int32s
from kvcache.errors import KVCacheError

from .snapshot import CacheSpec, Snapshot, check_same_specs
from .visibility import Visibility


def last_resumable(snapshots: Sequence[Snapshot], limit: int) -> int:
    """Return the last position up to `limit` to resume at after restoring `snapshots`.

    snapshots: of one sequence, in order, without gaps between them, the first from position 0.

    Every cache must be able to resume there. Return 0 if there is no such position.
    """
    if not snapshots:
        return 0
    limit, before = min(limit, snapshots[-1].stop), -1
    held = _held_positions(snapshots)
    # Each cache may lower the limit, for those asked before it, too: repeat until all agree.
    while limit != before:
        before = limit
        for visibility, positions in held:
            limit = visibility.last_resumable(positions, limit)
    return limit


def last_resumable_of_each(snapshots: Sequence[Snapshot], limit: int) -> list[int]:
    """Return :func:`last_resumable` for each cache, as if there were no other."""
    return [
        visibility.last_resumable(positions, limit)
        for visibility, positions in _held_positions(snapshots)
    ]


def _held_positions(snapshots: Sequence[Snapshot]) -> list[tuple[Visibility, Int32s]]:
    """Return the rule of each cache, and the positions of its rows in all `snapshots`."""
    columns = zip(*(snapshot.parts for snapshot in snapshots), strict=True)
    return [
        (column[0].spec.visibility, np.concatenate([part.rows.positions for part in column]))
        for column in columns
    ]


def resume_points(snapshot: Snapshot) -> Int32s:
    """Return the positions in a snapshot to resume at if all before it is held, ascending.

    Of those that are closer than the narrowest window, and so need the same rows but for a few,
    only the first and the last. Of a snapshot that can be resumed anywhere, its stop.
    """
    start = snapshot.start
    rules = [(part.spec.visibility, part.rows.positions) for part in snapshot.parts]
    limited = [(rule, held) for rule, held in rules if not rule.resumable_anywhere]
    if not limited:
        return np.array([snapshot.stop], np.int32)
    points: Int32s = limited[0][1] + 1  # the row right before a point is always needed
    for rule, held in limited:
        points = points[rule.resumable_at(held, points, start)]
    if not points.size:
        return points
    narrowest = min(rule.window for rule, _ in limited if rule.window is not None)
    parted, index = np.diff(points) != 1, np.arange(points.size)
    first = np.maximum.accumulate(np.where(np.append(True, parted), index, 0))
    told: Int32s = points[((index - first) % narrowest == 0) | np.append(parted, True)]
    return told


def check_contiguous(
    snapshots: Sequence[Snapshot], wanted: list[CacheSpec], stop: int | None = None
) -> int:
    """Check `snapshots` for a restore; return the position to resume at.

    stop: that position, inside the last one; None for its end.

    Raises: SnapshotMismatchError, ValueError unless they are contiguous from position 0,
        KVCacheError if the position is no resume point.
    """
    stop = None if stop is None else as_index(stop, "stop")
    check_same_specs(snapshots, wanted)
    spans = [(snapshot.start, snapshot.stop) for snapshot in snapshots]
    starts = [0, *(end for _, end in spans[:-1])]
    if not spans or [start for start, _ in spans] != starts:
        raise ValueError(f"snapshots to restore follow each other from position 0; got {spans}.")
    first, last = spans[-1]
    stop = last if stop is None else stop
    if not (first < stop <= last or stop == last):
        raise ValueError(
            f"a restore stops inside the last snapshot, [{first}, {last}); got {stop}. "
            "Leave out snapshots behind it."
        )
    if (possible := last_resumable(snapshots, stop)) != stop:
        raise KVCacheError(
            f"not all that is needed before position {stop} is in these snapshots; the last place "
            f"to go on is {possible}. Stop there."
        )
    return stop
