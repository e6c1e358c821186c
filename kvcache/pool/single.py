"""The commonest pass: one token appended to one sequence, planned without array operations."""

from __future__ import annotations

from typing import NamedTuple

from .cells import CellTable


class SingleTokenStep(NamedTuple):
    """Plan of one token of one sequence: its cell, the cell dropped, the range afterwards.

    low, high: first and last cell of the range of the sequence, both included.
    first, last: ends of its row before the step.
    """

    sequence: int
    position: int
    cell: int
    dropped: int | None
    low: int
    high: int
    first: int
    last: int


def plan_single(
    table: CellTable, sequence: int, position: int, oldest: int
) -> SingleTokenStep | None:
    """Plan to store one token, and to drop the one cell before position `oldest` if there is one.

    Return None where that is not all it takes, or where anything is wrong:
    :meth:`CellTable.group`, :meth:`CellTable.evict` and :meth:`CellTable.insert` handle every
    case, and raise the errors.
    """
    if not 0 <= sequence < table.first.size:
        return None
    first, last = int(table.first[sequence]), int(table.last[sequence])
    # Two cells at least, so that a range is left after a drop; and room in the row.
    if last - first < 2 or last == table.rows.shape[1]:
        return None
    tail = int(table.rows[sequence, last - 1])
    if table.page > 1 and not table.may_append(tail, last - first):
        return None
    if table.positions[tail] >= position:
        return None
    cell, low, high = tail + 1, int(table.low[sequence]), int(table.high[sequence])
    if cell == table.cells or table.allocator.refcounts[cell]:
        return _reuse_oldest(table, sequence, position, oldest, first, last)
    step = SingleTokenStep(sequence, position, cell, None, low, max(high, cell), first, last)
    return _drop_oldest(table, step, oldest)


def _reuse_oldest(
    table: CellTable, sequence: int, position: int, oldest: int, first: int, last: int
) -> SingleTokenStep | None:
    """Reuse the oldest cell, as a ring does; None if the fast path does not apply."""
    head, follower = table.rows[sequence, first : first + 2].tolist()
    if not table.positions[head] < oldest <= table.positions[follower]:
        return None
    if table.allocator.refcounts[head] > 1:  # shared, or pinned by a snapshot: not to be written
        return None
    low, high = int(table.low[sequence]), int(table.high[sequence])
    return SingleTokenStep(sequence, position, head, head, low, high, first, last)


def _drop_oldest(table: CellTable, step: SingleTokenStep, oldest: int) -> SingleTokenStep | None:
    """Add the drop of the oldest cell to `step` if necessary; None if that is not simple."""
    head, follower = table.rows[step.sequence, step.first : step.first + 2].tolist()
    if table.positions[head] >= oldest:
        return step
    if table.positions[follower] < oldest or table.allocator.refcounts[head] > 1:
        return None
    if head == step.low and follower == head + 1:
        return step._replace(dropped=head, low=follower)
    # At an edge of the range, the new edge would have to be searched for.
    return None if head in (step.low, step.high) else step._replace(dropped=head)


def commit_single(table: CellTable, step: SingleTokenStep) -> None:
    """Carry out a step of :func:`plan_single`, planned for the current state of the table."""
    sequence, position, cell, dropped, low, high, first, last = step
    table.rows[sequence, last] = cell
    table.last[sequence] = last + 1
    table.allocator.step(cell, dropped)
    table.positions[cell] = position
    if table.shifts is not None:
        table.shifts[cell] = 0
    table.low[sequence], table.high[sequence] = low, high
    if dropped is not None:
        table.first[sequence] = first + 1
