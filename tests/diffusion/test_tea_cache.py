"""TeaCache: decisions against a loop that adds up, what it holds, and what it refuses."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, NamedTuple
from weakref import ref

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache import StepOrderError, UnknownStreamError
from kvcache.diffusion import HitStats, TeaCache


class Made(NamedTuple):
    """Settings, in eighths where they are compared: every sum is exact."""

    threshold: float
    rescale: Any
    early: int
    longest: int


EIGHTHS = st.integers(0, 40).map(lambda n: n / 8)
FACTORS = st.sampled_from([0.0, 0.25, 0.5, 1.0, 2.0, -1.0])
MADE = st.builds(
    Made,
    EIGHTHS,
    FACTORS | st.lists(st.integers(-2, 2), min_size=1, max_size=3),
    st.integers(0, 3),
    st.integers(0, 5),
)
STEP = st.tuples(st.integers(-2, 3), st.integers(-16, 16).map(lambda n: n / 8) | st.just(math.nan))
"""How far the number goes on, and the timestep; a number that does not go on is one that is new."""
FREES, LOSES = st.booleans(), st.integers(0, 9)


class Slow:
    """All steps of a run are remembered, and added up each time."""

    def __init__(self, made):
        self.made, self.steps = made, list[tuple[int, float, bool]]()

    def computes(self, step, time, holds):
        if not holds or (self.steps and step < self.steps[-1][0]):
            self.steps = []
        computed = [n for n, (*_, computed) in enumerate(self.steps) if computed]
        since = self.steps[computed[-1] :] if computed else []
        answer = (
            not since
            or step < self.made.early
            or len(since) > self.made.longest
            or not self.drift([*(t for _, t, _ in since), time]) < self.made.threshold
        )
        self.steps.append((step, time, answer))
        return answer

    def drift(self, times):
        changes = [abs(new - old) for old, new in pairwise(times)]
        if any(map(math.isnan, changes)):
            return math.inf
        rescale = self.made.rescale
        terms = rescale[::-1] if isinstance(rescale, list) else [0, rescale]
        return sum(max(0, sum(c * x**n for n, c in enumerate(terms))) for x in changes)


@settings(max_examples=300)
@given(made=MADE, steps=st.lists(st.tuples(STEP, LOSES), max_size=14))
def test_decides_as_a_loop_that_adds_up(made, steps):
    """Also where steps go back or are left out, updates are missing, or everything is freed."""
    cache = TeaCache(*made[:3], max_consecutive_skips=made.longest)
    slow, last, counts = Slow(made), -1, [0, 0]
    for (ahead, time), loses in steps:
        step = max(0, last + (ahead or 1))
        if step == last:
            with pytest.raises(StepOrderError):
                cache.should_compute(step, time)
            continue
        expected = slow.computes(step, time, bool(cache.arrays()))
        assert cache.should_compute(step, time) is expected
        counts[expected] += 1
        last = step
        assert cache.stats == (counts[0], counts[1])
        if expected and loses:
            cache.update("output")
        if expected:
            assert cache.drift == 0
        if loses == 9:
            cache.free()
            slow.steps, last = [], -1


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        (Made(2.5, 1.0, 0, 99), "C..C..C..C.."),
        (Made(3.0, 1.0, 0, 99), "C..C..C..C.."),  # 3 is not below 3
        (Made(3.5, 1.0, 0, 99), "C...C...C..."),
        (Made(3.5, 0.5, 0, 99), "C......C...."),
        (Made(3.5, 0.5, 0, 4), "C....C....C."),
        (Made(3.5, 0.5, 0, 0), "CCCCCCCCCCCC"),
        (Made(2.5, 1.0, 5, 99), "CCCCC..C..C."),
        (Made(0.0, 1.0, 0, 99), "CCCCCCCCCCCC"),
        (Made(0.0, 0.0, 0, 99), "CCCCCCCCCCCC"),
        (Made(9.0, (2.0, 1.0, 0.5), 0, 99), "C..C..C..C.."),  # 3.5 each
        (Made(9.0, (-1.0, 0.0), 0, 5), "C.....C....."),
    ],
)
def test_by_hand(made, expected):
    """Timesteps fall by 1."""
    cache, found = TeaCache(*made[:3], max_consecutive_skips=made.longest), ""
    for step in range(12):
        computes = cache.should_compute(step, 100 - step)
        found += "C" if computes else "."
        if computes:
            cache.update(step)
    assert found == expected
    assert cache.stats == HitStats(hits=found.count("."), misses=found.count("C"))


def test_defaults():
    cache, found = TeaCache(), ""
    for step in range(12):
        computes = cache.should_compute(step, 1 - step / 64)
        found += "C" if computes else "."
        cache.update(step)
    assert found == "C....C....C."  # a longest run of 4; 7/64 would be above 0.1
    assert cache.streams == (0,)
    assert TeaCache(0.0625).should_compute(0, 1.0) is not False


def test_drift_is_shown_and_gone_once_computed():
    cache = TeaCache(1.0, 2.0)
    cache.should_compute(0, 3.0)
    cache.update("output")
    drifts = []
    for step, time in ((1, 2.875), (2, 3.0), (3, 2.75), (4, 2.5)):
        cache.should_compute(step, time)
        drifts.append(cache.drift)
    assert drifts == [0.25, 0.5, 0, 0.5]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e300])
def test_a_timestep_that_is_no_number_is_computed(bad):
    cache = TeaCache(1e30, max_consecutive_skips=99)
    cache.should_compute(0, 1.0)
    cache.update("output")
    times = [1.0, bad, 1.0, 1.0]
    assert [cache.should_compute(n + 1, time) for n, time in enumerate(times)] == [
        False, True, True, False,
    ]  # fmt: skip
    assert cache.drift == 0


def test_as_long_as_nothing_is_held_all_is_computed():
    cache = TeaCache(99.0, streams=2)
    assert all(cache.should_compute(step, 1.0) for step in range(9))
    cache.update("output", 1)
    assert not cache.should_compute(9, 1.0)


# What it holds.


def test_arrays_are_held_and_given_as_they_are(backend):
    one, two = (backend.from_host(np.full((2, 3), v, np.float32)) for v in (1, 2))
    with TeaCache(streams=("cond", "uncond")) as cache:
        assert (cache.get(), cache.get("uncond"), cache.nbytes) == (None, None, 0)
        cache.update(one, "uncond")
        cache.update(two)
        assert cache.get("cond") is cache.get(0) is two
        assert cache.get("uncond") is one
        assert [*map(id, cache.arrays())] == [id(two), id(one)]
        assert cache.nbytes == 48
        assert repr(cache) == "<TeaCache streams=('cond', 'uncond') holds 2 arrays>"
        cache.update(one)
        assert (len(cache.arrays()), cache.nbytes) == (1, 24)
    assert (cache.arrays(), cache.nbytes, cache.get("cond")) == ([], 0, None)


class Output:
    """Can be seen to be gone."""


def test_lets_go_of_what_was_before():
    cache, seen = TeaCache(streams=2), []
    for stream in (0, 1, 0):
        cache.update(Output(), stream)
        seen.append(ref(cache.get(stream)))
    assert [array() is None for array in seen] == [True, False, False]
    with pytest.raises(RuntimeError, match="stop"), cache:
        raise RuntimeError("stop")
    assert [array() is None for array in seen] == [True] * 3


def test_after_free_a_run_begins_and_counts_go_on():
    cache = TeaCache(1.0)
    for step, time in ((3, 1.0), (4, 0.5)):
        cache.should_compute(step, time)
        cache.update("output")
    assert (cache.drift, cache.stats) == (0.5, (1, 1))
    cache.free()
    assert cache.drift == 0
    assert cache.should_compute(4, 0.5)
    cache.update("output")
    assert not cache.should_compute(5, 0.0)
    assert cache.stats == (2, 2)


# What it refuses: nothing has changed then.


def test_refuses_steps_and_streams():
    cache = TeaCache(1.0, streams=("a", "b"))
    cache.should_compute(0, 1.0)
    cache.update("output", "b")
    assert not cache.should_compute(1, 0.5)
    for call, error, message in (
        (lambda: cache.should_compute(1, 0.0), StepOrderError, "This cache has passed step 1"),
        (lambda: cache.should_compute(-1, 0.0), ValueError, "steps count from 0; got -1"),
        (lambda: cache.should_compute(2.0, 0.0), TypeError, "float"),
        (lambda: cache.should_compute(2, "soon"), ValueError, "could not convert"),
        (lambda: cache.update("other", "c"), UnknownStreamError, "one of 'a', 'b'.*got 'c'"),
        (lambda: cache.update("other", 2), UnknownStreamError, "got 2"),
        (lambda: cache.get(-1), UnknownStreamError, "got -1"),
    ):
        with pytest.raises(error, match=message):
            call()
        assert (cache.drift, cache.stats, cache.arrays()) == (0.5, (1, 1), ["output"])
    assert not cache.should_compute(2, 0.125)
    assert cache.drift == 0.875


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: TeaCache(-0.1), ValueError, "a threshold must be finite and >= 0"),
        (lambda: TeaCache(math.nan), ValueError, "a threshold must be finite and >= 0"),
        (lambda: TeaCache(rescale=math.inf), ValueError, "rescale must be finite coefficients"),
        (lambda: TeaCache(rescale=()), ValueError, "rescale must be finite coefficients"),
        (lambda: TeaCache(skip_early_steps=-1), ValueError, "must be >= 0 steps; got -1"),
        (
            lambda: TeaCache(max_consecutive_skips=-1),
            ValueError,
            "max_consecutive_skips must be >= 0 steps; got -1",
        ),
        (lambda: TeaCache(streams=0), ValueError, "at least one stream"),
        (lambda: TeaCache(streams=("a", "a")), ValueError, "each of another name"),
        (lambda: TeaCache(streams="ab"), TypeError, r"write \('ab',\)"),
    ],
)
def test_no_tea_cache(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_a_polynomial_may_be_an_array():
    given = [TeaCache(0.1, rescale) for rescale in ((2.0, 0.5, 0.0), np.array([2.0, 0.5, 0.0]))]
    decisions = []
    for cache in given:
        cache.update(np.ones(1))
        decisions.append([cache.should_compute(step, step / 9) for step in range(9)])
    assert decisions[0] == decisions[1]
    assert not all(decisions[0])
