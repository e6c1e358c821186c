"""Per-layer caches by their tokens: what is found is what was computed for exactly those."""

import array
import gzip
import json
from collections import deque
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvcache
from kvcache import ExportedError, KVCache, KVCacheError, LayerCaches, RotatingKVCache
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


def ring(backend):
    """A rotating cache that turns after four tokens."""
    return RotatingKVCache(4, backend=backend)


class Partly(KVCache):
    """A kind of cache that gives back its last three tokens and no more."""

    def can_trim(self, tokens):
        return super().can_trim(tokens) and tokens <= 3


@pytest.mark.parametrize("trace", TRACES, ids=lambda trace: str(trace["seed"]))
def test_recorded(trace):
    """As recorded, but for the differences named in docs/semantics.md."""
    trie, layers = PrefixTrie(), trace["layers"]
    for op in trace["ops"]:
        tokens = op["tokens"]
        if op["op"] == "insert":
            if tokens:
                entry = trie.insert(tokens, holding(tokens, layers, mark=op["entry"]))
                stored, mark = held(entry.caches[0])
                assert stored[: len(tokens)] == tokens
                assert entry.repeats >= op["count"]
                if stored == tokens:  # not replaced by a longer one
                    assert mark == op["stored_entry"]
            continue
        if not tokens:
            continue
        caches, remaining = trie.find_nearest(tokens)
        outcomes = op["outcomes"]
        lost = {outcome["entry"] for outcome in outcomes} == {None}
        if caches is None:
            assert lost or len(tokens) == 1
            assert remaining == tokens
            continue
        assert len(caches) == layers
        found, _ = held(caches[0])
        assert found + remaining == tokens
        if not lost:
            kept_less = outcomes[0]["type"] == "prefix"
            reused = min(outcomes[0]["offset"] + kept_less, len(tokens) - 1)
            assert len(found) == reused if kept_less else len(found) >= reused


MAKERS = {"kv": KVCache, "ring": ring, "partly": Partly}


def usable(query, tokens, kind):
    """Tokens of `query` that an entry of `tokens` can serve, of which one is left to compute."""
    length = min(len(agreed(query, tokens)), len(query) - 1)
    if length < len(tokens) and kind == "ring" and len(tokens) > 4:
        return 0  # it has turned, and goes on at its end only
    return 0 if kind == "partly" and len(tokens) - length > 3 else length


@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 2), min_size=1, max_size=10),
            st.sampled_from(["kv", "ring", "partly"]),
        ),
        max_size=12,
    ),
    st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=12), min_size=1, max_size=6),
)
def test_the_longest_there_is_and_one_token_left(stored, queries):
    """As if nothing was ever dropped: every entry that was replaced is served by another one."""
    trie, first = PrefixTrie(), {}
    for tokens, kind in stored:
        trie.insert(tokens, holding(tokens, make=MAKERS[kind]))
        first.setdefault(tuple(tokens), (tokens, kind))
    for query in [*queries, *(tokens for tokens, _ in stored)]:
        caches, rest = trie.find_nearest(query)
        best = max((usable(query, *entry) for entry in first.values()), default=0)
        assert rest == query[best:]
        assert rest
        assert (caches is None) == (best == 0)
        for layer, cache in enumerate(caches or ()):
            assert cache.offset == best
            assert held(cache)[0] == query[max(0, best - cache.len) : best]
            assert set(cache.state[0][0, 0, :, 1]) == {layer}


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), max_size=12))
def test_no_entry_is_kept_beside_a_longer_one_that_serves_as_well(stored):
    trie, whole = PrefixTrie(), {tuple(tokens) for tokens in stored}
    for tokens in stored:
        trie.insert(tokens, holding(tokens))
    longest = {a for a in whole if not any(b[: len(a)] == a and b != a for b in whole)}
    assert len(trie) == len(longest)
    assert trie.nbytes == sum(LayerCaches(holding(tokens)).nbytes for tokens in longest)
    for tokens in longest:
        trie.remove(tokens)
    assert (len(trie), trie.nbytes) == (0, 0)


def agreed(one, two):
    length = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), None)
    return one[: min(len(one), len(two))] if length is None else one[:length]


def test_what_is_found_is_a_copy():
    trie = PrefixTrie()
    trie.insert([1, 2, 3], holding([1, 2, 3]))
    for query in ([1, 2, 3], [1, 2, 3, 4], [1, 2, 5]):
        caches, _ = trie.find_nearest(query)
        for cache in caches:
            cache.update(*(np.full((1, 1, 5, 3), 9, np.float32) for _ in range(2)))
    caches, rest = trie.find_nearest(np.array([1, 2, 3, 5], np.int32))
    assert held(caches[1])[0] == [1, 2, 3]
    assert rest.tolist() == [5]


def test_an_entry_is_replaced_only_by_one_that_serves_every_prefix_of_it():
    tokens = list(range(8))
    for shorter, longer, entries in (
        (Partly, Partly, 2),  # [0, 1, 2] is served by the shorter one only
        (KVCache, Partly, 2),
        (ring, Partly, 1),  # it has turned, and serves its end only
        (Partly, KVCache, 1),
        (KVCache, ring, 2),
    ):
        trie, backwards = PrefixTrie(), PrefixTrie()
        for stop, make in ((6, shorter), (8, longer)):
            trie.insert(tokens[:stop], holding(tokens[:stop], make=make))
        for stop, make in ((8, longer), (6, shorter)):
            backwards.insert(tokens[:stop], holding(tokens[:stop], make=make))
        assert len(trie) == len(backwards) == entries


def test_the_same_request_again_leaves_its_last_token():
    trie, tokens = PrefixTrie(), [1, 2, 3, 4]
    trie.insert(tokens, holding(tokens))
    caches, rest = trie.find_nearest(tokens)
    assert (held(caches[0])[0], rest) == ([1, 2, 3], [4])
    assert trie.find_nearest([1]) == (None, [1])


def test_a_ring_that_has_turned_serves_only_what_comes_after_it():
    trie, long = PrefixTrie(), list(range(10))
    trie.insert(long, holding(long, make=ring))
    assert trie.find_nearest(long[:6]) == (None, long[:6])
    assert trie.find_nearest(long) == (None, long)
    caches, rest = trie.find_nearest([*long, 77])
    assert held(caches[0])[0] == [6, 7, 8, 9]
    assert rest == [77]
    trie.insert(long[:3], holding(long[:3], make=ring))  # not turned yet
    assert trie.find_nearest(long[:2])[1] == [1]
    assert trie.find_nearest(long)[1] == long[3:]


def test_a_prefix_in_common_with_a_neighbour_is_found_beside_rings_that_have_turned():
    trie = PrefixTrie()
    trie.insert([0, 1, 2, 3, 4, 5, 6], holding(range(7), make=ring))
    trie.insert([0, 1, 9], holding([0, 1, 9], make=ring))
    caches, rest = trie.find_nearest([0, 1, 2, 3, 4])
    assert (held(caches[0])[0], rest) == ([0, 1], [2, 3, 4])


def conversation(trie, turns, make=KVCache):
    """Turns of ten tokens each, every one stored."""
    ids = []
    for turn in range(turns):
        ids += range(10 * turn, 10 * turn + 10)
        caches = holding(ids, layers=1, make=make)
        trie.insert(ids, caches)
    return ids, LayerCaches(caches).nbytes


def test_a_conversation_is_stored_once():
    trie = PrefixTrie()
    ids, nbytes = conversation(trie, 50)
    assert (len(trie), trie.nbytes) == (1, nbytes)
    assert trie.find_nearest([*ids[:123], 7])[1] == [7], "earlier turns are served by the latest"


def test_rings_of_a_conversation_stay_within_the_budget_and_the_newest_last():
    trie = PrefixTrie()
    ids, nbytes = conversation(trie, 8, make=ring)
    assert (len(trie), trie.nbytes) == (8, 8 * nbytes)
    trie = PrefixTrie(budget=3 * nbytes + 1)
    conversation(trie, 8, make=ring)
    assert (len(trie), trie.nbytes) == (3, 3 * nbytes)
    for turns in (6, 7, 8):
        assert trie.find_nearest([*ids[: 10 * turns], 5])[1] == [5]
    assert trie.find_nearest([*ids[:50], 5])[0] is None


def test_the_least_recently_used_goes_first():
    [size] = {LayerCaches(holding([token])).nbytes for token in range(3)}
    trie = PrefixTrie(budget=2 * size)
    trie.insert([1], holding([1]))
    trie.insert([2], holding([2]))
    assert trie.find_nearest([1, 5])[1] == [5]
    trie.insert([3], holding([3]))
    assert [trie.find_nearest([token, 5])[0] is None for token in (1, 2, 3)] == [False, True, False]
    trie.insert([1], holding([1]))  # present, and a use of it
    trie.insert([4], holding([4]))
    assert [trie.find_nearest([token, 5])[0] is None for token in (1, 3, 4)] == [False, True, False]
    assert (len(trie), trie.nbytes) == (2, 2 * size)


def test_an_entry_larger_than_the_budget_drops_nothing():
    size = LayerCaches(holding([1])).nbytes
    trie = PrefixTrie(budget=size)
    trie.insert([1], holding([1]))
    trie.insert([1, 2], holding([1, 2], layers=3))
    assert (len(trie), trie.nbytes) == (1, size)
    assert trie.find_nearest([1, 2])[1] == [2]
    assert trie.find_nearest([1, 2, 3])[1] == [2, 3]
    none = PrefixTrie(budget=0)
    none.insert([1], holding([1]))
    assert (len(none), none.nbytes, none.find_nearest([1, 2])) == (0, 0, (None, [1, 2]))


def test_no_budget_is_no_limit():
    assert conversation(PrefixTrie(budget=None), 3)


def test_insertion_of_what_is_present():
    trie = PrefixTrie()
    first = trie.insert([1, 2, 3], holding([1, 2, 3], mark=1))
    again = trie.insert([1, 2, 3], holding([1, 2, 3], mark=2))
    shorter = trie.insert([1, 2], holding([1, 2], mark=3))
    assert again.caches is shorter.caches is first.caches
    assert [entry.repeats for entry in (first, again, shorter)] == [0, 1, 2]
    assert len(trie) == 1


def test_a_buffer_that_the_caller_fills_again_changes_nothing():
    trie, buffer = PrefixTrie(), np.array([1, 2, 3], np.int32)
    trie.insert(buffer, holding([1, 2, 3]))
    buffer[:] = [1, 2, 9]
    caches, rest = trie.find_nearest(buffer)
    buffer[:] = 7
    assert (held(caches[0])[0], rest.tolist()) == ([1, 2], [9])
    assert trie.find_nearest([1, 2, 3, 4])[1] == [4]
    rest[:] = 8
    assert buffer.tolist() == [7, 7, 7]


@pytest.mark.parametrize("form", [list, tuple, deque, array.array, np.array])
def test_the_rest_comes_in_the_form_of_the_query(form):
    query = form("i", [1, 2, 5, 6]) if form is array.array else form([1, 2, 5, 6])
    trie = PrefixTrie()
    trie.insert([1, 2, 3], holding([1, 2, 3]))
    rest = trie.find_nearest(query)[1]
    assert list(rest) == [5, 6]
    assert isinstance(rest, type(query) if form is not deque else np.ndarray)


def test_caches_that_went_on_after_they_were_stored_are_noticed():
    trie, caches = PrefixTrie(), holding([1, 2])
    trie.insert([1, 2], caches)
    for cache in caches:
        cache.update(*(np.ones((1, 1, 1, 3), np.float32),) * 2)
    with pytest.raises(KVCacheError, match=r"had 2 tokens then; got .*offset=3.*Remove the entry"):
        trie.find_nearest([1, 2, 3])
    trie.remove([1, 2])
    assert trie.find_nearest([1, 2, 3])[0] is None


def test_caches_that_a_program_has_are_not_stored():
    trie, caches = PrefixTrie(), holding([1, 2], layers=1)
    caches[0].export_state(8)
    with pytest.raises(ExportedError):
        trie.insert([1, 2], caches)
    assert len(trie) == 0


def test_remove():
    trie = PrefixTrie()
    for tokens in ([1, 2, 3], [1, 2, 4], [1, 2]):
        trie.insert(tokens, holding(tokens))
    assert len(trie) == 2, "[1, 2] is served by the others"
    trie.remove([1, 2, 4])
    assert trie.find_nearest([1, 2, 4])[1] == [4]
    for absent in ([1, 2], [1, 2, 4], [1, 2, 3, 4], [9], []):
        with pytest.raises(KeyError, match=f"nothing is stored for these {len(absent)} tokens"):
            trie.remove(absent)
    assert len(trie) == 1


@pytest.mark.parametrize(
    ("tokens", "caches", "message"),
    [
        ([], [], "at least one token; got 0 tokens"),
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
    caches, _ = trie.find_nearest([5, 6])
    assert kvcache.backend_of(caches[0].state[0]).name == "torch"
