"""Any sequence of calls, good and bad, on every backend, against the oracle.

Hypothesis makes up to three caches (copies of one another), calls whatever it likes on them, and
shrinks what fails. After every call the caches must agree with their oracles; after every refused
one they must be, to the byte, what they were.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import hypothesis.strategies as st
import pytest
from hypothesis import settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from kvcache import Backend, KVCache, LayerCaches, RotatingKVCache, TrimError

from . import bad_updates
from .oracle import (
    Oracle,
    Shape,
    Token,
    check_columns,
    check_state,
    check_whole,
    fingerprint,
    held_columns,
    oracle_for,
    push,
)

REFUSED = [
    *bad_updates.BAD,
    *bad_updates.STRANGERS,
    "trim too much",
    "trim less than nothing",
    "accept too much",
    "accept less than nothing",
    "mask too much",
    "mask nothing",
    "no window",
    "load a damaged file",
]


@dataclass
class Pair:
    """A cache under test and its oracle. shape: None until the cache knows it.

    columns: what the last update returned, while `mask` still speaks of them.
    latest: how many tokens that update had. mark: the offset at an open checkpoint.
    """

    cache: KVCache
    oracle: Oracle
    shape: Shape | None = None
    columns: Sequence[Token] = ()
    latest: int = 1
    mark: int | None = None

    @property
    def maskable(self):
        """Queries whose whole window is among the columns."""
        displaced = len(self.oracle.held()) < self.oracle.offset
        return self.latest if displaced else self.oracle.offset

    def forget_columns(self):
        self.columns, self.latest, self.mark = (), 1, None


class CacheMachine(RuleBasedStateMachine):
    """The calls. A subclass says which backend and which cache."""

    backend: Backend
    kind: type[KVCache]
    shapes: st.SearchStrategy[Shape]
    options: st.SearchStrategy[dict[str, int]]

    def __init__(self):
        super().__init__()
        self.stamp = 0
        self.folder = tempfile.TemporaryDirectory()

    def teardown(self):
        self.folder.cleanup()

    @initialize(data=st.data())
    def start(self, data):
        self.shape = data.draw(self.shapes, label="shape")
        options = data.draw(self.options, label="options")
        named = data.draw(st.booleans(), label="dtype named")
        dtype = self.shape.dtype if named else None
        cache = self.kind(backend=self.backend, dtype=dtype, **options)
        self.pairs = [Pair(cache, oracle_for(cache))]

    def pair(self, which):
        return self.pairs[which % len(self.pairs)]

    @invariant()
    def every_cache_agrees_with_its_oracle(self):
        for pair in getattr(self, "pairs", []):
            check_state(pair.cache, pair.oracle)

    WHICH = st.integers(0, 2)
    SHARE = st.integers(0, 8)
    """Eighths of what is possible, so that most drawn counts are legal ones."""

    # Calls that succeed.

    @rule(which=WHICH, times=st.integers(1, 12))
    def decode(self, which, times):
        for _ in range(times):
            self.push(self.pair(which), 1)

    @rule(which=WHICH, tokens=st.integers(2, 24))
    def prefill(self, which, tokens):
        self.push(self.pair(which), tokens)

    @rule(which=WHICH, drafts=st.lists(st.integers(1, 24), min_size=1, max_size=4), share=SHARE)
    def speculate(self, which, drafts, share):
        pair = self.pair(which)
        mark = pair.oracle.offset
        pair.cache.checkpoint()
        for tokens in drafts:
            self.push(pair, tokens)
        accepted = (pair.oracle.offset - mark) * share // 8
        pair.cache.rollback(accepted)
        self.cut(pair, mark + accepted)

    @rule(which=WHICH)
    def checkpoint(self, which):
        pair = self.pair(which)
        pair.cache.checkpoint()
        pair.mark = pair.oracle.offset

    @rule(which=WHICH, share=SHARE)
    def rollback(self, which, share):
        pair = self.pair(which)
        if pair.mark is not None:
            accepted = (pair.oracle.offset - pair.mark) * share // 8
            pair.cache.rollback(accepted)
            self.cut(pair, pair.mark + accepted)

    @rule(which=WHICH, share=SHARE)
    def trim(self, which, share):
        pair = self.pair(which)
        tokens = pair.oracle.offset * share // 8
        if pair.oracle.can_trim(tokens):
            pair.cache.trim(tokens)
            self.cut(pair, pair.oracle.offset - tokens)

    @rule(share=SHARE)
    def trim_layers(self, share):
        caches = [pair.cache for pair in self.pairs]
        tokens = max(pair.oracle.offset for pair in self.pairs) * share // 8
        before = [fingerprint(cache) for cache in caches]
        if all(pair.oracle.can_trim(tokens) for pair in self.pairs):
            LayerCaches(iter(caches)).trim(tokens)
            for pair in self.pairs:
                self.cut(pair, pair.oracle.offset - tokens)
        else:
            with pytest.raises(TrimError):
                LayerCaches(iter(caches)).trim(tokens)
            assert [fingerprint(cache) for cache in caches] == before

    @rule(which=WHICH)
    def reset(self, which):
        pair = self.pair(which)
        pair.cache.reset()
        pair.oracle.cut(0)
        pair.shape = None
        pair.forget_columns()
        assert pair.cache.nbytes == 0
        assert pair.cache.growths == 0

    @rule(which=WHICH)
    def copy(self, which):
        pair = self.pair(which)
        twin = Pair(pair.cache.copy(), pair.oracle.copy())
        twin.shape = pair.shape if twin.oracle.offset else None
        assert type(twin.cache) is type(pair.cache)
        check_whole(twin.cache, twin.oracle)
        self.pairs = [*self.pairs, twin][-3:]

    @rule(which=WHICH, by_way_of_numpy=st.booleans())
    def save_and_load(self, which, by_way_of_numpy):
        pair, path = self.pair(which), Path(self.folder.name) / "cache"
        before = fingerprint(pair.cache)
        pair.cache.save(path)
        assert fingerprint(pair.cache) == before
        if by_way_of_numpy:
            type(pair.cache).load(path).save(path)
        pair.cache = type(pair.cache).load(path, self.backend)
        pair.forget_columns()
        pair.shape = pair.shape if pair.oracle.offset else None
        check_whole(pair.cache, pair.oracle)

    @rule(which=WHICH, share=SHARE, window=st.none() | st.integers(1, 30))
    def mask(self, which, share, window):
        pair = self.pair(which)
        if pair.oracle.offset:
            columns = pair.columns or held_columns(pair.cache)
            tokens = max(1, pair.maskable * share // 8)
            check_columns(pair.cache, pair.oracle, columns, tokens, window)

    # Calls that are refused, and must have changed nothing.

    @rule(which=WHICH, name=st.sampled_from(REFUSED), by=st.integers(1, 9))
    def refuse(self, which, name, by):
        pair = self.pair(which)
        if name in bad_updates.BAD and pair.shape is None and not bad_updates.BAD[name].always:
            return  # a new cache takes its first geometry, whatever it is
        call, error, match = self.refused(pair, name, by)
        before = fingerprint(pair.cache)
        with pytest.raises(error, match=match):
            call()
        assert fingerprint(pair.cache) == before

    def refused(self, pair, name, by):
        """The call `name`, wrong by `by`; the error and message it must end in."""
        cache, oracle = pair.cache, pair.oracle
        if name in bad_updates.BAD:
            bad = bad_updates.BAD[name]
            update = bad_updates.arrays(self.backend, self.shape, name, by)
            return lambda: cache.update(*update), bad.error, bad.match
        if name in bad_updates.STRANGERS:
            keys, values, error, match = bad_updates.stranger(self.backend, self.shape, name)
            return lambda: cache.update(keys, values), error, match
        since = 0 if pair.mark is None else oracle.offset - pair.mark
        trim = "trim takes back 0 to|cannot trim once tokens were displaced"
        accepted = f"accepted must be 0 to {since} tokens|needs an open checkpoint"
        covers = "mask covers 1 to"
        return {
            "trim too much": (lambda: cache.trim(oracle.offset + by), TrimError, trim),
            "trim less than nothing": (lambda: cache.trim(-by), TrimError, trim),
            "accept too much": (lambda: cache.rollback(since + by), TrimError, accepted),
            "accept less than nothing": (lambda: cache.rollback(-by), TrimError, accepted),
            "mask too much": (lambda: cache.mask(pair.maskable + by), ValueError, covers),
            "mask nothing": (lambda: cache.mask(1 - by), ValueError, covers),
            "no window": (lambda: cache.mask(1, 1 - by), ValueError, f"window must be|{covers}"),
            "load a damaged file": (lambda: self.load_damaged(cache, by), OSError, "damaged|whole"),
        }[name]

    def load_damaged(self, cache, missing):
        path = Path(self.folder.name) / "damaged"
        cache.save(path)
        path.write_bytes(path.read_bytes()[:-missing])
        type(cache).load(path, self.backend)

    # Helpers.

    def push(self, pair, tokens):
        tokens = min(tokens, 3 * (pair.oracle.max_size or 8))
        if self.backend.name == "jax":
            tokens = max(few for few in (1, 2, 5, 13, 24) if few <= tokens)
        pair.columns = push(pair.cache, pair.oracle, tokens, self.shape, self.stamp)
        pair.shape, pair.latest = self.shape, tokens
        self.stamp += tokens

    @staticmethod
    def cut(pair, offset):
        pair.oracle.cut(offset)
        pair.forget_columns()
        check_whole(pair.cache, pair.oracle)


# What is drawn. JAX compiles a program for every shape, so it gets few; its buffers grow by 256.


def shapes(backend):
    if backend.name == "jax":
        return st.sampled_from([Shape(2, 1, 2, 3, dtype) for dtype in ("float32", "bfloat16")])
    few = st.integers(1, 3)
    return st.builds(Shape, few, few, few, st.integers(1, 4), st.sampled_from(backend.dtypes))


def options(backend, kind):
    jax = backend.name == "jax"
    step = st.fixed_dictionaries({"step": st.sampled_from([1, 256] if jax else [1, 2, 3, 7, 256])})
    if kind is KVCache:
        return step
    sizes = [3, 5] if jax else range(1, 9)
    limits = [{"max_size": size, "keep": keep} for size in sizes for keep in range(size)]
    return st.tuples(st.sampled_from(limits), step).map(lambda both: both[0] | both[1])


SHARE = {"numpy": 150, "torch": 80, "array_api": 40, "mlx": 60, "jax": 12}
"""Examples out of a hundred: what a backend's speed affords."""


@pytest.mark.slow
@pytest.mark.parametrize("kind", [KVCache, RotatingKVCache])
def test_any_sequence(backend, kind):
    class Machine(CacheMachine):
        pass

    Machine.backend, Machine.kind = backend, kind
    Machine.shapes, Machine.options = shapes(backend), options(backend, kind)
    count = max(1, settings().max_examples * SHARE[backend.name] // 100)
    run_state_machine_as_test(
        Machine, settings=settings(max_examples=count, stateful_step_count=40)
    )
