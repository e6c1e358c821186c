"""Bytes of host memory that nodes, spans and containers of an index take.

As Python asks its allocator for them; what that rounds up is not counted.
"""

from __future__ import annotations

from sys import getsizeof
from typing import Any

from .media import of_integer
from .quotas import LimitedTree
from .radix import RadixTree
from .retention import NBYTES
from .spans import Span

_EMPTY: RadixTree[Span[Any]] = RadixTree()
_TREE = getsizeof(_EMPTY) + getsizeof(_EMPTY.root)
_LIMITED: LimitedTree[Any] = LimitedTree("", 0)
_LIMITED_NBYTES = (
    getsizeof(_LIMITED)
    + getsizeof(_LIMITED.candidates)
    + getsizeof(vars(_LIMITED.candidates))
    + _LIMITED.candidates.nbytes
    + getsizeof(1 << 30)
    - getsizeof(_EMPTY)
)
# With the key of its entry in its parent.
_NODE = getsizeof(_EMPTY.root) + getsizeof(1 << 20)
# With the time of its last use.
_SPAN = getsizeof(Span(_EMPTY, _EMPTY.root)) + getsizeof(0.5)
ENTRY = 60
"""Bytes of an entry of a dict, which has room for up to three times as many."""
ORDERED_ENTRY = 180
"""The same of an OrderedDict."""


def of_span(span: Span[Any]) -> int:
    """Return the bytes of `span` and its node, without payload and data of the policy."""
    node, media = span.node, span.media
    nbytes = _SPAN + _NODE + of_integer(node.depth) + getsizeof(node.edge)
    if span.retention is not None:  # most often shared by a few spans: no less than it takes
        nbytes += NBYTES
    if media:
        nbytes += getsizeof(media) + sum(placement.nbytes for placement in media)
    return nbytes + getsizeof(node.children)


def of_tree(tree: RadixTree[Any]) -> int:
    """Return the bytes of a tree and its salt, without the table of the children of its root.

    Of one with a quota, the queue of candidates as if it were empty.
    """
    limited = _LIMITED_NBYTES if isinstance(tree, LimitedTree) else 0
    return _TREE + getsizeof(tree.salt) + limited
