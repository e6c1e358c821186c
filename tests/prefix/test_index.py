"""The index of spans against a dict of what each token of each sequence has seen."""

import random
from sys import getsizeof

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache import KVCacheError
from kvcache.prefix.footprint import of_span, of_tree
from kvcache.prefix.index import SpanIndex
from kvcache.prefix.policies import LRU, POLICIES, make_policy
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

    overhead = 5

    def joins(self, following):
        return self.resumable_anywhere

    def join(self, following):
        return Rows([*self.rows, *(row for each in following for row in each.rows)])

    def reduced(self, position):
        return None

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
    world.find([1, 2, 9])
    upper, lower = world.spans()
    assert (upper.start, upper.stop, lower.start, lower.stop) == (0, 2, 2, 4)
    for span in (upper, lower):
        assert (span.uses, span.used, span.policy_data, span.nbytes) == (2, 5.0, "mine", 4)
    assert (upper.children, upper.offered, lower.offered) == (1, False, True)


def test_pins_protect_the_whole_path_when_it_is_split_while_they_hold():
    world = World()
    world.ask([1, 2, 3, 4, 5, 6])
    world.pin([1, 2, 3, 4, 5, 6])
    for length in (2, 4):
        world.find([1, 2, 3, 4, 5, 6][:length])
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


def test_ghosts_are_bounded_and_go_from_the_end():
    world = World(ghosts=10)
    for first in range(50):
        world.ask([first, 1, 2])
        world.ask([first, 1, 2, 3])
        world.trim(0)
        assert len(world.index._ghosts) <= 10
        world.check()
    assert {tokens_of(span)[0] for span in world.spans()} == set(range(45, 50))
    assert world.find([49, 1]) == []


def test_ghosts_that_others_hang_on_make_way_later():
    world = World(ghosts=2)
    for length in range(1, 9):  # the first is the oldest, and all others are behind it
        world.ask(list(range(length)), keep=False)
    for _ in range(20):  # no call looks at all of them
        world.trim(0)
    assert len(world.spans()) == 2
    world.check()


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
    world, chance = World(name, 2 * 400, grain=4, ghosts=300), random.Random(name)
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
