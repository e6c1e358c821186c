"""A radix tree over token ids, at the speed of ``memcmp``.

An edge holds the ids of its span as little-endian int32 bytes, so that following it is one
comparison of bytes, whatever its length. A query is turned into bytes edge by edge: what lies
behind the point where it leaves the tree is never looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from heapq import heappop, heappush
from itertools import count
from typing import Any, Generic, NamedTuple, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

Tokens: TypeAlias = npt.NDArray[np.int32]
_ID = np.dtype("<i4")
V = TypeVar("V")


class Node(Generic[V]):
    """The end of an edge. value: what is kept here, None where paths merely part.

    depth: tokens from the root to here. children: by the first token of their edges.
    """

    __slots__ = ("children", "depth", "edge", "parent", "value")

    def __init__(self, edge: bytes, parent: Node[V] | None) -> None:
        self.edge = edge
        self.parent = parent
        self.depth: int = (parent.depth if parent else 0) + len(edge) // _ID.itemsize
        self.children: dict[int, Node[V]] = {}
        self.value: V | None = None

    @property
    def first(self) -> int:
        """First token of the edge."""
        return int.from_bytes(self.edge[: _ID.itemsize], "little", signed=True)

    @property
    def idle(self) -> bool:
        """Whether nothing is kept here."""
        return self.value is None

    def below(self) -> Iterator[Node[V]]:
        """This node and all under it, by their depth."""
        heap, order = [(self.depth, 0, self)], count(1)
        while heap:
            *_, node = heappop(heap)
            yield node
            for child in node.children.values():
                heappush(heap, (child.depth, next(order), child))


class Match(NamedTuple, Generic[V]):
    """How far a query follows the tree.

    length: tokens in common. node: the last node on the way whose edge was followed to its end.
    inside: the child on whose edge the query leaves the tree, or ends; None if it does at `node`.
    """

    length: int
    node: Node[V]
    inside: Node[V] | None


class RadixTree(Generic[V]):
    """Values by sequences of token ids."""

    def __init__(self) -> None:
        self.root: Node[V] = Node(b"", None)

    def match(self, tokens: Tokens) -> Match[V]:
        """The longest path that begins like `tokens`."""
        node, at, size = self.root, 0, tokens.size
        while at < size:
            child = node.children.get(tokens.item(at))
            if child is None:
                break
            if tokens[at : child.depth].astype(_ID, copy=False).tobytes() != child.edge:
                return Match(at + _in_common(tokens[at : child.depth], child.edge), node, child)
            node, at = child, child.depth
        return Match(at, node, None)

    def insert(self, tokens: Tokens) -> Node[V]:
        """The node at the end of `tokens`, made if there is none."""
        length, node, inside = self.match(tokens)
        if inside is not None:
            node = self.split(inside, length - node.depth)
        if length < tokens.size:
            edge = tokens[length:].astype(_ID, copy=False).tobytes()
            node.children[tokens.item(length)] = node = Node(edge, node)
        return node

    @staticmethod
    def remove(node: Node[V]) -> None:
        """Forget the value of `node`; edges that no longer part are joined."""
        node.value = None
        while node.parent is not None and node.idle and not node.children:
            del node.parent.children[node.first]
            node = node.parent
        if node.parent is not None and node.idle and len(node.children) == 1:
            _join(node)

    @staticmethod
    def split(node: Node[V], length: int) -> Node[V]:
        """A new node `length` tokens down the edge of `node`, which hangs below it then."""
        at, parent = length * _ID.itemsize, node.parent
        upper: Node[V] = Node(node.edge[:at], parent)
        if parent is not None:
            parent.children[node.first] = upper
        node.edge, node.parent = node.edge[at:], upper
        upper.children[node.first] = node
        return upper


def as_tokens(tokens: npt.ArrayLike | Sequence[int]) -> Tokens:
    """Token ids as an int32 array, which is not copied if it is one.

    Raises: ValueError for what is no list of 32-bit integers.
    """
    array = np.asarray(tokens)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(f"token ids are a list of integers; got {array.dtype} {array.shape}.")
    if array.dtype == np.int32:
        return array
    ids = array.astype(np.int32)
    if (ids != array).any():
        raise ValueError(f"token ids are int32; got {array.min()} to {array.max()}.")
    return ids


def _in_common(tokens: Tokens, edge: bytes) -> int:
    """How many of `tokens`, not all, are those that an edge begins with."""
    ids = np.frombuffer(edge, _ID)[: tokens.size]
    differ = tokens != ids
    return int(differ.argmax()) if differ.any() else ids.size


def _join(node: Node[V]) -> None:
    """Let the only child of `node` stand in its place."""
    [child] = node.children.values()
    parent: Any = node.parent
    parent.children[node.first] = child
    child.edge, child.parent = node.edge + child.edge, parent
