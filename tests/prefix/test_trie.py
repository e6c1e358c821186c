"""Per-layer caches by their tokens: what is found is what was computed for exactly those."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvcache
from kvcache import KVCache, RotatingKVCache
from kvcache.prefix import PrefixTrie

DATA = Path(__file__).parents[1] / "data" / "mlxrunner_trie.json.gz"
TRACES = json.loads(gzip.decompress(DATA.read_bytes()))


def holding(tokens, layers=2, make=KVCache, mark=0):
    """Caches whose key at each position names its token, the layer and who made them."""
    caches = [make(backend="numpy") for _ in range(layers)]
    for layer, cache in enumerate(caches):
        if len(tokens):
            keys = [[[[token, layer, mark] for token in tokens]]]
            cache.update(*(np.array(keys, np.float32) for _ in range(2)))
    return caches


def held(cache):
    """Tokens that a cache holds, in order of their positions, and its mark."""
    keys, _ = cache.state
    order = np.argsort(cache.positions[: keys.shape[2]])
    return keys[0, 0, order, 0].astype(int).tolist(), int(keys[0, 0, 0, 2])


@pytest.mark.parametrize("trace", TRACES, ids=lambda trace: str(trace["seed"]))
def test_recorded(trace):
    """As recorded, less the losses of the original: see docs/semantics.md."""
    trie, layers = PrefixTrie(), trace["layers"]
    for op in trace["ops"]:
        tokens = op["tokens"]
        if op["op"] == "insert":
            if tokens:
                entry = trie.insert(tokens, holding(tokens, layers, mark=op["entry"]))
                assert held(entry.caches[0])[1] == op["stored_entry"]
                assert entry.repeats == op["count"]
            continue
        caches, remaining = trie.find_nearest(tokens)
        outcomes = op["outcomes"]
        kind = outcomes[0]["type"]
        lost = {outcome["entry"] for outcome in outcomes} == {None}
        if caches is None:
            assert lost
            assert remaining == tokens
            continue
        assert len(caches) == layers
        found, entry = held(caches[0])
        assert found + remaining == tokens
        if not lost:
            if kind == "prefix":  # it kept one token less
                assert len(found) == outcomes[0]["offset"] + 1
            else:
                assert len(found) >= outcomes[0]["offset"]
            if len(found) == outcomes[0]["offset"] + (kind == "prefix"):
                assert entry in {outcome["entry"] for outcome in outcomes}


@given(
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=10), max_size=12),
    st.lists(st.lists(st.integers(0, 2), max_size=12), min_size=1, max_size=6),
)
def test_the_longest_there_is(stored, queries):
    trie = PrefixTrie()
    for tokens in stored:
        trie.insert(tokens, holding(tokens))
    assert len(trie) == len({tuple(tokens) for tokens in stored})
    for query in queries:
        caches, rest = trie.find_nearest(query)
        best = max((len(agreed(query, tokens)) for tokens in stored), default=0)
        assert len(query) - len(rest) == best
        assert (caches is None) == (best == 0)
        for layer, cache in enumerate(caches or ()):
            assert held(cache)[0] == query[:best]
            assert set(cache.state[0][0, 0, :, 1]) == {layer}


def agreed(one, two):
    length = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), None)
    return one[: min(len(one), len(two))] if length is None else one[:length]


def test_what_is_found_is_a_copy():
    trie = PrefixTrie()
    trie.insert([1, 2, 3], holding([1, 2, 3]))
    for query in ([1, 2, 3], [1, 2, 3, 4], [1, 2]):
        caches, _ = trie.find_nearest(query)
        for cache in caches:
            cache.update(*(np.full((1, 1, 5, 3), 9, np.float32) for _ in range(2)))
    caches, rest = trie.find_nearest(np.array([1, 2, 3, 5], np.int32))
    assert held(caches[1])[0] == [1, 2, 3]
    assert rest.tolist() == [5]


def test_a_ring_that_has_turned_serves_only_what_comes_after_it():
    def ring(backend):
        return RotatingKVCache(4, backend=backend)

    trie, long = PrefixTrie(), list(range(10))
    trie.insert(long, holding(long, make=ring))
    assert trie.find_nearest(long[:6]) == (None, long[:6])
    caches, rest = trie.find_nearest([*long, 77])
    assert held(caches[0])[0] == [6, 7, 8, 9]
    assert rest == [77]
    trie.insert(long[:3], holding(long[:3], make=ring))  # not turned yet
    assert trie.find_nearest(long[:2])[1] == []
    assert trie.find_nearest(long[:6])[1] == long[3:6]


def test_remove():
    trie = PrefixTrie()
    for tokens in ([1, 2, 3], [1, 2, 4], [1, 2]):
        trie.insert(tokens, holding(tokens))
    trie.remove([1, 2])
    assert len(trie) == 2
    trie.remove([1, 2, 4])
    assert trie.find_nearest([1, 2, 4])[1] == [4]
    for absent in ([1, 2], [1, 2, 4], [1, 2, 3, 4], [9]):
        with pytest.raises(KeyError, match=f"nothing is stored for these {len(absent)} tokens"):
            trie.remove(absent)


@pytest.mark.parametrize(
    ("tokens", "caches", "message"),
    [
        ([], [], r"got 0 tokens and 0 caches at \[\]"),
        ([1, 2], [], r"got 2 tokens and 0 caches at \[\]"),
        ([1, 2], holding([1]), r"got 2 tokens and 2 caches at \[1\]"),
        ([1, 2], [*holding([1, 2]), *holding([1])], r"got 2 tokens and 4 caches at \[1, 2\]"),
    ],
)
def test_caches_hold_exactly_the_tokens(tokens, caches, message):
    trie = PrefixTrie()
    with pytest.raises(ValueError, match=message):
        trie.insert(tokens, caches)
    assert len(trie) == 0
    assert trie.find_nearest([1, 2]) == (None, [1, 2])


@pytest.mark.one_backend(name="torch")
def test_between_backends():
    """An entry is found on the backend that it was stored on; load moves caches to another."""
    torch = pytest.importorskip("torch", reason="needs pip install 'kvcache[torch]'")
    cache = KVCache()
    cache.update(torch.ones(1, 1, 2, 3), torch.ones(1, 1, 2, 3))
    trie = PrefixTrie()
    trie.insert([5, 6], [cache])
    caches, _ = trie.find_nearest([5])
    assert kvcache.backend_of(caches[0].state[0]).name == "torch"
