"""Classes of spans, refined when their request ends: bounds, hazards, and when they are told."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache import KVCache
from kvcache.prefix import PrefixCache
from kvcache.prefix.index import SpanIndex
from kvcache.prefix.policies import LRU, EndedRequest, Gittins
from kvcache.prefix.policies.classes import (
    CLASSES,
    NEW,
    SHAPE,
    class_of,
    last_block_of,
    pause_of,
)
from kvcache.prefix.policies.returns import EDGES, TICK, TICKS, Returns
from kvcache.prefix.radix import RadixTree
from kvcache.prefix.simulation.replay import BlockPayload, replay
from kvcache.prefix.simulation.trace import Request

from ... import peek

NUMPY = "numpy"


def parts(kind):
    """Uses, distance, pause and answer of a finest class."""
    return tuple(int(part) for part in np.unravel_index(kind - SHAPE[0], SHAPE))


@pytest.mark.parametrize(
    ("blocks", "part"),
    [(1, 0), (2, 1), (3, 1), (4, 2), (15, 2), (16, 3), (63, 3), (64, 4), (10**6, 4)],
)
def test_distances(blocks, part):
    assert parts(class_of(0, 512 * blocks, NEW, 0))[1] == part
    assert parts(class_of(0, 512 * blocks - 511, NEW, 0))[1] == part, "a block begun counts"


@pytest.mark.parametrize(
    ("seconds", "part"),
    [(0, 1), (15.9, 1), (16, 2), (127.9, 2), (128, 3), (511.9, 3), (512, 4), (1e9, 4)],
)
def test_pauses(seconds, part):
    assert pause_of(seconds) == part != NEW == 0
    assert parts(class_of(0, 1, part, 0))[2] == part


@pytest.mark.parametrize(
    ("answered", "part"), [(0, 0), (31, 0), (32, 1), (127, 1), (128, 2), (511, 2), (512, 3)]
)
def test_answers(answered, part):
    assert parts(class_of(0, 1, NEW, answered))[3] == part


def test_every_class_has_its_number():
    numbers = [
        class_of(uses, 512 * blocks, pause, answered)
        for uses in range(8)
        for blocks in (1, 2, 4, 16, 64)
        for pause in range(5)
        for answered in (0, 32, 128, 512)
    ]
    assert numbers == list(range(8, CLASSES))


def test_the_last_block_differs_in_nothing_but_the_distance():
    for kind in range(8, CLASSES):
        uses, _, pause, answer = parts(kind)
        assert parts(last_block_of(kind)) == (uses, 0, pause, answer)


# Hazards.


def test_a_finer_class_begins_with_the_hazard_of_the_coarser_one():
    chance, returns, weight = np.random.default_rng(0), Returns(), 20.0
    returns.returned[:] = chance.integers(0, 100, returns.returned.shape)
    returns.risked[:] = chance.integers(1, 10**5, returns.risked.shape)
    hazard = returns.hazard(weight)
    for place in [(0, 0, 0, 0), (3, 2, 1, 3), (7, 4, 4, 3), (5, 0, 4, 1)]:
        expected = hazard[place[0]]
        for level in (2, 3, 4):
            inside = [kind for kind in range(8, CLASSES) if parts(kind)[:level] == place[:level]]
            more, seconds = returns.returned[inside].sum(0), returns.risked[inside].sum(0)
            expected = (more + weight) / (seconds + weight / expected)
        assert hazard[8 + np.ravel_multi_index(place, SHAPE)] == pytest.approx(expected)


def test_the_coarsest_classes_count_all_requests_ended_or_not():
    one, other = Returns(), Returns()
    kinds = [2, class_of(2, 700, 1, 40), class_of(2, 10**5, NEW, 600)]
    one.returned[kinds], one.risked[kinds] = 30.0, 1e3
    other.returned[2], other.risked[2] = 90.0, 3e3
    assert one.hazard(20.0)[:8] == pytest.approx(other.hazard(20.0)[:8])


def test_a_class_never_seen_is_taken_for_the_coarser_one():
    returns = Returns()
    returns.returned[1], returns.risked[1] = 500.0, 1e4
    hazard = returns.hazard(20.0)
    assert hazard[class_of(1, 700, 2, 40)] == pytest.approx(hazard[1])
    assert (hazard[class_of(0, 700, 2, 40)] != hazard[1]).all()


# Time at risk.


def counted(uses, until):
    """Tokens x seconds by bucket: half of a tick at an age of one whole tick less."""
    risked = np.zeros(EDGES.size)
    for tick, tokens in uses:
        for age in range(min(until - tick, TICKS)):
            for whole in (max(age - 1, 0), age):
                risked[np.searchsorted(EDGES, TICK * whole, "right") - 1] += tokens * TICK / 2
    return risked


@settings(max_examples=25)  # each is a count of hundreds of ticks
@given(
    st.lists(st.tuples(st.integers(0, 400), st.integers(1, 9)), min_size=1, max_size=5),
    st.sampled_from([1, 7, 31, 500]),
)
def test_time_at_risk_is_counted_by_age(uses, stride):
    """Tick by tick, several at once, and after silence, when the time skipped is not counted."""
    returns, coming = Returns(fade=1.0), sorted(uses)
    for tick, tokens in coming:
        while returns.ticks < tick:
            returns.advance(min(returns.ticks + min(stride, 31), tick) * TICK)
        returns.enter(3, returns.ticks, 0.0, tokens, 0.0)
    while returns.ticks < 450:
        returns.advance(min(returns.ticks + 31, 450) * TICK)
    assert returns.risked[3] == pytest.approx(counted(uses, 450))
    twin = Returns(fade=1.0)
    for tick, tokens in coming:
        twin.enter(3, tick - 450, 0.0, tokens, 0.0)
    before = returns.risked.copy()
    for observed in (returns, twin):
        observed.advance((observed.ticks + 1) * TICK)
    assert returns.risked - before == pytest.approx(twin.risked)


def test_after_silence_ages_are_right():
    returns, slow = Returns(fade=1.0), Returns(fade=1.0)
    for observed in (returns, slow):
        observed.enter(0, 0, 0.0, 5, 0.0)
    returns.advance(300 * TICK)
    for tick in range(1, 301):
        slow.advance(tick * TICK)
    risked = returns.risked[0].copy(), slow.risked[0].copy()
    for observed in (returns, slow):
        observed.advance(301 * TICK)
    assert returns.risked[0] - risked[0] == pytest.approx(slow.risked[0] - risked[1])
    returns.advance(3000 * TICK)
    assert not returns.waiting.any()


# When a policy is told.


class Listener(LRU):
    """Writes down what it is told."""

    def __init__(self):
        super().__init__()
        self.told = []

    def use(self, span, now):
        self.told.append(("use", span.start, span.stop, now))

    def ended(self, request, now):
        bounds = [(span.start, span.stop) for span in request.spans]
        self.told.append(("ended", bounds, request.stop, request.answered, now))


def test_a_replay_tells_of_ends_in_their_order_and_not_before():
    policy = Listener()
    requests = [
        Request(0.0, [1, 2, 3], answered=500),  # until 10 s
        Request(1.0, [9], answered=100),  # until 3 s
        Request(2.0, [8]),  # nobody knows
        Request(10.0, [1, 2, 4], answered=0),
        Request(11.0, [7], answered=1),
    ]
    replay(requests, policy, 100)
    assert policy.told == [
        ("use", 0, 3, 0.0),
        ("use", 0, 1, 1.0),
        ("use", 0, 1, 2.0),
        ("ended", [(0, 1)], 1, 100, 3.0),
        ("ended", [(0, 3)], 3, 500, 10.0),
        ("use", 0, 2, 10.0),
        ("use", 2, 3, 10.0),
        ("ended", [(0, 2), (2, 3)], 3, 0, 10.0),
        ("use", 0, 1, 11.0),
    ]


def layers():
    return [KVCache(NUMPY), KVCache(NUMPY)]


def compute(session, tokens):
    for layer in session.caches:
        rows = np.zeros((1, 1, tokens, 2), np.float32)
        layer.update(rows, rows)


def test_a_session_tells_of_its_end_and_not_before():
    now = 0.0
    policy = Listener()
    prefix = PrefixCache(layers(), policy=policy, clock=lambda: now)
    with prefix.session([1, 2, 3]) as session:
        compute(session, 3)
        session.extend([4, 5])
        compute(session, 2)
        session.commit()
        now = 7.0
        assert [kind for kind, *_ in policy.told] == ["use"]
    assert policy.told[-1] == ("ended", [(0, 5)], 3, 2, 7.0)
    told = len(policy.told)
    session.close()
    assert len(policy.told) == told, "once"


def test_a_session_that_is_detached_has_no_end():
    policy = Listener()
    prefix = PrefixCache(layers(), policy=policy)
    prefix.session([1, 2, 3]).detach()
    assert not policy.told


def test_a_session_that_stores_nothing_has_ended_too():
    policy = Listener()
    prefix = PrefixCache(layers(), policy=policy)
    session = prefix.session([1, 2, 3])
    session.extend([4])
    session.close(store=False)
    assert policy.told[-1][:4] == ("ended", [], 3, 1)


def test_a_policy_that_raises_at_the_end_leaves_nothing_in_use():
    class Raising(LRU):
        def ended(self, request, now):
            raise RuntimeError("the end")

    prefix = PrefixCache(layers(), policy=Raising())
    with pytest.raises(RuntimeError, match="the end"), prefix.session([1, 2, 3]) as session:
        compute(session, 3)
    assert (prefix.stats.active, prefix.stats.spans) == (0, 1)
    assert prefix.lookup([1, 2, 3, 4]).matched == 3


# What `gittins` makes of it.


def shelf(policy):
    return asking(SpanIndex(policy, grain=1))


def asking(index):
    """A function that asks an index for tokens, and fills the spans that it lacks."""
    tree = RadixTree()

    def ask(tokens, now):
        spans = index.extend(tree, np.array(tokens, np.int32))
        index.use(spans, now)
        for span in spans:
            if span.payload is None:
                index.fill(span, BlockPayload(span.stop - span.start))
        return spans

    return ask


def kind_of(span):
    return span.policy_data.kind


def test_spans_are_refined_at_the_end_of_their_request():
    policy = Gittins()
    policy.position_tokens = 512
    ask = shelf(policy)
    ask([1] * 10, 0.0)
    spans = ask([1] * 4 + [2] * 20, 20.0)
    assert [kind_of(span) for span in spans] == [1, 0]
    policy.ended(EndedRequest(spans, 24, 200, {20.0}), 30.0)
    assert [parts(kind_of(span)) for span in spans] == [(1, 3, NEW, 2), (0, 3, 2, 2)]


def test_spans_used_by_another_request_since_are_left_to_its_end():
    policy = Gittins()
    ask = shelf(policy)
    first = ask([1, 1, 1], 0.0)
    policy.ended(EndedRequest(first, 3, 0, {0.0}), 0.5)
    ask([1, 1, 1], 1.0)
    [span] = ask([1, 1, 1], 2.0)
    policy.ended(EndedRequest([span], 3, 900, {1.0}), 3.0)
    assert kind_of(span) == 2
    policy.ended(EndedRequest([span], 3, 40, {2.0}), 4.0)
    assert parts(kind_of(span)) == (2, 0, NEW, 1)


def test_returns_count_for_the_refined_class():
    policy = Gittins()
    ask = shelf(policy)
    spans = ask([1, 1, 1], 0.0)
    policy.ended(EndedRequest(spans, 3, 900, {0.0}), 5.0)
    kind = kind_of(spans[0])
    ask([1, 1, 1], 50.0)
    returns = peek.returns(policy)
    assert returns.returned[kind].sum() == pytest.approx(3, rel=0.01)
    assert returns.returned.sum() == pytest.approx(3, rel=0.01)
    assert returns.risked.sum() + 3 * (50.0 - returns.ticked) == pytest.approx(150, rel=0.01)


# The last block of a request.


@pytest.mark.parametrize("position_tokens", [1, 16, 512, 1000])
def test_the_last_block_is_in_a_class_of_its_own(position_tokens):
    """Observed for itself, in one span with the others or split from them."""
    block = max(1, 512 // position_tokens)
    policy = Gittins()
    policy.position_tokens = position_tokens
    ask = shelf(policy)
    prompt = [1] * (4 * block)
    spans = ask(prompt, 0.0)
    policy.ended(EndedRequest(spans, 4 * block, 40, {0.0}), 1.0)
    whole, last = class_of(0, 4 * block * position_tokens, NEW, 40), class_of(0, 1, NEW, 40)
    waiting = peek.returns(policy).waiting.sum(0)
    assert (waiting[whole], waiting[last], waiting.sum()) == (3 * block, block, 4 * block)
    assert policy.tail(spans[0]) == block
    ask([1] * (3 * block) + [2] * block, 50.0)  # as a chat goes on: in a block that was not full
    returned = peek.returns(policy).returned
    assert returned[whole].sum() == pytest.approx(3 * block, rel=0.01)
    assert not returned[last].any()


def test_last_blocks_that_never_return_go_first_and_alone():
    policy = Gittins()
    policy.position_tokens = 512
    index = SpanIndex(policy, grain=1)
    fill = asking(index)

    def ask(tokens, now):
        policy.ended(EndedRequest(fill(tokens, now), len(tokens), 40, {now}), now + 1)

    for first in range(60):
        for turn in range(2):
            ask([first, 1, 1, 1, 2 + turn], 100.0 * first + 50 * turn)
    index.budget = 0
    index.trim(6000.0)
    index.budget = 8
    for first in (100, 101):
        ask([first, 1, 1, 1, 2], 6000.0 + first)
    index.trim(6130.0)
    assert [(span.start, span.stop, span.nbytes) for span in index.kept] == [(0, 4, 4), (0, 4, 4)]


def test_spans_that_cannot_be_cut_are_judged_as_a_whole():
    class Whole(BlockPayload):
        resumable_anywhere = False

    policy = Gittins()
    index, tree = SpanIndex(policy, grain=1), RadixTree()
    spans = index.extend(tree, np.arange(4000, dtype=np.int32))
    index.use(spans, 0.0)
    index.fill(spans[0], Whole(4000))
    policy.ended(EndedRequest(spans, 4000, 40, {0.0}), 1.0)
    assert peek.returns(policy).waiting[:, class_of(0, 4000, NEW, 40)].sum() == 4000
    assert policy.tail(spans[0]) == 4000
