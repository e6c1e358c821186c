"""Caches that leave their session, and caches that were filled without one."""

import pytest

import kvcache
from kvcache import KVCache, LayerCaches
from kvcache.prefix import Hit

from .served import MODELS, Server, check_accounts, check_nothing_left

NUMPY = kvcache.get_backend("numpy")
KINDS = ["per-layer", "rotating", "sinks", "recurrent", "hybrid"]
IDS = [1, 2, 3, 4, 5, 6, 7, 8, 9]


class Outside:
    """Caches in the place of a session."""

    def __init__(self, caches):
        self.caches = caches


def filled(server, ids):
    """Caches that hold `ids`, of no session of a server."""
    outside = Outside(LayerCaches(cache.copy() for cache in server.model.given))
    server.compute(outside, ids, 0)
    return outside.caches


@pytest.mark.parametrize("name", KINDS)
def test_caches_filled_without_a_session_are_stored(backend, name):
    server = Server(MODELS[name](backend))
    server.prefix.insert(IDS, filled(server, IDS))
    assert server.ask([*IDS, 20]) == 9
    assert server.ask([*IDS, 20, 21]) == 10
    # Behind what is stored: the windows and states of the first turn are there already.
    turn = [*IDS, 20, 21, 22, 23]
    server.prefix.insert(turn, filled(server, turn))
    assert server.ask([*turn, 24]) == 13
    assert server.ask([*IDS, 25]) == 9
    check_accounts(server)
    check_nothing_left(server)


@pytest.mark.parametrize("name", KINDS)
def test_what_is_stored_already_is_stored_once(backend, name):
    server = Server(MODELS[name](backend))
    server.prefix.insert(IDS, filled(server, IDS))
    stored = server.prefix.stats.nbytes
    caches = filled(server, IDS)
    server.prefix.insert(IDS, caches)
    assert server.prefix.stats.nbytes == stored
    assert caches.offset == caches.nbytes == 0  # taken over


def test_salts_and_media_of_inserted_tokens():
    server = Server(MODELS["per-layer"](NUMPY))
    media = {(2, 5): "an image"}
    server.prefix.insert(IDS, filled(server, IDS), salt="a", media=media)
    lookup = server.prefix.lookup
    assert lookup(IDS) == lookup(IDS, salt="a", media={(2, 5): "another"})._replace(
        matched=0, stored=0
    )
    assert lookup(IDS, salt="a").matched == 2
    assert lookup(IDS, salt="a", media=media).matched == 8


@pytest.mark.parametrize("name", KINDS)
def test_caches_leave_their_session(backend, name):
    server = Server(MODELS[name](backend))
    server.ask(IDS)
    session = server.begin([*IDS, 20, 21])
    outside = Outside(session.detach())
    assert server.prefix.stats.active == 0
    with pytest.raises(kvcache.KVCacheError, match="this one has ended"):
        session.caches  # noqa: B018
    session.close()
    del session
    server.ask([30])  # which would have given the caches back
    server.compute(outside, [*IDS, 20, 21], 9)
    assert outside.caches.offset == 11
    server.prefix.insert([*IDS, 20, 21], outside.caches)
    assert server.ask([*IDS, 20, 21, 22]) == 11
    check_accounts(server)


@pytest.mark.parametrize("name", KINDS)
def test_a_lookup_says_what_a_session_would_find(name):
    server = Server(MODELS[name](NUMPY))
    server.ask(IDS)
    before = server.prefix.stats
    for ids in (IDS, [*IDS, 20], IDS[:4], [30]):
        hit = server.prefix.lookup(ids)
        session = server.begin(ids)
        assert hit == Hit(session.matched, session.stored, session.limited_by)
        session.close(store=False)
    assert server.prefix.stats.spans == before.spans


def test_a_lookup_counts_nothing():
    server = Server(MODELS["full"](NUMPY))
    server.ask(IDS)
    before = server.prefix.stats
    assert server.prefix.lookup(IDS) == Hit(8, 9, ())
    assert server.prefix.stats == before


@pytest.mark.parametrize("name", ["per-layer", "full", "hybrid"])
def test_trimming_evicts_down_to_a_size(name):
    server = Server(MODELS[name](NUMPY))
    server.ask(IDS)
    server.ask([20, 21, 22])
    stored, budget = server.prefix.stats.nbytes, server.prefix.stats.budget
    server.prefix.trim(stored)
    assert server.prefix.stats.nbytes == stored
    server.prefix.trim(stored - 1)
    assert 0 < server.prefix.stats.nbytes < stored
    assert server.ask([20, 21, 22, 23]) == 3  # used last
    session = server.begin([20, 21, 22, 23])
    server.prefix.trim(-1)
    assert server.prefix.stats.nbytes == server.prefix.stats.pinned > 0
    session.close(store=False)
    server.prefix.trim(0)
    assert (server.prefix.stats.nbytes, server.prefix.stats.budget) == (0, budget)
    with pytest.raises(TypeError, match="nbytes"):
        server.prefix.trim(None)


# Refused, and interrupted.


def test_only_caches_like_the_given_ones_are_stored():
    server = Server(MODELS["per-layer"](NUMPY))
    caches, rule = filled(server, IDS), "of the kinds given to the prefix cache"
    others = Server(MODELS["rotating"](NUMPY))
    for ids, wrong in [
        (IDS, filled(others, IDS)),
        (IDS, caches[:1]),
        (IDS[:-1], caches),
        ([*IDS, 1], caches),
        (IDS, LayerCaches.concat([caches, filled(server, IDS[:3])])),
    ]:
        with pytest.raises(ValueError, match=rule):
            server.prefix.insert(ids, wrong)
    with pytest.raises(TypeError, match="per-layer caches of one sequence"):
        server.prefix.insert(IDS, [1, 2])
    with pytest.raises(ValueError, match="at least one token"):
        server.prefix.insert([], caches)
    exported = KVCache(NUMPY)
    exported.fill(*caches[0].state, 9)
    exported.export_state(1)
    with pytest.raises(kvcache.errors.ExportedError):
        server.prefix.insert(IDS, [exported, caches[1]])
    assert server.prefix.stats.spans == 0
    server.prefix.insert(IDS, caches)


def test_a_pool_stores_what_its_sessions_put_there():
    server = Server(MODELS["full"](NUMPY))
    with pytest.raises(kvcache.KVCacheError, match=r"Use session\(\)"):
        server.prefix.insert(IDS, [KVCache("numpy")])
    with server.begin(IDS) as session, pytest.raises(kvcache.KVCacheError, match="share its cache"):
        session.detach()


@pytest.mark.parametrize("name", KINDS)
def test_an_insertion_that_fails_changes_nothing(monkeypatch, name):
    server = Server(MODELS[name](NUMPY))
    caches = filled(server, IDS)

    def fail(self):
        raise MemoryError("no room")

    monkeypatch.setattr(kvcache.Snapshot, "detach", fail)
    with pytest.raises(MemoryError, match="no room"):
        server.prefix.insert(IDS, caches)
    assert server.prefix.stats.spans == 0
    monkeypatch.undo()
    assert caches.offset == 9
    server.prefix.insert(IDS, caches)
    assert server.ask([*IDS, 20]) == 9
    check_accounts(server)
