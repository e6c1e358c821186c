"""Windows and states over the index budget: turns are joined, and the newest one stays."""

import math

import numpy as np
import pytest

import kvcache
from kvcache import KVCache, RotatingKVCache
from kvcache.prefix import PrefixCache
from kvcache.prefix.policies import POLICIES, Gittins

from .. import peek
from .served import FULL, MODELS, Server, check_accounts

NUMPY = kvcache.get_backend("numpy")
TURN = 40


def ring():
    return [RotatingKVCache(16, backend="numpy")]


def hybrid():
    return [RotatingKVCache(16, backend="numpy"), KVCache("numpy")]


class Chats:
    """Conversations of turns of 40 tokens, half of them generated."""

    def __init__(self, caches, conversations=1, **options):
        self.now = 0.0
        self.prefix = PrefixCache(caches, clock=lambda: self.now, **options)
        self.chats, self.turn = [[] for _ in range(conversations)], 0

    def go_on(self, number=0, **options):
        """A turn of one of them; return how many tokens of those before it are computed again."""
        self.now += 60.0
        self.turn += 1
        ids = self.chats[number]
        known = len(ids)
        ids.extend(100 * self.turn + token for token in range(20))
        with self.prefix.session(ids, **options) as session:
            for start in range(session.matched, len(ids) + 19, 8):
                tokens = min(8, len(ids) + 19 - start)
                rows = np.zeros((1, 1, tokens, 2), np.float32)
                for cache in session.caches:
                    cache.update(rows, rows)
            reply = [token + 50 for token in ids[-20:]]
            session.extend(reply)
        ids.extend(reply)
        return known - session.matched


FOREVER = (50, math.inf)


@pytest.mark.parametrize("name", POLICIES)
@pytest.mark.parametrize(
    ("caches", "conversations", "retain", "room"),
    [
        (ring, 1, None, 14_000),
        (ring, 3, None, 40_000),
        (ring, 1, FOREVER, 14_000),
        (hybrid, 1, None, 40_000),
        (hybrid, 3, None, 110_000),
        (hybrid, 1, FOREVER, 40_000),
    ],
)
def test_a_chat_over_its_index_budget_computes_a_turn_again_at_most(
    name, caches, conversations, retain, room
):
    empty = PrefixCache(caches(), policy=name).stats.index_nbytes
    chats = Chats(caches(), conversations, policy=name, budget=1 << 20, index_budget=empty + room)
    for _ in range(25):
        for number in range(conversations):
            assert chats.go_on(number, retain=retain) <= TURN
            stats = chats.prefix.stats
            assert stats.index_nbytes <= stats.index_budget
    assert stats.evictions == 0
    assert conversations <= stats.spans < 13 * conversations


def squeeze(prefix):
    """Leave the index too little room by a byte."""
    index = prefix._index
    index.index_budget = index._reserved - 1
    prefix.trim(1 << 30)


@pytest.mark.parametrize("name", sorted(set(MODELS) - FULL))
def test_what_is_joined_for_the_index_is_what_was_computed(name):
    server, ids = Server(MODELS[name](NUMPY)), []
    for turn in range(3):
        ids += [10 * turn + 1, 10 * turn + 2, 10 * turn + 3]
        server.ask(ids, [10 * turn + 4, 10 * turn + 5])
        ids += [10 * turn + 4]  # the last token is not computed
    for turn in (1, 2):
        spans = server.prefix.stats.spans
        squeeze(server.prefix)
        check_accounts(server)
        assert (server.prefix.stats.spans, server.prefix.stats.evictions) == (spans - 1, 0)
        server.prefix._index.index_budget = None
        assert server.ask([*ids, 90 + turn]) == len(ids)


@pytest.mark.parametrize(("caches", "room"), [(ring, 40_000), (hybrid, 110_000)])
def test_a_turn_that_is_joined_waits_for_requests_as_the_next_one(caches, room):
    """Gittins counts tokens by class: those of a turn go where they are looked for later."""
    policy, empty = Gittins(), PrefixCache(caches(), policy="gittins").stats.index_nbytes
    chats = Chats(caches(), 3, policy=policy, budget=1 << 20, index_budget=empty + room)
    for _ in range(25):
        for number in range(3):
            chats.go_on(number)
            assert peek.returns(policy).waiting.min() >= 0
    assert chats.prefix.stats.evictions == 0
