"""Block tables: a pass as kernels for paged attention take it."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kvcache._types import Indices, Int32s
from kvcache.backends import Array, Backend
from kvcache.errors import KVCacheError, NotSupportedError

from .cells import CellTable
from .plan import BlockTable, Pass


def block_table(forward_pass: Pass) -> BlockTable[Int32s]:
    """Return the block table of a pass, as NumPy arrays. Costs time in proportion to its size.

    Raises: NotSupportedError for a pass that stores nothing, whose tokens are not the last ones of
        their sequences, in order, or that sees what a kernel cannot know; KVCacheError for a
        sequence that has changed since the pass was complete.
    """
    if not forward_pass.stores:
        raise NotSupportedError("a reserve pass has no block table: it stores nothing.")
    starts = np.flatnonzero(np.diff(forward_pass.sequences, prepend=-1))
    rows = _rows_of(forward_pass, starts)
    _check_queries(forward_pass, starts, rows)
    _check_visibility(forward_pass, starts, rows)
    return BlockTable(
        rows.pages,
        (rows.begin + rows.held).astype(np.int32),
        np.append(starts, forward_pass.positions.size).astype(np.int32),
        forward_pass.cells,
        forward_pass.sequences[starts],
        (rows.oldest - rows.begin).astype(np.int32),
    )


def on_device(table: BlockTable[Int32s], backend: Backend) -> BlockTable[Array]:
    """Return a copy of `table`, of NumPy arrays, as arrays of `backend`."""
    return BlockTable(*(backend.from_host(array, "int32") for array in table))


class _Rows(NamedTuple):
    """Content of sequences: pages, the slot of the first token, and the number of tokens.

    oldest, newest: positions of the first and the last token. queries: position of the first of so
    many last tokens as the pass has.
    """

    pages: Int32s
    begin: Indices
    held: Indices
    oldest: Int32s
    newest: Int32s
    queries: Int32s


def _rows_of(forward_pass: Pass, starts: Indices) -> _Rows:
    """Return what the sequences of a pass hold. starts: the first token of each in its batch."""
    ids, table = forward_pass.sequences[starts].astype(np.int64), forward_pass.table
    counts = np.diff(starts, append=forward_pass.sequences.size)
    if not forward_pass.detached:
        return _held(table, ids, counts)
    parts = [
        _held_before(*forward_pass.detached[sequence], int(count), table.page)
        if sequence in forward_pass.detached
        else _held(table, ids[number : number + 1], counts[number : number + 1])
        for number, (sequence, count) in enumerate(zip(ids.tolist(), counts, strict=True))
    ]
    width = max(part.pages.shape[1] for part in parts)
    pages = [np.pad(part.pages, ((0, 0), (0, width - part.pages.shape[1]))) for part in parts]
    begin, held, oldest, newest, queries = (
        np.concatenate(arrays) for arrays in zip(*(part[1:] for part in parts), strict=True)
    )
    return _Rows(np.concatenate(pages), begin, held, oldest, newest, queries)


def _held(table: CellTable, ids: Indices, counts: Indices) -> _Rows:
    """Return what sequences `ids` hold, whose last `counts` tokens are of the pass."""
    pages, begin = table.pages_of(ids)
    first, last = table.first[ids], table.last[ids]
    oldest, newest, queries = (
        table.positions[table.rows[ids, column]] for column in (first, last - 1, last - counts)
    )
    return _Rows(pages, begin, last - first, oldest, newest, queries)


def _held_before(cells: Int32s, positions: Int32s, count: int, page: int) -> _Rows:
    """Return what a sequence held that has changed during the pass: as this reads it."""
    if not cells.size:
        raise KVCacheError(
            "a pass is over once every layer was put and a sequence of it has changed. Ask for its "
            "block table before, or call start_forward."
        )
    begin = int(cells[0]) % page
    columns = np.maximum(np.arange(0, begin + cells.size, page) - begin, 0)
    width = 1 << (columns.size - 1).bit_length()
    pages = np.pad(cells[columns] // page, (0, width - columns.size))
    begins, held = np.array([begin]), np.array([cells.size])
    return _Rows(pages[None], begins, held, positions[:1], positions[-1:], positions[[-count]])


def _check_queries(forward_pass: Pass, starts: Indices, rows: _Rows) -> None:
    """Raise NotSupportedError unless the tokens are the last ones of their sequences, in order."""
    positions, sequences = forward_pass.positions, forward_pass.sequences
    ids = sequences[starts]
    ordered = bool((np.diff(positions)[np.diff(sequences) == 0] > 0).all())
    if not ordered or np.unique(ids).size < ids.size or (rows.queries != positions[starts]).any():
        raise NotSupportedError(
            "a block table describes passes whose tokens are the last ones of each sequence, "
            "adjacent and in order of position. Sort the batch by sequence and position."
        )


def _check_visibility(forward_pass: Pass, starts: Indices, rows: _Rows) -> None:
    """Raise NotSupportedError if a kernel would show a query other tokens than the cache does.

    Kernels count slots. With a window or a chunk that comes to the same where positions have no
    gaps, and where every slot before the oldest token is out of sight.
    """
    rule = forward_pass.visibility
    if rule.window is None and rule.chunk is None:
        wrong = rows.begin > 0
    else:
        lowest = rule.lowest(forward_pass.positions[starts])
        wrong = rows.newest - rows.oldest != rows.held - 1
        wrong |= (rows.begin > 0) & (lowest < rows.oldest)
    if wrong.any():
        sequence = int(forward_pass.sequences[starts][wrong][0])
        raise NotSupportedError(
            f"a block table cannot tell a kernel which positions of sequence {sequence} are "
            "missing, and a token of the pass would see their slots. Read with get."
        )
