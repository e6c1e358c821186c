"""Bytes of host memory that nodes, spans and containers of an index take.

As Python asks its allocator for them; what that rounds up is not counted.
"""

from __future__ import annotations

from sys import getsizeof
from typing import Any

from .media import of_integer
from .radix import RadixTree
from .spans import Span

_EMPTY: RadixTree[Span[Any]] = RadixTree()
_TREE = getsizeof(_EMPTY) + getsizeof(_EMPTY.root)
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
    if media:
        nbytes += getsizeof(media) + sum(placement.nbytes for placement in media)
    return nbytes + getsizeof(node.children)


def of_tree(tree: RadixTree[Any]) -> int:
    """Return the bytes of a tree and its salt, without the table of the children of its root."""
    return _TREE + getsizeof(tree.salt)
