"""Changes of sequences: prefixes are copied, parts removed, and later tokens move."""

from __future__ import annotations

from kvcache._types import Int32s
from kvcache.errors import NotSupportedError, ShapeError, SharedCellsError

from .originals import Shift
from .owned import Commit
from .passes import CellPool
from .rope import RoPEShift


def prepare_copy(pool: CellPool, source: int, target: int, length: int) -> Commit:
    """Return a commit to make `target` hold just the tokens of `source` below position `length`."""
    kept = pool.passes.history(source)[: pool.passes.find(source, length)].copy()

    def commit() -> None:
        pool.passes.detach(target)
        pool.pins.forget(target, 0)  # rows retained from its old content
        pool.table.set_row(target, kept)
        pool.maybe_expired |= {target}

    return _truncation(pool, source, kept.size) if source == target else commit


def _truncation(pool: CellPool, sequence: int, length: int) -> Commit:
    """Return a commit to keep the first `length` tokens of the history of a sequence."""

    def commit() -> None:
        pool.passes.detach(sequence)
        pool.table.truncate(sequence, length)
        pool.pins.forget(sequence, pool.table.next_position(sequence))

    return commit


def prepare_removal(
    pool: CellPool, shift: Shift | None, sequence: int, start: int, stop: int | None
) -> Commit:
    """Return a commit to remove positions ``[start, stop)``; None: to the end.

    Raises: as :func:`_removal_from_the_middle`.
    """
    passes = pool.passes
    first, held = passes.find(sequence, start), passes.history(sequence).size
    last = held if stop is None else passes.find(sequence, stop)
    if stop is None or last == held:
        return _truncation(pool, sequence, first)
    if start == stop:
        return lambda: None
    return _removal_from_the_middle(pool, shift, sequence, range(first, last), start, stop)


def _removal_from_the_middle(
    pool: CellPool, shift: Shift | None, sequence: int, removed: range, start: int, stop: int
) -> Commit:
    """Check the removal of positions ``[start, stop)``, before the last token of a sequence.

    removed: these tokens, counted from the first one of its history.

    Keys are shifted and pinned rows copied now, because that may fail. The commit stores both
    without calling the framework.

    Raises: NotSupportedError without a shift, or for parts of pages; SharedCellsError for cells of
        several sequences, ShapeError or DTypeError for a shift that does not suit the keys.
    """
    row = pool.passes.history(sequence)
    cells = row[removed.stop :].copy()  # a view changes with its row
    checked = _check_moving(pool, shift, sequence, cells, stop)
    pool.table.check_removal(row, removed)
    offset = start - stop
    store = pool.buffers.prepare_shift(cells, pool.table.moved_by(cells), offset, checked)
    spill = pool.pins.prepare_spill(cells)

    def commit() -> None:
        spill()
        pool.passes.detach(sequence)
        pool.pins.forget(sequence, start)
        pool.table.remove_middle(sequence, removed.start, removed.stop, offset)
        store()

    return commit


def _check_moving(
    pool: CellPool, shift: Shift | None, sequence: int, cells: Int32s, stop: int
) -> Shift:
    """Return `shift`, which is there, once `cells` may move."""
    if pool.pins.is_shared(cells):
        raise SharedCellsError(
            f"cells that move must belong to one sequence; some at or behind position {stop} "
            f"of sequence {sequence} are shared. Remove the other sequences first."
        )
    if shift is None:
        raise NotSupportedError(
            "removing from the middle moves later tokens, and this cache has no shift. "
            "Make it with CausalCache(shift=...)."
        )
    layout = pool.buffers.layouts[0].axes
    # It could not tell by itself where as many tokens move as there are heads.
    if isinstance(shift, RoPEShift) and shift.layout != layout:
        raise ShapeError(
            f"keys of this cache are in layout {layout!r}; its RoPEShift is made for "
            f"{shift.layout!r}. Make it with RoPEShift(..., layout={layout!r})."
        )
    return shift
