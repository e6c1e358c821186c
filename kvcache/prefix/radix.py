"""A radix tree over token ids, at the speed of ``memcmp``.

An edge holds the ids of its span as little-endian int32 bytes, so that following it is one
comparison of bytes, whatever its length. A query is turned into bytes edge by edge: the part
behind the point where it leaves the tree is never looked at.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from heapq import heappop, heappush
from itertools import count
from typing import Generic, NamedTuple, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt

from kvcache._checks import as_int32s

Tokens: TypeAlias = npt.NDArray[np.int32]
"""Token ids, one-dimensional."""
_ID = np.dtype("<i4")
V = TypeVar("V")


class Node(Generic[V]):
    """The end of an edge.

    edge: token ids from `parent` to here, as little-endian int32. depth: tokens from the root to
    here. value: kept here, None where paths merely part. children: by the first token of their
    edges.
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
    def tokens(self) -> Tokens:
        """Tokens of the edge, read-only."""
        return np.frombuffer(self.edge, _ID)

    @property
    def idle(self) -> bool:
        """True if nothing is kept here."""
        return self.value is None

    def below(self) -> Iterator[Node[V]]:
        """Yield this node and all under it, in the order of their depth."""
        # The number decides between nodes of equal depth, which cannot be compared.
        heap, order = [(self.depth, 0, self)], count(1)
        while heap:
            *_, node = heappop(heap)
            yield node
            for child in node.children.values():
                heappush(heap, (child.depth, next(order), child))


class Match(NamedTuple, Generic[V]):
    """Result of following a query through the tree.

    length: tokens in common. node: the last node on the way whose edge was followed to its end.
    inside: the child on whose edge the query leaves the tree, or ends; None if it does at `node`.
    """

    length: int
    node: Node[V]
    inside: Node[V] | None


class RadixTree(Generic[V]):
    """Values by sequences of token ids.

    salt: of the requests whose tokens it holds, where there is a tree for each.
    """

    __slots__ = ("root", "salt")

    def __init__(self, salt: str = "") -> None:
        self.root: Node[V] = Node(b"", None)
        self.salt = salt

    def match(self, tokens: Tokens) -> Match[V]:
        """Find the longest path with the ids of `tokens`, from their beginning."""
        node, at, size = self.root, 0, tokens.size
        while at < size:
            child = node.children.get(tokens.item(at))
            if child is None:
                break
            # Bytes of this edge alone: the rest of a long query may never be needed.
            if tokens[at : child.depth].astype(_ID, copy=False).tobytes() != child.edge:
                return Match(at + _in_common(tokens[at : child.depth], child), node, child)
            node, at = child, child.depth
        return Match(at, node, None)

    def insert(self, tokens: Tokens) -> Node[V]:
        """Return the node at the end of `tokens`, a new one if there is none."""
        length, node, inside = self.match(tokens)
        if inside is not None:
            node = self.split(inside, length - node.depth)
        return self.attach(node, tokens[length:]) if length < tokens.size else node

    @staticmethod
    def attach(node: Node[V], tokens: Tokens) -> Node[V]:
        """Return a new child of `node` for `tokens`; no other child begins with their first."""
        child: Node[V] = Node(tokens.astype(_ID, copy=False).tobytes(), node)
        node.children[tokens.item(0)] = child
        return child

    @staticmethod
    def detach(node: Node[V]) -> None:
        """Take `node`, and all under it, out of the tree."""
        if node.parent is not None:
            del node.parent.children[node.first]

    @staticmethod
    def join(nodes: Sequence[Node[V]]) -> None:
        """Let the last of `nodes`, each the only child of the one before, be all of them."""
        first, last = nodes[0], nodes[-1]
        if first.parent is not None:
            first.parent.children[first.first] = last
        last.edge, last.parent = b"".join(node.edge for node in nodes), first.parent

    @staticmethod
    def remove(node: Node[V]) -> None:
        """Forget the value of `node`, and nodes without values or branches."""
        node.value = None
        while (parent := node.parent) is not None and node.idle and not node.children:
            del parent.children[node.first]
            node = parent
        if parent is not None and node.idle and len(node.children) == 1:
            RadixTree.join([node, *node.children.values()])

    @staticmethod
    def split(node: Node[V], length: int) -> Node[V]:
        """Return a new node `length` tokens down the edge of `node`, now the child of it."""
        at, parent = length * _ID.itemsize, node.parent
        upper: Node[V] = Node(node.edge[:at], parent)
        if parent is not None:
            parent.children[node.first] = upper
        # The depth of `node` stays: it counts from the root.
        node.edge, node.parent = node.edge[at:], upper
        upper.children[node.first] = node
        return upper


def as_tokens(tokens: npt.ArrayLike | Sequence[int]) -> Tokens:
    """Return token ids as an int32 array, without a copy of an int32 array.

    Raises: ValueError for anything but a list of 32-bit integers.
    """
    if isinstance(tokens, np.ndarray) and tokens.dtype == np.int32 and tokens.ndim == 1:
        return tokens
    return as_int32s(tokens, "token ids")


def _in_common(tokens: Tokens, node: Node[V]) -> int:
    """Count the `tokens` in common with the beginning of the edge of `node`."""
    ids = node.tokens[: tokens.size]
    differ = tokens != ids
    return int(differ.argmax()) if differ.any() else ids.size
