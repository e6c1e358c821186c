"""Sessions that fail, and what a prefix cache can be made with."""

import random

import pytest

import kvcache
from kvcache import CacheFullError, CausalCache, KVCache, KVCacheError
from kvcache.prefix import PrefixCache
from kvcache.prefix.policies import LRU, POLICIES, Gittins

from .served import MODELS, Pool, Server, check_accounts, check_nothing_left

NUMPY = kvcache.get_backend("numpy")
LONG = list(range(1, 16))


@pytest.mark.parametrize("name", MODELS)
def test_who_leaves_leaves_nothing(name):
    server = Server(MODELS[name](NUMPY))
    server.ask(LONG)
    before = server.prefix.stats
    for tokens in (0, 1, 4):
        server.ask([*LONG, 60, 61, 62, 63], fail=tokens, keep_on_error=False)
    stats = server.prefix.stats
    assert (stats.spans, stats.nbytes, stats.pinned) == (before.spans, before.nbytes, 0)
    assert server.ask([*LONG, 60, 61, 62, 63]) == len(LONG)
    check_accounts(server)


@pytest.mark.parametrize("name", MODELS)
def test_who_leaves_keeps_what_was_computed(name):
    server = Server(MODELS[name](NUMPY))
    server.ask(LONG)
    longer = [*LONG, 60, 61, 62, 63]
    held = len(LONG)
    for tokens in (0, 1, 2):
        assert server.ask(longer, fail=tokens) == held
        held += tokens
        check_accounts(server)
    assert server.ask(longer) == len(longer) - 1
    check_accounts(server)
    check_nothing_left(server)


@pytest.mark.parametrize("keep", [False, True])
def test_a_generator_that_is_not_read_to_its_end(keep):
    server = Server(MODELS["full"](NUMPY))

    def answer():
        with server.prefix.session(LONG, keep_on_error=keep) as session:
            server.compute(session, LONG, session.matched)
            yield session

    for _ in range(5):
        next(answers := answer())
        assert server.prefix.stats.active == 1
        answers.close()
        check_accounts(server)
    assert server.prefix.lookup([*LONG, 60]).matched == keep * len(LONG)


def test_a_session_ends_once():
    server = Server(MODELS["full"](NUMPY))
    session = server.begin(LONG)
    server.finish(session, LONG)
    session.__exit__(None, None, None)
    both = server.begin([1]), server.begin([2])
    assert {session.sequence for session in both} == {0, 1}


@pytest.mark.parametrize("fail", [None, 1])
def test_a_session_that_has_ended_has_no_sequence(fail):
    server = Server(MODELS["full"](NUMPY))
    session = server.begin(LONG)
    assert session.sequence == 0
    server.finish(session, LONG, fail=fail)
    with pytest.raises(KVCacheError, match=r"this one has ended. Begin another"):
        _ = session.sequence
    assert session.matched == 0


def test_no_sequence_is_left():
    server = Server(MODELS["full"](NUMPY))
    server.ask(LONG)
    open_ones = [server.begin(LONG), server.begin(LONG)]
    before = server.prefix.stats
    with pytest.raises(CacheFullError, match="all 2 are in use"):
        server.begin(LONG)
    assert server.prefix.stats == before
    for session in open_ones:
        server.finish(session, LONG)
    check_accounts(server)
    check_nothing_left(server)


def test_no_cell_is_left():
    """Another user of the pool holds nearly all; what is stored moves out for it."""
    model = Pool(NUMPY, {}, max_sequences=3, capacity=8)
    server = Server(model, sequences=[0, 1])
    server.ask(LONG)
    model.run_all([(2, list(range(8)), 0, 8)])
    model.run_all([(2, list(range(16)), 8, 16)])
    before = server.prefix.stats
    assert before.resident == 0 < before.nbytes
    with pytest.raises(CacheFullError, match="restoring needs 14 free cells; 8 of 24"):
        server.begin(LONG)
    assert server.prefix.stats == before
    check_accounts(server)
    model.cache.remove(2, 4)
    assert server.ask(LONG) == len(LONG) - 1


@pytest.mark.parametrize("name", ["full", "window", "per-layer", "sinks"])
def test_tokens_that_were_never_named_are_not_stored(name):
    server = Server(MODELS[name](NUMPY))
    with server.begin(LONG) as session:
        server.compute(session, [*LONG, 8, 9], 0)
    check_accounts(server)
    assert server.ask([*LONG, 8, 9, 10]) == len(LONG)
    check_nothing_left(server)


# What it is made with.


@pytest.mark.parametrize(
    "given",
    [*POLICIES, pytest.param(LRU(), id="LRU"), pytest.param(Gittins(seed=4), id="Gittins")],
)
def test_policies_by_name_and_as_objects(given):
    server = Server(MODELS["full"](NUMPY), budget=30 * 24, policy=given)
    chosen = server.prefix._index.policy
    assert chosen is given or type(chosen) is POLICIES[given]
    chance = random.Random(1)
    for _ in range(40):
        server.ask([chance.randrange(3) for _ in range(chance.randrange(1, 18))])
    assert server.prefix.stats.evictions
    check_accounts(server)


@pytest.mark.parametrize("name", MODELS)
def test_a_budget_of_nothing(name):
    server = Server(MODELS[name](NUMPY), budget=0)
    for _ in range(3):
        assert server.ask(LONG) == 0
        assert server.prefix.stats.nbytes == server.prefix.stats.spans == 0


def test_what_is_offered_and_takes_no_room():
    """The first part of a span, without the image that came behind it."""
    cache = kvcache.EncoderCache()
    cache.init("numpy", max_sequences=1)
    prefix = PrefixCache(cache, budget=400)
    for ids in ([1, 1, 1, 7, 7], [1, 1, 2], [3, 3, 3, 7, 7], [4, 4, 4, 7, 7]):
        with prefix.session(ids) as session:
            if 7 in ids:
                cache.start_forward(kvcache.Batch([3], [session.sequence], [0]))
                cache.put(*(NUMPY.alloc((1, 20, 2), "float32"),) * 2)
    assert prefix.stats.nbytes == 320


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"budget": -1}, "budget is bytes >= 0"),
        ({"policy": "best"}, "there is no policy 'best'"),
        ({"sequences": [0, 2]}, r"lie in \[0, 2\)"),
        ({"sequences": [1, 1]}, r"name each once, got \[1, 1\]"),
    ],
)
def test_what_it_cannot_be_made_with(options, says):
    with pytest.raises(ValueError, match=says):
        Server(MODELS["full"](NUMPY), **options)


def test_caches_it_cannot_be_made_over():
    with pytest.raises(KVCacheError, match="Call init"):
        PrefixCache(CausalCache())
    used = KVCache("numpy")
    used.update(*(NUMPY.alloc((1, 1, 3, 2), "float32"),) * 2)
    for caches in ([], [used]):
        with pytest.raises(ValueError, match="one empty cache for every layer"):
            PrefixCache(caches)
