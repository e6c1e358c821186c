"""Sessions from their beginning to their end: what they own, and that they give all of it back."""

import gc
import pickle
import threading
import warnings

import numpy as np
import pytest

import kvcache
from kvcache import CacheFullError, CausalCache, KVCacheError
from kvcache.prefix import PrefixCache
from kvcache.prefix.policies import LRU

from .served import MODELS, Layers, Pool, Server, check_accounts, check_nothing_left

NUMPY = kvcache.get_backend("numpy")
LONG = list(range(1, 16))


def pool(**sizes):
    cache = CausalCache()
    cache.init("numpy", **({"max_sequences": 2, "capacity": 40, "max_batch": 20} | sizes))
    return cache


# Tokens are the session's own.


@pytest.mark.parametrize("name", ["full", "per-layer"])
def test_arrays_that_are_used_again(name):
    server = Server(MODELS[name](NUMPY))
    buffer, sampled = np.array(LONG, np.int32), np.zeros(1, np.int32)
    ids = [*LONG, 21, 22, 23]
    with server.prefix.session(buffer) as session:
        server.compute(session, ids, 0)
        buffer[:] = 9
        for sampled[0] in ids[15:]:
            session.extend(sampled)
        sampled[0] = 9
    assert session.remaining.tolist() == LONG
    with pytest.raises(ValueError, match="read-only"):
        session.remaining[0] = 5
    server.stored.append(ids)
    assert server.ask([*ids, 30]) == 18


def test_a_tensor_that_is_used_again():
    torch = pytest.importorskip("torch")
    server, buffer = Server(MODELS["full"](NUMPY)), torch.tensor(LONG, dtype=torch.int32)
    for tokens in (buffer, buffer.numpy()):
        with server.prefix.session(tokens, salt=type(tokens).__name__) as session:
            server.compute(session, LONG, 0)
            buffer[:] = 9
        buffer[:] = torch.tensor(LONG)
        assert server.ask([*LONG, 30], salt=type(tokens).__name__) == 15


# Owners.


def test_a_sequence_has_one_owner():
    cache = pool(max_sequences=4)
    one, two = PrefixCache(cache, sequences=[0, 1]), PrefixCache(cache, sequences=[2])
    for sequences in (None, [3, 1], [2]):
        with pytest.raises(KVCacheError, match=r"one owner; sequence \d is in use by another"):
            PrefixCache(cache, sequences=sequences)
    three = PrefixCache(cache, sequences=[3])
    assert {p.session([1]).sequence for p in (one, two, three)} == {0, 2, 3}


def test_a_prefix_cache_that_is_dropped_gives_its_sequences_back():
    cache = pool()
    gc.disable()  # dropped is dropped, without waiting for the collector
    try:
        for _ in range(3):
            prefix = PrefixCache(cache, budget=100)
            for ids in ([1, 2, 3], [4, 5, 6], [1, 2, 7]):
                run(cache, session := prefix.session(ids), ids)
                session.close()
            run(cache, session := prefix.session([1, 2]), [1, 2])
            del session, prefix  # one with a session that nobody ends
    finally:
        gc.enable()
    assert cache.next_position(0) == 2
    _prefix = PrefixCache(cache)
    assert cache.next_position(0) == 0


def run(cache, session, ids):
    start = session.matched
    count = len(ids) - start
    cache.start_forward(kvcache.Batch(range(start, len(ids)), [session.sequence] * count))
    keys = np.array(ids[start:], np.float32)[None, :, None]
    cache.put(keys, keys)


def test_sequences_in_use_by_hand_are_no_sessions():
    model = Pool(NUMPY, {}, max_sequences=3)
    model.run_all([(1, LONG, 0, 5)])
    with pytest.raises(KVCacheError, match=r"empty when .* sequence 1 holds 5 tokens"):
        PrefixCache(model.cache)
    prefix = PrefixCache(model.cache, sequences=[0, 2])
    model.run_all([(0, LONG, 0, 4)])
    with pytest.raises(KVCacheError, match="sequence 0 holds 4 tokens of no session"):
        prefix.session([1, 2])
    model.cache.remove(0, 0)
    assert prefix.session([1, 2]).sequence == 0


def test_a_part_of_a_wrapper_and_its_wrapper_have_the_same_owners():
    wrapper = kvcache.WrapperCache(pool(), pool())
    _prefix = PrefixCache(wrapper)
    with pytest.raises(KVCacheError, match="one owner"):
        PrefixCache(wrapper.caches[1])
    cache = pool()
    _other = PrefixCache(cache)
    with pytest.raises(ValueError, match="no owners of its own"):
        kvcache.WrapperCache(cache)


def test_copies_of_a_cache_have_no_owner():
    cache = pool()
    _prefix = PrefixCache(cache)
    for copy in (cache.copy(), cache.to_backend("numpy"), pickle.loads(pickle.dumps(cache))):
        PrefixCache(copy)


def test_a_pool_that_is_closed_or_made_anew_has_lost_all_tokens():
    cache = pool()
    prefix = PrefixCache(cache)
    session = prefix.session([1, 2, 3])
    run(cache, session, [1, 2, 3])
    cache.init("numpy", max_sequences=2, capacity=40, max_batch=20)
    run(cache, session, [4, 5])
    session.close()
    assert prefix.stats.nbytes == 0
    session = prefix.session([1, 2, 3])
    cache.close()
    with pytest.raises(KVCacheError, match="Call init"):
        session.close()
    cache.init("numpy", max_sequences=2, capacity=40, max_batch=20)
    both = prefix.session([1]), prefix.session([2])
    assert {session.sequence for session in both} == {0, 1}


# The end.


def test_close_ends_a_session_once():
    server = Server(MODELS["full"](NUMPY))
    for store in (False, True):
        session = server.begin(LONG)
        server.compute(session, LONG, 0)
        session.close(store=store)
        session.close()
        assert bool(server.prefix.stats.nbytes) is store
    check_accounts(server)


@pytest.mark.parametrize("name", ["full", "per-layer"])
def test_a_session_that_has_ended_owns_nothing(name):
    server = Server(MODELS[name](NUMPY))
    session = server.begin(LONG)
    session.close(store=False)
    for use in (
        lambda: session.sequence,
        lambda: session.caches,
        lambda: session.extend([1]),
        lambda: session.truncate(1),
        lambda: session.schedule([3]),
    ):
        with pytest.raises(KVCacheError, match="until it ends, and this one has ended"):
            use()
    assert session.matched == 0
    assert session.remaining.tolist() == LONG


@pytest.mark.parametrize("name", ["full", "window", "per-layer"])
def test_a_session_that_is_dropped_stores_nothing_and_blocks_nothing(name):
    server = Server(MODELS[name](NUMPY))
    server.ask(LONG)
    before = server.prefix.stats
    for _ in range(5):
        session = server.begin([*LONG, 16])
        server.compute(session, [*LONG, 16], session.matched)
        del session
    assert server.prefix.stats.active == 0
    session = server.begin([*LONG, 16])
    assert session.matched == 15
    session.close(store=False)
    assert server.prefix.stats.nbytes == before.nbytes
    assert server.prefix.stats.pinned == 0
    check_accounts(server)
    check_nothing_left(server)


def test_a_session_that_is_dropped_in_a_cycle_goes_with_the_collector():
    server = Server(MODELS["full"](NUMPY))
    session = server.begin(LONG)
    cycle = [session]
    cycle.append(cycle)
    del session, cycle
    gc.collect()
    server.prefix.clear()
    assert server.prefix.stats.active == 0


def test_a_session_may_be_dropped_in_the_middle_of_a_call():
    """By a thread that holds the lock: its sequence is given back later."""
    server = Server(MODELS["full"](NUMPY))
    open_ones, seen = [server.begin(LONG)], []

    def dropping(event):
        open_ones.clear()
        seen.append(len(server.prefix._requests._active))

    server.prefix.events.subscribe(dropping)
    server.ask(list(range(40, 58)))
    assert seen == [1], "the other one, though nobody has it"
    assert server.prefix.stats.active == 0
    check_accounts(server)


def test_an_ended_session_that_is_dropped_is_not_ended_again():
    server = Server(MODELS["full"](NUMPY))
    session = server.begin(LONG)
    session.close(store=False)
    other = server.begin(LONG)
    assert other.sequence == 0
    del session
    assert server.prefix.stats.active == 1
    assert not server.prefix._requests.dropped


def test_sessions_dropped_in_other_threads():
    server = Server(MODELS["full"](NUMPY))

    def work():
        for _ in range(50):
            try:
                server.prefix.session(LONG)
            except CacheFullError:
                continue

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert server.prefix.stats.active == 0
    check_nothing_left(server)


# Whatever raises.


class Boom(Exception):  # noqa: N818 - thrown by tests
    """Raised by a policy or a clock."""


class Fuse:
    """Raises at one call of all that it counts, 0 for none."""

    def __init__(self):
        self.left = 0

    def burn(self):
        self.left -= 1
        if self.left == 0:
            raise Boom


def policy_with(fuse, after):
    """An LRU policy that raises before it does its work, or after."""

    def wrapped(name):
        def call(self, *arguments):
            if not after:
                fuse.burn()
            result = getattr(LRU, name)(self, *arguments)
            if after:
                fuse.burn()
            return result

        return call

    names = ("use", "offer", "withdraw", "evict", "victim")
    return type("Fused", (LRU,), {name: wrapped(name) for name in names})()


def fused(name, budget, after):
    """A server whose policy and clock raise when a fuse has burnt down."""
    fuse = Fuse()

    def clock():
        fuse.burn()
        return 0.0

    server = Server(
        MODELS[name](NUMPY), budget=budget, policy=policy_with(fuse, after), clock=clock
    )
    server.ask(LONG)
    server.ask([*LONG[:8], 30, 31, 32])
    return server, fuse


PROMPTS = [LONG[:12], [*LONG[:8], 30, 40], [50, 51, 52], [*LONG, 60]]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("budget", [None, 500])
@pytest.mark.parametrize("name", ["full", "window", "per-layer"])
def test_a_policy_or_a_clock_that_raises_leaks_nothing(name, budget, after):
    for ids in PROMPTS:
        for moment in range(1, 100):
            server, fuse = fused(name, budget, after)
            before = server.prefix.stats
            fuse.left = moment
            session = None
            try:
                session = server.begin(ids)
                server.compute(session, ids, session.matched)
                session.close()
            except Boom:
                pass
            else:
                fuse.left = 0
                break
            fuse.left = 0
            if session is None:  # it never began
                assert server.prefix.stats.nbytes == before.nbytes
                assert server.prefix.stats.sessions == before.sessions
            check_accounts(server)
            assert server.prefix.stats.active == 0
            both = server.begin(ids), server.begin(ids)
            for other in both:
                other.close(store=False)
            server.ask(ids)
            check_accounts(server)
            server.prefix.clear()
        assert 3 < moment < 99


def test_a_salt_that_is_no_text_takes_no_sequence():
    server = Server(MODELS["full"](NUMPY))
    for salt in (["tenant"], None, 7, b"x"):
        with pytest.raises(TypeError, match="a salt"):
            server.prefix.session(LONG, salt=salt)
    both = server.begin([1]), server.begin([2])
    assert {session.sequence for session in both} == {0, 1}


@pytest.mark.parametrize("step", ["acquire", "restore", "track", "schedule"])
@pytest.mark.parametrize("model", [lambda: Pool(NUMPY, {}), lambda: Layers(NUMPY, {}, {})])
def test_a_step_of_a_beginning_that_raises_leaks_nothing(monkeypatch, model, step):
    server = Server(model())
    server.ask(LONG)
    handle = server.prefix._source.acquire()
    kind = type(server.prefix._source if step == "acquire" else handle)
    handle.release()
    before = server.prefix.stats
    with monkeypatch.context() as patch:
        patch.setattr(kind, step, raising)
        with pytest.raises(Boom):
            server.prefix.session([*LONG, 16])
    assert server.prefix.stats == before
    assert server.ask([*LONG, 16]) == 15
    both = server.begin([1]), server.begin([2])
    for session in both:
        session.close()
    check_accounts(server)
    check_nothing_left(server)


def raising(*arguments):
    raise Boom


@pytest.mark.parametrize("step", ["update_known", "held", "capture", "release"])
@pytest.mark.parametrize("model", [lambda: Pool(NUMPY, {}), lambda: Layers(NUMPY, {}, {})])
def test_a_step_of_an_end_that_raises_leaks_nothing(monkeypatch, model, step):
    server = Server(model())
    server.ask(LONG[:8])
    before = server.prefix.stats.nbytes
    session = server.begin(LONG)
    server.compute(session, LONG, session.matched)
    with monkeypatch.context() as patch:
        if step == "release":
            patch.setattr(kvcache.pool.base.Cache, "remove", raising)
            patch.setattr(kvcache.LayerCaches, "reset", raising)
        else:
            patch.setattr(type(session._request.handle), step, raising)
        with pytest.raises(Boom):
            session.close()
    assert server.prefix.stats.active == server.prefix.stats.pinned == 0
    if step != "release":
        assert server.prefix.stats.nbytes == before
        check_accounts(server)
        assert server.ask(LONG) == 8


def test_no_session_warns_when_the_interpreter_collects_it():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        server = Server(MODELS["full"](NUMPY))
        server.begin(LONG)
        del server
        gc.collect()
