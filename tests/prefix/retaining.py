"""Random sessions that retain what they store, and an oracle of what may be evicted."""

import math
import random
from fractions import Fraction

import numpy as np

from kvcache import KVCache
from kvcache.prefix import PrefixCache

from .. import peek
from .served import spans_of

ROW = 8
"""Bytes of a token."""
INF = math.inf
QUOTAS = {"a": 25 * ROW, "b": 60 * ROW, "c": 0}


class Model:
    """Sessions over one layer, whose rows tell the token; a clock that is set by hand."""

    model = None

    def __init__(self, **options):
        self.now = 0.0
        self.prefix = PrefixCache([KVCache("numpy")], clock=lambda: self.now, **options)

    def ask(self, ids, *, store=True, **options):
        session = self.begin(ids, **options)
        self.compute(session, ids, session.matched)
        session.close(store)
        return session

    def begin(self, ids, **options):
        return self.prefix.session(ids, **options)

    @staticmethod
    def compute(session, ids, start):
        """Tokens from `start` on; the rows of those before are those of these tokens."""
        keys = np.array(ids[start:], np.float32)[None, None, :, None]
        found, _ = session.caches[0].update(keys, -keys)
        assert found[0, 0, :, 0].tolist() == ids

    def stored(self, ids, **options):
        return self.prefix.lookup([*ids, 9_999], **options).stored


def levels(prefix, now):
    """Effective priority of every stored token, by the tokens up to it."""
    found = {}
    for span in spans_of(prefix):
        ids = [t for part in span.path for t in part.node.tokens.tolist()]
        level = 0 if span.retention is None else span.retention.level(now)
        for stop in range(span.start + 1, span.stop + 1):
            found[span.tree.salt, tuple(ids[:stop])] = level
    return found


class Oracle:
    """What stored tokens are retained for, and who may go: worked out anew for each eviction."""

    def __init__(self, model, budget, quota_of):
        self.model, self.budget, self.quota_of = model, budget, quota_of
        self.retained, self.retained_evictions = {}, 0
        self.storing = self.dropped = None
        peek.watch_evictions(model.prefix, self.evicts)

    def level(self, name):
        """Effective priority and end of what a token is retained for."""
        priority, seconds, since = self.retained.get(name, (0, 1.0, -1e9))
        if seconds == INF:
            return priority, INF
        left = Fraction(since) + Fraction(seconds) - Fraction(self.model.now)
        return max(0, math.ceil(priority * left / Fraction(seconds))), since + seconds

    def retain(self, salt, ids, held, ranges):
        stored = self.stored()
        for start, stop, priority, seconds in ranges:
            for place in range(start, min(stop, held)):
                name = salt, tuple(ids[: place + 1])
                new = priority, (INF if seconds == INF else self.model.now + seconds)
                if name in stored and new > self.level(name):
                    self.retained[name] = priority, seconds, self.model.now

    def names(self, span):
        ids = [t for part in span.path for t in part.node.tokens.tolist()]
        return [(span.tree.salt, tuple(ids[:n])) for n in range(span.start + 1, span.stop + 1)]

    def stored(self):
        return {name for span in spans_of(self.model.prefix) for name in self.names(span)}

    def candidates(self):
        """Spans that nobody uses or builds on, with the order in which they go, by salt."""
        for span in spans_of(self.model.prefix):
            below = [node.value.payload for node in span.node.children.values()]
            if not span.pins and not any(below):
                yield span, (self.level(self.names(span)[0])[0], span.used)

    def evicts(self, span):
        """Called with each span about to go: it has to, and no other before it."""
        self.settle()
        order = dict(self.candidates())
        assert span in order
        salt, names = span.tree.salt, self.names(span)
        if not self.is_dead(span):
            sizes, limit = self.sizes(), self.quota_of(salt)
            own = [key for other, key in order.items() if other.tree.salt == salt]
            for_quota = limit is not None and sizes[salt] > limit and order[span] == min(own)
            for_room = sum(sizes.values()) > self.budget and order[span] == min(order.values())
            assert for_quota or for_room
            self.retained_evictions += order[span][0] > 0
        for name in names:
            self.retained.pop(name, None)

    def is_dead(self, span):
        """Whether it is of a branch that is being dropped."""
        if self.dropped is None:
            return False
        salt, ids, position = self.dropped
        own = self.names(span)[-1] == (salt, tuple(ids[: span.stop]))
        return own and span.start >= position

    def settle(self):
        """Retain what was stored just now, before anything is evicted for it."""
        if self.storing is not None:
            storing, self.storing = self.storing, None
            self.retain(*storing)

    def sizes(self):
        """Bytes by salt."""
        sizes = {}
        for span in spans_of(self.model.prefix):
            salt = span.tree.salt
            sizes[salt] = sizes.get(salt, 0) + span.nbytes
        return sizes

    def check(self):
        sizes, busy = self.sizes(), {span.tree.salt for span, _ in self.candidates()}
        for salt, nbytes in sizes.items():
            limit = self.quota_of(salt)
            assert limit is None or nbytes <= limit or salt not in busy
        assert sum(sizes.values()) <= self.budget or not busy
        stats = self.model.prefix.stats
        assert stats.nbytes == sum(sizes.values())
        assert stats.retained_evictions == self.retained_evictions
        for name, level in levels(self.model.prefix, self.model.now).items():
            assert level == self.level(name)[0]


class RetainingSessions:
    """Random sessions of several tenants, some of them open at once."""

    def __init__(self, seed):
        self.chance = random.Random(seed)
        # Few ghosts, which the oracle looks at as well.
        self.model = Model(budget=120 * ROW, quota=QUOTAS.get, index_budget=400_000)
        self.oracle = Oracle(self.model, 120 * ROW, QUOTAS.get)
        self.asked, self.open = [("", [1])], []

    def step(self):
        chance = self.chance
        self.model.now += chance.choice([0.0, 0.25, 1.0, 5.0])
        if self.open and chance.random() < 0.45:
            self.end(self.open.pop(chance.randrange(len(self.open))))
        elif chance.random() < 0.1:
            self.drop_stored()
        elif self.open and chance.random() < 0.2:
            self.drop_in(chance.choice(self.open))
        elif self.open and chance.random() < 0.2:
            self.store(chance.choice(self.open), lambda session: session.commit())
        else:
            self.begin()
        self.oracle.check()

    def begin(self):
        chance = self.chance
        salt, old = chance.choice(self.asked[-15:])
        if chance.random() < 0.3:
            salt, old = chance.choice(["", "a", "b", "c"]), []
        ids = old[: chance.randrange(len(old) + 1)] if old else []
        ids = ids + [chance.randrange(3) for _ in range(chance.randrange(1, 12))]
        retain = self.retention(len(ids))
        session = self.model.begin(ids, salt=salt, retain=retain)
        reply = [chance.randrange(3) for _ in range(chance.randrange(6))]
        session.extend(reply)
        whole = [*ids, *reply]
        self.model.compute(session, whole, session.matched)
        self.asked.append((salt, whole))
        self.open.append([session, salt, whole, retain, None])

    def retention(self, size):
        chance = self.chance
        pair = chance.choice([1, 3, 4, 100]), chance.choice([4.0, 16.0, 64.0, INF])
        kind = chance.randrange(4)
        if kind == 0:
            return None
        if kind == 1:
            return pair
        middle = chance.randrange(1, size + 1)
        start = chance.randrange(middle)
        return {(start, middle): pair, (middle + chance.randrange(3), None): (2, 16.0)}

    def ranges(self, retain):
        if retain is None:
            return []
        if isinstance(retain, tuple):
            return [(0, 10**6, *retain)]
        return [(a, 10**6 if b is None else b, *pair) for (a, b), pair in retain.items()]

    def store(self, session, how):
        opened, salt, ids, retain, dropped = session
        held = len(ids) if dropped is None else min(dropped, len(ids))
        self.oracle.storing = salt, ids, held, self.ranges(retain)
        how(opened)
        self.oracle.settle()

    def end(self, session):
        opened, salt, ids, _, dropped = session
        self.oracle.dropped = None if dropped is None else (salt, ids, dropped)
        if self.chance.random() < 0.9:
            self.store(session, lambda session: session.close())
        else:
            opened.close(store=False)
        self.oracle.dropped = None
        if dropped is not None:
            self.check_dropped(salt, ids, dropped)

    def drop_in(self, session):
        opened, salt, ids, _, dropped = session
        position = self.chance.randrange(len(ids) + 3)
        session[4] = position if dropped is None else min(dropped, position)
        self.dropping(salt, ids, position, lambda: opened.drop_branch(position))

    def drop_stored(self):
        salt, ids = self.chance.choice(self.asked[-15:])
        position, drop_branch = self.chance.randrange(len(ids)), self.model.prefix.drop_branch
        self.dropping(salt, ids, position, lambda: drop_branch(ids, position, salt=salt))

    def dropping(self, salt, ids, position, how):
        self.oracle.dropped = salt, ids, position
        how()
        self.oracle.dropped = None
        self.check_dropped(salt, ids, position)

    def check_dropped(self, salt, ids, position):
        """The last stored span of the branch is one that others use, or go on from."""
        path = [
            span
            for span in spans_of(self.model.prefix)
            if self.oracle.names(span)[0] == (salt, tuple(ids[: span.start + 1]))
        ]
        last = max(path, key=lambda span: span.stop, default=None)
        if last is not None and last.stop > position:
            own = self.oracle.names(last)[-1] == (salt, tuple(ids[: last.stop]))
            assert last.pins or last.children or not own
