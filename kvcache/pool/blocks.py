"""The reads of a pass in blocks of one size, as programs of few shapes take them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np

from kvcache._types import Int32s
from kvcache.backends import Array
from kvcache.backends.blocks import BlockReads, Blocks
from kvcache.backends.products import VisibleColumns

from .reads import Read, Reads

_COLUMNS = 64, 256
"""Columns of a block: the least, for short sequences, and the most."""
_QUERIES = 64
"""Most queries of a block."""


class _Tile(NamedTuple):
    """Some queries of a read, ``[start, start + size)``, and the cells that any of them sees.

    visible: which of these each query sees; None: all.
    """

    start: int
    size: int
    cells: Int32s
    visible: VisibleColumns | None


def block_reads(
    passes: Sequence[Reads], tokens: int, padded: int, move: Callable[[Int32s], Array]
) -> BlockReads:
    """Return the reads of one pass or of several, with one more axis in front, the passes.

    tokens: of each pass. padded: tokens of its program, which repeat the last one. move: applied to
    each array.
    """
    reads = [[*_all_reads(own)] for own in passes]
    widest = max((_columns(read) for read in chain(*reads)), default=1)
    columns = min(max(_COLUMNS[0], power_of_two(widest)), _COLUMNS[1])
    several = [[read for read in own if read.stop - read.start > 1] for own in reads]
    single = [[read for read in own if read.stop - read.start == 1] for own in reads]
    blocks, queries = [], 1
    if any(single):
        tiles = [[_Tile(read.start, 1, read.cells, None) for read in own] for own in single]
        blocks.append(_blocks(tiles, 1, columns))
    if any(several):
        largest = max(read.stop - read.start for read in chain(*several))
        queries = min(power_of_two(largest), _QUERIES)
        tiles = [[tile for read in own for tile in _tiles(read, queries)] for own in several]
        blocks.append(_blocks(tiles, queries, columns))
    order, inverse = _orders(passes, tokens, padded, queries - 1)
    moved = tuple(Blocks(*map(move, own)) for own in blocks)
    return BlockReads(move(order), move(inverse), moved)


def power_of_two(count: int) -> int:
    """Return the least power of two that is not less than `count`, at least 1."""
    return 1 << (count - 1).bit_length()


def _all_reads(reads: Reads) -> Iterator[Read]:
    """Yield the products of a pass; those of a token add up, in any order."""
    for segment in reads.segments:
        yield from chain(*segment.levels)


def _columns(read: Read) -> int:
    return read.last - read.first if read.scattered is None else int(read.scattered.size)


def _tiles(read: Read, queries: int) -> Iterator[_Tile]:
    """Yield the queries of a read, at most so many at a time, with the cells that they see."""
    cells, count = read.cells, read.stop - read.start
    for start in range(0, count, queries):
        stop = min(start + queries, count)
        left, right, visible = 0, cells.size, None
        if read.visible is not None:
            _, _, left, right, visible = read.visible.block(start, stop)
        yield _Tile(read.start + start, stop - start, cells[left:right], visible)


def _blocks(passes: Sequence[Sequence[_Tile]], queries: int, columns: int) -> Blocks:
    """Return the blocks of the tiles of each pass, padded to as many in all, a power of two."""
    sizes = [[-(-tile.cells.size // columns) for tile in tiles] for tiles in passes]
    count = power_of_two(max(map(sum, sizes)))
    shape = len(passes), count
    blocks = Blocks(
        np.zeros(shape, np.int32),
        np.zeros((*shape, columns), np.int32),
        np.zeros((*shape, queries), np.int32),
        np.zeros((*shape, queries), np.int32),
    )
    for number, (tiles, own) in enumerate(zip(passes, sizes, strict=True)):
        _fill(Blocks(*(array[number] for array in blocks)), tiles, own)
    return blocks


def _fill(blocks: Blocks, tiles: Sequence[_Tile], sizes: Sequence[int]) -> None:
    """Write `tiles` to `blocks`, ``sizes[i]`` for each of them."""
    columns, flat = blocks.cells.shape[1], blocks.cells.reshape(-1)
    left = 0
    for (start, count, cells, visible), size in zip(tiles, sizes, strict=True):
        right, begin = left + size, left * columns
        flat[begin : begin + cells.size] = cells
        # Padding reads a cell that is seen: hidden ones may hold NaN, which no weight of 0 removes.
        flat[begin + cells.size :] = cells[-1]
        blocks.starts[left:right] = start
        first, last = blocks.first[left:right, :count], blocks.last[left:right, :count]
        if visible is None:
            last[:] = columns
            last[-1] = cells.size - (size - 1) * columns
        else:
            offsets = np.arange(0, size * columns, columns)[:, None]
            np.clip(visible.first - offsets, 0, columns, out=first, casting="unsafe")
            np.clip(visible.last - offsets, 0, columns, out=last, casting="unsafe")
        left = right


def _orders(passes: Sequence[Reads], tokens: int, padded: int, extra: int) -> tuple[Int32s, Int32s]:
    """Return the order of the tokens of each pass, and its inverse, ``[passes, padded]``.

    extra: so many more queries at the end of the order.
    """
    same = np.arange(tokens, dtype=np.int32)
    orders = [same if reads.order is None else reads.order for reads in passes]
    inverses = [same if reads.inverse is None else reads.inverse for reads in passes]
    order, inverse = np.stack(orders), np.stack(inverses)
    more = padded - tokens
    # Padding has the output of the last token: its own place in the order sees nothing.
    return (
        np.pad(order, ((0, 0), (0, more + extra))),
        np.pad(inverse, ((0, 0), (0, more)), "edge"),
    )
