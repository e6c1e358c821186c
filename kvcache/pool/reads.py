"""The cells that attention reads for a pass, decided on the host once for all layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from operator import attrgetter
from typing import NamedTuple

import numpy as np

from kvcache._types import Indices, Int32s
from kvcache.backends.products import NEVER, ReadCosts, VisibleColumns

from .cascade import Group, Shared, shared_prefixes
from .plan import Pass


class Read(NamedTuple):
    """One product: tokens ``[start, stop)`` of a pass, in the order of :class:`Reads`.

    first, last: the cells that they meet, ``[first, last)``; or
    scattered: those that they meet, where they are not in a row; int32 [columns].
    visible: which of these each token sees; None: all.
    """

    start: int
    stop: int
    first: int
    last: int
    scattered: Int32s | None
    visible: VisibleColumns | None

    @property
    def cells(self) -> Int32s:
        """The cells met, int32 [columns]."""
        if self.scattered is not None:
            return self.scattered
        return np.arange(self.first, self.last, dtype=np.int32)


class Segment(NamedTuple):
    """Tokens ``[start, stop)`` of a pass, and the products whose merged results are theirs.

    levels: each with products of different tokens, ascending. A token sees different cells in each
        level, and what it sees is all of them together. A token in no product sees nothing.
    runs: cells ``[first, last)`` of each token, if it meets just these and no other token does, as
        in most decode steps; else None.
    packed: cells to be copied first, and `runs` are of the copy; None: they are of the pool.
    """

    start: int
    stop: int
    levels: tuple[tuple[Read, ...], ...]
    runs: tuple[tuple[int, int], ...] | None = None
    packed: Int32s | None = None


class Reads(NamedTuple):
    """Everything that the tokens of a pass see.

    order: batch index of each token in the order of the segments, int32; None: that of the batch.
    inverse: place of each token of the batch in that order; None: the same.
    segments: one after the other, for all tokens.
    """

    order: Int32s | None
    inverse: Int32s | None
    segments: tuple[Segment, ...]


def plan_reads(forward_pass: Pass, costs: ReadCosts) -> Reads:
    """Return the reads of a pass, by the current state of its table.

    O(tokens + cells seen). costs: of the backend.
    """
    tokens = int(forward_pass.cells.size)
    if not forward_pass.stores:  # a reserve pass has no cells of its own in the table
        return Reads(None, None, (_segment(0, tokens, [[]]),))
    groups = list(_groups(forward_pass))
    shared = shared_prefixes(groups, costs)
    if shared.order is not None:
        groups = [groups[number] for number in shared.order]
    pieces = _Pieces(forward_pass, groups, shared.nodes, costs.run)
    # Those of a kind beside each other, because every segment has its price.
    components = sorted(_components(pieces, costs), key=attrgetter("kind"))
    in_groups = np.concatenate([group.tokens for group in groups]).astype(np.int32)
    order = np.concatenate([in_groups[part.start : part.stop] for part in components])
    segments = tuple(_segments(components, costs.packed))
    if (order == np.arange(tokens)).all():
        return Reads(None, None, segments)
    return Reads(order, np.argsort(order).astype(np.int32), segments)


def _by_sequence(forward_pass: Pass) -> list[Indices]:
    """Return the batch indices of each sequence by position, in order of first appearance."""
    positions, sequences = forward_pass.positions, forward_pass.sequences
    changes = np.flatnonzero(sequences[1:] != sequences[:-1]) + 1
    indices = np.split(np.arange(sequences.size), changes)
    if len(indices) > len(set(sequences.tolist())):  # tokens of a sequence stand apart
        by_sequence: dict[int, list[int]] = {}
        for token, sequence in enumerate(sequences.tolist()):
            by_sequence.setdefault(sequence, []).append(token)
        indices = [np.array(tokens) for tokens in by_sequence.values()]
    return [
        tokens if tokens.size == 1 else tokens[np.argsort(positions[tokens], kind="stable")]
        for tokens in indices
    ]


def _groups(forward_pass: Pass) -> Iterator[Group]:
    """Yield the tokens of each sequence of a pass with the cells that they see."""
    lows, stops = _positions_seen(forward_pass)
    for tokens in _by_sequence(forward_pass):
        cells, columns = forward_pass.columns_of(int(forward_pass.sequences[tokens[0]]))
        first, last = columns(lows[tokens]), columns(stops[tokens])
        left = int(first.min())
        yield Group(tokens, cells[left : int(last.max())], first - left, last - left)


def _positions_seen(forward_pass: Pass) -> tuple[Indices, Indices]:
    """Return the positions that each token sees: the first one, and the one behind the last."""
    lows = forward_pass.visibility.lowest(forward_pass.positions).astype(np.int64)
    stops = forward_pass.positions.astype(np.int64) + 1
    for token, (start, stop) in forward_pass.ahead.items():
        lows[token], stops[token] = min(lows[token], start), stop
    return lows, stops


class _Pieces:
    """The reads of a pass, made group by group."""

    def __init__(
        self, forward_pass: Pass, groups: Sequence[Group], nodes: Sequence[Shared], long_run: int
    ) -> None:
        self._is_run, self._groups, self._long_run = forward_pass.table.is_run, groups, long_run
        self.ends = np.cumsum([0, *(group.tokens.size for group in groups)]).tolist()
        # By group: columns that shared prefixes cover, and the number of these prefixes.
        self._covered, self._depths = [0] * len(groups), [0] * len(groups)
        self._nodes: dict[int, list[Shared]] = {}
        for node in nodes:  # inner ones come after those around
            self._nodes.setdefault(node.start, []).append(node)
            for number in range(node.start, node.stop):
                self._covered[number], self._depths[number] = node.last, node.depth + 1

    def components(self) -> Iterator[tuple[int, int]]:
        """Yield ranges of groups that share prefixes, or are alone."""
        start = 0
        while start < len(self._groups):
            nodes = self._nodes.get(start)
            stop = nodes[0].stop if nodes else start + 1
            yield start, stop
            start = stop

    def of(self, number: int) -> Iterator[tuple[int, Read]]:
        """Yield the reads that begin with a group, each with its level."""
        for node in self._nodes.get(number, ()):
            cells = self._groups[number].cells[node.first : node.last]
            yield 1 + node.depth, self._read(self.ends[number], self.ends[node.stop], cells)
        for place, read in enumerate(self._own(number)):
            yield self._depths[number] + place if place else 0, read

    def _own(self, number: int) -> list[Read]:
        """Return the reads of cells of a group that no shared prefix covers."""
        group, covered = self._groups[number], self._covered[number]
        cells = group.cells[covered:]
        if not cells.size:
            return []
        start, stop = self.ends[number : number + 2]
        visible = _visible(group, covered, cells.size)
        if visible is not None:
            return [self._read(start, stop, cells, visible)]
        return [self._read(start, stop, piece) for piece in self._in_pieces(cells)]

    def _in_pieces(self, cells: Int32s) -> list[Int32s]:
        """Return cells that every token of a group sees in pieces: long runs, and all others."""
        if cells.size < self._long_run or self._is_run(cells):
            return [cells]
        edges = np.flatnonzero(np.diff(cells) != 1) + 1
        sizes = np.diff(edges, prepend=0, append=cells.size)
        long = sizes >= self._long_run
        if not long.any():
            return [cells]
        starts = np.append(0, edges)[long]
        runs = [
            cells[start : start + size] for start, size in zip(starts, sizes[long], strict=True)
        ]
        others = cells[~np.repeat(long, sizes)]
        return [others, *runs] if others.size else runs

    def _read(
        self, start: int, stop: int, cells: Int32s, visible: VisibleColumns | None = None
    ) -> Read:
        if self._is_run(cells):
            first = cells.item(0)
            return Read(start, stop, first, first + cells.size, None, visible)
        # A copy, because the table may change during the pass.
        return Read(start, stop, 0, 0, cells.copy(), visible)


class _Component(NamedTuple):
    """Tokens ``[start, stop)`` whose products have no other tokens; levels: as of a segment.

    kind: equal for those that one segment may hold: the number of levels; and where runs have a
        price of their own, whether the only level has scattered cells.
    """

    start: int
    stop: int
    levels: list[list[Read]]
    kind: tuple[int, bool]

    def levels_at(self, start: int) -> list[list[Read]]:
        """Return the levels, if `start` is the first token."""
        shift = start - self.start
        if not shift:
            return self.levels
        return [
            [read._replace(start=read.start + shift, stop=read.stop + shift) for read in level]
            for level in self.levels
        ]


def _components(pieces: _Pieces, costs: ReadCosts) -> Iterator[_Component]:
    """Yield all tokens, in components as small as possible."""
    apart = costs.packed or costs.run != NEVER
    for first, last in pieces.components():
        levels: list[list[Read]] = [[]]
        for number in range(first, last):
            for level, read in pieces.of(number):
                levels += [[] for _ in range(level + 1 - len(levels))]
                levels[level].append(read)
        scattered = any(read.scattered is not None for read in levels[0])
        kind = len(levels), len(levels) == 1 and scattered and apart
        yield _Component(pieces.ends[first], pieces.ends[last], levels, kind)


def _segments(components: Sequence[_Component], packed: bool) -> Iterator[Segment]:
    """Yield a segment for all components of a kind, which are beside each other.

    packed: as of the costs.
    """
    start = 0
    for _, alike in groupby(components, attrgetter("kind")):
        levels, stop = list[list[Read]](), start
        for component in alike:
            own = component.levels_at(stop)
            levels = levels or [[] for _ in own]
            for level, reads in zip(levels, own, strict=True):
                level.extend(reads)
            stop += component.stop - component.start
        yield _segment(start, stop, levels, packed)
        start = stop


def _segment(
    start: int, stop: int, levels: Sequence[Sequence[Read]], packed: bool = False
) -> Segment:
    """Return a segment of these levels. packed: as of the costs."""
    segment, first = Segment(start, stop, tuple(map(tuple, levels))), levels[0]
    # Each token has a read of its own if there are as many.
    if len(levels) > 1 or len(first) != stop - start:
        return segment
    if all(read.scattered is None for read in first):
        return segment._replace(runs=tuple((read.first, read.last) for read in first))
    if not packed:
        return segment
    cells = [read.cells for read in first]
    ends = np.cumsum([0, *(own.size for own in cells)]).tolist()
    runs = tuple(pairwise(ends))
    return segment._replace(runs=runs, packed=np.concatenate(cells))


def _visible(group: Group, left: int, columns: int) -> VisibleColumns | None:
    """Return which of `columns` columns from `left` on each token of a group sees; None: all."""
    if group.tokens.size == 1:
        return None
    first, last = (group.first - left).clip(0), group.last - left
    if first.max() == 0 and last.min() == columns:
        return None
    return VisibleColumns(first, last)
