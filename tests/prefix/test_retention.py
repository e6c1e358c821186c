"""Spans that are retained: how priorities fall, and the order in which spans go."""

import math
import random
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import kvcache
from kvcache import KVCache, KVCacheError, RotatingKVCache
from kvcache.prefix import PrefixCache
from kvcache.prefix.policies import LRU, POLICIES
from kvcache.prefix.retention import Retention

from .. import peek
from .retaining import INF, ROW, Model, levels
from .served import MODELS, Server, check_accounts, check_nothing_left
from .test_index import World

NUMPY = kvcache.get_backend("numpy")


# How a priority falls.


@given(
    st.integers(1, 100),
    st.sampled_from([0.25, 1.0, 4.0, 64.0, 3600.0]),
    st.sampled_from([0.0, 1.0, 1e6]),
    st.integers(0, 300),
)
def test_a_priority_falls_in_whole_steps(priority, seconds, since, step):
    """At any time it is the whole one times the share of time that is left, rounded up."""
    retention = Retention(priority, seconds, since)
    now = since + seconds * step / 256
    left = max(Fraction(0), Fraction(since) + Fraction(seconds) - Fraction(now))
    assert retention.level(now) == math.ceil(priority * left / Fraction(seconds))


@given(
    st.integers(1, 100),
    st.floats(min_value=5e-324, allow_infinity=False),
    st.floats(-1e9, 1e9),
)
def test_every_level_ends_at_its_time_whatever_is_rounded(priority, seconds, since):
    retention = Retention(priority, seconds, since)
    for level in {1, priority // 2 + 1, priority}:
        time = retention.until(level)
        if math.isfinite(time) and math.isfinite(retention.expires):
            assert retention.level(time) < level


def test_a_pin_never_falls():
    assert Retention(3, INF).level(1e300) == 3
    assert Retention(3, INF).outranks(Retention(3, 1e300, 5.0), 5.0)
    assert not Retention(3, INF).outranks(Retention(4, 10.0, 5.0), 5.0)


# The order in which spans go.


def order(world):
    """First tokens of all spans in the order in which they are evicted."""
    gone = []
    while world.index.nbytes:
        kept = {span.node.first for span in world.spans() if span.payload}
        world.trim(world.index.nbytes - 1)
        gone += kept - {span.node.first for span in world.spans() if span.payload}
    return gone


def keep(world, *firsts, priority=None, seconds=INF):
    for first in firsts:
        world.ask([first])
        if priority is not None:
            world.index.retain(world.spans()[-1:], priority, seconds, world.now)
        world.now += 1.0


def retain(world, first, priority, seconds):
    [span] = [span for span in world.spans() if span.node.first == first]
    world.index.retain([span], priority, seconds, world.now)


@pytest.mark.parametrize("name", POLICIES)
def test_the_least_retained_go_last_under_every_policy(name):
    world = World(name)
    keep(world, 1, 2, priority=50)
    keep(world, 3, 4, priority=9)
    keep(world, 5, 6)
    gone = order(world)
    assert (set(gone[:2]), gone[2:]) == ({5, 6}, [3, 4, 1, 2])
    assert world.index.retained_evictions == 4
    assert world.index.evictions == 6
    world.check()


def test_among_equals_the_least_recently_used_goes():
    world = World()
    keep(world, 1, 2, 3, priority=5)
    world.ask([1])
    assert order(world) == [2, 3, 1]


def test_what_is_retained_falls_behind_while_time_passes():
    world = World()
    keep(world, 1, priority=100, seconds=100.0)
    keep(world, 2, priority=30)
    world.now = 69.0  # 31 of 100 are left
    assert world.spans()[0].retention.level(world.now) == 31
    world.trim(3)
    assert [span.node.first for span in world.spans() if span.payload] == [1]
    world = World()
    keep(world, 1, priority=100, seconds=100.0)
    keep(world, 2, priority=30)
    world.now = 71.0
    assert order(world) == [1, 2]


def test_what_has_expired_is_a_candidate_like_others():
    world = World()
    keep(world, 1, priority=100, seconds=10.0)
    keep(world, 2)
    assert order(world) == [2, 1]
    world = World()
    keep(world, 1, priority=100, seconds=10.0)
    keep(world, 2)
    world.now = 10.0
    assert order(world) == [1, 2]
    assert world.index.retained_evictions == 0


def test_time_passes_for_spans_that_are_no_candidates_as_well():
    """Those in use, and those with others behind them."""
    world = World()
    world.ask([1, 2])
    world.ask([1, 2, 3])
    world.index.retain(world.spans(), 7, 8.0, 0.0)
    world.pin([1, 2])
    world.now = 8.0
    world.index.trim(world.now)
    assert [span.retention for span in world.spans()] == [None, None]
    world.check()
    world.unpin(0)
    world.trim(0)
    assert world.index.retained_evictions == 0


def test_the_stronger_of_two_counts():
    world = World()
    keep(world, 1)
    for priority, seconds, now, level in [
        (10, 100.0, 1.0, 10),
        (9, INF, 1.0, 10),  # less, though for longer
        (10, 50.0, 1.0, 10),  # not as long
        (10, 200.0, 1.0, 10),
        (8, 100.0, 51.0, 8),  # by now 7.5 of 10 are left, which is 8, and for longer
        (8, 400.0, 51.0, 8),
        (8, INF, 51.0, 8),
        (90, 1.0, 51.0, 90),
    ]:
        world.now = now
        retain(world, 1, priority, seconds)
        [span] = world.spans()
        assert span.retention.level(now) == level
        stays = (9, INF), (10, 50.0), (8, 100.0)
        assert (span.retention.seconds == seconds) == ((priority, seconds) not in stays)
        world.check()


def test_both_parts_of_a_span_are_retained_and_may_be_one_again():
    world, ids = World(), list(range(20))
    world.ask(ids)
    world.index.retain(world.spans(), 5, 100.0, 0.0)
    for stop in (4, 8, 12, 16):
        world.part(ids[:stop])
        world.check()
    assert {span.retention.level(1.0) for span in world.spans()} == {5}
    world.pin(ids)
    world.unpin(0)
    assert len(world.spans()) == 1
    world.part(ids[:8])
    world.index.retain(world.spans()[:1], 6, 100.0, 0.0)
    world.part(ids[:4])
    world.part(ids[:12])
    world.pin(ids)
    world.unpin(0)
    assert len(world.spans()) == 4, "they differ"
    world.now = 100.0
    world.index.trim(world.now)
    world.pin(ids)
    world.unpin(0)
    assert len(world.spans()) == 1
    world.check()


def test_entries_of_retention_that_was_replaced_are_bounded():
    world = World()
    keep(world, *range(10))
    before = world.index.index_nbytes
    for turn in range(5_000):
        retain(world, turn % 10, 5, 1_000.0 + turn)
    assert len(peek.retention_steps(world.index)) < 100
    assert world.index.index_nbytes < before + 20_000
    world.trim(0)
    world.index.forget_ghosts()
    assert world.index._tracked == 0


def test_a_policy_cannot_choose_what_it_was_not_offered():
    class Stubborn(LRU):
        span = None

        def offer(self, span):
            self.span = span

        def withdraw(self, span):
            pass

        def victim(self, now):
            return self.span

    world = World(Stubborn())
    keep(world, 1, priority=5)
    world.index.policy.span = world.spans()[0]
    with pytest.raises(KVCacheError, match="among the spans it was offered"):
        world.trim(0)


# Sessions.


def test_what_a_session_retains_stays_and_nothing_else():
    model, system = Model(budget=40 * ROW), list(range(100, 110))
    model.ask(system, retain=(50, 60.0))
    for first in range(40):
        model.now += 1.0
        model.ask([first, *range(20)])
        assert model.stored(system) == 10
    assert model.prefix.stats.retained_evictions == 0
    model.now = 60.0
    for first in range(50, 54):
        model.ask([first, *range(20)])
    assert model.stored(system) == 0


def test_of_ranges_only_the_tokens_named_are_retained():
    model, ids = Model(), list(range(20))
    model.ask(ids[:7])
    model.ask(ids, retain={(12, None): (3, INF), (4, 9): (8, INF)})
    wanted = [0] * 4 + [8] * 5 + [0] * 3 + [3] * 8
    assert [level for _, level in sorted(levels(model.prefix, 0.0).items())] == wanted
    check_accounts(model)
    model.prefix.trim(16 * ROW)  # what is behind builds on all before: it goes first
    assert model.stored(ids) == 12


def test_a_range_does_not_reach_into_what_others_stored_behind():
    model, ids = Model(), list(range(20))
    model.ask(ids)
    model.ask(ids[:10], retain=(5, INF))
    found = [level for _, level in sorted(levels(model.prefix, 0.0).items())]
    assert found == [5] * 10 + [0] * 10


def test_a_session_that_stores_nothing_retains_nothing():
    model, ids = Model(), list(range(10))
    model.ask(ids)
    model.ask(ids, store=False, retain=(5, INF))
    with pytest.raises(RuntimeError), model.begin(ids, retain=(5, INF), keep_on_error=False):
        raise RuntimeError
    assert set(levels(model.prefix, 0.0).values()) == {0}
    model.begin(ids, retain=(5, INF)).close()  # computes nothing, and keeps what it has
    assert [n for _, n in sorted(levels(model.prefix, 0.0).items())] == [5] * 9 + [0]


def test_retention_begins_with_a_commit_and_again_at_the_end():
    model, ids = Model(), list(range(10))
    session = model.begin(ids, retain=(4, 8.0))
    model.compute(session, ids, 0)
    session.commit()
    model.now = 6.0
    assert set(levels(model.prefix, model.now).values()) == {1}
    session.close()
    assert set(levels(model.prefix, model.now).values()) == {4}


def test_inserted_tokens_are_retained():
    model, ids = Model(), list(range(10))
    session = model.begin(ids)
    model.compute(session, ids, 0)
    model.prefix.insert(ids, session.detach(), retain=(5, INF))
    assert set(levels(model.prefix, 0.0).values()) == {5}


@pytest.mark.parametrize("name", ["full", "window", "hybrid pool", "hybrid"])
def test_a_pool_in_which_everything_is_pinned_goes_on_serving(name):
    server, chance = Server(MODELS[name](NUMPY), budget=1_500), random.Random(4)
    for _ in range(30):
        ids = [chance.randrange(3) for _ in range(chance.randrange(1, 16))]
        server.ask(ids, retain=(chance.randrange(1, 101), INF))
        assert server.prefix.stats.nbytes <= 1_500
    stats = server.prefix.stats
    assert 0 < stats.retained_evictions <= stats.evictions
    check_accounts(server)
    check_nothing_left(server)


def test_of_pins_the_lowest_priority_goes():
    model = Model(budget=30 * ROW)
    for first, priority in [(1, 50), (2, 3), (3, 70)]:
        model.ask([first, *range(9)], retain=(priority, INF))
    model.ask([4, *range(9)], retain=(9, INF))
    assert [model.stored([first, *range(9)]) for first in (1, 2, 3, 4)] == [10, 0, 10, 10]
    model.ask([5, *range(9)])  # not retained, so it goes at once
    assert model.stored([5, *range(9)]) == 0


def test_a_retained_end_stays_a_resume_point_though_its_sequence_goes_on():
    """Where a window drops tokens: of others, only what their last turn needs would be left."""
    system, turn = list(range(1, 9)), list(range(1, 15))
    found = []
    for retained in (None, (5, INF)):
        server = Server(MODELS["rotating"](NUMPY))
        server.ask(system, retain=retained)
        server.ask(turn)
        server.prefix.trim(server.prefix.stats.nbytes - 1)
        found.append(server.ask([*system, 50]))
    assert found == [0, 8]


def test_the_end_of_a_range_is_a_resume_point():
    server, ids = Server(MODELS["rotating"](NUMPY)), list(range(1, 15))
    server.ask(ids, retain={(0, 5): (5, INF), (7, None): (2, 8.0)})
    assert server.ask([*ids[:5], 50]) == 5
    assert server.ask([*ids[:7], 50]) == 5


def test_of_a_retained_conversation_the_last_turn_goes_last():
    now = 0.0
    caches = [RotatingKVCache(16, backend="numpy")]
    prefix = PrefixCache(caches, budget=2_640, clock=lambda: now)
    ids = []
    for turn in range(25):
        now += 60.0
        known = len(ids)
        ids += [1_000 * turn + token for token in range(40)]
        with prefix.session(ids, retain=(7, INF)) as session:
            assert known - session.matched <= 40
            for start in range(session.matched, len(ids), 8):
                keys = np.zeros((1, 1, min(8, len(ids) - start), 2), np.float32)
                session.caches[0].update(keys, keys)
        assert prefix.stats.nbytes <= 2_640


# Odd arguments.


PAIR = r"retain is a pair \(priority, seconds\), or a mapping of positions \(start, stop\)"


@pytest.mark.parametrize(
    ("retain", "error", "message"),
    [
        (5, TypeError, PAIR),
        ("ab", TypeError, PAIR),
        ((5,), TypeError, PAIR),
        ([1, 2, 3], TypeError, PAIR),
        ({5: (5, 1.0)}, TypeError, PAIR),
        ({(1, 2): 5}, TypeError, PAIR),
        ((5.0, 1.0), TypeError, "a priority must be an integer; got 5.0"),
        ((0, 1.0), ValueError, "a priority is 1 to 100; got 0. Leave out what need not stay"),
        ((101, 1.0), ValueError, "a priority is 1 to 100; got 101"),
        ((5, "1"), TypeError, "what is retained has positive seconds, or math.inf"),
        ((5, math.nan), ValueError, "positive seconds, or math.inf, a finite number; got nan"),
        ((5, -INF), ValueError, "positive seconds, or math.inf"),
        ((5, 0.0), ValueError, "positive seconds, or math.inf; got 0.0"),
        ({(3, 3): (5, 1.0)}, ValueError, r"with 0 <= start < stop; got \(3, 3\)"),
        ({(-1, 3): (5, 1.0)}, ValueError, r"with 0 <= start < stop; got \(-1, 3\)"),
        ({(0.0, 3): (5, 1.0)}, TypeError, "the start of a range to retain must be an integer"),
        ({(0, None): (5, 1.0), (9, 10): (6, 1.0)}, ValueError, "ranges to retain share no posi"),
    ],
)
def test_what_cannot_be_retained(retain, error, message):
    model = Model()
    session = model.ask([1, 2, 3])
    before = model.prefix.stats
    with pytest.raises(error, match=message):
        model.prefix.session([1, 2, 3, 4], retain=retain)
    with pytest.raises(error, match=message):
        model.prefix.insert([1, 2, 3], [KVCache("numpy")], retain=retain)
    assert model.prefix.stats == before
    assert session.matched == 0


@pytest.mark.parametrize("odd", [np.int8(7), np.array(7)])
def test_numbers_of_every_kind_are_taken(odd):
    model = Model()
    model.ask([1, 2, 3], retain={(np.int64(1), np.int8(2)): (odd, np.float32(8.0))})
    assert [level for _, level in sorted(levels(model.prefix, 0.0).items())] == [0, 7, 0]
