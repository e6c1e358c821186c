"""Per-layer caches, found by the tokens they hold."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from heapq import merge
from typing import Any, NamedTuple, TypeVar

import numpy as np

from kvcache._checks import as_budget
from kvcache._interrupts import uninterrupted
from kvcache.errors import KVCacheError
from kvcache.layers.base import LayerCache
from kvcache.layers.stack import LayerCaches

from .arguments import as_layers
from .media import check_token_ids
from .radix import Match, Node, RadixTree, Tokens, as_tokens

Query = TypeVar("Query", bound=Sequence[int])


class Entry(NamedTuple):
    """Caches stored for a sequence of tokens.

    caches: one per layer, owned by the trie. repeats: later insertions that they serve as well, of
    the same tokens or of a beginning of them.
    """

    caches: LayerCaches[LayerCache]
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
    turned serves only requests that go on where its tokens end, and recurrent layers only those
    that go on behind a state that they kept. So an entry that can be trimmed replaces those of
    earlier turns of its conversation, and another one is stored beside them.

    budget: bytes of all entries at most, None for no limit. The least recently used go first, and
        a larger entry is not stored.
    """

    def __init__(self, *, budget: int | None = 1 << 30) -> None:
        self._budget = as_budget(budget, "bytes")
        self._tree: RadixTree[Entry] = RadixTree()
        # Bytes by the node of each entry, the least recently used first.
        self._sizes: OrderedDict[Node[Entry], int] = OrderedDict()
        self._nbytes = 0

    def __len__(self) -> int:
        return len(self._sizes)

    @property
    def nbytes(self) -> int:
        """Bytes of all entries when they were inserted, spare capacity of their caches included."""
        return self._nbytes

    def insert(self, tokens: Sequence[int] | Tokens, caches: Iterable[LayerCache]) -> Entry:
        """Store `caches`, one per layer, each with exactly `tokens`. The trie takes ownership.

        Return the entry that serves these tokens: the one that did already, where there is one,
        with the caches that were inserted first.

        Raises: ValueError for no tokens, no caches, or caches with another number of tokens;
            TypeError for caches of another kind; ExportedError while a program has one. The trie
            is unchanged then.
        """
        ids, layers = _token_ids(tokens), _layer_caches(caches)
        offsets = sorted({cache.offset for cache in layers})
        if offsets != [ids.size]:
            raise ValueError(
                "an entry is at least one token, and caches that hold exactly that many; "
                f"got {ids.size} tokens and {len(layers)} caches at {offsets}."
            )
        match = self._tree.match(ids)
        present = _serving(match, layers, ids.size)
        with uninterrupted():
            if present is None:
                return self._stored(ids, Entry(layers), _replaced(match, layers, ids.size))
            node, entry = present
            self._sizes.move_to_end(node)
            node.value = entry._replace(repeats=entry.repeats + 1)
            return node.value

    def find_nearest(self, tokens: Query) -> tuple[LayerCaches[Any] | None, Query]:
        """Return copies of the caches with the longest prefix of `tokens`, and the other tokens.

        At least one token is left to compute, also where all of them are stored. (None, tokens) if
        nothing of use is stored. `tokens` is a list or, faster, an int32 array; the other tokens
        are a copy of its end.

        Raises: ValueError for no tokens, KVCacheError if the caches found were changed after
            :meth:`insert`.
        """
        ids = _token_ids(tokens)
        nearest = _nearest(self._tree.match(ids[:-1]))
        if nearest is None:
            return None, _rest(tokens, ids, 0)
        node, entry, length = nearest
        copies, rest = _copied(entry.caches, node.depth, length), _rest(tokens, ids, length)
        self._sizes.move_to_end(node)
        return copies, rest

    def remove(self, tokens: Sequence[int] | Tokens) -> None:
        """Remove the entry of exactly these tokens.

        Raises: KeyError if there is none: never inserted, removed, replaced by a longer one, or
            over budget.
        """
        ids = as_tokens(tokens)
        length, node, inside = self._tree.match(ids)
        if inside is not None or length < ids.size or node.value is None:
            raise KeyError(
                f"nothing is stored for these {ids.size} tokens: never inserted, removed, replaced "
                "by a longer entry, or over budget."
            )
        with uninterrupted():
            self._drop(node)

    def _stored(self, ids: Tokens, entry: Entry, replaced: list[Node[Entry]]) -> Entry:
        """Store a new entry, drop those `replaced` and what exceeds the budget; return it."""
        size = entry.caches.nbytes
        if self._budget is not None and size > self._budget:
            return entry  # else all others would be dropped in vain
        node = self._tree.insert(ids)
        self._sizes[node] = size
        node.value = entry
        self._nbytes += size
        for shorter in replaced:
            self._drop(shorter)
        while self._budget is not None and self._nbytes > self._budget:
            self._drop(next(iter(self._sizes)))
        return entry

    def _drop(self, node: Node[Entry]) -> None:
        self._nbytes -= self._sizes.pop(node)
        self._tree.remove(node)


def _serving(
    match: Match[Entry], caches: LayerCaches[LayerCache], tokens: int
) -> tuple[Node[Entry], Entry] | None:
    """Return the node of an entry that serves all that `caches` of so many tokens would."""
    if match.length < tokens:
        return None
    if match.inside is None and match.node.value is not None:
        return match.node, match.node.value
    for node, entry in _entries((match.inside or match.node).below()):
        if _covers(entry.caches, node.depth, caches, tokens):
            return node, entry
    return None


def _replaced(
    match: Match[Entry], caches: LayerCaches[LayerCache], tokens: int
) -> list[Node[Entry]]:
    """Return the nodes of shorter entries of no use beside `caches`, of so many tokens."""
    return [
        node
        for node, entry in _entries(_upwards(match.node))
        if _covers(caches, tokens, entry.caches, node.depth)
    ]


def _nearest(match: Match[Entry]) -> tuple[Node[Entry], Entry, int] | None:
    """Return the entry of most use to a query, its node, and how many of its tokens to use."""
    searched: Node[Entry] | None = None
    best: tuple[Node[Entry], Entry, int] | None = None
    reached = 0
    for top, length in _levels(match):
        if reached >= length:
            break
        # The others were asked for a longer prefix already, and so for this one.
        for node, entry in _entries(_below(top, searched)):
            position = entry.caches.last_trimmable(length)
            if position > reached:
                best, reached = (node, entry, position), position
            if reached == length:
                return best
        searched = top
    return best


def _token_ids(tokens: Sequence[int] | Tokens) -> Tokens:
    """Return token ids as int32. Raises: ValueError for none, negative ones, or anything else."""
    ids = as_tokens(tokens)
    if not ids.size:
        raise ValueError("a query and an entry are at least one token; got 0 tokens.")
    check_token_ids(ids, {})
    return ids


def _layer_caches(caches: Iterable[LayerCache]) -> LayerCaches[LayerCache]:
    """Return `caches` as one object. Raises: TypeError, ExportedError."""
    layers = as_layers(
        caches, "an entry is a list of per-layer caches (a PrefixCache stores those of pools)"
    )
    for cache in layers:
        cache.check_not_exported()
    return LayerCaches(layers)


def _rest(tokens: Query, ids: Tokens, length: int) -> Query:
    """Return a copy of `tokens` from `length` on: a slice if they have any, else of their ids."""
    try:
        rest: Sequence[int] | Tokens = tokens[length:]
    except TypeError:  # a deque, say
        rest = ids[length:]
    return rest.copy() if isinstance(rest, np.ndarray) else rest  # type: ignore[return-value]


def _copied(caches: LayerCaches[LayerCache], held: int, length: int) -> LayerCaches[LayerCache]:
    """Return copies of `caches`, stored with `held` tokens, trimmed to `length` tokens."""
    if {cache.offset for cache in caches} != {held}:
        raise KVCacheError(
            f"caches belong to the trie after insert, and these had {held} tokens then; got "
            f"{caches}. Remove the entry, and insert caches.copy() where you go on with caches."
        )
    # Copies first: trimming takes tokens from the caches themselves.
    copies = caches.copy()
    copies.trim(held - length)
    return copies


def _covers(
    longer: LayerCaches[LayerCache], tokens: int, shorter: LayerCaches[LayerCache], fewer: int
) -> bool:
    """Return True if `longer`, of so many tokens, serves whatever `shorter` of `fewer` does."""
    # Caches that can be trimmed by some tokens can be trimmed by fewer. So caches that cannot by a
    # single token serve their end only, and those that can to a single token serve everything.
    least = 1 if shorter.can_trim(1) else fewer
    return longer.can_trim(tokens - least)


def _entries(nodes: Iterable[Node[Entry]]) -> Iterator[tuple[Node[Entry], Entry]]:
    return ((node, node.value) for node in nodes if node.value is not None)


def _upwards(node: Node[Entry] | None) -> Iterator[Node[Entry]]:
    """Yield `node` and those above it, up to the root."""
    while node is not None:
        yield node
        node = node.parent


def _below(top: Node[Entry], searched: Node[Entry] | None) -> Iterator[Node[Entry]]:
    """Yield `top` and all under it but `searched`, in the order of their depth."""
    yield top
    others = (child.below() for child in top.children.values() if child is not searched)
    yield from merge(*others, key=lambda node: node.depth)


def _levels(match: Match[Entry]) -> Iterator[tuple[Node[Entry], int]]:
    """Yield the nodes on the way of a query, deepest first, with its tokens in common with them."""
    if match.inside is not None:
        yield match.inside, match.length
    for node in _upwards(match.node):
        if node.depth:  # the root has no tokens
            yield node, node.depth
