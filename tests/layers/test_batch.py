"""Batches: rows of unequal length, selected, split and joined, against one list per row.

A query's whole view is read off the columns that its mask shows.
"""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from kvcache import KVCache, NotSupportedError, RotatingKVCache, TrimError

from .rows import Rows, affordable, arrays, check_held, content, host, mask_rows, visible

KINDS = {
    "growing": (KVCache, {"step": 4}),
    "ring": (RotatingKVCache, {"max_size": 5, "step": 4}),
    "sinks": (RotatingKVCache, {"max_size": 6, "keep": 2, "step": 4}),
    "slack": (RotatingKVCache, {"max_size": 4, "slack": 3, "step": 4}),
    "sinks and slack": (RotatingKVCache, {"max_size": 5, "keep": 1, "slack": 4, "step": 4}),
    "tokens first": (KVCache, {"step": 4, "layout": "bthd"}),
    "ring, tokens first": (RotatingKVCache, {"max_size": 5, "keep": 1, "layout": "bthd"}),
}


class BatchMachine(RuleBasedStateMachine):
    """One cache of several rows, and its snapshots."""

    backend = None
    name = "growing"

    @initialize(padding=st.lists(st.integers(0, 7), min_size=1, max_size=3))
    def make(self, padding):
        self.next, self.snapshots, self.mark = 1, [], None
        self.cache = self.fresh()
        self.cache.pad(padding)
        self.rows = Rows([[] for _ in padding], padding)

    def fresh(self):
        kind, options = KINDS[self.name]
        return kind(backend=self.backend, **options)

    @rule(tokens=st.integers(1, 14))
    def update(self, tokens):
        self.push(tokens)

    @rule(times=st.integers(1, 9))
    def decode(self, times):
        for _ in range(times):
            self.push(1)

    def push(self, tokens):
        rows, cache = self.rows, self.cache
        numbers = self.next + np.arange(len(rows.padding) * tokens).reshape(-1, tokens)
        self.next += numbers.size
        before = cache.mask(tokens, ahead=True)
        keys, values = cache.update(*arrays(cache, numbers))
        after = cache.mask(tokens)
        assert (before is None) == (after is None)
        if before is not None:
            assert (cache.backend.to_host(before) == cache.backend.to_host(after)).all()
        columns = np.arange(rows.offset, rows.offset + tokens)
        for row, padding, own in zip(rows.tokens, rows.padding, numbers, strict=True):
            row.extend(own[columns >= padding].tolist())
        rows.offset += tokens
        self.check_columns(host(cache, keys), host(cache, values), tokens, numbers)

    def check_columns(self, keys, values, tokens, numbers):
        rows, cache = self.rows, self.cache
        assert (values == -keys).all()
        positions = np.broadcast_to(cache.positions, keys.shape)
        shown = mask_rows(cache, tokens, len(rows.padding))
        for number, (row, padding) in enumerate(zip(rows.tokens, rows.padding, strict=True)):
            live = positions[number][positions[number] >= 0]
            assert (np.diff(live) > 0).all(), "columns ascend"
            for query in range(tokens):
                columns = np.flatnonzero(shown[number, query])
                position = rows.offset - tokens + query - padding
                got = keys[number, columns].tolist()
                if position < 0:
                    assert got == [numbers[number, query]], "a query of padding sees itself"
                    continue
                seen = list(zip(positions[number, columns].tolist(), got, strict=True))
                assert seen == visible(cache, row, position)

    @rule(data=st.data())
    def select(self, data):
        count = len(self.rows.padding)
        rows = data.draw(st.lists(st.integers(0, count - 1), min_size=1, max_size=4))
        there = self.cache.rows
        self.cache.select(rows)
        if there is not None:  # a cache that saw neither tokens nor padding has no rows
            self.rows = self.rows.select(rows)

    @rule()
    def split_and_join(self):
        if not self.rows.offset:
            return
        single = self.cache.split()
        for cache, row in zip(single, self.rows.tokens, strict=True):
            assert cache.offset == len(row)
            assert cache.padding is None
            assert cache.rows in (1, None)
            check_held(cache, [row])
        lengths = [len(row) for row in self.rows.tokens]
        if all(lengths):
            self.cache = type(self.cache).concat(single)
            offset = max(lengths)
            padding = [offset - length for length in lengths]
            self.rows = Rows(self.rows.tokens, padding, offset)
            self.mark = None

    @rule(tokens=st.integers(1, 12))
    def join_another(self, tokens):
        if not self.rows.offset or len(self.rows.padding) > 3:
            return
        other, numbers = self.fresh(), self.next + np.arange(tokens)[None]
        other.update(*arrays(other, numbers))
        self.next += tokens
        if any(padding >= self.rows.offset for padding in self.rows.padding):
            return  # a row without a token cannot be joined
        self.cache = type(self.cache).concat([self.cache, other])
        rows = [*self.rows.tokens, numbers[0].tolist()]
        offset = max(map(len, rows))
        self.rows, self.mark = Rows(rows, [offset - len(row) for row in rows], offset), None

    @rule(tokens=st.integers(0, 9))
    def trim(self, tokens):
        if self.cache.can_trim(tokens):
            self.cache.trim(tokens)
            self.rows.cut(self.rows.offset - tokens)
            self.mark = None
        else:
            with pytest.raises(TrimError):
                self.cache.trim(tokens)

    @rule()
    def checkpoint(self):
        self.cache.checkpoint()
        self.mark = self.rows.offset

    @rule(share=st.integers(0, 4))
    def rollback(self, share):
        if self.mark is not None:
            accepted = (self.rows.offset - self.mark) * share // 4
            self.cache.rollback(accepted)
            self.rows.cut(self.mark + accepted)
            self.mark = None

    @rule()
    def snapshot(self):
        if not self.rows.offset:
            return
        with suppress(NotSupportedError):
            snapshot = self.cache.snapshot()
            rows = self.rows.select(range(len(self.rows.padding)))
            self.snapshots = [*self.snapshots, (snapshot, content(snapshot), rows)][-3:]

    @rule()
    def restore(self):
        if self.snapshots:
            snapshot, _, rows = self.snapshots[-1]
            cache = self.fresh()
            cache.pad(rows.padding)
            cache.restore(snapshot)
            self.cache, self.mark = cache, None
            self.rows = rows.select(range(len(rows.padding)))

    @rule(way=st.sampled_from(["copy", "file", "to_backend"]))
    def copy(self, way):
        if way == "copy":
            self.cache = self.cache.copy()
        elif way == "to_backend" and self.rows.offset:
            self.cache = self.cache.to_backend("numpy").to_backend(self.backend)
        elif self.rows.offset:
            with tempfile.TemporaryDirectory() as folder, suppress(NotSupportedError):
                self.cache.save(Path(folder, "cache"))
                self.cache = type(self.cache).load(Path(folder, "cache"), self.backend)
        if not self.rows.offset:
            self.cache.pad(self.rows.padding)
        self.mark = None

    @invariant()
    def what_is_held_is_right(self):
        if hasattr(self, "rows"):
            check_held(self.cache, self.rows.tokens)
            for snapshot, before, _ in self.snapshots:
                assert content(snapshot) == before, "a snapshot changed"


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_any_sequence_of_calls(backend, kind):
    class Machine(BatchMachine):
        name = kind

    Machine.backend = backend
    run_state_machine_as_test(Machine, settings=affordable(backend))
