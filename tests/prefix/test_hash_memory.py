"""Hashes of blocks that are remembered for subscribers: of what is stored, and within a limit."""

import sys

import numpy as np
import pytest

from kvcache import KVCache
from kvcache.prefix import BlockRemoved, BlockStored, PrefixCache

from .block_names import hashes
from .random_sessions import RandomSessions


def size_of_hashes(events):
    known = events._hashed.values()
    names = {id(name) for last, hashes in known for name in [last, *hashes] if name is not None}
    lists = sum(sys.getsizeof(each) + sys.getsizeof(each.hashes) for each in known)
    return sys.getsizeof(events._hashed) + lists + len(names) * sys.getsizeof(bytes(32))


@pytest.mark.parametrize("index_budget", [None, 100_000])
def test_hashes_are_those_of_stored_spans_and_told(index_budget):
    sessions = RandomSessions(7, 1, index_budget=index_budget)
    events, index, blocks = sessions.prefix.events, sessions.prefix._index, set()
    limit, most, forgotten = sessions.prefix.stats.index_budget // 8, 0, False

    def note(event):
        if isinstance(event, BlockStored):
            blocks.update(event.block_hashes)
        elif isinstance(event, BlockRemoved):
            assert blocks.issuperset(event.block_hashes)
            blocks.difference_update(event.block_hashes)
        else:
            blocks.clear()

    leave = events.subscribe(note)
    for _ in range(200):
        sessions.run()
        assert index.kept.keys() >= events._hashed.keys()
        # Two spans may have the same bytes for the block that one ends with.
        assert size_of_hashes(events) <= events.nbytes <= limit
        most = max(most, events.nbytes)
        forgotten = forgotten or len(events._hashed) < len(index.kept) // 2
        assert blocks == sessions.stored(hashes)
    assert forgotten == (index_budget is not None)
    assert most > 10_000
    leave()
    sessions.prefix.clear()
    assert not events._hashed
    assert events.nbytes == sys.getsizeof(events._hashed) < most


def test_hashes_of_spans_that_are_joined_go():
    prefix, told = PrefixCache([KVCache("numpy")]), []
    prefix.events.subscribe(told.append)
    ids = list(range(96))
    for stop in [16, 32, 48, 64, 80, 96, 96]:
        with prefix.session(ids[:stop]) as session:
            rows = np.zeros((1, 1, session.remaining.size, 1), np.float32)
            session.caches[0].update(rows, rows)
    assert prefix.stats.spans < 6
    assert prefix._index.kept.keys() >= prefix.events._hashed.keys()
    prefix.trim(0)
    stored, removed = told[:6], told[6:]
    assert [name for event in stored for name in event.block_hashes] == hashes(ids)
    assert {name for event in removed for name in event.block_hashes} == set(hashes(ids))
