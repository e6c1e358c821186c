"""Requests of several sessions in one batch: their rows go back to them, and are stored."""

import numpy as np
import pytest

import kvcache
from kvcache import KVCacheError, LayerCaches
from kvcache.prefix import PrefixCache

from .served import MODELS, RECURRENT, Layers, Server

NUMPY = kvcache.get_backend("numpy")
SYSTEM = [1, 2, 3, 4, 5, 6]
PER_LAYER = ["per-layer", "rotating", "sinks", "recurrent", "hybrid"]


class Joined:
    """Has the caches of a batch where a model looks for those of a session."""

    def __init__(self, caches):
        self.caches = caches


def step(backend, batch, rows):
    """One token of every row, ids as far as they are computed, without looking at what is seen."""
    keys = backend.from_host(
        np.array([[[(ids[-1], len(ids) - 1)]] for ids in rows], np.float32), "float32"
    )
    for cache in batch:
        if isinstance(cache, kvcache.StateCache):
            state = [[*map(float, ids), *[-1.0] * (40 - len(ids))] for ids in rows]
            cache.advance(1, backend.from_host(np.array(state, np.float32), "float32"))
        else:
            cache.update(keys, 0 - keys)


@pytest.mark.parametrize("name", PER_LAYER)
def test_rows_of_a_batch_are_stored_by_their_sessions(name):
    check_batch(NUMPY, name)


def test_rows_of_a_batch_on_every_backend(backend):
    check_batch(backend, "hybrid")


def check_batch(backend, name):
    """Two prompts that share a beginning, three tokens of each in one batch, and what is stored."""
    server = Server(MODELS[name](backend))
    prompts = [[*SYSTEM, 10, 11, 12], [*SYSTEM, 20, 21, 22, 23, 24]]
    sessions = [server.begin(ids) for ids in prompts]
    for session, ids in zip(sessions, prompts, strict=True):
        server.compute(session, ids, 0)
    batch = LayerCaches.concat([session.caches for session in sessions])
    texts = prompts
    for token in (30, 31, 32):
        texts = [[*ids, token] for ids in texts]
        step(backend, batch, texts)
    for session, caches, ids in zip(sessions, batch.split(), texts, strict=True):
        session.commit()
        session.adopt(caches)
        session.extend(ids[-3:])
        assert session.caches is caches
        session.close()
    for ids in texts:
        assert server.ask([*ids, 40]) == len(ids)  # looks at all that is restored
    for ids in prompts:
        assert server.ask([*ids, 41]) == len(ids)


@pytest.mark.parametrize("name", ["per-layer", "hybrid", "full", "hybrid pool"])
def test_tokens_are_stored_while_a_session_goes_on(name):
    server, prompt = Server(MODELS[name](NUMPY)), [*SYSTEM, 10, 11]
    with server.begin(prompt) as session:
        server.compute(session, prompt, 0)
        session.commit()
        nbytes = server.prefix.stats.nbytes
        assert nbytes > 0
        assert server.prefix.stats.active == 1
        assert server.ask([*prompt, 50]) == 8
        session.extend([12, 13])
        server.compute(session, [*prompt, 12, 13], 8)
        session.commit()
        session.commit()  # nothing more
    assert server.ask([*prompt, 12, 13, 14]) == 10
    assert server.prefix.stats.active == 0


def test_an_adopted_row_is_followed():
    server = Server(MODELS["per-layer"](NUMPY))
    with server.begin(SYSTEM) as session:
        server.compute(session, SYSTEM, 0)
        [row] = LayerCaches.concat([session.caches]).split()
        session.adopt(row)
        row.trim(2)
        server.model.run(session, [*SYSTEM[:4], 8, 9], 4, 6)  # named by nobody
    assert server.ask([*SYSTEM, 7]) == 4
    assert session.matched == 0


def test_rows_taken_back_before_they_are_adopted_stay_named():
    """Adopting its own caches vouches for them: they hold the tokens named, however they came."""
    server = Server(MODELS["per-layer"](NUMPY))
    with server.begin(SYSTEM) as session:
        server.compute(session, SYSTEM, 0)
        session.caches.trim(3)
        server.compute(session, SYSTEM, 3)
        session.adopt(session.caches)
    assert server.ask([*SYSTEM, 7]) == 6


def test_caches_that_no_session_can_adopt():
    server = Server(MODELS["rotating"](NUMPY))
    session = server.begin(SYSTEM)
    server.compute(session, SYSTEM, 0)
    own = session.caches
    for caches, error, message in [
        ([kvcache.KVCache()] * 2, TypeError, "a session adopts LayerCaches; got"),
        (LayerCaches([kvcache.KVCache()] * 2), ValueError, "adopts caches like its own"),
        (LayerCaches([kvcache.RotatingKVCache(4)] * 2), ValueError, "adopts caches like its own"),
        (LayerCaches([own[0]]), ValueError, "adopts caches like its own"),
        (LayerCaches.concat([own, own]), ValueError, "of one row without padding"),
    ]:
        with pytest.raises(error, match=message):
            session.adopt(caches)
        assert session.caches is own
    session.close()
    for call in (session.commit, lambda: session.adopt(own)):
        with pytest.raises(KVCacheError, match="this one has ended"):
            call()


@pytest.mark.parametrize("first", [0, 1])
def test_no_two_sessions_have_the_same_caches(first):
    """A change in them would be heard by one of both only."""
    server = Server(MODELS["rotating"](NUMPY))
    one, two = server.begin(SYSTEM), server.begin(SYSTEM)
    for session in (one, two):
        server.compute(session, SYSTEM, 0)
    own, left = two.caches, one.caches
    [row] = LayerCaches.concat([one.caches]).split()
    one.adopt(row)
    taken = LayerCaches([*own[:first], *row[first:]])
    calls = [lambda: two.adopt(taken), lambda: server.prefix.insert(SYSTEM, taken)]
    before = server.prefix.stats
    for call in calls:
        with pytest.raises(KVCacheError, match=r"only one that has its caches; got .* Copy them"):
            call()
    assert two.caches is own
    assert server.prefix.stats == before
    two.adopt(left)  # those that the first has left
    one.close()
    two.adopt(row)  # nobody has them now
    two.close()
    assert server.ask([*SYSTEM, 7]) == 6


def test_detached_caches_are_free():
    server = Server(MODELS["per-layer"](NUMPY))
    one, two = server.begin(SYSTEM), server.begin(SYSTEM)
    server.compute(one, SYSTEM, 0)
    caches = one.detach()
    two.adopt(caches)
    assert two.detach() is caches
    server.prefix.insert(SYSTEM, caches)
    assert server.prefix.lookup([*SYSTEM, 7]).matched == len(SYSTEM)


def test_a_session_over_a_pool_adopts_nothing():
    server = Server(MODELS["full"](NUMPY))
    with (
        server.begin(SYSTEM) as session,
        pytest.raises(KVCacheError, match=r"share its cache\. Batch their sequences"),
    ):
        session.adopt(LayerCaches([kvcache.KVCache()]))


def test_storing_fails_as_a_whole(monkeypatch):
    server = Server(Layers(NUMPY, {}, RECURRENT))
    with server.begin(SYSTEM) as session:
        server.compute(session, SYSTEM, 0)
        monkeypatch.setattr(LayerCaches, "snapshot", _raise)
        with pytest.raises(MemoryError):
            session.commit()
        monkeypatch.undo()
        assert server.prefix.stats.nbytes == 0
        session.commit()
    assert server.ask([*SYSTEM, 7]) == 6


def _raise(*arguments):
    raise MemoryError


def test_storing_before_anything_is_computed():
    prefix = PrefixCache([kvcache.KVCache("numpy")])
    with prefix.session([1, 2]) as session:
        session.commit()
    assert prefix.stats.nbytes == 0
