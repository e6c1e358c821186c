"""Odd arguments at the doors of the prefix cache: named errors, and nothing has changed."""

import math
from collections import deque
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvcache
from kvcache import CausalCache, KVCache, KVCacheError, LayerCaches, Snapshot
from kvcache.prefix import EvictionPolicy, PrefixCache, PrefixTrie, register_metrics
from kvcache.prefix.policies import LRU, POLICIES, S3FIFO, Cost, Gittins, make_policy
from kvcache.prefix.simulation.replay import found_without_limit, optimum, replay
from kvcache.prefix.simulation.report import run_simulation
from kvcache.prefix.simulation.trace import Request
from kvcache.stores import MemoryStore

from .served import Layers, Pool, Server, check_accounts

NUMPY = kvcache.get_backend("numpy")
STORED = list(range(12))


class Unreadable:
    """An array that cannot be read, as one inside of a transform."""

    def __array__(self, dtype=None, copy=None):
        raise RuntimeError("no values here")

    def __index__(self):
        raise RuntimeError("no number here")


ODD_SCALARS = [
    *("1", "", b"1", "NaN", 1.0, -1.0, math.nan, math.inf, 1e308),
    *(True, False, -1, 2**70, -(2**70), 10**400, 1j, None, ..., object(), Unreadable()),
    *(np.float32(2), np.bool_(True), np.array(1.5), np.array([1, 2]), np.datetime64("2020")),
]
ODD_LISTS = [
    *([], [[]], [1.0], [1.5, 2], [math.nan], ["1"], ["a", 2], [None], [[1, 2]], [[1], [2, 3]]),
    *([-1], [1, -2], [2**31], [2**70], [True, False], [b"x"], [1j], [[1, 2], 3], [{}], [object()]),
    *(
        (),
        {1, 2},
        {},
        {1: 2},
        deque(["x"]),
        range(-3, 3),
        "12",
        b"12",
        {1.5: 2}.keys(),
        Unreadable(),
    ),
    *(np.array([1.0]), np.array([[1]]), np.array(["1"]), np.array([True]), np.zeros(0)),
    *(np.array([None]), np.array([2**40]), np.array([1, 2], "M8[s]"), np.array([(1, 2)], "i4,i4")),
    *(np.ma.masked_array([1, 2], [True, False]), memoryview(b"12"), [Unreadable()]),
]
ODD_MEDIA = [
    *({3: "x"}, {(0,): "x"}, {(0, 1, 2): "x"}, {"ab": "x"}, {(0.0, 1): "x"}, {(0, None): "x"}),
    *({(0, 1): 7}, {(0, 1): None}, {(0, 1): ""}, {(0, 1): b""}, {(0, 1): bytearray(b"x")}),
    *({(2, 1): "x"}, {(1, 1): "x"}, {(-1, 1): "x"}, {(0, 99): "x"}, {(0, 2**70): "x"}),
    *({(0, 2): "x", (1, 3): "y"}, {None: "x"}, {(0, 1): ["x"]}, [((0, 1), "x")], [(0, 1)], 0, ""),
    *({(0, 1): np.array([1])}, {(True, 2.0): "x"}, {((0, 1), (2, 3)): "x"}),
]
ODD = [*ODD_SCALARS, *ODD_LISTS, *ODD_MEDIA]


POOL = (
    "sessions over a pool share its cache",
    "a prefix cache over a pool stores what its sessions",
)
KNOWN = ("got ", "there is no policy", "nothing is stored for these", "Compute anew", *POOL)


def named(call, *arguments, **options):
    """The error of a call, which has to be one of kvcache; None if it raised none."""
    error = None
    try:
        call(*arguments, **options)
    except (TypeError, ValueError, KVCacheError, KeyError) as raised:
        error = raised
    assert error is None or any(text in str(error) for text in KNOWN), repr(error)
    return error


def server_of(model=None, **options):
    """A prefix cache with something stored, under two salts."""
    server = Server(model or Pool(NUMPY, {"window": 6}), **options)
    server.ask(STORED[:10], [40, 41])
    server.ask(STORED[:6], salt="tenant")
    return server


def state_of(server):
    """All that can be seen of a prefix cache."""
    pools = getattr(server.model, "caches", [])
    held = [[pool.next_position(sequence) for sequence in range(2)] for pool in pools]
    pytest.importorskip("rich")
    return server.prefix.stats, server.prefix.render(), held


def unchanged(server, call, *arguments, **options):
    """Whether a call raised; if so, nothing has changed."""
    before = state_of(server)
    error = named(call, *arguments, **options)
    if error is None:
        return False
    assert state_of(server) == before
    check_accounts(server)
    return True


def passed_over(server, **options):
    """Whether a session did not begin, and nothing has changed; one that begins ends at once."""

    def session():
        server.prefix.session(**options).__exit__(None, None, None)

    return unchanged(server, session)


MODELS = {
    "pool": lambda: Pool(NUMPY, {"window": 6}),
    "layers": lambda: Layers(NUMPY, {"max_size": 6}, {}),
}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]()


# Any value at any door. In loops: a case of its own for each would be a thousand tests.


DOORS = ["tokens", "salt", "media", "resume_points", "wait", "deadline", "keep_on_error", "retain"]


@pytest.mark.parametrize("name", DOORS)
@pytest.mark.parametrize("kind", MODELS)
def test_a_session_begins_or_nothing_has_changed(kind, name):
    server = server_of(MODELS[kind]())
    for odd in ODD:
        if not passed_over(server, **{"tokens": [1, 2, 3, 4]} | {name: odd}):
            server = server_of(MODELS[kind]())


@pytest.mark.parametrize("name", ["extend", "schedule", "truncate", "drop_branch", "adopt"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_session_goes_on_as_if_it_had_not_been_called_oddly(kind, name):
    for odd in ODD:
        server = server_of(MODELS[kind]())
        session = server.begin([7, 8, 9])
        server.compute(session, [7, 8, 9, 10], 0)
        if unchanged(server, getattr(session, name), odd):
            session.extend([10])
            session.__exit__(None, None, None)
            assert server.ask([7, 8, 9, 10, 11]) == 4


@pytest.mark.parametrize("name", ["decode", "other_salts"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_session_is_explained_or_nothing_is_counted(kind, name):
    server = server_of(MODELS[kind]())
    with server.begin([*STORED[:4], 70, 71]) as session:
        for odd in ODD:
            raised = unchanged(server, session.explain, **{name: odd})
            assert raised != (odd is None if name == "decode" else isinstance(odd, bool))
            if name == "decode":  # also where it returns what is no text
                raised = unchanged(server, session.explain, decode=lambda ids, odd=odd: odd)
                assert raised != isinstance(odd, str)


@pytest.mark.parametrize("name", ["tokens", "caches", "salt", "media", "retain"])
@pytest.mark.parametrize("kind", MODELS)
def test_caches_are_inserted_or_nothing_has_changed(kind, name):
    for odd in ODD:
        server, other = server_of(MODELS[kind]()), Server(MODELS["layers"]())
        session = other.begin([7, 8, 9])
        other.compute(session, [7, 8, 9], 0)
        caches = session.detach()
        given = {"tokens": [7, 8, 9], "caches": caches} | {name: odd}
        if unchanged(server, server.prefix.insert, **given):
            assert caches.offset == 3


@pytest.mark.parametrize("name", ["tokens", "position", "salt", "media"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_branch_is_dropped_or_nothing_has_changed(kind, name):
    server = server_of(MODELS[kind]())
    for odd in ODD:
        asked = {"tokens": STORED[:10], "position": 9} | {name: odd}
        if not unchanged(server, server.prefix.drop_branch, **asked):
            server = server_of(MODELS[kind]())


MADE_WITH = ["budget", "policy", "sequences", "namespace", "clock", "index_budget", "resume_every"]


@pytest.mark.parametrize("name", [*MADE_WITH, "quota", "seal", "page_tokens"])
@pytest.mark.parametrize("kind", MODELS)
def test_a_prefix_cache_is_made_or_its_cache_is_free(kind, name):
    for odd in ODD:
        model = MODELS[kind]()
        if named(PrefixCache, model.given, **{name: odd}):
            assert Server(model).ask([1, 2, 3]) == 0


@pytest.mark.parametrize("kind", MODELS)
def test_quotas_and_seals_of_a_salt(kind):
    """What a function returns is looked at when it is asked: at the end, and at the beginning."""
    for odd in ODD:
        server = Server(MODELS[kind](), quota=lambda salt, odd=odd: odd)
        named(ask, server)
        assert server.prefix.stats.active == 0
        with MemoryStore() as store:
            options = {"store": store, "namespace": "m", "seal": lambda salt, odd=odd: odd}
            server = Server(MODELS[kind](), **options)
            named(ask, server)  # per-layer caches look nothing up before they know their backend
            assert passed_over(server, tokens=[17, 18, 19]) == (odd is not None)
            assert server.prefix.stats.active == 0
            server.prefix.close()


def ask(server):
    """A whole session; it ends also if its end raises."""
    with server.begin([7, 8, 9]) as session:
        server.compute(session, [7, 8, 9], 0)


def test_a_prefix_cache_is_over_caches():
    for odd in [*ODD, KVCache(), [KVCache(), None], [CausalCache()], LayerCaches([]), KVCache]:
        assert named(PrefixCache, odd)


def test_drawings_and_subscribers():
    server = server_of()
    for odd in ODD:
        for name in ("decode", "width"):
            unchanged(server, server.prefix.render, **{name: odd})
        assert unchanged(server, server.prefix.events.subscribe, odd)


def test_metrics():
    client = pytest.importorskip("prometheus_client")
    server = server_of()
    for odd in ODD:
        registry = client.CollectorRegistry()
        assert named(register_metrics, odd, registry)
        if odd is not None:  # the default registry
            assert named(register_metrics, server.prefix, odd)
        if not isinstance(odd, str) or not odd.isalpha():  # "NaN" is a name like any other
            assert named(register_metrics, server.prefix, registry, odd)
            assert not client.generate_latest(registry)


def stored_entry(trie, tokens):
    cache = KVCache("numpy")
    cache.update(*(np.ones((1, 1, len(tokens), 2), np.float32),) * 2)
    trie.insert(tokens, [cache])
    return cache


def test_a_trie():
    trie = PrefixTrie()
    cache = stored_entry(trie, [1, 2, 3])

    def seen():
        return len(trie), trie.nbytes, trie.find_nearest([1, 2, 3, 4])[1]

    before = seen()
    for odd in [*ODD, [None], cache, [CausalCache()]]:
        assert named(trie.insert, [1, 2, 3], odd)
        assert named(trie.insert, odd, [cache])
        assert named(trie.remove, odd)
        named(trie.find_nearest, odd)
        named(PrefixTrie, budget=odd)
        assert seen() == before


REQUESTS = [Request(0.0, [1, 2]), Request(1.0, [1])]
SIMULATION = {
    "trace": "t",
    "requests": REQUESTS,
    "policies": ["lru"],
    "capacities": [16],
    "block_size": 8,
}


def test_simulations():
    for odd in ODD:
        for name in ("requests", "policies", "capacities", "block_size", "tick", "seeds"):
            named(run_simulation, **SIMULATION | {name: odd})
        named(Request, odd, [1])
        named(Request, 1.0, odd)
        assert named(replay, REQUESTS, odd, 4)
        named(replay, REQUESTS, LRU(), odd)
        named(replay, REQUESTS, LRU(), 4, odd)
        named(Request, 1.0, [1], odd)
        named(optimum, REQUESTS, odd)
        for bound in (lambda requests: optimum(requests, 4), found_without_limit):
            named(bound, odd)


def test_policies():
    for odd in ODD:
        assert named(make_policy, odd)
        named(S3FIFO, odd)
        named(Gittins, odd)
        assert named(Cost, odd)


def test_snapshots_in_files(tmp_path):
    cache = stored_entry(PrefixTrie(), [1, 2, 3])
    path = tmp_path / "one"
    with cache.snapshot() as snapshot:
        for odd in ODD:
            if odd is not None:
                assert named(snapshot.save, path, tokens=odd)
            if not isinstance(odd, str):
                assert named(snapshot.save, path, fingerprint=odd)
            assert not path.exists()
        snapshot.save(path, tokens=[1, 2, 3])
    for odd in ODD:
        named(Snapshot.load, path, tokens=odd)
        named(Snapshot.load, path, fingerprint=odd)


scalars = st.one_of(st.integers(), st.floats(), st.booleans(), st.none(), st.text(max_size=3))
nested = st.recursive(scalars, lambda parts: st.lists(parts, max_size=4), max_leaves=8)


@settings(deadline=None)
@given(nested)
def test_tokens_nested_and_mixed_in_any_way(tokens):
    server, trie = server_of(), PrefixTrie()
    cache = stored_entry(trie, [1, 2, 3])
    ids = isinstance(tokens, list) and all(type(x) in {int, bool} for x in tokens)
    good = ids and tokens and all(0 <= x < 2**31 for x in tokens)
    good = good and not all(type(x) is bool for x in tokens)
    begun = not passed_over(server, tokens=tokens)
    found = named(trie.find_nearest, tokens) is None
    assert begun == found == bool(good)
    with cache.snapshot() as snapshot, TemporaryDirectory() as folder:
        saved = named(snapshot.save, Path(folder) / "one", tokens=tokens) is None
        assert saved == (tokens is None or bool(good and len(tokens) == 3))


# What is wrong, what is said, and what is a remedy.


NAN, DAY = math.nan, 86_400.0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"budget": "1"}, TypeError, "budget must be an integer; got '1'"),
        ({"budget": 1.0}, TypeError, r"budget must be an integer; got 1\.0"),
        ({"budget": NAN}, TypeError, "budget must be an integer; got nan"),
        ({"budget": True}, TypeError, "budget must be an integer; got True. Give bytes, or None"),
        ({"budget": -1}, ValueError, "bytes >= 0, or None for no limit; got -1"),
        ({"policy": LRU}, TypeError, "a policy is a name or an object of a class derived"),
        ({"policy": object()}, TypeError, "a policy is a name or an object of a class derived"),
        ({"policy": "best"}, ValueError, "take lru, s3fifo, cost, gittins"),
        ({"sequences": [1.0]}, TypeError, r"each of sequences must be an integer; got 1\.0"),
        ({"sequences": 1}, TypeError, "sequences must be a list of integers; got 1"),
        ({"namespace": b"model"}, TypeError, "a namespace tells models apart, a str; got b'model'"),
        ({"clock": 5}, TypeError, "a clock is a function without arguments .* got 5"),
    ],
)
def test_what_a_prefix_cache_cannot_be_made_with(model, options, error, message):
    with pytest.raises(error, match=message):
        PrefixCache(model.given, **options)


def test_sessions_over_no_sequence():
    with pytest.raises(ValueError, match=r"sessions need a sequence each; got none\. Name some"):
        PrefixCache(MODELS["pool"]().given, sequences=[])


@pytest.mark.parametrize(
    ("cache", "message"),
    [
        (None, "one cache of several sequences, or per-layer caches.* got None"),
        (KVCache(), "one cache for each layer; got <KVCache .* Put it in a list"),
        ([KVCache(), 3], "one cache for each layer; got"),
        ([CausalCache()], "one cache for each layer; got"),
    ],
)
def test_what_a_prefix_cache_is_not_over(cache, message):
    with pytest.raises(TypeError, match=message):
        PrefixCache(cache)


def test_the_callers_caches_are_its_own():
    given = [KVCache("numpy")]
    prefix = PrefixCache(given)
    given[0].update(*(np.ones((1, 1, 2, 2), np.float32),) * 2)
    assert prefix.session([1, 2]).caches.offset == 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"salt": ["tenant"]}, TypeError, r"a salt tells tenants apart, a str; got \['tenant'\]"),
        ({"salt": 7}, TypeError, "a salt tells tenants apart, a str; got 7"),
        ({"media": 0}, TypeError, "media map places .* to digests, bytes or str; got 0"),
        ({"media": {3: "x"}}, ValueError, "media map places .* got 3 for a place"),
        ({"media": {(0, 1.0): "x"}}, TypeError, "the stop of a medium must be an integer; got 1"),
        ({"media": {(0, 1): ""}}, ValueError, r"got '' for \[0, 1\). Hash its content"),
        ({"resume_points": [-1]}, ValueError, "resume_points are positions >= 0; got -1"),
        ({"resume_points": 3}, TypeError, "resume_points must be a list of integers; got 3"),
        ({"tokens": [1, -2]}, ValueError, "token ids are >= 0 .* got -2.*leave out padding"),
        ({"tokens": [[1], [2, 3]]}, ValueError, r"must be a list of integers on the host; got \["),
        ({"tokens": [[1, 2]]}, ValueError, r"lists of integers; got int64 \(1, 2\). Give a list"),
        ({"tokens": [1.0]}, ValueError, "lists of integers; got float64"),
        ({"tokens": [2**31]}, ValueError, "token ids are int32; got 2147483648"),
        ({"tokens": "12"}, ValueError, "lists of integers; got <U2"),
    ],
)
def test_what_a_session_cannot_begin_with(model, options, error, message):
    server = server_of(model)
    before = state_of(server)
    for _ in range(4):  # more than there are sequences
        with pytest.raises(error, match=message):
            server.prefix.session(**{"tokens": [1, 2, 3]} | options)
    assert state_of(server) == before


def test_any_text_is_a_digest_and_a_salt():
    server = server_of()
    for text in ("\ud800", "\0", "[red]", "😀"):
        with server.prefix.session([1, 2, 3], salt=text, media={(0, 1): text}) as session:
            assert session.matched == 0


# Clocks.


@pytest.mark.parametrize(
    ("time", "error"),
    [
        *((NAN, ValueError), (math.inf, ValueError), ("5", TypeError), (None, TypeError)),
        *(([1.0], TypeError), (1j, TypeError)),
        pytest.param(10**400, ValueError, id="too large for a float"),
    ],
)
def test_a_clock_returns_seconds(time, error):
    prefix = PrefixCache([KVCache("numpy")], clock=lambda: time)
    with pytest.raises(error, match="a clock returns seconds, a finite number; got"):
        prefix.session([1, 2, 3])


class Timed(LRU):
    """A policy that notes the times that it is given."""

    def __init__(self):
        super().__init__()
        self.times = []

    def use(self, span, now):
        self.times.append(now)


def test_time_stands_still_for_policies_while_the_clock_is_behind():
    times, policy = iter([5.0, 6, 2.0, np.float32(3), 7, 1, 8, 9] * 2), Timed()
    server = Server(Pool(NUMPY, {}), policy=policy, clock=lambda: next(times))
    for _ in range(4):
        server.ask([1, 2, 3, 4])
    assert len(policy.times) == 4
    assert policy.times == sorted(policy.times)


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_works_with_a_clock_that_is_set_back(policy):
    times = iter([DAY, 2 * DAY, 0.0, -DAY, DAY] * 40)
    server = server_of(Pool(NUMPY, {}), policy=policy, budget=200, clock=lambda: next(times))
    for number in range(20):
        server.ask([number % 5, *range(10)])
    assert server.prefix.stats.evictions
    check_accounts(server)


# Callbacks and policies of one's own.


class Choosing(EvictionPolicy):
    """A policy that chooses no span."""

    def offer(self, span):
        pass

    def withdraw(self, span):
        pass

    def victim(self, now):
        return "the first"


def test_a_policy_that_chooses_no_span():
    server = Server(Pool(NUMPY, {}), policy=Choosing(), budget=0)
    with pytest.raises(KVCacheError, match="Choosing chose 'the first', which it was not"):
        server.ask([1, 2, 3])
    assert server.prefix.stats.active == 0


@pytest.mark.parametrize("cost", [NAN, math.inf, "3", None])
def test_a_cost_is_a_number(cost):
    server = Server(Pool(NUMPY, {}), policy=Cost(lambda start, stop: cost))
    with pytest.raises((TypeError, ValueError), match="cost returns the cost of tokens, a finite"):
        server.ask([1, 2, 3])


@pytest.mark.parametrize("small", [-0.1, 1.5, NAN, "0.1"])
def test_a_share_is_from_0_to_1(small):
    with pytest.raises((TypeError, ValueError), match="small is a share of all candidates, 0 to 1"):
        S3FIFO(small)


# The others.


@pytest.mark.parametrize(
    ("budget", "error", "message"),
    [
        ("1", TypeError, "budget must be an integer; got '1'"),
        (1.0, TypeError, "budget must be an integer; got 1.0"),
        (False, TypeError, "budget must be an integer; got False"),
        (-1, ValueError, "a budget is bytes >= 0, or None for no limit; got -1"),
    ],
)
def test_budgets_of_a_trie(budget, error, message):
    with pytest.raises(error, match=message):
        PrefixTrie(budget=budget)


@pytest.mark.parametrize("call", ["insert", "find_nearest"])
def test_tokens_of_a_trie(call):
    arguments = [[KVCache("numpy")]] if call == "insert" else []
    for tokens, message in (
        ([], "at least one token; got 0 tokens"),
        ([1, -1], "token ids are >= 0 .* got -1"),
        ([1.5], "lists of integers; got float64"),
    ):
        with pytest.raises(ValueError, match=message):
            getattr(PrefixTrie(), call)(tokens, *arguments)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"requests": [1]}, TypeError, "a list of requests, as read_trace returns; got 1"),
        ({"requests": None}, TypeError, "a list of requests, as read_trace returns; got None"),
        ({"requests": REQUESTS[::-1]}, ValueError, r"got 0\.0 s after 1\.0 s.* Sort them"),
        ({"policies": "lru"}, TypeError, "policies are a list of names; got 'lru'"),
        ({"policies": [LRU()]}, TypeError, "each policy anew, by its name, a str; got"),
        ({"capacities": []}, ValueError, "at least one capacity; got none"),
        ({"capacities": [16.0]}, TypeError, r"each of capacities must be an integer; got 16\.0"),
        ({"block_size": "8"}, TypeError, "block_size must be an integer; got '8'"),
        ({"tick": 3}, TypeError, "tick is a function without arguments; got 3"),
    ],
)
def test_what_cannot_be_simulated(options, error, message):
    with pytest.raises(error, match=message):
        run_simulation(**SIMULATION | options)


@pytest.mark.parametrize("now", [NAN, math.inf, "5", None])
def test_requests_have_a_time(now):
    with pytest.raises((TypeError, ValueError), match="now is in seconds, a finite number; got"):
        Request(now, [1])


def test_a_simulation_once_for_each_policy_and_capacity():
    options = {"policies": ["lru", "lru"], "capacities": [16, np.int64(16)]}
    simulation = run_simulation(**SIMULATION | options)
    assert [each.policy for each in simulation.outcomes] == ["lru", "ceiling", "optimum"]
    with pytest.raises(KeyError, match="there is no 'cost' at 16 tokens; simulated were lru"):
        simulation.rate("cost", 16)


@pytest.mark.parametrize("tokens", [[1, 2], [1, 2, 3, 4], []])
def test_a_snapshot_is_of_all_tokens_before_its_stop(tokens, tmp_path):
    cache = stored_entry(PrefixTrie(), [1, 2, 3])
    with cache.snapshot(1) as snapshot:
        message = f"all before its stop, 3; got {len(tokens)}. Give those before its start"
        with pytest.raises(ValueError, match=message):
            snapshot.save(tmp_path / "one", tokens=tokens)
        assert not list(tmp_path.iterdir())
        snapshot.save(tmp_path / "one", tokens=[1, 2, 3])
    assert Snapshot.load(tmp_path / "one", tokens=np.array([1, 2, 3])).start == 1
    with pytest.raises(ValueError, match="token ids are >= 0; got -1"):
        Snapshot.load(tmp_path / "one", tokens=[1, 2, -1])
