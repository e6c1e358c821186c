"""The index of spans against a dict of what each token of each sequence has seen."""

import math
import random
from sys import getsizeof

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache import KVCacheError
from kvcache.prefix.footprint import of_span, of_tree
from kvcache.prefix.index import SpanIndex
from kvcache.prefix.media import Medium, Placement
from kvcache.prefix.policies import LRU, POLICIES, EvictionPolicy, make_policy
from kvcache.prefix.radix import RadixTree

IDS = st.lists(st.integers(0, 2), min_size=1, max_size=10)


class Rows:
    """A payload that says of each token what came before it; of two bytes per token."""

    def __init__(self, rows, resumable_anywhere=True):
        self.rows, self.resumable_anywhere, self.closed = rows, resumable_anywhere, False

    @property
    def nbytes(self):
        return 2 * len(self.rows)

    def split(self, tokens):
        first, second = self.rows[:tokens], self.rows[tokens:]
        return Rows(first, self.resumable_anywhere), Rows(second, self.resumable_anywhere)

    overhead, resumable_inside = 5, True

    def joins(self, following):
        return self.resumable_anywhere

    def join(self, following):
        rows = [*self.rows, *(row for each in following for row in each.rows)]
        for payload in (self, *following):
            payload.close()
        return type(self)(rows, self.resumable_anywhere)

    def reduced(self, position):
        return None

    thinned = cut = reduced

    def close(self):
        assert not self.closed
        self.closed = True


def rows(ids, start, stop):
    """What is kept for positions [start, stop): a number that depends on all tokens up to each."""
    found, seen = [], 0
    for place, token in enumerate(ids[:stop]):
        seen = (seen * 1_000_003 + token + 1) % (2**61 - 1)
        found += [seen] * (place >= start)
    return found


def tokens_of(span):
    return [each for part in span.path for each in np.frombuffer(part.node.edge, "<i4").tolist()]


def footprint_of(tree):
    """Bytes of a tree and all of its spans, counted anew."""
    spans = [node.value for node in tree.root.below() if node.value is not None]
    nbytes = sum(of_span(span) + (span.payload.overhead if span.payload else 0) for span in spans)
    return nbytes + (of_tree(tree) + getsizeof(tree.root.children) if spans else 0)


class Cautious(LRU):
    """Takes only equal spans for alike."""

    alike = EvictionPolicy.alike


class Piecewise(LRU):
    """Gives up `piece` tokens at a time."""

    piece = 2

    def tail(self, span):
        return self.piece


class World:
    """An index over one tree, and the dict: (uses, used) by the tokens up to each."""

    def __init__(self, name="lru", budget=None, ghosts=None, **options):
        """Ghosts are given in bytes, of everything outside the budget."""
        self.index = SpanIndex(make_policy(name), budget, index_budget=ghosts, **options)
        self.tree = RadixTree()
        self.now, self.asked, self.pinned = 0.0, {}, []
        self.resumable_anywhere = True

    def spans(self):
        return [node.value for node in self.tree.root.below() if node.value is not None]

    def ask(self, ids, keep=True):
        spans = self.index.extend(self.tree, np.array(ids, np.int32))
        assert (spans[0].start, spans[-1].stop) == (0, len(ids))
        self.index.use(spans, self.now)
        for stop in range(1, len(ids) + 1):
            uses, _ = self.asked.get(tuple(ids[:stop]), (0, 0.0))
            self.asked[tuple(ids[:stop])] = uses + 1, self.now
        for span in spans if keep else ():
            if span.payload is None:
                self.index.fill(
                    span, Rows(rows(ids, span.start, span.stop), self.resumable_anywhere)
                )

    def find(self, ids):
        """What is kept of the beginning of `ids`; finding it changes nothing."""
        found, before = [], list(map(id, self.spans()))
        spans, length = self.index.follow(self.tree, np.array(ids, np.int32))
        for span in spans:
            if span.payload is None:
                break
            found += span.payload.rows
        assert list(map(id, self.spans())) == before
        assert not spans or spans[-1].start < length <= spans[-1].stop
        return found[:length]

    def part(self, ids):
        """A request that ends, or parts, after `ids`: what is stored there is split."""
        self.index.extend(self.tree, np.array(ids, np.int32))

    def pin(self, ids):
        spans, _ = self.index.follow(self.tree, np.array(ids, np.int32))
        if spans:
            self.index.pin(spans[-1])
            self.pinned.append((spans[-1], tokens_of(spans[-1]), self.find(tokens_of(spans[-1]))))

    def unpin(self, number):
        if self.pinned:
            span, *_ = self.pinned.pop(number % len(self.pinned))
            self.index.pin(span, -1)
            self.index.settle(span)

    def retain(self, ids, priority, seconds):
        spans, _ = self.index.follow(self.tree, np.array(ids, np.int32))
        self.index.retain(spans, priority, seconds, self.now)

    def trim(self, budget):
        self.index.budget = budget
        self.index.trim(self.now)
        if self.index.nbytes > budget:
            assert all(span.pins for span in self.spans() if span.payload and not span.children)
        limit = self.index.index_budget
        if limit is not None and self.index._reserved > limit:
            assert all(span.pins or span.node.children for span in self.spans())

    def check(self):
        spans = self.spans()
        ghosts = {span for span in spans if span.payload is None}
        idle = {span for span in ghosts if not span.pins and not span.node.children}
        assert self.index.nbytes == sum(span.nbytes for span in spans)
        assert set(self.index._ghosts) == idle
        assert set(self.index.kept) == set(spans) - ghosts
        assert self.index._tracked == footprint_of(self.tree)
        assert self.index._spans == len(spans)
        known = {}
        for span in spans:
            self.check_span(span)
            ids = tokens_of(span)
            for stop in range(span.start + 1, span.stop + 1):
                uses, used = self.asked[tuple(ids[:stop])]
                # Joined spans have the uses of the last one: the least.
                assert uses >= span.uses
                assert used == span.used
                known[tuple(ids[:stop])] = span.uses, used
            assert uses == span.uses
        self.asked = known
        for span, ids, found in self.pinned:
            assert tokens_of(span) == ids
            assert self.find(ids)[: len(found)] == found, "what was pinned has gone"

    def check_span(self, span):
        ids, kept = tokens_of(span), span.payload is not None
        assert len(ids) == span.stop > span.start
        below = [child.value for child in span.node.children.values()]
        assert span.children == sum(child.payload is not None for child in below)
        assert span.pins == sum(other[: span.stop] == ids for _, other, _ in self.pinned)
        assert span.offered == (kept and not span.pins and not span.children)
        assert kept or span.retention is None
        queued = span.retention if span.offered else None
        assert span.level == (0 if queued is None else queued.level(self.index._candidates.now))
        if kept:
            assert not span.payload.closed
            assert span.payload.rows == rows(ids, span.start, span.stop)
            assert span.parent is None or span.parent.payload is not None, "leaf first"


OPERATION = st.one_of(
    st.tuples(st.just("ask"), IDS, st.booleans()),
    st.tuples(st.just("ask"), IDS),
    st.tuples(st.just("find"), IDS),
    st.tuples(st.just("pin"), IDS),
    st.tuples(st.just("unpin"), st.integers(0, 9)),
    st.tuples(st.just("trim"), st.integers(0, 40)),
    st.tuples(st.just("retain"), IDS, st.integers(1, 3), st.sampled_from([20.0, 80.0, math.inf])),
)


@given(
    st.sampled_from(sorted(POLICIES)),
    st.sampled_from([None, 0, 1_500, 4_000, 8_000]),
    st.booleans(),
    st.lists(OPERATION, max_size=30),
)
def test_any_operations(name, ghosts, resumable_anywhere, operations):
    world = World(name, grain=2, ghosts=ghosts)
    world.resumable_anywhere = resumable_anywhere
    for operation, *arguments in operations:
        world.now += 7.0
        getattr(world, operation)(*arguments)
        world.check()
    for number in range(len(world.pinned)):
        world.unpin(number)
    world.trim(0)
    world.check()
    assert world.index.nbytes == 0


def test_a_span_that_is_split_has_the_same_history_twice():
    world = World()
    world.now = 5.0
    world.ask([1, 2, 3, 4])
    world.ask([1, 2, 3, 4])
    [lower] = world.spans()
    lower.policy_data = "mine"
    world.part([1, 2])
    upper, lower = world.spans()
    assert (upper.start, upper.stop, lower.start, lower.stop) == (0, 2, 2, 4)
    for span in (upper, lower):
        assert (span.uses, span.used, span.policy_data, span.nbytes) == (2, 5.0, "mine", 4)
        assert span.tree is world.tree
    assert (upper.children, upper.offered, lower.offered) == (1, False, True)


def test_pins_protect_the_whole_path_when_it_is_split_while_they_hold():
    world = World()
    world.ask([1, 2, 3, 4, 5, 6])
    world.pin([1, 2, 3, 4, 5, 6])
    for length in (2, 4):
        world.part([1, 2, 3, 4, 5, 6][:length])
    assert [span.pins for span in world.spans()] == [1, 1, 1]
    world.trim(0)
    assert world.index.nbytes == 12
    world.unpin(0)
    world.check()
    world.trim(0)
    assert world.index.nbytes == 0


def test_no_more_goes_than_has_to_and_from_the_end():
    world = World(grain=2)
    world.ask(list(range(10)))
    world.trim(13)  # four tokens are too much, in bytes 7
    assert world.find(list(range(10))) == rows(range(10), 0, 6)
    world.trim(11)  # one token is, but two go together
    assert world.find(list(range(10))) == rows(range(10), 0, 4)
    assert world.index.evictions == 2
    world.resumable_anywhere = False
    world.ask([20, 21, 22])
    world.now = 1.0
    world.ask(list(range(4)))
    world.trim(12)
    assert world.find([20, 21, 22]) == []


def test_who_wants_to_know_is_told_before_it_goes():
    told = []
    world = World(on_evict=lambda span: told.append((tokens_of(span), span.payload.rows)))
    world.ask([1, 2])
    world.ask([1, 2, 3])
    world.trim(0)
    assert told == [([1, 2, 3], rows([1, 2, 3], 2, 3)), ([1, 2], rows([1, 2], 0, 2))]


def test_what_goes_is_closed():
    world = World()
    world.ask([1, 2])
    payload = world.spans()[0].payload
    world.trim(0)
    assert payload.closed


def test_a_ghost_that_is_pinned_is_not_forgotten():
    world = World(ghosts=0)
    world.ask([1, 2], keep=False)
    world.pin([1, 2])
    world.trim(0)
    world.check()
    assert len(world.spans()) == 1
    world.unpin(0)
    world.trim(0)
    assert not world.spans()


@pytest.mark.slow
def test_ghosts_are_bounded_in_bytes_and_the_oldest_go_from_the_end():
    world, limit = World(), 25_000
    world.index.index_budget = limit
    for first in range(100):
        world.ask([first, 1, 2])
        world.ask([first, 1, 2, 3])
        world.trim(0)
        assert world.index.index_nbytes <= limit
        world.check()
    kept = {tokens_of(span)[0] for span in world.spans()}
    assert kept == set(range(min(kept), 100))
    assert 10 < len(kept) < 40
    long = World(ghosts=limit)
    for first in range(100):
        long.ask([first] * (limit // 12))  # two of them have room
        long.trim(0)
    assert {tokens_of(span)[0] for span in long.spans()} == {98, 99}


def test_ghosts_go_before_those_that_they_hang_on():
    world = World(Cautious())
    for length in range(1, 9):  # the first is the oldest, and all others are behind it
        world.ask(list(range(length)), keep=False)
    world.index.index_budget = world.index._reserved - 1
    for left in range(7, 1, -1):
        world.trim(0)
        assert [span.stop for span in world.spans()] == list(range(1, left + 1))
        world.check()
        world.index.index_budget = world.index._reserved - 1
    world.index.index_budget = 0
    world.trim(0)
    assert not world.spans()
    assert world.index.index_nbytes < 1_000


def test_where_no_ghost_is_left_spans_are_evicted_for_the_memory_of_the_index():
    world = World(ghosts=0)
    world.ask([1, 2])
    world.ask([3, 4])
    world.pin([3, 4])
    world.trim(100)
    assert [tokens_of(span) for span in world.spans()] == [[3, 4]]
    world.unpin(0)
    world.trim(100)
    assert not world.spans()


def test_all_ghosts_are_forgotten_but_pinned_ones_and_those_others_hang_on():
    empty = []
    world = World(on_empty=empty.append)
    for ids in ([1, 2], [1, 2, 3], [4]):
        world.ask(ids, keep=False)
    world.pin([1, 2])
    world.ask([5], keep=False)
    world.ask([5, 6])
    world.index.forget_ghosts()
    assert [tokens_of(span) for span in world.spans()] == [[5], [1, 2], [5, 6]]
    assert not empty
    world.unpin(0)
    world.trim(0)
    world.index.forget_ghosts()
    assert not world.spans()
    assert empty == [world.tree]
    assert world.index._tracked == 0


# What nobody tells apart any more.


def cut_up(world, ids, at):
    """A document that others were parted from at some places; they have gone again."""
    world.ask(ids)
    for place in at:
        world.now += 1
        world.ask([*ids[:place], 99])
        world.index.evict(world.index.follow(world.tree, np.array([*ids[:place], 99])).spans[-1], 0)
    world.index.forget_ghosts()


def test_a_document_that_was_cut_is_whole_again_once_it_is_requested_as_a_whole():
    world, ids = World(), list(range(20))
    cut_up(world, ids, range(17, 0, -3))
    assert len(world.spans()) == 7
    world.pin(ids)
    world.unpin(0)
    assert len(world.spans()) == 7, "its parts were last used at different times"
    world.now = 50.0
    world.ask(ids)
    payloads = [span.payload for span in world.spans()]
    world.pin(ids)
    world.unpin(0)
    [span] = world.spans()
    assert all(payload.closed for payload in payloads)
    assert (span.start, span.stop, span.uses, span.used) == (0, 20, 2, 50.0)
    assert span.offered
    assert world.find(ids) == rows(ids, 0, 20)
    world.check()
    world.trim(0)
    world.check()


def test_few_parts_stay_as_joining_copies_them():
    world, ids = World(), list(range(20))
    cut_up(world, ids, (5, 10))
    world.ask(ids)
    world.pin(ids)
    world.unpin(0)
    assert len(world.spans()) == 3
    world.ask([*ids, 20])
    world.pin([*ids, 20])
    world.unpin(0)
    assert len(world.spans()) == 1


def test_parts_that_differ_stay_apart():
    """By pins, by what is behind them, or by what the policy thinks of them."""
    ids = list(range(20))
    for difference in ("pin", "branches", "policy", "rows"):
        world = World(Cautious())
        cut_up(world, ids, (4, 8, 12, 16))
        world.ask(ids)
        if difference == "pin":
            world.pin(ids[:12])
        elif difference == "branches":
            for last in (50, 51):
                world.ask([*ids[:12], last])
            world.ask(ids)
        elif difference == "policy":
            for span in world.spans():
                span.policy_data = span.start > 8
        else:
            world.spans()[3].payload.resumable_anywhere = False
        world.pin(ids)
        world.unpin(len(world.pinned) - 1)
        assert len([span for span in world.spans() if span.payload.rows]) >= 5, difference


def test_one_ghost_makes_way_for_a_span_to_be_whole():
    world, ids = World(), list(range(20))
    world.ask(ids)
    for place in (4, 8, 12, 16):
        world.ask([*ids[:place], 99])
        world.index.evict(world.index.follow(world.tree, np.array([*ids[:place], 99])).spans[-1], 0)
    world.now = 1.0
    world.ask(ids)
    world.pin(ids)
    world.unpin(0)
    assert [tokens_of(span) for span in world.spans()] == [ids]
    world.check()


def test_ghosts_in_a_row_are_one():
    world, ids = World(grain=2), list(range(20))
    world.ask(ids)
    for left in range(18, -1, -2):
        world.trim(2 * left)
        assert len(world.spans()) == (2 if left else 1)
        world.check()
    assert [tokens_of(span) for span in world.spans()] == [ids]
    world.now = 1.0
    world.ask([*ids[:9], 50], keep=False)
    assert len(world.spans()) == 3
    world.index._remove(world.index.follow(world.tree, np.array([*ids[:9], 50])).spans[-1])
    assert len(world.spans()) == 2, "the first part was requested again"
    world.check()


# Where a window drops tokens.


class Window(Rows):
    """Rows of which all but the last two are of use at the end of their span only."""

    def __init__(self, rows, resumable_anywhere=False):
        super().__init__(rows, resumable_anywhere)

    def reduced(self, position):
        return Window(self.rows[-2:]) if len(self.rows) > 2 else None

    def joins(self, following):
        return len(self.rows) <= 2


def keep_windows(world, *conversations):
    """Turns of five tokens, each of which has a window of five rows of two bytes."""
    for ids in conversations:
        spans = world.index.extend(world.tree, np.array(ids, np.int32))
        world.index.use(spans, world.now)
        for span in spans:
            if span.payload is None:
                world.index.fill(span, Window(rows(ids, span.start, span.stop)))


def held(world, ids):
    """For each of the turns of a conversation the rows that are kept of it."""
    known = rows(ids, 0, len(ids))
    path = world.index.follow(world.tree, np.array(ids, np.int32)).spans
    kept = {row for span in path if span.payload for row in span.payload.rows}
    return [sum(row in kept for row in known[at : at + 5]) for at in range(0, len(ids), 5)]


@pytest.mark.parametrize("name", POLICIES)
def test_of_a_conversation_the_last_turn_goes_last(name):
    world, ids = World(name), list(range(20))
    keep_windows(world, ids[:5], ids[:10], ids[:15], ids)
    payloads = [span.payload for span in world.spans()]
    world.trim(39)
    assert held(world, ids) == [2, 5, 5, 5]
    assert payloads[0].closed
    world.trim(33)
    assert held(world, ids)[1:] == [2, 5, 5]
    world.trim(24)
    assert held(world, ids)[3] == 5
    assert world.index.evictions == 0
    world.trim(0)
    assert held(world, ids) == [0, 0, 0, 0]
    assert all(payload.closed for payload in payloads)


def test_turns_that_are_superseded_go_before_the_last_of_another_conversation():
    world, other, ids = World(), list(range(20, 25)), list(range(15))
    keep_windows(world, other)
    world.now = 1.0
    keep_windows(world, ids[:5], ids[:10], ids)
    world.trim(28)
    assert held(world, other) == [5]
    assert held(world, ids)[2] == 5
    world.trim(19)
    assert held(world, other) == [0]
    assert held(world, ids)[2] == 5


def test_what_several_go_on_from_is_not_superseded():
    world, ids = World(), list(range(15))
    other = [*ids[:5], 50, 51, 52, 53, 54]
    keep_windows(world, ids[:5], ids[:10], other)
    world.trim(29)
    assert sorted([held(world, ids[:10]), held(world, other)]) == [[5, 0], [5, 5]]
    world.index.forget_ghosts()
    world.trim(18)  # the one that is left goes on from it
    assert sorted([held(world, ids[:10]), held(world, other)]) == [[2, 0], [2, 5]]


def test_what_was_requested_later_than_what_is_behind_it_is_not_superseded():
    world, ids = World(), list(range(10))
    keep_windows(world, ids[:5], ids)
    world.now = 1.0
    keep_windows(world, ids[:5])
    world.trim(19)
    assert held(world, ids) == [5, 0]


def test_a_pinned_turn_is_reduced_when_it_is_free_again():
    world, ids = World(), list(range(10))
    keep_windows(world, ids[:5], ids)
    world.pin(ids[:5])
    world.trim(19)
    assert held(world, ids) == [5, 0]
    world.unpin(0)
    keep_windows(world, ids)
    world.trim(19)
    assert held(world, ids) == [2, 5]


def test_a_reduced_turn_and_the_next_one_are_one_span():
    world, ids = World(), list(range(15))
    keep_windows(world, ids[:5], ids[:10], ids)
    world.trim(29)
    assert [span.stop for span in world.spans()] == [10, 15]
    world.trim(23)
    assert [span.stop for span in world.spans()] == [15]
    assert held(world, ids) == [0, 2, 5]
    world.trim(0)
    assert world.index.nbytes == 0


class Apart(LRU):
    """A policy to which no two spans are alike."""

    def alike(self, upper, lower):
        return False


def squeeze(world):
    """Leave the index too little room by a byte."""
    world.index.index_budget = world.index._reserved - 1
    world.trim(1_000)


@pytest.mark.parametrize("name", POLICIES)
def test_where_the_index_has_no_room_superseded_turns_are_joined(name):
    world, ids, other = World(name), list(range(20)), [50, 51, 52, 53, 54]
    keep_windows(world, other)
    world.now = 1.0
    keep_windows(world, ids[:5], ids[:10], ids[:15], ids)
    payloads = [span.payload for span in world.spans() if span.stop < 20]
    for stops in ([10, 15, 20], [15, 20], [20]):
        squeeze(world)
        assert [span.stop for span in world.spans()] == [5, *stops]
        assert held(world, ids)[3] == 5
        assert world.index._tracked == footprint_of(world.tree)
    assert held(world, other) == [5]
    assert sum(payload.closed for payload in payloads) >= 3
    assert world.index.evictions == 0
    squeeze(world)
    assert held(world, other) == [0]
    assert held(world, ids)[3] == 5


def test_turns_without_rows_to_release_are_joined_first():
    world, ids, other = World(Apart()), list(range(15)), list(range(50, 60))
    keep_windows(world, ids[:5], ids[:10], ids)
    keep_windows(world, other[:5], other)
    world.trim(44)
    world.trim(38)
    assert held(world, ids) == [2, 2, 5]
    assert len(world.spans()) == 5
    squeeze(world)
    assert (len(world.spans()), held(world, other)) == (4, [5, 5])
    for spans in (3, 2):
        squeeze(world)
        assert len(world.spans()) == spans
    assert held(world, other) == [2, 5]
    assert world.index.evictions == 0


def test_a_turn_that_was_requested_later_is_not_joined():
    world, ids = World(), list(range(10))
    keep_windows(world, ids[:5], ids)
    world.now = 1.0
    keep_windows(world, ids[:5])
    squeeze(world)
    assert held(world, ids) == [5, 0]


class Elsewhere(Window):
    """Rows in another place than those behind them."""

    made = None

    def reduced(self, position):
        self.made = Elsewhere(self.rows[-2:])
        return self.made

    def joins(self, following):
        return False


def test_turns_that_cannot_be_joined_stay_as_they_are():
    world, ids = World(), list(range(10))
    keep_windows(world, ids[:5], ids)
    first = world.spans()[0]
    world.index.fill(first, Elsewhere(first.payload.rows))
    squeeze(world)
    assert held(world, ids) == [5, 0]
    assert first.payload.made.closed
    assert not first.payload.closed


# Where requests can resume at some places only.


class Stops(Rows):
    """Rows and states behind some tokens, of 10 bytes each; position-coded like the rows."""

    def __init__(self, rows, start=0, stops=()):
        super().__init__(rows, resumable_anywhere=False)
        self.start, self.stops = start, sorted(stops)

    @property
    def nbytes(self):
        return 2 * len(self.rows) + 10 * len(self.stops)

    @property
    def resumable_inside(self):
        return bool(self.stops)

    def split(self, tokens):
        at = self.start + tokens
        return (
            Stops(self.rows[:tokens], self.start, [stop for stop in self.stops if stop <= at]),
            Stops(self.rows[tokens:], at, [stop for stop in self.stops if stop > at]),
        )

    def joins(self, following):
        return not self.stops

    def join(self, following):
        joined = super().join(following)
        stops = [stop for each in (self, *following) for stop in each.stops]
        return Stops(joined.rows, self.start, stops)

    def reduced(self, position):
        return Stops(self.rows, self.start) if self.stops else None

    def thinned(self, nbytes):
        gone = -(-nbytes // 10)
        kept = self.stops[gone:]
        return Stops(self.rows, self.start, kept) if kept else None

    def cut(self, nbytes):
        fitting = [
            stop - self.start
            for stop in self.stops
            if 2 * (stop - self.start) + 10 <= self.nbytes - nbytes
        ]
        return next((tokens for tokens in reversed(fitting) if tokens < len(self.rows)), None)


class Stopping(World):
    """A world of rows and states; of each span that is filled a few tokens have one behind them."""

    def ask(self, ids, chance):
        spans = self.index.extend(self.tree, np.array(ids, np.int32))
        self.index.use(spans, self.now)
        for stop in range(1, len(ids) + 1):
            uses, _ = self.asked.get(tuple(ids[:stop]), (0, 0.0))
            self.asked[tuple(ids[:stop])] = uses + 1, self.now
        for span in spans:
            if span.payload is None:
                places = range(span.start + 1, span.stop)
                stops = {span.stop, *(place for place in places if chance.random() < 0.4)}
                stops -= {span.stop} if chance.random() < 0.2 else set()
                kept = Stops(rows(ids, span.start, span.stop), span.start, stops)
                self.index.fill(span, kept)

    def check_span(self, span):
        super().check_span(span)
        if span.payload is not None:
            assert span.payload.start == span.start
            assert all(span.start < stop <= span.stop for stop in span.payload.stops)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize("retained", [False, True])
def test_any_budget_with_some_places_to_resume_at(name, retained):
    """Of what is left, all is of use; and no more has gone than had to."""
    world, chance = Stopping(name), random.Random(name)
    evictions = thinned = 0
    for number in range(400):
        world.now = float(number)
        ids = [chance.randrange(2) for _ in range(chance.randrange(1, 12))]
        world.ask(ids, chance)
        if retained and chance.random() < 0.3:
            world.retain(ids, chance.randrange(1, 4), 20.0)
        before = world.index.nbytes, world.index.evictions
        world.trim(max(0, before[0] - chance.choice([5, 15, 40, 80])))
        world.check()
        evictions += world.index.evictions - before[1]
        thinned += world.index.nbytes < before[0] and world.index.evictions == before[1]
        for span in world.index.kept:
            assert span.children or span.payload.stops, "nothing is of use behind it"
    assert evictions > 100
    assert thinned > 10
    world.trim(0)
    assert world.index.nbytes == 0


@pytest.mark.parametrize("name", POLICIES)
def test_places_to_resume_at_go_before_the_last_one_of_them(name):
    world, ids = World(name), list(range(10))
    [span] = world.index.extend(world.tree, np.array(ids, np.int32))
    world.index.use([span], 0.0)
    world.index.fill(span, Stops(rows(ids, 0, 10), 0, [3, 6, 10]))
    first = span.payload
    for budget, stops in ((49, [6, 10]), (40, [6, 10]), (39, [10]), (30, [10])):
        world.trim(budget)
        assert span.payload.stops == stops
        assert world.index.nbytes == span.nbytes <= budget
        world.check_span(span)
    assert first.closed
    assert world.index.evictions == 0
    world.trim(29)
    assert world.index.nbytes == 0


@pytest.mark.parametrize("name", POLICIES)
def test_the_end_goes_back_to_a_place_to_resume_at(name):
    world, ids = World(name), list(range(10))
    [span] = world.index.extend(world.tree, np.array(ids, np.int32))
    world.index.use([span], 0.0)
    world.index.fill(span, Stops(rows(ids, 0, 10), 0, [3, 6, 10]))
    world.trim(27)
    assert world.find(ids) == rows(ids, 0, 6)
    assert [kept.payload.stops for kept in world.index.kept] == [[6]]
    assert world.index.nbytes == 22


def test_a_candidate_that_was_thinned_counts_as_it_is_now():
    """S3-FIFO shares by bytes; what a tree with a quota takes is told, too."""
    world = World("s3fifo", quota_of=lambda salt: 100)
    world.tree = world.index.new_tree("")
    ids = list(range(10))
    [span] = world.index.extend(world.tree, np.array(ids, np.int32))
    world.index.use([span], 0.0)
    world.index.fill(span, Stops(rows(ids, 0, 10), 0, [3, 6, 10]))
    world.tree.quota = 35
    world.index._quotas.count(world.tree, 0)
    world.trim(1000)
    assert span.payload.stops == [10]
    assert world.tree.nbytes == world.index.nbytes == 30
    assert sum(world.index.policy._sizes.values()) == 30
    assert not world.index._quotas.exceeded


# Policies and trees.


def test_several_trees_share_a_budget():
    world, other = World(), RadixTree()
    world.ask([1, 2, 3])
    mine, world.tree, world.now = world.tree, other, 1.0
    world.ask([1, 2, 4])
    world.trim(6)
    assert world.find([1, 2, 4]) == rows([1, 2, 4], 0, 3)
    world.tree = mine
    assert world.find([1, 2, 3]) == []


@pytest.mark.parametrize("name", POLICIES)
def test_ten_thousand_sessions_byte_for_byte(name):
    """2,500 for each policy: whatever is found is what was computed for exactly these tokens."""
    world, chance = World(name, 2 * 400, grain=4, ghosts=200_000), random.Random(name)
    sessions, found = [[]], 0
    for number in range(2_500):
        world.now = float(number)
        ids = chance.choice(sessions[-40:])[: chance.randrange(60)]
        ids = ids + [chance.randrange(3) for _ in range(chance.randrange(1, 20))]
        kept = world.find(ids)
        assert kept == rows(ids, 0, len(kept))
        found += len(kept)
        spans = world.index.extend(world.tree, np.array(ids, np.int32))
        world.index.use(spans, world.now)
        for span in spans:
            if span.payload is None:
                world.index.fill(span, Rows(rows(ids, span.start, span.stop)))
        world.index.trim(world.now)
        assert world.index.nbytes <= world.index.budget
        sessions.append(ids)
    assert found > 10_000
    assert world.index.nbytes == sum(span.nbytes for span in world.spans())


def test_a_policy_chooses_among_the_spans_it_was_offered():
    class Stubborn(LRU):
        """Chooses the first span it was ever offered."""

        first = None

        def offer(self, span):
            self.first = self.first or span

        def victim(self, now):
            return self.first

    world = World(Stubborn())
    world.ask([1, 2, 3])
    world.ask([7])
    message = r"among the spans it was offered; Stubborn chose \[0, 3\), which it was not"
    with pytest.raises(KVCacheError, match=message):
        world.trim(0)
    assert world.find([7]) == rows([7], 0, 1)


def test_each_part_of_a_span_has_its_media():
    """Also where the parts are joined again."""
    ids = np.arange(12, dtype=np.int32)
    ids[2:4], ids[6:9] = -1, -2
    media = tuple(
        Placement(start, stop, Medium(bytes([start]), stand_in), np.full(stop - start, 7, np.int32))
        for start, stop, stand_in in ((2, 4, -1), (6, 9, -2))
    )
    index, tree = SpanIndex(LRU()), RadixTree()
    [whole] = index.extend(tree, ids, media)
    index.fill(whole, Rows(rows(ids.tolist(), 0, 12)))
    assert whole.media == media
    [upper, _] = index.extend(tree, np.append(ids[:5], 99).astype(np.int32), media[:1])
    lower = index.follow(tree, ids).spans[-1]
    assert (upper.media, lower.media) == (media[:1], media[1:])
    [first, _] = index.extend(tree, np.append(ids[:3], 99).astype(np.int32), media[:1])
    assert first.media == media[:1]  # it ends inside
    assert index.follow(tree, ids).spans[1].media == media[:1]


@pytest.mark.parametrize(("piece", "left"), [(2, [4, 4]), (100, [3, 6]), (0, [5, 4])])
def test_no_more_goes_at_once_than_the_policy_says(piece, left):
    """The one it takes next is another: it was used since."""

    class Turns(Piecewise):
        def victim(self, now):
            return max((span for span in index.kept if span.offered), key=lambda span: span.stop)

    policy = Turns()
    policy.piece = piece
    world = World(policy, grain=1)
    index = world.index
    for first in (1, 2):
        world.ask([first] + [0] * 5)
    index.budget = 2 * sum(left)
    index.trim(world.now)
    assert sorted(span.stop for span in index.kept) == sorted(left)


def test_a_tail_that_is_no_number_is_refused():
    policy = Piecewise()
    policy.piece = "two"
    world = World(policy, budget=3)
    world.ask([1, 2, 3, 4])
    with pytest.raises(TypeError, match="the tail of a span"):
        world.index.trim(world.now)
    assert world.index.nbytes == 8
