"""A store behind a prefix cache: every token attends to what it would without one."""

import logging
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvcache
from kvcache import KVCache
from kvcache.errors import StoreError
from kvcache.prefix import PrefixCache
from kvcache.stores import Deadline, FileStore, Hit, Item, MemoryStore, Namespace, Seal

from .. import peek
from .served import FULL, MODELS, SOME, Server, check_accounts
from .test_cache import TURN
from .tiered import FIRST, LATER, PAGE, REPLY, TURNED, Gate, Restored, Stored, model_of, stored_in

NUMPY = kvcache.get_backend("numpy")


def mostly(names, *kept):
    """All `names`, of which each run of the tests takes those `kept`."""
    rest = pytest.mark.matrix
    return [name if name in kept else pytest.param(name, marks=rest) for name in names]


# After a restart, and elsewhere.


@pytest.mark.parametrize("name", MODELS)
def test_a_conversation_goes_on_after_a_restart(name, tmp_path):
    with FileStore(tmp_path) as store:
        stored_in(store, name)
    with FileStore(tmp_path) as store:
        server = Stored(model_of(name, NUMPY), store)
        assert server.ask([*TURNED, 12, 13]) == 10  # computed up to the token sampled last
        assert (server.counts.fetched_tokens, server.counts.failed) == (10, 0)
        assert server.ask([*TURNED, 12, 13, 14]) == 13, "from memory"
        check_accounts(server)


@pytest.mark.parametrize("name", MODELS)
def test_the_same_prompt_again_leaves_its_last_token(name):
    server = Stored(model_of(name, NUMPY), stored_in(MemoryStore(), name))
    assert server.ask(FIRST) == 7


@pytest.mark.parametrize("name", mostly(SOME, "full", "hybrid pool"))
def test_backends_share_what_they_store(backend, name):
    store = stored_in(MemoryStore(), name, backend)
    other = Stored(model_of(name, NUMPY), store)
    assert other.ask([*TURNED, 12], [13, 14]) == 10
    third = Stored(model_of(name, backend), store)
    assert third.ask([*TURNED, 12, 13, 14]) == 13


@pytest.mark.parametrize("name", sorted(FULL - {"encoder"}))
def test_a_prompt_that_parts_has_the_full_pages_before(name):
    server = Stored(model_of(name, NUMPY), stored_in(MemoryStore(), name))
    assert server.ask([1, 2, 3, 4, 5, 60]) == 4
    assert server.ask([1, 2, 3, 40]) == 3, "from memory, where rows are by token"


@pytest.mark.parametrize("name", ["window", "hybrid", "hybrid pool", "rotating"])
def test_a_prompt_that_parts_has_the_deepest_state_before(name):
    store = MemoryStore()
    Stored(model_of(name, NUMPY), store).ask(FIRST, REPLY, resume_points=[3, 5])
    server = Stored(model_of(name, NUMPY), store)
    assert server.ask([1, 2, 3, 4, 5, 6, 60]) == 5
    assert server.ask([1, 2, 3, 4, 61]) in {3, 4}, "a window may have held what 4 takes"


@pytest.mark.parametrize("name", MODELS)
def test_pages_behind_a_hit_in_memory_are_fetched(name):
    store = MemoryStore()
    server = Stored(model_of(name, NUMPY), store)
    server.ask(FIRST[:6])
    stored_in(store, name)
    assert server.ask([*TURNED, 12]) == 10
    check_accounts(server)


@pytest.mark.parametrize("name", mostly(MODELS, "full", "sinks", "hybrid", "hybrid pool"))
@settings(max_examples=15)
@given(turns=st.lists(TURN, min_size=2, max_size=8), budget=st.sampled_from([None, 0, 300, 900]))
def test_any_conversations_of_two_who_share_a_store(name, turns, budget):
    store = MemoryStore()
    servers = [Stored(model_of(name, NUMPY), store, budget=budget) for _ in range(2)]
    servers[1].stored = servers[0].stored
    for number, turn in enumerate(turns):
        server = servers[number % 2]
        old = server.stored[turn["base"] % len(server.stored)] if server.stored else []
        ids = [*old[: turn["cut"]], *turn["new"]][:18] or [1]
        common = server.common(ids)
        matched = server.ask(
            ids,
            turn["reply"],
            sizes=turn["sizes"],
            fail=turn["fail"],
            resume_points=turn["resume_points"],
        )
        assert matched <= common
        check_accounts(server)
    assert {server.counts.failed for server in servers} == {0}
    assert {server.counts.dropped for server in servers} == {0}


# Who finds what.


def test_others_find_nothing():
    store = stored_in(MemoryStore())
    prompt = [*TURNED, 12]
    assert Stored(model_of("full", NUMPY), store).ask(prompt, salt="tenant") == 0
    other = {"store": store, "namespace": "another", "page_tokens": PAGE}
    assert Server(MODELS["full"](NUMPY), **other).ask(prompt) == 0
    assert Stored(model_of("window", NUMPY), store).ask(prompt) == 0
    assert Stored(model_of("full", NUMPY), store).ask([90, *prompt]) == 0


def test_an_image_is_found_by_its_content():
    def turn(server, image):
        ids = [1, 2, 7, 7, 7, 3, 4, 5, 6]
        return server.ask(ids, media={(2, 5): image})

    store = MemoryStore()
    assert turn(Stored(model_of("per-layer", NUMPY), store), "cat") == 0
    other = Stored(model_of("per-layer", NUMPY), store)
    other.ask([90], media={(0, 1): "bird"})  # takes the first stand-in id of its process
    assert turn(other, "cat") == 8
    assert turn(Stored(model_of("per-layer", NUMPY), store), "dog") == 0


def test_a_store_needs_the_name_of_the_model():
    with pytest.raises(ValueError, match=r"got no namespace\. Give a fingerprint"):
        PrefixCache([KVCache("numpy")], store=MemoryStore())
    with pytest.raises(StoreError, match="named by a URL"):
        PrefixCache([KVCache("numpy")], store="/var/cache", namespace="tiny")


def test_a_store_may_be_a_url(tmp_path):
    for matched in (0, 11):
        server = Stored(model_of("per-layer", NUMPY), f"file://{tmp_path}")
        assert server.ask([*TURNED, 12][: 11 + bool(matched)]) == matched
        assert server.prefix.close()
    assert server.prefix.stats.store is None
    assert server.ask([90]) == 0, "goes on without the store"


def test_caches_without_a_backend_fetch_when_they_have_one():
    store = stored_in(MemoryStore(), "per-layer")
    server = Stored(MODELS["per-layer"](NUMPY), store)
    assert server.ask([*TURNED, 12]) == 0
    assert server.ask([90]) == 0
    server.prefix.clear()
    assert server.ask([*TURNED, 12]) == 11


# Ahead of the session.


def test_a_session_takes_what_was_prefetched():
    store = Gate(stored_in(MemoryStore()))
    server = Stored(model_of("full", NUMPY), store)
    server.prefix.prefetch(TURNED)
    assert peek.fetching(server.prefix).drain(LATER)
    store.broken = True
    assert server.ask([*TURNED, 12, 13]) == 10


def test_a_session_waits_for_what_is_being_prefetched():
    store = Gate(stored_in(MemoryStore()))
    server = Stored(model_of("full", NUMPY), store)
    store.opened.clear()
    server.prefix.prefetch(TURNED)
    threading.Timer(0, store.opened.set).start()
    assert server.ask([*TURNED, 12, 13]) == 10


def test_a_session_asks_again_where_a_prefetch_got_no_answer():
    store = Gate(stored_in(MemoryStore()))
    server = Stored(model_of("full", NUMPY), store)
    store.broken = True
    server.prefix.prefetch(TURNED)
    assert peek.fetching(server.prefix).drain(LATER)
    store.broken = False
    assert server.ask([*TURNED, 12, 13]) == 10
    assert server.counts.late == 0


# Trouble.


def test_a_store_that_hangs_holds_a_session_until_its_deadline():
    store = Gate(stored_in(MemoryStore()))
    server = Stored(model_of("full", NUMPY), store)
    store.opened.clear()
    with server.begin([*TURNED, 12], deadline=Deadline.after(0.05)) as session:
        assert session.matched == 0
        server.compute(session, [*TURNED, 12], 0)
    assert server.counts.late == 1
    store.opened.set()
    assert server.prefix.flush(LATER)


def test_a_store_that_is_down_is_a_miss_and_one_warning(caplog):
    store = Gate(MemoryStore())
    store.broken = True
    server = Stored(model_of("full", NUMPY), store)
    with caplog.at_level(logging.WARNING):
        server.ask(FIRST, REPLY, deadline=LATER)
        server.ask([*TURNED, 12], deadline=LATER)
    assert server.counts.late >= 1
    assert server.counts.dropped >= 3
    assert len(caplog.records) == 1, "of the store itself"
    store.broken = False
    server.ask([*TURNED, 12, 13])
    assert Stored(model_of("full", NUMPY), store).ask([*TURNED, 12, 13, 14]) == 13, "put again"


class Altered(MemoryStore):
    """Gives other bytes for every value, checksums being no matter."""

    def __init__(self, inner, alter):
        super().__init__()
        self.inner, self.alter = inner, alter

    def _get(self, keys, deadline):
        found = self.inner.get(keys)
        return [self.alter(one) if isinstance(one, Hit) else one for one in found]

    def _contains(self, keys, deadline):
        return self.inner.contains(keys)


def swapped(hit):
    """The value under a label of other positions."""
    label = hit.label._replace(start=hit.label.start + PAGE, stop=hit.label.stop + PAGE)
    return Hit(hit.value, label)


@pytest.mark.parametrize(
    "alter",
    [
        lambda hit: Hit(hit.value[:-1], hit.label),
        lambda hit: Hit(hit.value[:5], hit.label),
        lambda hit: Hit(hit.value, hit.label._replace(layout=bytes(32))),
        lambda hit: Hit(memoryview(b"KVCPAGE\0\x09" + bytes(hit.value[9:])), hit.label),
        swapped,
    ],
    ids=["truncated", "stub", "layout", "version", "positions"],
)
@pytest.mark.parametrize("name", ["full", "hybrid"])
def test_pages_that_are_none_are_a_miss(name, alter, caplog):
    store = Altered(stored_in(MemoryStore(), name), alter)
    server = Stored(model_of(name, NUMPY), store)
    with caplog.at_level(logging.WARNING):
        assert server.ask([*TURNED, 12]) == 0
        assert server.ask([*FIRST, 13]) in {0, 8}
    assert server.counts.failed >= 1
    [warning] = caplog.records
    assert "a page is damaged, or of other caches" in warning.getMessage()


def damaged(store, start, stop):
    """A store whose value for ``[start, stop)`` passes for whole, and cannot be decoded."""
    [(key, label)] = [
        (entry.key, entry.label) for entry in store.entries() if entry.label[2:] == (start, stop)
    ]
    store.delete([key])
    store.put([Item(key, [b"none"], label)])
    return store


def test_the_pages_before_a_damaged_one_are_used():
    store = damaged(stored_in(MemoryStore()), 4, 8)
    server = Stored(model_of("full", NUMPY), store)
    assert server.ask([*TURNED, 12], [13]) == 7, "with the state of the prompt but for its end"
    assert server.counts.failed == 1
    # The session has put a page in its place.
    assert Stored(model_of("full", NUMPY), store).ask([*TURNED, 12, 13, 14]) == 12


@pytest.mark.parametrize("name", ["hybrid", "hybrid pool"])
def test_a_session_goes_on_at_the_state_before_a_damaged_one(name):
    store = MemoryStore()
    Stored(model_of(name, NUMPY), store).ask(FIRST, REPLY, resume_points=[3, 5])
    [state] = {entry.label.start for entry in store.entries() if entry.label.stop == 10}
    damaged(store, state, 10)
    server = Stored(model_of(name, NUMPY), store)
    assert server.ask([*TURNED, 12]) == 8
    assert server.counts.failed == 1


@pytest.mark.parametrize("name", ["hybrid", "hybrid pool"])
@pytest.mark.parametrize(("page", "left"), [((4, 8), 7), ((0, 4), 3)])
def test_a_session_goes_on_at_the_state_before_a_damaged_page(name, page, left):
    store = MemoryStore()
    Stored(model_of(name, NUMPY), store).ask(FIRST, REPLY, resume_points=[3, 5])
    server = Stored(model_of(name, NUMPY), damaged(store, *page))
    assert server.ask([*TURNED, 12]) == left
    assert server.counts.failed == 1


def test_a_page_that_a_store_finds_damaged_is_counted_and_put_again(tmp_path):
    with FileStore(tmp_path) as store:
        stored_in(store)
        for path in tmp_path.rglob("*"):
            if path.is_file() and "index" not in path.name:
                path.write_bytes(path.read_bytes()[:-1] + b"?")
    with FileStore(tmp_path) as store:
        server = Stored(model_of("full", NUMPY), store)
        assert server.ask([*TURNED, 12]) == 0
        assert server.counts.failed >= 1
    with FileStore(tmp_path) as store:
        assert Stored(model_of("full", NUMPY), store).ask([*TURNED, 12, 13]) == 12


def test_pages_of_another_form_are_not_restored(caplog):
    """Namespaces that lie: the same name for models of other head sizes."""

    class Wide(Restored):
        def run(self, session, ids, start, stop):
            for cache in session.caches:
                rows = self.backend.from_host(wide_rows(ids, start, stop))
                cache.update(rows, rows)

    store = MemoryStore()
    Stored(Wide(NUMPY, {}, {}), store).ask(FIRST, REPLY)
    server = Stored(model_of("per-layer", NUMPY), store)
    server.ask([90, 91])
    with caplog.at_level(logging.WARNING):
        assert server.ask([*TURNED, 12]) == 0
    assert server.counts.failed >= 1


def wide_rows(ids, start, stop):
    return np.array([[[(ids[p],) * 3 for p in range(start, stop)]]], np.float32)


def test_a_full_queue_drops_pages_and_a_later_session_puts_them():
    store = Gate(MemoryStore())
    server = Stored(model_of("full", NUMPY), store)
    with server.begin(FIRST) as session:
        store.opened.clear()
        peek.fill_queue(server.prefix, store.opened.wait)
        server.compute(session, FIRST, 0)
    assert (server.counts.written, server.counts.dropped) == (0, 3)
    store.opened.set()
    assert server.prefix.flush(LATER)
    server.ask([*FIRST, 9])
    assert Stored(model_of("full", NUMPY), store).ask([*FIRST, 9, 10]) == 9


# What pays.


def test_fetching_that_does_not_pay_is_left():
    store = stored_in(MemoryStore())
    server = Stored(model_of("full", NUMPY), store)
    gate = peek.cost_gate(server.prefix)
    gate.note_sizes(1000, state=False)
    gate.note_sizes(1000, state=True)
    gate.note_transfer(1000, 1.0)
    gate.note_computed(1000, 1.0)
    assert server.ask([*TURNED, 12]) == 0
    assert server.counts.gated == 1
    assert server.counts.bytes_per_second == pytest.approx(1000)
    gate.note_computed(1, 1e6)
    server.prefix.clear()
    assert server.ask([*TURNED, 12]) == 11


def test_no_more_is_fetched_than_comes_in_time():
    server = Stored(model_of("full", NUMPY), stored_in(MemoryStore()))
    gate = peek.cost_gate(server.prefix)
    gate.note_sizes(1000, state=False)
    gate.note_sizes(1000, state=True)
    gate.note_transfer(1000, 400.0)  # for a page, of which one comes in 600 seconds
    gate.note_computed(1, 1e6)
    assert server.ask([*TURNED, 12], deadline=Deadline.after(600)) == 4


def test_both_costs_are_measured():
    store = stored_in(MemoryStore())
    server = Stored(model_of("full", NUMPY), store)
    assert (server.counts.bytes_per_second, server.counts.seconds_per_token) == (None, None)
    server.ask([*TURNED, 12])
    assert server.counts.bytes_per_second > 0
    assert server.counts.seconds_per_token > 0
    assert server.counts.store.hits == server.counts.fetched == 3


def test_keys_are_those_of_a_chain():
    """What another program finds by the public recipe."""
    store = stored_in(MemoryStore())
    [*labels] = sorted((entry.label.start, entry.label.stop) for entry in store.entries())
    assert labels == [(0, 4), (4, 7), (4, 8), (8, 10)]
    assert Namespace("tiny").seed not in {entry.key for entry in store.entries()}


def test_a_deadline_is_that_of_a_store():
    prefix = PrefixCache([KVCache("numpy")])
    with pytest.raises(TypeError, match=r"got 0\.5\. Give Deadline\.after\(seconds\)"):
        prefix.session([1], deadline=0.5)


# Sealed.


def test_tenants_have_seals_of_their_own():
    pytest.importorskip("cryptography", reason="needs pip install 'kvcache[seal]'")
    seals = {"left": Seal(bytes(32)), "right": Seal(bytes(range(32)))}
    store = MemoryStore()

    def server(**options):
        return Stored(model_of("hybrid", NUMPY), store, **options)

    for salt in ("left", "right", ""):
        server(seal=seals.get).ask(FIRST, REPLY, salt=salt)
    assert [server(seal=seals.get).ask([*TURNED, 12], salt=salt) for salt in seals] == [10, 10]
    assert server(seal=seals["left"]).ask([*TURNED, 12], salt="left") == 11, "one for all"
    assert server().ask([*TURNED, 12]) == 10, "no tenant's"


def test_what_does_not_open_stays_for_those_with_the_secret():
    pytest.importorskip("cryptography", reason="needs pip install 'kvcache[seal]'")
    store = MemoryStore()
    seal = Seal(bytes(32))
    Stored(model_of("full", NUMPY), store, seal=seal).ask(FIRST, REPLY)
    other = Stored(model_of("full", NUMPY), store, seal=Seal(bytes(range(32))))
    assert other.ask([*TURNED, 12]) == 0
    assert other.counts.failed >= 1
    assert Stored(model_of("full", NUMPY), store, seal=seal).ask([*TURNED, 12]) >= 10


def test_a_seal_is_one_or_a_function_that_returns_one():
    with pytest.raises(TypeError, match=r"pages are sealed with a kvcache\.stores\.Seal"):
        PrefixCache([KVCache("numpy")], seal=bytes(32))
    server = Stored(model_of("full", NUMPY), MemoryStore(), seal=lambda salt: salt.encode())
    with pytest.raises(TypeError, match=r"the seal of a salt is .* got b'tenant'"):
        server.begin([1, 2], salt="tenant")
    assert server.prefix.stats.sessions == server.prefix.stats.active == 0
