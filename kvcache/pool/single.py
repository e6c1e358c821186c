"""The commonest pass by far: one token behind the last one of one sequence, without arrays."""

from __future__ import annotations

from typing import NamedTuple

from .cells import CellTable


class SingleTokenStep(NamedTuple):
    """One token for one sequence: its cell, the cell dropped for it, the range afterwards."""

    sequence: int
    position: int
    cell: int
    dropped: int | None
    low: int
    high: int


def plan_single(
    table: CellTable, sequence: int, position: int, oldest: int
) -> SingleTokenStep | None:
    """Return how one token is stored and the cell before position `oldest` dropped, or None.

    None where it takes more than that: :meth:`CellTable.group`, :meth:`CellTable.evict` and
    :meth:`CellTable.insert` do everything, and raise what is wrong.
    """
    if not 0 <= sequence < table.first.size:
        return None
    first, last = int(table.first[sequence]), int(table.last[sequence])
    if last - first < 2 or last == table.rows.shape[1]:
        return None
    tail = int(table.rows[sequence, last - 1])
    if table.positions[tail] >= position:
        return None
    cell, low, high = tail + 1, int(table.low[sequence]), int(table.high[sequence])
    if cell == table.cells or table.allocator.refcounts[cell]:
        return _reuse_oldest(table, sequence, position, oldest)
    step = SingleTokenStep(sequence, position, cell, None, low, max(high, cell))
    return _drop_oldest(table, step, oldest)


def _reuse_oldest(
    table: CellTable, sequence: int, position: int, oldest: int
) -> SingleTokenStep | None:
    """Reuse the oldest cell (a ring step); None if the fast path does not apply."""
    first = int(table.first[sequence])
    head, follower = table.rows[sequence, first : first + 2].tolist()
    if not table.positions[head] < oldest <= table.positions[follower]:
        return None
    if table.allocator.refcounts[head] > 1:
        return None
    low, high = int(table.low[sequence]), int(table.high[sequence])
    return SingleTokenStep(sequence, position, head, head, low, high)


def _drop_oldest(table: CellTable, step: SingleTokenStep, oldest: int) -> SingleTokenStep | None:
    """Return `step` with the oldest cell dropped, if it has to be; None if that is not simple."""
    first = int(table.first[step.sequence])
    head, follower = table.rows[step.sequence, first : first + 2].tolist()
    if table.positions[head] >= oldest:
        return step
    if table.positions[follower] < oldest or table.allocator.refcounts[head] > 1:
        return None
    if head == step.low and follower == head + 1:
        return step._replace(dropped=head, low=follower)
    # Elsewhere at the edge of the range the new edge would have to be searched for.
    return None if head in (step.low, step.high) else step._replace(dropped=head)


def commit_single(table: CellTable, step: SingleTokenStep) -> None:
    """Carry out a step of :func:`plan_single`, planned for the table as it is."""
    sequence, position, cell, dropped, low, high = step
    allocator = table.allocator
    table.rows[sequence, table.last[sequence]] = cell
    table.last[sequence] += 1
    allocator.refcounts[cell] = 1
    table.positions[cell] = position
    table.low[sequence], table.high[sequence] = low, high
    if dropped is None:
        allocator.free -= 1
        return
    table.first[sequence] += 1
    if dropped != cell:
        allocator.refcounts[dropped] = 0
    allocator.push(dropped)
