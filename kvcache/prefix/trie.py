"""Per-layer caches, found by the tokens they hold."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

from kvcache.layers.growing import KVCache
from kvcache.layers.stack import LayerCaches

from .radix import Match, Node, RadixTree, as_tokens

Query = TypeVar("Query", bound=Sequence[int])


class Entry(NamedTuple):
    """Caches stored for a sequence of tokens.

    caches: one per layer, owned by the trie. repeats: later insertions of the same tokens.
    """

    caches: LayerCaches[KVCache]
    repeats: int = 0


class PrefixTrie:
    """Per-layer caches by their tokens; a request gets a copy of the best for its beginning.

    ::

        caches, rest = trie.find_nearest(tokens)
        caches = caches or make_caches()
        ...                                     # the model is given `rest`, and generates
        trie.insert(tokens + generated, caches)

    :meth:`find_nearest` returns copies: going on with them changes nothing in the trie. An entry
    serves every prefix of its tokens if its caches can be trimmed; a rotating cache that has
    turned serves only requests that go on where its tokens end.
    """

    def __init__(self) -> None:
        self._tree: RadixTree[Entry] = RadixTree()
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def insert(self, tokens: Sequence[int], caches: Sequence[KVCache]) -> Entry:
        """Store `caches`, one per layer, each with exactly `tokens`. The trie takes ownership.

        Returns the entry of these tokens: with the caches that were inserted first.

        Raises: ValueError for no tokens, no caches, or caches with another number of tokens.
        """
        ids, layers = as_tokens(tokens), LayerCaches(caches)
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

    def find_nearest(self, tokens: Query) -> tuple[LayerCaches[KVCache] | None, Query]:
        """Return copies of the caches with the longest prefix of `tokens`, and the other tokens.

        (None, tokens) if there are none. `tokens` is a list or, faster, an int32 array.
        """
        match = self._tree.match(as_tokens(tokens))
        caches = self._from_longer(match) or self._from_shorter(match.node)
        held = caches[0].offset if caches else 0
        return caches, tokens[held:]  # type: ignore[return-value]

    def remove(self, tokens: Sequence[int]) -> None:
        """Remove the entry of exactly these tokens.

        Raises: KeyError if there is none.
        """
        ids = as_tokens(tokens)
        length, node, inside = self._tree.match(ids)
        if inside is not None or length < ids.size or node.value is None:
            raise KeyError(f"nothing is stored for these {ids.size} tokens.")
        self._tree.remove(node)
        self._count -= 1

    def _from_longer(self, match: Match[Entry]) -> LayerCaches[KVCache] | None:
        """Return copies of the shortest entry beyond the match, trimmed to it.

        None if no entry can be trimmed so far, or one ends exactly there.
        """
        length, node, inside = match
        # An entry that ends exactly there needs no trimming: _from_shorter returns it.
        if not length or (node.value is not None and inside is None):
            return None
        for entry in _entries(inside or node):
            surplus = entry.caches[0].offset - length
            if entry.caches.can_trim(surplus):
                # Copies first: trimming takes tokens from the caches themselves.
                copies = entry.caches.copy()
                copies.trim(surplus)
                return copies
        return None

    @staticmethod
    def _from_shorter(node: Node[Entry] | None) -> LayerCaches[KVCache] | None:
        """Return copies of the longest entry at or above `node`, None if there is none."""
        while node is not None:
            if node.value is not None:
                return node.value.caches.copy()
            node = node.parent
        return None


def _entries(top: Node[Entry]) -> Iterator[Entry]:
    for node in top.below():
        if node.value is not None:
            yield node.value
