"""Who goes first, and what that costs."""

import gc
import random
import weakref
from time import thread_time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache.prefix.index import SpanIndex
from kvcache.prefix.policies import (
    LRU,
    POLICIES,
    S3FIFO,
    Cost,
    EndedRequest,
    EvictionPolicy,
    Gittins,
    make_policy,
    recompute_cost,
)
from kvcache.prefix.policies import returns as learning
from kvcache.prefix.policies.base import Queue
from kvcache.prefix.policies.returns import gittins_index
from kvcache.prefix.radix import RadixTree
from kvcache.prefix.simulation.replay import BlockPayload

from ... import peek


class Shelf:
    """An index of sequences that have nothing in common, each one span."""

    def __init__(self, given, budget=None):
        self.index, self.tree = SpanIndex(make_policy(given), budget, grain=1), RadixTree()

    def spans(self, *ids):
        return self.index.extend(self.tree, np.array(ids, np.int32))

    def ask(self, first, now, size=1, tokens=1):
        """Returns whether it was there."""
        spans = self.spans(*[first] * tokens)
        self.index.use(spans, now)
        there = spans[0].payload is not None
        if not there:
            self.index.fill(spans[0], BlockPayload(size))
        self.index.trim(now)
        return there

    def order(self, now):
        """First tokens, in the order in which they go."""
        gone = []
        while (span := self.index.policy.victim(now)) is not None:
            gone.append(span.node.first)
            self.index.evict(span, now)
        return gone


def end(shelf, first, tokens, now, answered=0):
    """End the last request of :meth:`Shelf.ask` for a sequence."""
    spans = shelf.spans(*[first] * tokens)
    shelf.index.policy.ended(EndedRequest(spans, tokens, answered, {spans[-1].used}), now)


@given(st.lists(st.tuples(st.integers(0, 5), st.sampled_from(["ask", "pin", "free"]))))
def test_lru_is_the_least_recently_used(operations):
    shelf, used, pins = Shelf("lru"), {}, {}
    for now, (first, what) in enumerate(operations):
        if what == "ask":
            shelf.ask(first, float(now))
            used[first] = now
        elif what == "pin" and first in used:
            shelf.index.pin(shelf.spans(first)[0])
            pins[first] = pins.get(first, 0) + 1
        elif pins.get(first):
            shelf.index.pin(shelf.spans(first)[0], -1)
            pins[first] -= 1
        free = [each for each in used if not pins.get(each)]
        victim = shelf.index.policy.victim(float(now))
        assert (victim and victim.node.first) == min(free, key=used.get, default=None)


def test_s3fifo_lets_a_scan_pass():
    shelf = Shelf("s3fifo", budget=20)
    for now in range(3):
        for first in range(10):
            shelf.ask(first, float(now))
    for first in range(100, 400):
        shelf.ask(first, 10.0)
    assert [shelf.ask(first, 20.0) for first in range(10)] == [True] * 10
    lru = Shelf("lru", budget=20)
    for first in [*range(10), *range(100, 400), *range(10)]:
        there = lru.ask(first, 0.0)
    assert not there


def test_s3fifo_takes_what_was_given_up_too_early_into_the_main_queue():
    shelf = Shelf("s3fifo", budget=10)
    for first in [*[0, 1, 2, 3, 4] * 3, *range(10, 16)]:
        shelf.ask(first, 0.0)
    assert shelf.spans(10)[0].payload is None
    shelf.ask(10, 1.0)
    assert shelf.spans(10)[0].policy_data.main
    for first in range(20, 60):
        shelf.ask(first, 2.0)
    assert not shelf.ask(30, 3.0)
    assert not shelf.spans(11)[0].policy_data.main
    shelf.ask(11, 3.0)
    assert not shelf.spans(11)[0].policy_data.main, "too long ago"


def test_s3fifo_gives_up_something_when_all_have_chances():
    shelf = Shelf(S3FIFO())
    for _ in range(5):
        for first in range(300):
            shelf.ask(first, 0.0)
    assert shelf.index.policy.victim(1.0) is not None
    moved = [first for first in range(300) if shelf.spans(first)[0].policy_data.main]
    assert 0 < len(moved) <= 100, "nobody waits until all have passed"
    assert sorted(shelf.order(1.0)) == list(range(300))


def test_every_round_of_s3fifo_takes_a_chance():
    shelf = Shelf("s3fifo")
    for now in range(20):
        for first in range(12):
            shelf.ask(first, float(now))
        shelf.index.policy.victim(float(now))
    assert all(shelf.index.policy.victim(30.0).policy_data.chances == 0 for _ in range(2))


def test_cost_weighs_uses_time_and_room():
    shelf = Shelf(Cost(lambda start, stop: 10.0 * (stop - start)))
    shelf.ask(1, 0.0, size=10)  # 1
    shelf.ask(2, 1.0, size=5)  # 2
    shelf.ask(3, 2.0, size=40, tokens=2)  # 0.5
    shelf.ask(4, 3.0, size=20)
    for now in (4.0, 5.0):
        shelf.ask(4, now, size=20)  # 1.5 with its third use
    assert shelf.order(6.0) == [3, 1, 4, 2]


def test_what_is_dear_but_never_used_again_goes_in_the_end():
    shelf = Shelf(Cost(lambda start, stop: 1.0), budget=30)
    shelf.ask(0, 0.0, size=1)
    for first in range(1, 40):
        shelf.ask(first, 1.0, size=10)
    assert shelf.spans(0)[0].payload is None


def test_recomputing_later_tokens_costs_more():
    assert recompute_cost(0, 10) == pytest.approx(10, abs=0.01)
    assert recompute_cost(30_000, 30_001) == pytest.approx(2, abs=1e-4)
    parts = recompute_cost(0, 700) + recompute_cost(700, 5_000)
    assert parts == pytest.approx(recompute_cost(0, 5_000))


# gittins


def slowly(hazard, width):
    """The index by its definition."""
    found = []
    for start in range(len(hazard)):
        best, left, seconds = 0.0, 1.0, 0.0
        for rate, long in zip(hazard[start:], width[start:], strict=True):
            seconds += left * (1 - np.exp(-rate * long)) / rate
            left *= np.exp(-rate * long)
            best = max(best, (1 - left) / seconds)
        found.append(best)
    return found


@given(st.lists(st.tuples(st.floats(1e-5, 1.0), st.floats(0.5, 1000)), min_size=1, max_size=8))
def test_the_gittins_index_is_the_best_return_per_second(buckets):
    hazard, width = np.array(buckets).T
    assert gittins_index(hazard[None], width)[0] == pytest.approx(slowly(hazard, width))


def test_the_gittins_index_looks_ahead():
    [index] = gittins_index(np.array([[1e-6, 0.1, 1e-6]]), np.array([10.0, 10.0, 1000.0]))
    assert index[1] == pytest.approx(0.1)
    assert 0.03 < index[0] < 0.1
    assert index[2] == pytest.approx(1e-6)


def test_gittins_that_knows_nothing_is_lru():
    shelf = Shelf("gittins")
    for now, first in enumerate([3, 1, 2, 0, 1]):
        shelf.ask(first, now * 100.0)
    assert shelf.order(400.0) == [3, 2, 0, 1]


def taught(budget=None):
    """A service where every second newcomer comes back after 100 s, nine times."""
    shelf, coming = Shelf("gittins", budget), {}
    for step in range(2_000):
        now = step * 5.0
        for first in coming.pop(step, ()):
            shelf.ask(first, now)
        shelf.ask(10 * step, now)
        if step % 2:
            for time in range(1, 10):
                coming.setdefault(step + 20 * time, []).append(10 * step)
    return shelf


@pytest.mark.parametrize("budget", [None, 30])
def test_gittins_learns_who_comes_back_and_when_from_ghosts_too(budget):
    hazard = taught(budget).index.policy.hazard()[:8]
    bucket = np.searchsorted(learning.EDGES, 100.0, "right") - 1
    assert hazard[:, bucket].argmin() == 0
    for uses in range(7):
        others = np.delete(hazard[uses], bucket)[1:]  # newcomers have hardly been at risk
        assert hazard[uses, bucket] > 4 * others.max()
    # Of 64 s in the bucket, those that come back are at risk for 36.
    rate = hazard[0, bucket] * (0.5 * 36 + 0.5 * 64)
    assert rate == pytest.approx(0.5, rel=0.05)
    assert hazard[3, bucket] * 36 == pytest.approx(1, rel=0.1)


def test_gittins_prefers_who_will_come_back_to_who_was_here_last():
    policy = taught().index.policy
    shelf = Shelf(policy)
    now = 2_000 * 5.0
    for each in policy._offered[:]:
        policy.withdraw(each)
    shelf.ask(1, now)  # once, and then just now
    for step in range(3):
        shelf.ask(2, now + 100 * step)
    shelf.ask(3, now + 280)
    assert shelf.order(now + 290) == [1, 3, 2]


@pytest.mark.parametrize("ending", [False, True])
def test_all_time_at_risk_is_counted_once(ending):
    chance, policy = random.Random(0), Gittins()
    returns = policy._returns = learning.Returns(fade=1.0)
    shelf, now, since = Shelf(policy), 0.0, {}
    for _ in range(3_000):
        now += chance.expovariate(0.5)
        first = chance.randrange(50)
        shelf.ask(first, now, tokens=first % 5 + 1)
        since.setdefault(first, now)
        if ending and chance.random() < 0.5:
            now += chance.expovariate(0.1)
            end(shelf, first, first % 5 + 1, now, answered=chance.randrange(1000))
    tokens = {first: first % 5 + 1 for first in since}
    assert returns.waiting.sum() == sum(tokens.values())
    counted = returns.risked.sum() + returns.waiting.sum() * (now - returns.ticked)
    assert counted == pytest.approx(sum(tokens[each] * (now - since[each]) for each in since))
    assert returns.returned[8:].any() == ending
    assert returns.returned.sum() == sum(
        tokens[each] * (shelf.spans(*[each] * tokens[each])[0].uses - 1) for each in since
    )


def test_after_silence_gittins_goes_on_at_once():
    shelf = Shelf("gittins")
    for now in (1.7e9, 1.7e9 + 3, 1.8e9, 1.9e9):
        start = thread_time()
        shelf.ask(1, now)
        assert thread_time() - start < 0.02
    assert peek.returns(shelf.index.policy).waiting.sum() == 1
    assert np.isfinite(shelf.index.policy.hazard()).all()
    assert (shelf.index.policy.hazard() > 0).all()


def test_among_equals_gittins_is_lru():
    shelf = Shelf("gittins")
    for now, first in enumerate([1, 2, 3]):
        shelf.ask(first, float(now))
    shelf.index.pin(shelf.spans(1)[0])
    shelf.index.pin(shelf.spans(1)[0], -1)
    assert [span.node.first for span in shelf.index.policy._offered] != [1, 2, 3]
    assert shelf.order(3.0) == [1, 2, 3]


def test_an_unknown_class_is_taken_for_like_the_one_before():
    policy = Gittins()
    peek.returns(policy).returned[2] += 1e4
    peek.returns(policy).risked[2] += 1e5
    hazard = policy.hazard()[:8]
    assert hazard[3:] == pytest.approx(np.broadcast_to(hazard[2], (5, hazard.shape[1])))
    assert (hazard[2] != hazard[1]).all()


# all of them


class LastIn(EvictionPolicy):
    """One of a user."""

    def __init__(self):
        self.spans = {}

    def offer(self, span):
        self.spans[span] = None

    def withdraw(self, span):
        del self.spans[span]

    def victim(self, now):
        return next(reversed(self.spans), None)


def test_one_of_ones_own():
    mine = LastIn()
    assert make_policy(mine) is mine
    shelf = Shelf(mine)
    for first in (1, 2, 3):
        shelf.ask(first, 0.0)
    assert shelf.order(1.0) == [3, 2, 1]


def test_names():
    assert {name: type(make_policy(name)) for name in POLICIES} == POLICIES
    assert make_policy("lru") is not make_policy("lru")
    assert isinstance(make_policy("lru"), LRU)
    with pytest.raises(ValueError, match="no policy 'lfu'; take lru, s3fifo, cost, gittins, or"):
        make_policy("lfu")
    with pytest.raises(TypeError, match=r"a policy is a name or an object .*; got 7"):
        make_policy(7)
    with pytest.raises(TypeError, match="got <class"):
        make_policy(LRU)


@pytest.mark.slow
@pytest.mark.parametrize("name", POLICIES)
def test_nobody_waits_long_for_an_eviction(name):
    """Seconds of this thread alone; `kvcache bench prefix` measures five times as many spans."""
    shelf, longest = Shelf(name), 0.0
    gc.collect()
    gc.disable()
    try:
        for first in range(20_000):
            shelf.ask(first, first / 100)
        for now in range(10_000):
            start = thread_time()
            shelf.index.evict(shelf.index.policy.victim(200 + now / 100), 200 + now / 100)
            longest = max(longest, thread_time() - start)
    finally:
        gc.enable()
    assert longest < 0.005


class Item:
    """A span of a queue."""

    def __init__(self, used):
        self.used, self.offered = used, True


@given(st.lists(st.tuples(st.sampled_from("add withdraw first grow".split()), st.integers(0, 9))))
def test_a_queue_holds_what_was_added_and_not_withdrawn(operations):
    queue, queued = Queue(lambda item: item.used), {}
    for operation, number in operations:
        if operation == "add" and number not in queued:
            queued[number] = Item(number % 4)
            queue.add(queued[number])
        elif operation == "withdraw" and number in queued:
            queue.withdraw(queued.pop(number))
        elif operation == "grow" and number in queued:
            queued[number].used += number % 3
        first = queue.first()
        assert first is None if not queued else first in queued.values()
        assert not queued or first.used == queue.least == min(x.used for x in queued.values())
    stranger = Item(0)
    queue.withdraw(stranger)  # no harm


def test_a_queue_lets_go_of_what_is_withdrawn():
    queue, items = Queue(lambda item: item.used), [Item(number) for number in range(3_000)]
    for item in items:
        queue.add(item)
    full, references = queue.nbytes, [weakref.ref(item) for item in items]
    while len(items) > 1:
        queue.withdraw(items.pop())
        del item
        item = items[0]
        assert references[len(items)]() is None
    assert queue.nbytes < full / 20
    assert queue.first() is item
    for _ in range(1_000):
        queue.withdraw(item)
        queue.add(item)
    assert queue.nbytes < full / 20


def test_policies_take_spans_for_alike_by_what_they_go_by():
    shelf = Shelf("lru")
    one, two = (shelf.spans(first)[0] for first in (1, 2))
    one.uses, two.uses = 4, 7
    for policy, alike in ((LRU(), True), (Cost(), True), (LastIn(), False)):
        assert policy.alike(one, two) == alike
    one.uses = 3
    assert not Cost().alike(one, two)
    one.uses, one.policy_data, two.policy_data = 7, 1.0, 2.0
    for policy, alike in ((LRU(), True), (Cost(), False), (S3FIFO(), False), (Gittins(), False)):
        assert policy.alike(one, two) == alike
    two.policy_data = 1.0
    assert all(policy.alike(one, two) for policy in (Cost(), S3FIFO(), Gittins(), LastIn()))
    assert LastIn().nbytes == LastIn().data_nbytes == 0


def test_worth_is_that_of_the_span_that_goes():
    """Also where another one goes than the policy chose."""
    shelf = Shelf(Cost(lambda start, stop: 10.0))
    for first, size in ((1, 10), (2, 5), (3, 2)):
        shelf.ask(first, 0.0, size=size)
    policy = shelf.index.policy
    assert policy.victim(0.0).node.first == 1
    shelf.index.evict(shelf.spans(3)[0], 0.0)
    assert policy._level == 5
    shelf.index.evict(policy.victim(0.0), 0.0)
    assert policy._level == 5
    shelf.index.evict(policy.victim(0.0), 0.0)
    assert policy.victim(0.0) is None
