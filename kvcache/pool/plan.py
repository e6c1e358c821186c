"""The effect of a forward pass on the buffers, decided on the host."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import repeat
from types import MappingProxyType
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeAlias, TypeVar

import numpy as np

from kvcache._types import Bools, Indices, Int32s
from kvcache.backends import Array
from kvcache.backends.arrays import RowIndex, TracedIndex
from kvcache.backends.attention import RowCopier
from kvcache.backends.blocks import BlockReads
from kvcache.snapshots.visibility import Visibility

from .cells import CellTable
from .changes import Dropped, DroppedCell
from .latest import BLANK, COMPLETE, NOTHING, PARTIAL, Progress
from .placement import Moved

if TYPE_CHECKING:
    from .reads import Reads

A = TypeVar("A")

PoolState: TypeAlias = Mapping[int, tuple[Array, ...]]
"""The arrays of every layer, by its number: keys and values, or keys alone."""


class BlockTable(NamedTuple, Generic[A]):
    """The pages that each sequence of a pass reads, and the cells that its tokens go to.

    All arrays are int32, of the backend of the cache or of NumPy; sequences are in the order of
    the batch. A slot counts from the beginning of the first page of its sequence.
    """

    block_tables: A
    """``[sequences, pages]``: pages of each sequence in order, then zeros. The width is a power
    of two, so that programs are compiled for few widths."""
    lengths: A
    """``[sequences]``: slots up to the last token of the pass, itself included."""
    query_starts: A
    """``[sequences + 1]``: the tokens of sequence i are ``[query_starts[i], query_starts[i + 1])``
    of the batch, and the last ones of its `lengths`."""
    slot_mapping: A
    """``[tokens]``: the cell of each token, its page times the size of a page plus its slot."""
    sequences: A
    """``[sequences]``: ids."""
    first_positions: A
    """``[sequences]``: position of slot 0. Without a window that is 0, or the first position put.
    With one, the slots before the oldest token held are of tokens that no query sees."""


class ForwardPlan(NamedTuple):
    """A pass as arrays of the cache's backend: a pytree, an argument of compiled programs.

    :mod:`kvcache.functional` applies it. From :meth:`CausalCache.plan_steps` every leaf has one
    more axis in front, the steps, as ``lax.scan`` wants it.
    """

    cells: Array
    """int32 [tokens]: the cell of each token."""
    start: TracedIndex
    """First cell of the range read: an integer, or an integer array of shape []."""
    mask: Array
    """[tokens, history]: visibility of the cells of the range, which is as long as this is wide.

    In a plan with `reads` there is no range, and the width is 0.
    """
    key_like: Array
    """Empty keys in the layout and dtype of the cache: length 0 on the axis of tokens."""
    value_like: Array
    """Empty values, likewise."""
    reads: BlockReads | None = None
    """The cells that the tokens see, for :func:`kvcache.functional.attend`; None: not asked for."""

    @property
    def prototypes(self) -> tuple[Array, ...]:
        """An empty array like each array of a layer, in order."""
        return self.key_like, self.value_like


class StatePlan(NamedTuple):
    """A pass over recurrent layers as arrays of the cache's backend, a pytree like the plan above.

    :mod:`kvcache.functional` applies it. From :meth:`RecurrentCache.plan_steps` every leaf has one
    more axis in front, the steps.
    """

    before: Array
    """int32 [runs]: slot of the state that each run of the pass begins with."""
    behind: Array
    """int32 [runs]: slot for the state behind each run."""
    likes: Mapping[int, Mapping[int, Array]]
    """By layer and number of an array: an empty one like it, where the buffer carries bits."""


class PassBlocks(NamedTuple):
    """What a pass reads as blocks, for a program that is compiled for few numbers of tokens.

    rows: of its queries, padded by the last one, int32. likes: prototypes of the arrays of a layer.
    """

    rows: Int32s
    reads: BlockReads
    likes: tuple[Array, ...]


class Pass:
    """A forward pass on the host: the cells written, the range read, and the visibility.

    Its tokens are history once it is complete: every layer that was allocated when it began has
    been put, one at least. Until then it can be taken back.

    cells: cell of each token, int32 [tokens].
    start, stop: the range of cells returned by `get`.
    positions, sequences: of each token, int32 [tokens].
    visibility: rule for the earlier tokens of its sequence that a token sees.
    expected: layers to put. dropped: cells evicted to make room, for taking the pass back.
    maybe_expired: sequences with new tokens by then since they were last cut down, likewise.
    stores: False for a reserve pass, which only allocates.
    """

    ahead: Mapping[int, tuple[int, int]] = MappingProxyType({})
    """By batch index, for tokens that see others ahead: the positions ``[start, stop)`` to see
    beyond the rule."""
    block_table: BlockTable[Int32s] | None = None
    """Asked for in this pass, as NumPy arrays; and on the device."""
    device_table: BlockTable[Array] | None = None
    device_mask: Array | None = None
    """Asked for in this pass: :meth:`mask`, on the device."""
    reads: Reads | None = None
    """Asked for in this pass: the cells that attention reads."""
    blocks: PassBlocks | None = None
    """The same for a program."""
    row_index: RowIndex | None = None
    """Once a layer was put, if cells are not consecutive: `cells` as the backend writes rows."""
    moved: Moved | None = None
    """Tokens of earlier passes that were moved for this one; None also once they are back."""

    def __init__(
        self,
        table: CellTable,
        cells: Int32s,
        start: int,
        stop: int,
        positions: Int32s,
        sequences: Int32s,
        visibility: Visibility,
        expected: frozenset[int] = frozenset(),
        dropped: Dropped | DroppedCell | None = None,
        maybe_expired: frozenset[int] = frozenset(),
        stores: bool = True,
    ) -> None:
        self.table, self.cells, self.start, self.stop = table, cells, start, stop
        self.positions, self.sequences, self.visibility = positions, sequences, visibility
        self.expected, self.dropped, self.stores = expected, dropped, stores
        self.maybe_expired = maybe_expired
        self.put_layers: set[int] = set()
        """Layers put so far."""
        self.copiers: list[RowCopier] = []
        """Those that no call of `attend` is using; they keep memory, so one serves all layers."""
        self.detached: dict[int, tuple[Int32s, Int32s]] = {}
        """Cells and positions of sequences that were changed during the pass, as it reads them."""

    @property
    def progress(self) -> Progress:
        """How far it has come."""
        put = self.put_layers
        if not self.stores:
            return NOTHING
        if not self.expected <= put:
            return PARTIAL
        return COMPLETE if put else BLANK

    @cached_property
    def first_cell(self) -> int | None:
        """First cell if the cells are consecutive, else None: a write is then a slice."""
        return self.cells.item(0) if self.table.is_run(self.cells) else None

    def visible(self, tokens: Sequence[int]) -> Iterator[Int32s]:
        """Yield the cells visible to each of `tokens`, by the current state of the table."""
        sequences, positions = self.sequences[tokens], self.positions[tokens]
        lows = self.visibility.lowest(positions).tolist()
        rows = zip(tokens, sequences.tolist(), positions.tolist(), lows, strict=True)
        for token, sequence, position, low in rows:
            start, stop = self.ahead.get(token, (low, position + 1))
            yield self._between(sequence, min(low, start), stop)

    def _between(self, sequence: int, start: int, stop: int) -> Int32s:
        """Return the cells of positions ``[start, stop)`` of a sequence."""
        if sequence in self.detached:
            cells, positions = self.detached[sequence]
            first, last = np.searchsorted(positions, [start, stop])
            return cells[first:last]
        find = self.table.find
        return self.table.cells_of(sequence)[find(sequence, start) : find(sequence, stop)]

    def columns_of(self, sequence: int) -> tuple[Int32s, Callable[[Indices], Indices]]:
        """Return the cells of a sequence by position, and a function from positions to columns.

        It counts, for each of some positions, the cells of positions below.
        """
        cells, positions = self.detached.get(sequence, (None, None))
        if cells is None or positions is None:
            cells = self.table.cells_of(sequence)
            positions = self.table.positions
            first, last = (int(positions[cells[end]]) for end in (0, -1)) if cells.size else (0, -1)
            if last - first == cells.size - 1:  # no gaps, as usual: no search
                size = cells.size
                return cells, lambda wanted: (wanted - first).clip(0, size)
            positions = positions[cells]
        held = positions
        return cells, lambda wanted: np.searchsorted(held, wanted)

    def mask(self) -> Bools:
        """Return the mask, bool ``[tokens, stop - start]``, True = attend."""
        mask = np.zeros((self.cells.size, self.stop - self.start), np.bool_)
        if not self.stores:  # a reserve pass has no cells of its own in the table
            return mask
        rest = []
        for token, (first, last) in enumerate(self._ranges_seen()):
            if first < last:
                mask[token, first - self.start : last - self.start] = True
            else:
                rest.append(token)
        for token, cells in zip(rest, self.visible(rest), strict=True):
            if self.table.is_run(cells):  # a slice is filled far faster
                first = cells.item(0) - self.start
                mask[token, first : first + cells.size] = True
            else:
                mask[token, cells - self.start] = True
        return mask

    def _ranges_seen(self) -> Iterator[tuple[int, int]]:
        """Return by token the cells that it sees, ``[first, last)``, where that is simple.

        Simple, and so most of a decode pass: a token sees all of its sequence, whose cells have no
        others between them. Else the range is empty.
        """
        table, ids = self.table, self.sequences.astype(np.int64)
        if self.detached or self.ahead or ids.size == 1:  # for one, looking takes as long
            return repeat((0, 0), ids.size)
        begins, ends, low, stop = table.first[ids], table.last[ids], table.low[ids], table.high[ids]
        stop = stop + 1
        oldest = table.positions.take(table.rows[ids, begins])
        latest = table.positions.take(table.rows[ids, ends - 1])
        whole = (self.visibility.lowest(self.positions) <= oldest) & (self.positions >= latest)
        whole &= stop - low == ends - begins
        return zip((low * whole).tolist(), (stop * whole).tolist(), strict=True)
