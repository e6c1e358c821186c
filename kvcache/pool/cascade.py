"""Prefixes that several sequences of a pass share, so that attention reads them once for all.

The tokens of the sequences meet the shared cells in one product, and their own cells in others
(cascade attention). Prefixes nest: a system prompt that all share, then documents that some share.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kvcache._types import Indices, Int32s
from kvcache.backends.products import ReadCosts

_MOST_TOKENS = 64
"""Tokens of a sequence beyond which their product is bound by arithmetic: sharing saves none."""


class Group(NamedTuple):
    """The tokens of one sequence in a pass, and the cells that any of them sees.

    tokens: batch indices, by position.
    cells: int32 [columns], by position. A view of the table.
    first, last: the columns that each token sees, ``[first[i], last[i])``; int [tokens].
    """

    tokens: Indices
    cells: Int32s
    first: Indices
    last: Indices

    @property
    def common(self) -> int:
        """Number of first columns that every token sees, and a further one with them."""
        if self.tokens.size > _MOST_TOKENS or self.first.any():
            return 0
        return max(0, int(self.last.min()) - 1)


class Shared(NamedTuple):
    """Columns ``[first, last)``, of the same cells in all of the groups ``[start, stop)``.

    depth: number of other shared prefixes before it, in the same groups.
    """

    start: int
    stop: int
    first: int
    last: int
    depth: int


class SharedPrefixes(NamedTuple):
    """The shared prefixes of some groups, once these are in `order`; None: as they are."""

    order: list[int] | None
    nodes: list[Shared]


class _Branch(NamedTuple):
    """Groups, by number, with the same cells in their first columns.

    equal: number of these columns. read: how many of them shared prefixes cover.
    depth: number of these shared prefixes.
    """

    members: list[int]
    equal: int
    read: int
    depth: int


def shared_prefixes(groups: Sequence[Group], costs: ReadCosts) -> SharedPrefixes:
    """Return the prefixes that are worth a product of their own, and the order it needs."""
    if len({group.cells.item(0) for group in groups if group.cells.size}) == len(groups):
        return SharedPrefixes(None, [])  # as usual
    common = [group.common for group in groups]
    order: list[int] = []
    nodes: list[Shared] = []
    branches = [_Branch(list(range(len(groups))), 0, 0, 0)]
    while branches:
        branch = branches.pop()
        if len(branch.members) == 1:
            order += branch.members
            continue
        children = []
        for members in _by_next_cell(groups, common, branch):
            children.append(child := _child(groups, common, branch, members, costs))
            if child.read > branch.read:
                start = len(order) + sum(len(other.members) for other in children[:-1])
                stop = start + len(members)
                nodes.append(Shared(start, stop, branch.read, child.read, branch.depth))
        branches += reversed(children)
    if not nodes:
        return SharedPrefixes(None, [])
    return SharedPrefixes(order, nodes)


def _by_next_cell(
    groups: Sequence[Group], common: Sequence[int], branch: _Branch
) -> list[list[int]]:
    """Return the groups of a branch by the cell behind their equal columns."""
    cells: dict[int, list[int]] = {}
    for number in branch.members:
        more = branch.equal < common[number]
        # A group that shares no further column is alone: no cell has a negative number.
        key = groups[number].cells.item(branch.equal) if more else -1 - number
        cells.setdefault(key, []).append(number)
    return list(cells.values())


def _child(
    groups: Sequence[Group],
    common: Sequence[int],
    branch: _Branch,
    members: list[int],
    costs: ReadCosts,
) -> _Branch:
    """Return the branch of `members`, whose next cells are equal, as far as they stay so."""
    if len(members) == 1:
        return branch._replace(members=members)
    equal = min(common[number] for number in members)
    head = groups[members[0]].cells
    for number in members[1:]:
        equal = _equal_columns(head[:equal], groups[number].cells[:equal], branch.equal)
    columns = equal - branch.read
    if columns < costs.least or columns * (len(members) - 1) < costs.shared:
        return _Branch(members, equal, branch.read, branch.depth)
    return _Branch(members, equal, equal, branch.depth + 1)


def _equal_columns(cells: Int32s, others: Int32s, start: int) -> int:
    """Return the number of first columns in which two rows of the same length are equal.

    start: number of columns known to be equal.
    """
    differing = cells[start:] != others[start:]
    return start + int(np.argmax(differing)) if differing.any() else cells.size
