"""Per-layer caches, by the tokens that they hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias, TypeVar

from kvcache.layers.growing import KVCache
from kvcache.layers.stack import LayerCaches

from .radix import Match, Node, RadixTree, as_tokens

Layers: TypeAlias = list[KVCache]
Query = TypeVar("Query", bound=Sequence[int])


class Entry(NamedTuple):
    """What is stored for a sequence of tokens. repeats: how often it was inserted again."""

    caches: tuple[KVCache, ...]
    repeats: int = 0


class PrefixTrie:
    """Finds the caches that hold the longest beginning of a request.

    ::

        caches, rest = trie.find_nearest(tokens)
        caches = caches or make_caches()
        ...                                     # the model is given `rest`, and generates
        trie.insert(tokens + generated, caches)

    What :meth:`find_nearest` returns are copies: going on with them changes nothing that is
    stored. A stored entry serves every prefix of it, if its caches can be trimmed; a rotating cache
    that has turned serves what comes after it.
    """

    def __init__(self) -> None:
        self._tree: RadixTree[Entry] = RadixTree()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def insert(self, tokens: Sequence[int], caches: Sequence[KVCache]) -> Entry:
        """Store `caches`, one per layer, that hold exactly `tokens`. They are the trie's then.

        Returns what is stored: the first that came for these tokens.

        Raises: ValueError for no tokens, no caches, or caches that hold another number of tokens.
        """
        ids, layers = as_tokens(tokens), tuple(caches)
        offsets = sorted({cache.offset for cache in layers})
        if not ids.size or offsets != [ids.size]:
            raise ValueError(
                "an entry is at least one token, and caches that hold exactly that many; "
                f"got {ids.size} tokens and {len(layers)} caches at {offsets}."
            )
        node = self._tree.insert(ids)
        if node.value is None:
            node.value = Entry(layers)
            self._count += 1
        else:
            node.value = node.value._replace(repeats=node.value.repeats + 1)
        return node.value

    def find_nearest(self, tokens: Query) -> tuple[Layers | None, Query]:
        """Copies of the caches that hold the most of the beginning of `tokens`, and the rest.

        (None, tokens) where there are none. `tokens` is a list or, faster, an int32 array.
        """
        match = self._tree.match(as_tokens(tokens))
        caches = self._longer(match) or self._shorter(match.node)
        held = caches[0].offset if caches else 0
        return caches, tokens[held:]  # type: ignore[return-value]

    def remove(self, tokens: Sequence[int]) -> None:
        """Forget what is stored for exactly these tokens.

        Raises: KeyError if nothing is.
        """
        ids = as_tokens(tokens)
        length, node, inside = self._tree.match(ids)
        if inside is not None or length < ids.size or node.value is None:
            raise KeyError(f"nothing is stored for these {ids.size} tokens.")
        self._tree.remove(node)
        self._count -= 1

    def _longer(self, match: Match[Entry]) -> Layers | None:
        """From the shortest entry that goes on beyond what is asked for, cut back to it."""
        length, node, inside = match
        if not length or (node.value is not None and inside is None):
            return None
        for entry in _entries(inside or node):
            surplus = entry.caches[0].offset - length
            if all(cache.can_trim(surplus) for cache in entry.caches):
                copies = [cache.copy() for cache in entry.caches]
                LayerCaches(copies).trim(surplus)
                return copies
        return None

    @staticmethod
    def _shorter(node: Node[Entry] | None) -> Layers | None:
        """From the longest entry that is a prefix of what is asked for."""
        while node is not None:
            if node.value is not None:
                return [cache.copy() for cache in node.value.caches]
            node = node.parent
        return None


def _entries(top: Node[Entry]) -> Iterator[Entry]:
    for node in top.below():
        if node.value is not None:
            yield node.value
