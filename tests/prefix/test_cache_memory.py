"""What a prefix cache takes besides what it stores: bounded, and told in its statistics."""

import gc
import json
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
from hypothesis import settings

import kvcache
from kvcache import Batch, CausalCache, RotatingKVCache
from kvcache.prefix import PrefixCache, kept
from kvcache.prefix.known_keys import KnownKeys
from kvcache.prefix.media import MediaIds
from kvcache.prefix.policies import POLICIES
from kvcache.stores import Deleted, Miss, Store, Stored, Usage

NUMPY = kvcache.get_backend("numpy")
TOKENS = 40
THOROUGH = settings.get_current_profile_name() == "thorough"


class Sink(Store):
    """Takes all pages, and remembers none of them."""

    def _get(self, keys, deadline):
        return [Miss()] * len(keys)

    def _put(self, items, deadline):
        return [Stored()] * len(items)

    def _contains(self, keys, deadline):
        return [Miss()] * len(keys)

    def _delete(self, keys, deadline):
        return [Deleted()] * len(keys)

    def _entries(self, deadline):
        yield from ()

    def _usage(self, deadline):
        return Usage(0, 0)


class Service:
    """A pool of one sequence, where a request computes its tokens in one pass."""

    def __init__(self, capacity=512, **options):
        self.cache = CausalCache()
        self.cache.init("numpy", max_sequences=2, capacity=capacity, max_batch=capacity)
        self.now = 0.0
        self.prefix = PrefixCache(self.cache, clock=lambda: self.now, **options)

    def ask(self, ids, **options):
        self.now += 1.0
        with self.prefix.session(ids, **options) as session:
            positions = np.arange(session.matched, len(ids))
            self.cache.start_forward(Batch(positions, np.full(positions.size, session.sequence)))
            self.cache.set_layer(0)
            self.cache.put(np.zeros((1, positions.size, 2), np.float32))
        return session.matched

    def give_up(self, ids, **options):
        """A request that stores nothing; returns what it found."""
        session = self.prefix.session(ids, **options)
        session.__exit__(KeyError, None, None)
        return session.matched

    def strangers(self, start, stop):
        """Requests with nothing in common, of a tenant and with an image each."""
        for number in range(start, stop):
            ids = np.random.default_rng(number).integers(0, 30_000, TOKENS).astype(np.int32)
            image = {(4, 12): f"image {number}"}
            assert self.ask(ids, salt=f"tenant {number}", media=image) == 0


def measure(sessions, samples, block_size=None, page_tokens=None, **options):
    """Memory that Python's allocator gave to a prefix cache, and what its statistics tell.

    block_size: of the events of a subscriber, None without one. page_tokens: of a store, the same.
    """
    if page_tokens is not None:
        options |= {"store": Sink(), "namespace": "m", "page_tokens": page_tokens}
    tracemalloc.start()
    service, held, told = Service(**options), [], []
    if block_size is not None:
        service.prefix.events.block_size = block_size
        service.prefix.events.subscribe(lambda event: None)
    service.strangers(10**6, 10**6 + 50)  # the pool makes its buffers, and NumPy its reserves
    service.prefix.flush()
    gc.collect()
    pool = tracemalloc.get_traced_memory()[0] - service.prefix.stats.index_nbytes
    for sample in range(samples):
        service.strangers(sample * sessions, (sample + 1) * sessions)
        service.prefix.flush()
        gc.collect()
        held.append(tracemalloc.get_traced_memory()[0] - pool)
        told.append(service.prefix.stats.index_nbytes)
    return held, told, service.prefix.stats.index_budget


def check_told(sessions, samples, **options):
    """Memory is flat after the bound, and the statistics tell it within 5 %.

    In a process of its own: whatever else runs in that of the tests has memory, too.
    """
    arguments = json.dumps([sessions, samples, options])
    done = subprocess.run([sys.executable, __file__, arguments], capture_output=True, check=False)
    assert not done.returncode, done.stderr.decode()
    held, told, budget = json.loads(done.stdout)
    assert told == pytest.approx(held, rel=0.05)
    assert max(held) < 1.05 * min(held)
    assert 0.9 * budget < told[-1] <= budget


@pytest.mark.slow
@pytest.mark.parametrize(("name", "budget"), [("lru", 0), *((name, 8_000) for name in POLICIES)])
def test_tenants_and_images_that_never_come_back(name, budget):
    check_told(700, 2, budget=budget, index_budget=1_000_000, policy=name)


@pytest.mark.slow
@pytest.mark.parametrize("block_size", [16, 1])
def test_a_subscriber_to_events(block_size):
    check_told(700, 2, budget=8_000, index_budget=1_000_000, block_size=block_size)


@pytest.mark.slow
def test_keys_known_of_a_store():
    check_told(700, 2, budget=8_000, index_budget=1_000_000, page_tokens=16)


@pytest.mark.slow
@pytest.mark.skipif(
    not THOROUGH, reason="takes minutes: HYPOTHESIS_PROFILE=thorough, -o faulthandler_timeout=0"
)
def test_two_hundred_thousand_tenants_and_images():
    check_told(40_000, 5, budget=8_000, index_budget=4 << 20)


def test_nothing_is_left_of_tenants_and_images_that_are_forgotten():
    service = Service(budget=0, index_budget=0)
    before = service.prefix.stats.index_nbytes
    service.strangers(0, 50)
    assert not service.prefix._trees
    assert not service.prefix._media_ids._media
    assert service.prefix.stats.index_nbytes < before + 2_000
    service = Service()
    service.strangers(0, 50)
    assert len(service.prefix._trees) == len(service.prefix._media_ids._media) == 50
    with service.prefix.session([1, 2, 3], salt="tenant 3", media={(0, 1): "image 4"}) as session:
        service.prefix.clear()
        assert session.matched == 0
        assert not service.prefix._trees
        assert len(service.prefix._media_ids._media) == 1
    service.prefix.clear()
    assert not service.prefix._media_ids._media


def test_a_tree_that_has_gone_while_a_session_was_open_is_made_again():
    service = Service()
    ids = list(range(TOKENS))
    service.ask(ids, salt="me")
    session = service.prefix.session([7, 7], salt="me")  # finds nothing, so it pins nothing
    service.prefix.clear()
    assert not service.prefix._trees
    service.cache.start_forward(Batch([0, 1], [session.sequence] * 2))
    service.cache.set_layer(0)
    service.cache.put(np.zeros((1, 2, 2), np.float32))
    session.__exit__(None, None, None)
    assert service.give_up([7, 7, 7], salt="me") == 2
    service.prefix.clear()
    assert service.prefix.stats.spans == 0


def test_a_request_that_stores_nothing_makes_no_tree():
    service = Service()
    for number in range(20):
        assert service.give_up([1, 2, 3], salt=str(number), media={(0, 2): str(number)}) == 0
    assert not service.prefix._trees
    assert not service.prefix._media_ids._media


@pytest.mark.parametrize(("budget", "wanted"), [(0, 1 << 26), (1 << 34, 1 << 30), (None, None)])
def test_the_bound_follows_the_budget(budget, wanted):
    assert Service(budget=budget).prefix.stats.index_budget == wanted
    assert Service(budget=budget, index_budget=5).prefix.stats.index_budget == 5


EVICTING = {
    "quota": ({"quota": 30 * TOKENS}, lambda service, ids: None),
    "trim": ({}, lambda service, ids: service.prefix.trim(30 * TOKENS)),
    "drop_branch": ({}, lambda service, ids: service.prefix.drop_branch(ids, 0)),
}


@pytest.mark.parametrize("evicting", EVICTING)
def test_evicted_spans_are_forgotten_without_a_budget(evicting, monkeypatch):
    monkeypatch.setattr(kept, "_MIN_INDEX_BUDGET", 100_000)
    options, evict = EVICTING[evicting]
    service = Service(budget=None, **options)
    for number in range(300):
        ids = np.random.default_rng(number).integers(0, 30_000, TOKENS).astype(np.int32)
        service.ask(ids)
        evict(service, ids)
    assert service.prefix.stats.index_nbytes <= 100_000
    assert service.prefix._index._ghosts
    assert service.prefix.stats.index_budget is None


def test_what_is_stored_without_a_budget_stays(monkeypatch):
    monkeypatch.setattr(kept, "_MIN_INDEX_BUDGET", 20_000)
    service = Service(budget=None)
    service.strangers(0, 100)
    service.prefix.trim(service.prefix.stats.nbytes // 2)
    service.strangers(100, 101)
    stats = service.prefix.stats
    assert (stats.spans, stats.evictions) == (51, 50)
    assert stats.index_nbytes > 20_000
    assert not service.prefix._index._ghosts
    limited = Service(budget=None, index_budget=20_000)
    limited.strangers(0, 100)
    assert limited.prefix.stats.index_nbytes <= 20_000
    assert 0 < limited.prefix.stats.spans < 20


def test_a_bound_that_is_none():
    with pytest.raises(ValueError, match=r"a budget is bytes >= 0.*; got -1"):
        Service(index_budget=-1)
    with pytest.raises(TypeError):
        Service(index_budget="much")


def test_long_evicted_prompts_are_forgotten_by_their_bytes():
    service = Service(capacity=4_096, budget=0, index_budget=100_000)
    for first in range(40):
        service.ask(np.full(4_000, first, np.int32))
        assert service.prefix.stats.index_nbytes <= 100_000
    [tree] = service.prefix._trees.values()
    assert sorted(tree.root.children) == [35, 36, 37, 38, 39]


@pytest.mark.parametrize("name", POLICIES)
def test_clear_leaves_policies_nothing(name):
    service = Service(policy=name, budget=1 << 20)
    sizes = []
    for _ in range(4):
        for first in range(200):
            service.ask([first, *range(9)])
        service.prefix.clear()
        sizes.append(service.prefix._index.policy.nbytes)
    assert max(sizes) == sizes[0] < 40_000


# Hashes of blocks, for subscribers.


def test_spans_do_not_go_for_hashes():
    kept = []
    for heard in (False, True):
        service = Service(index_budget=200_000)
        if heard:
            service.prefix.events.block_size = 1
            service.prefix.events.subscribe(lambda event: None)
        service.strangers(0, 200)
        kept.append(service.prefix.stats.spans)
    assert kept[0] > kept[1] > 0.8 * kept[0]


# Keys known of a store.


def test_keys_are_known_within_a_limit_the_newest_of_them():
    keys, names = KnownKeys(10_000), [bytes([number]) * 32 for number in range(200)]
    for name in names:
        keys.add(name)
        assert keys.nbytes <= 10_000
    known = [name for name in names if name in keys]
    assert known == names[-len(known) :]
    assert len(known) >= 40
    keys.discard([names[-1], b"other"])
    assert [name for name in names if name in keys] == known[:-1]
    keys.clear()
    assert keys.nbytes == KnownKeys(0).nbytes
    keys.add(names[0])
    assert names[0] in keys


def test_keys_are_told_and_go_with_the_store():
    service = Service(store=Sink(), namespace="m", page_tokens=4, index_budget=4_000_000)
    service.strangers(0, 50)
    assert service.prefix.flush()
    with_store = service.prefix.stats.index_nbytes
    assert service.prefix.stats.store.written == 50 * (TOKENS // 4 + 1)  # and a state
    assert service.prefix.close()
    assert service.prefix.stats.index_nbytes < with_store - 550 * 100
    service.strangers(50, 51)
    assert service.prefix.stats.spans == 51


# One document, cut everywhere.


def cost_of(service, ids):
    """Calls of functions that a hit takes, which no other process disturbs."""
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += 1

    sys.setprofile(count)
    try:
        session = service.prefix.session(ids)
    finally:
        sys.setprofile(None)
    session.__exit__(KeyError, None, None)
    assert session.matched == len(ids) - 1
    return calls


def test_requests_that_store_nothing_cut_nothing():
    service, whole = Service(capacity=2_048, budget=None), Service(capacity=2_048, budget=None)
    ids = np.arange(2_000, dtype=np.int32)
    for one in (service, whole):
        one.ask(ids)
    again = np.append(ids, 50_000).astype(np.int32)
    before = service.prefix.stats.index_nbytes
    for at in np.random.default_rng(0).permutation(np.arange(1, 2_000)):
        cut = ids[: at + 1].copy()
        cut[at] = 60_000
        assert service.give_up(cut) == at
    assert service.prefix.stats.spans == 1
    assert service.prefix.stats.index_nbytes == before
    assert cost_of(service, again) == cost_of(whole, again)


def test_requests_that_are_stored_and_evicted_leave_a_document_whole():
    service, whole = Service(capacity=2_048), Service(capacity=2_048)
    ids = np.arange(400, dtype=np.int32)
    for one in (service, whole):
        one.ask(ids)
    again = np.append(ids, 50_000).astype(np.int32)
    for number, at in enumerate(np.random.default_rng(0).permutation(np.arange(1, 400))):
        cut = ids[: at + 1].copy()
        cut[at] = 60_000
        assert service.ask(cut) == at
        index = service.prefix._index
        index.evict(index.follow(service.prefix._trees[""], cut).spans[-1], service.now)
        if number % 10 == 9:
            assert service.ask(again) >= 400 - (number < 10)
    index.forget_ghosts()
    service.ask(again)
    service.ask(again)
    assert service.prefix.stats.spans < 6
    assert cost_of(service, again) < 1.5 * cost_of(whole, ids)


# Windows over budget.


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("conversations", [1, 3])
def test_a_chat_over_budget_computes_a_turn_again_at_most(name, conversations):
    """A ring of 16, turns of 40 tokens, room for five turns."""
    now = 0.0
    caches = [RotatingKVCache(16, backend="numpy")]
    prefix = PrefixCache(caches, budget=2_640, policy=name, clock=lambda: now)
    chats = [[] for _ in range(conversations)]
    for turn in range(25):
        for number, ids in enumerate(chats):
            now += 60.0
            known = len(ids)
            ids.extend(1_000 * turn + 100 * number + token for token in range(20))
            with prefix.session(ids) as session:
                assert known - session.matched <= 40
                for start in range(session.matched, len(ids) + 19, 8):
                    tokens = min(8, len(ids) + 19 - start)
                    rows = np.zeros((1, 1, tokens, 2), np.float32)
                    session.caches[0].update(rows, rows)
                reply = [token + 50 for token in ids[-20:]]
                session.extend(reply)
            ids.extend(reply)
            assert prefix.stats.nbytes <= 2_640


# Media.


def test_ids_of_media_begin_anew_without_taking_those_of_living_ones():
    ids, tokens = MediaIds(), np.zeros(1, np.int32)
    kept = [ids.substitute(tokens, {(0, 1): name}) for name in ("a", "b", "c")]
    del kept[1]
    ids._next = 2**31 - 1
    found = [ids.substitute(tokens, {(0, 1): name}) for name in ("d", "e", "f")]
    assert [int(substituted[0]) for substituted, _ in found] == [-(2**31), -2, -4]
    assert [int(substituted[0]) for substituted, _ in kept] == [-1, -3]
    assert ids.substitute(tokens, {(0, 1): "c"})[0] == [-3]
    del found, kept
    gc.collect()
    assert not ids._media


def test_media_are_told_apart_by_digest_length_and_placeholders():
    ids = MediaIds()
    asked = [("a", [5, 5]), ("b", [5, 5]), ("a", [5, 5, 5]), ("a", [5, 6])]
    found = [
        ids.substitute(np.array(tokens, np.int32), {(0, len(tokens)): name})
        for name, tokens in asked
    ]
    assert [substituted.tolist() for substituted, _ in found] == [
        [-1] * 2,
        [-2] * 2,
        [-3] * 3,
        [-4] * 2,
    ]
    for (_, tokens), (_, [placement]) in zip(asked, found, strict=True):
        assert placement.placeholders.tolist() == tokens
        assert (placement.start, placement.stop) == (0, len(tokens))
    assert len({placement.medium.key for _, [placement] in found}) == 4


if __name__ == "__main__":
    sessions, samples, options = json.loads(sys.argv[1])
    print(json.dumps(measure(sessions, samples, **options)))
