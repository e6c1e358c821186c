"""The cells that attention reads for a pass, decided on the host once for all layers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from kvcache._types import Indices, Int32s
from kvcache.backends.products import VisibleColumns

from .cascade import Group, Shared, shared_prefixes
from .plan import Pass

_LONG_RUN = 256
"""Cells in a row from which reading them in place, and merging, is cheaper than a copy."""
_MOST_RUNS = 3
"""Runs of a sequence that are read in place."""


class Read(NamedTuple):
    """One product: tokens ``[start, stop)`` of a pass, in the order of :class:`Reads`.

    first, last: the cells that they meet, ``[first, last)``; or
    index: those that they meet, where they are not in a row; int32 [columns].
    visible: which of these each token sees; None: all.
    """

    start: int
    stop: int
    first: int
    last: int
    index: Int32s | None
    visible: VisibleColumns | None

    @property
    def cells(self) -> Int32s:
        """The cells met, int32 [columns]."""
        return np.arange(self.first, self.last, dtype=np.int32) if self.index is None else self.index


class Reads(NamedTuple):
    """Everything that the tokens of a pass see, as products to be merged.

    tokens: number of tokens of the pass.
    order: batch index of each token in the order of the products, int32; None: that of the batch.
    levels: each with products of different tokens, ascending. A token sees different cells in each
        level, and what it sees is all of them together. A token in no product sees nothing.
    """

    tokens: int
    order: Int32s | None
    levels: tuple[tuple[Read, ...], ...]

    @property
    def inverse(self) -> Int32s | None:
        """Place of each token of the batch in the order of the products; None: the same."""
        return None if self.order is None else np.argsort(self.order).astype(np.int32)


def plan_reads(forward_pass: Pass, worth: int) -> Reads:
    """Return the reads of a pass, by the current state of its table.

    O(tokens + cells seen). worth: see :attr:`Backend.shared_columns`.
    """
    tokens = int(forward_pass.cells.size)
    if not forward_pass.stores:  # a reserve pass has no cells of its own in the table
        return Reads(tokens, None, ())
    groups = list(_groups(forward_pass))
    shared = shared_prefixes(groups, worth)
    if shared.order is not None:
        groups = [groups[number] for number in shared.order]
    order = np.concatenate([group.tokens for group in groups])
    in_order = bool((order == np.arange(tokens)).all())
    levels = _levels(forward_pass, groups, shared.nodes)
    return Reads(tokens, None if in_order else order.astype(np.int32), levels)


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


class _Levels:
    """The levels of reads, as they grow."""

    def __init__(self, forward_pass: Pass) -> None:
        self._is_run = forward_pass.table.is_run
        self._levels: list[list[Read]] = []

    def add(
        self,
        level: int,
        start: int,
        stop: int,
        cells: Int32s,
        visible: VisibleColumns | None = None,
    ) -> None:
        """Add a read of `cells`, for tokens ``[start, stop)``."""
        while len(self._levels) <= level:
            self._levels.append([])
        if self._is_run(cells):
            first = cells.item(0)
            read = Read(start, stop, first, first + cells.size, None, visible)
        else:  # a copy, because the table may change during the pass
            read = Read(start, stop, 0, 0, cells.copy(), visible)
        self._levels[level].append(read)

    def sorted(self) -> tuple[tuple[Read, ...], ...]:
        """Return all levels."""
        return tuple(tuple(sorted(level, key=lambda read: read.start)) for level in self._levels)


def _levels(
    forward_pass: Pass, groups: Sequence[Group], nodes: Sequence[Shared]
) -> tuple[tuple[Read, ...], ...]:
    """Return the reads: level 0 has the own cells of each group, the others what is shared."""
    levels = _Levels(forward_pass)
    ends = np.cumsum([0, *(group.tokens.size for group in groups)]).tolist()
    shared = [0] * len(groups)  # columns of each group that shared prefixes cover
    depths = [0] * len(groups)
    for node in nodes:  # outer ones come before those within
        cells = groups[node.start].cells[node.first : node.last]
        levels.add(1 + node.depth, ends[node.start], ends[node.stop], cells)
        for number in range(node.start, node.stop):
            shared[number], depths[number] = node.last, node.depth + 1
    for number, group in enumerate(groups):
        own = group.cells[shared[number] :]
        if not own.size:
            continue
        start, stop = ends[number : number + 2]
        visible = _visible(group, shared[number], own.size)
        pieces = [own] if visible is not None else _pieces(own, forward_pass.table.is_run(own))
        for place, piece in enumerate(pieces):
            level = depths[number] + place if place else 0
            levels.add(level, start, stop, piece, visible)
    return levels.sorted()


def _visible(group: Group, left: int, columns: int) -> VisibleColumns | None:
    """Return which of `columns` columns from `left` on each token of a group sees; None: all."""
    if group.tokens.size == 1:
        return None
    first, last = (group.first - left).clip(0), group.last - left
    if first.max() == 0 and last.min() == columns:
        return None
    return VisibleColumns(first, last)


def _pieces(cells: Int32s, is_run: bool) -> list[Int32s]:
    """Return cells that every token of a group sees in pieces: long runs, and all others."""
    if is_run or cells.size < _LONG_RUN:
        return [cells]
    edges = np.flatnonzero(np.diff(cells) != 1) + 1
    runs = np.split(cells, edges) if edges.size < cells.size // 16 else [cells]
    long = sorted((run for run in runs if run.size >= _LONG_RUN), key=len)[-_MOST_RUNS:]
    if not long or len(runs) == 1:
        return [cells]
    chosen = {run.item(0) for run in long}
    others = [run for run in runs if run.item(0) not in chosen]
    return [*([np.concatenate(others)] if others else []), *long]
