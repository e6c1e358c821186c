"""States that have no room: which of those in one span go, and that nothing useless stays.

A state is all tokens so far, and every pass looks at the one that it begins with (:mod:`served`).
"""

import math
import random

import numpy as np
import pytest

import kvcache
from kvcache import KVCache, StateCache
from kvcache.prefix import PrefixCache
from kvcache.prefix.policies import POLICIES
from kvcache.prefix.stored import StoredSnapshot, has_resume_point, last_resume_points
from kvcache.prefix.thinning import cut, thinned
from kvcache.snapshots.resuming import resume_points

from .served import (
    MODELS,
    RECURRENT,
    Layers,
    Pool,
    Server,
    check_accounts,
    check_nothing_left,
    spans_of,
)

NUMPY = kvcache.get_backend("numpy")
HYBRIDS = {
    "layers": lambda: Layers(NUMPY, {}, RECURRENT),
    "pool": lambda: Pool(NUMPY, {}, RECURRENT, capacity=80),
}
WINDOWED = {"window", "hybrid", "hybrid pool"}
BOUNDS = ["budget", "quota", "retained"]


class Chat:
    """A chat whose stored bytes are limited, and the bytes of a token and of a state."""

    def __init__(self, kind, policy, bound="budget"):
        probe = Server(HYBRIDS[kind]())
        probe.ask([1, 2, 3, 4])
        [span] = spans_of(probe.prefix)
        tokens, states = (part.rows for part in span.payload.snapshot.parts)
        self.state = states.nbytes // states.positions.size
        self.token = tokens.nbytes // tokens.positions.size
        self.bound, self.room, self.said = bound, 0, []
        quota = (lambda salt: self.room) if bound == "quota" else None
        self.server = Server(HYBRIDS[kind](), policy=policy, quota=quota)
        self.options = {"retain": (5, math.inf)} if bound == "retained" else {}

    @property
    def index(self):
        return self.server.prefix._index

    def limit(self, states, tokens):
        """Leave room for so many states and tokens from now on."""
        self.room = states * self.state + tokens * self.token
        if self.bound == "quota":
            for tree in self.server.prefix._trees.values():
                tree.quota = self.room
        else:
            self.index.budget = self.room

    def turn(self, states, spare=0):
        """A turn with room for its tokens and so many states, and a few bytes; returns its hit."""
        first = len(self.said) + 1
        prompt, reply = [*self.said, *range(first, first + 4)], [*range(first + 20, first + 23)]
        self.limit(states, len(prompt) + 2)
        self.room += spare
        matched = self.server.ask(prompt, reply, **self.options)
        self.said, self.prompt = [*prompt, *reply], prompt
        return matched


def states_of(prefix):
    """Positions of all states that are stored."""
    rows = [span.payload.snapshot.parts[1].rows.positions for span in spans_of(prefix)]
    return sorted(position + 1 for positions in rows for position in positions.tolist())


def check_useful(prefix, windows=False):
    """Requests can resume in each span that is stored, or in one behind it.

    windows: take for granted that the rows before a span are those that it needs.
    """
    useful = {}
    for span in sorted(spans_of(prefix), key=lambda span: -span.stop):
        below = [child.value for child in span.node.children.values()]
        led_on = any(useful.get(child, False) for child in below)
        own = has_resume_point(span.payload.snapshot) if windows else last_resume_points(span, 1)
        useful[span] = led_on or bool(own)
        assert useful[span], f"[{span.start}, {span.stop}) is of no use, of {span.nbytes} bytes"


@pytest.mark.parametrize("bound", BOUNDS)
@pytest.mark.parametrize("kind", HYBRIDS)
@pytest.mark.parametrize("policy", POLICIES)
def test_one_state_and_its_tokens_serve_every_turn_of_a_chat(policy, kind, bound):
    chat = Chat(kind, policy, bound)
    for turn in range(5):
        known = len(chat.said)
        assert chat.turn(states=1) == max(0, known - 1), f"turn {turn}"
        assert chat.index.nbytes == chat.room, "one state, and all tokens"
        assert states_of(chat.server.prefix) == [len(chat.said) - 1]
        check_useful(chat.server.prefix)
        check_accounts(chat.server)
    assert chat.index.evictions == 0
    check_nothing_left(chat.server)


@pytest.mark.parametrize("policy", POLICIES)
def test_with_two_states_the_same_prompt_is_served_as_well(policy):
    chat = Chat("layers", policy)
    for _ in range(5):
        known = len(chat.said)
        assert chat.turn(states=2) == max(0, known - 1)
        assert chat.server.prefix.lookup(chat.prompt).matched == len(chat.prompt) - 1
        assert chat.server.prefix.lookup([*chat.said, 99]).matched == len(chat.said) - 1
        assert chat.index.nbytes == chat.room


@pytest.mark.parametrize("kind", HYBRIDS)
def test_without_room_for_a_state_nothing_stays(kind):
    pytest.importorskip("rich")
    chat = Chat(kind, "lru")
    for _ in range(3):
        assert chat.turn(states=0) == 0
        assert not spans_of(chat.server.prefix)
        assert "no resume point" not in chat.server.prefix.render()
    assert chat.index.nbytes == 0


def going(points, start):
    """Points in the order in which they go, found anew for each."""
    kept, gone = list(points), []
    while len(kept) > 1:
        before = [start, *kept]
        gone.append(min(kept[:-1], key=lambda p: (p - before[kept.index(p)], p)))
        kept.remove(gone[-1])
    return [*gone, *kept]


@pytest.mark.parametrize("kind", HYBRIDS)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("states", [1, 3, 6, 11])
def test_of_a_document_the_states_go_behind_which_the_fewest_tokens_are_lost(policy, kind, states):
    document, chat = list(range(1, 32)), Chat(kind, policy)
    chat.server.prefix._requests._resume_every = 3
    chat.limit(states, len(document))
    chat.server.ask(document)
    order = going([*range(3, 31, 3), 31], 0)  # 30 is the end less one
    kept = sorted(order[-states:])
    assert len(order) == 11
    assert states_of(chat.server.prefix) == kept
    assert chat.index.nbytes == chat.room
    for length in range(1, 32):
        deepest = max((point for point in kept if point <= length), default=0)
        assert chat.server.prefix.lookup([*document[:length], 99]).matched == deepest
    assert chat.index.evictions == 0
    assert chat.server.ask([*document, 32]) == 31


@pytest.mark.parametrize("policy", POLICIES)
def test_where_tokens_have_no_room_the_end_goes_back_to_a_resume_point(policy):
    document, chat = list(range(1, 32)), Chat("layers", policy)
    chat.server.prefix._requests._resume_every = 6
    chat.limit(states=1, tokens=20)
    chat.server.ask(document)
    assert states_of(chat.server.prefix) == [18]
    assert chat.index.nbytes == chat.state + 18 * chat.token
    assert chat.server.prefix.lookup(document).matched == 18
    evicted = chat.server.prefix.session(document)
    assert [reason.why for reason in evicted.explain().reasons] == ["evicted"]
    evicted.close()


def test_what_is_given_up_costs_no_more_looks_than_it_has_states():
    """An eighth goes at once at least, however little it takes."""
    caches = kvcache.LayerCaches([StateCache("numpy"), KVCache("numpy")])
    points = list(range(1, 31))
    caches.schedule(points)
    Layers(NUMPY, RECURRENT, {}).run(Holder(caches), [1] * 30, 0, 30)
    snapshot, looks = caches.snapshot(), 0
    assert resume_points(snapshot).tolist() == points
    while snapshot is not None:
        left, looks = resume_points(snapshot).size, looks + 1
        snapshot = thinned(snapshot, 1)
        if snapshot is not None:
            assert left - resume_points(snapshot).size == max(1, left // 8)
    assert left == 1
    assert looks <= 21


class Holder:
    """Caches as those of a session."""

    def __init__(self, caches):
        self.caches = caches


@pytest.mark.parametrize("kind", ["recurrent", "hybrid"])
def test_rows_without_a_state_are_known_to_lead_nowhere(kind):
    server = Server(MODELS[kind](NUMPY))
    server.ask([1, 2, 3, 4, 5, 6, 7, 8], resume_points=[3])
    [span] = spans_of(server.prefix)
    first, rest = span.payload.snapshot.copy().split(5)
    before, without = first.split(3)
    assert StoredSnapshot(before).resumable_inside
    assert not StoredSnapshot(without).resumable_inside
    assert StoredSnapshot(rest).resumable_inside
    assert thinned(without, 1) is None
    assert cut(without, 1) is None


def test_a_part_that_led_to_what_went_goes_too():
    """The end of a killed session has no state; a request that parts there leaves it alone."""
    prefix = PrefixCache([StateCache("numpy"), KVCache("numpy")])
    with prefix.session([1, 2, 3, 4]) as session:
        Layers(NUMPY, RECURRENT, {}).run(session, [1, 2, 3, 4, 5, 6, 7, 8], 0, 8)
        session.extend([5, 6])  # and no more, so that the state behind 8 is not stored
    assert prefix.lookup([1, 2, 3, 4, 5, 6, 7])[:2] == (4, 6)
    with prefix.session([1, 2, 3, 4, 5, 60]) as session:
        Layers(NUMPY, RECURRENT, {}).run(session, [1, 2, 3, 4, 5, 60], 4, 6)
    assert [(span.start, span.stop) for span in spans_of(prefix)] == [(0, 5), (5, 6)]
    check_useful(prefix)


@pytest.mark.parametrize("kind", HYBRIDS)
def test_what_no_request_can_use_is_not_stored(kind):
    pytest.importorskip("rich")
    server, told = Server(HYBRIDS[kind]()), []
    server.prefix.events.block_size = 2
    server.prefix.events.subscribe(told.append)
    server.ask([1, 2, 3, 4])
    before, ids = server.prefix.stats, list(range(1, 9))
    with server.begin(ids) as session:
        server.compute(session, ids, session.matched)
        session.drop_branch(6)  # states are behind 7 and 8
    after = server.prefix.stats
    assert (after.nbytes, after.spans, after.evictions) == (before.nbytes, before.spans, 0)
    assert len(told) == 1
    assert "○ [4, 6)  5 6  not stored" in server.prefix.render()
    assert server.ask(ids) == 4


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", [*HYBRIDS, "recurrent", "recurrent pool", *sorted(WINDOWED)])
def test_nothing_useless_is_left_whatever_the_budget(name, policy):
    """Every session checks all that its tokens see against a cold run."""
    chance = random.Random(f"{name} {policy}")
    model = HYBRIDS[name]() if name in HYBRIDS else MODELS[name](NUMPY)
    server = Server(
        model,
        policy=policy,
        resume_every=chance.choice([None, 2, 5]),
        quota=chance.choice([None, 900]),
    )
    asked = [[1]]
    for _ in range(40):
        base = chance.choice(asked[-6:])[: chance.randrange(12)]
        prompt = [*base, *(chance.randrange(1, 4) for _ in range(chance.randrange(1, 7)))]
        reply = [chance.randrange(1, 4) for _ in range(chance.randrange(5))]
        server.prefix._index.budget = chance.choice([0, 100, 300, 500, 800, 1500, None])
        retain = chance.choice([None, None, (3, 50.0), {(0, 2): (5, math.inf)}])
        fail = chance.choice([None, None, None, 2])
        points = chance.sample(range(12), chance.randrange(3))
        server.ask(prompt, reply, resume_points=points, retain=retain, fail=fail)
        asked.append([*prompt, *reply])
        check_useful(server.prefix, windows=name in WINDOWED)
        check_accounts(server)
        budget = server.prefix._index.budget
        assert budget is None or server.prefix.stats.nbytes <= budget
    check_nothing_left(server)


@pytest.mark.parametrize("name", ["window", "rotating", "sinks", "hybrid", "hybrid pool"])
@pytest.mark.parametrize("seed", range(4))
def test_points_that_are_left_are_as_good_as_before(name, seed):
    """Against rows needed one by one, and hits found one by one."""
    chance = random.Random(seed)
    server = Server(MODELS[name](NUMPY))
    ids = [chance.randrange(1, 4) for _ in range(18)]
    server.ask(ids, resume_points=chance.sample(range(1, 18), 6))
    [span] = spans_of(server.prefix)
    before = {p for p in range(1, 19) if server.prefix.lookup([*ids[:p], 9]).matched == p}
    snapshot = span.payload.snapshot
    points = resume_points(snapshot)
    assert set(points.tolist()) <= before
    assert max(before) == points[-1]
    for nbytes in range(1, snapshot.nbytes, 7):
        less = thinned(snapshot, nbytes)
        if less is None:
            assert snapshot.nbytes - nbytes < snapshot.needed_by(points[-1:]).nbytes
            break
        assert less.nbytes <= snapshot.nbytes - nbytes
        kept = resume_points(less)
        assert set(kept.tolist()) <= before
        assert kept[-1] == points[-1]
    for nbytes in range(1, snapshot.nbytes, 7):
        point = cut(snapshot, nbytes)
        alone = [snapshot.copy().split(int(p))[0] for p in points if p < snapshot.stop]
        sizes = {each.stop: each.needed_by(np.array([each.stop])).nbytes for each in alone}
        fitting = [stop for stop, size in sizes.items() if size <= snapshot.nbytes - nbytes]
        assert point == max(fitting, default=None)
