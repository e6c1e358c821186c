"""What a recipe should decide, worked out slowly from all that happened, and loops to try it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st

from kvcache.diffusion import (
    Accumulated,
    DiffusionCache,
    Interval,
    Limits,
    Magnitude,
    Recipe,
    RelativeChange,
    StepMask,
    Threshold,
    TimestepChange,
    TracedCache,
)

Host = np.ndarray[Any, Any]
STEPS = 12


class Seen(NamedTuple):
    """A step, what was measured of it, and what came of it."""

    step: int
    value: Any
    computed: bool = False


@dataclass
class Oracle:
    """Decides in float64, and calls for another example where float32 might decide otherwise."""

    recipe: Recipe

    def __post_init__(self):
        self.run = []

    def computes(self, step, signal=None, time=None):
        measure = self.recipe.policy.signal
        when = step if time is None else time
        value = None if measure is None else np.float64(signal if measure.array else when)
        if self.run and step < self.run[-1].step:
            self.run = []
        self.run.append(Seen(step, value))
        answer = self._first() or self._limited(step) or self._judged(self.recipe.policy)
        self.run[-1] = self.run[-1]._replace(computed=answer)
        return answer

    def _first(self):
        return not any(seen.computed for seen in self.run)

    def _limited(self, step):
        limits, policy = self.recipe.limits, self.recipe.policy
        longest = (
            policy.max_consecutive_skips
            if limits.max_consecutive_skips is None
            else limits.max_consecutive_skips
        )
        skipped = sum(not seen.computed for seen in self.run[:-1])
        return (
            step < limits.warmup
            or (limits.steps is not None and step >= limits.steps - limits.tail)
            or (longest is not None and len(self._open()) > longest)
            or (limits.max_skips is not None and skipped >= limits.max_skips)
        )

    def _open(self):
        """The steps since the last computed one, and the present one."""
        computed = [number for number, seen in enumerate(self.run) if seen.computed]
        return self.run[computed[-1] + 1 :]

    def _judged(self, policy):
        now, measure = self.run[-1], policy.signal
        match policy:
            case Interval():
                return len(self._open()) >= policy.every
            case StepMask():
                return now.step >= len(policy.mask) or policy.mask[now.step]
            case Threshold():
                (*_, change) = self._changes(policy.measure)
                return reached(change, policy.threshold, change)
            case Accumulated():
                changes = self._changes(policy.measure)
                terms = [[c * x**n for n, c in enumerate(policy.rescale[::-1])] for x in changes]
                size = sum(abs(part) for parts in terms for part in parts)
                drift = sum(part if part >= 0 else 0.0 for part in map(sum, terms))
                return not all(map(math.isfinite, changes)) or reached(
                    drift, policy.threshold, size
                )
            case Magnitude():
                ratios = [
                    policy.ratios[seen.step] if seen.step < len(policy.ratios) else math.inf
                    for seen in self._open()
                ]
                held = [math.prod(ratios[: n + 1]) for n in range(len(ratios))]
                error = sum(abs(1 - ratio) for ratio in held)
                return reached(error, policy.threshold, error)
        raise AssertionError(measure)

    def _changes(self, measure):
        """That of every step since the last computed one."""
        steps = self.run[-len(self._open()) - 1 :]
        if measure.since == "computed":
            return [change(measure, seen.value, steps[0].value) for seen in steps[1:]]
        return [change(measure, new.value, old.value) for old, new in pairwise(steps)]


def change(measure, new, old):
    with np.errstate(all="ignore"):
        if isinstance(measure, TimestepChange):
            return float(abs(new - old))
        return float(np.abs(new - old).mean() / np.abs(old).mean())


def reached(value, threshold, size):
    """Whether it is not below; `size` is that of what it was added up from."""
    assume(not threshold or not abs(value - threshold) <= 1e-4 * (threshold + size))
    return not value < threshold


# Any recipe.

MEASURES = st.builds(RelativeChange, st.sampled_from(["previous", "computed"])) | st.builds(
    TimestepChange, st.sampled_from(["previous", "computed"])
)
THRESHOLDS = st.just(0.0) | st.floats(2**-6, 2.0, width=16)
MASKS = st.lists(st.booleans(), min_size=1, max_size=STEPS + 2)
POLYNOMIALS = st.lists(st.floats(-2, 4, width=16), min_size=1, max_size=5)
POLICIES = {
    Interval: st.builds(Interval, st.integers(1, 4)),
    StepMask: st.builds(StepMask, MASKS),
    Threshold: st.builds(Threshold, THRESHOLDS, MEASURES),
    Accumulated: st.builds(Accumulated, THRESHOLDS, POLYNOMIALS, MEASURES),
    Magnitude: st.builds(
        Magnitude, st.lists(st.floats(0.5, 1.25, width=16), min_size=1, max_size=14), THRESHOLDS
    ),
}
FEW = st.none() | st.integers(0, 6)


@st.composite
def limits(draw):
    steps = draw(st.none() | st.integers(1, STEPS + 2))
    tail = 0 if steps is None else draw(st.integers(0, 4))
    return Limits(draw(st.integers(0, 3)), tail, draw(FEW), draw(FEW), steps)


# Loops.


class Loop(NamedTuple):
    """The steps of a run: their numbers, times, and signals of shape [2, 3]."""

    numbers: list[int]
    times: list[float]
    signals: list[Host]


@st.composite
def loops(draw, least=2):
    """Numbers that may leave some out, times that fall by uneven gaps, signals that wander."""
    count = draw(st.integers(least, STEPS))
    gaps = draw(st.lists(st.sampled_from([1, 1, 1, 2, 3]), min_size=count, max_size=count))
    numbers = [sum(gaps[:n]) for n in range(count)]
    chance = np.random.default_rng(draw(st.integers(0, 99)))
    times = 8 - np.cumsum(chance.integers(1, 24, count)) / 32
    moves = chance.normal(size=(count, 2, 3)) * chance.choice([0.0, 0.03, 0.3, 1.0], (count, 1, 1))
    signals = (2 + np.cumsum(moves, 0)).astype(np.float32)
    return Loop(numbers, times.tolist(), list(signals))


def fixed(count=STEPS):
    """Steps 0, 1, ... at times of these numbers, all signals 1."""
    return Loop(
        list(range(count)), list(map(float, range(count))), [np.ones((2, 3), np.float32)] * count
    )


def whole_decisions(recipe, loop):
    """Of the oracle."""
    oracle = Oracle(recipe)
    return [oracle.computes(step, signal, time) for step, time, signal in zip(*loop, strict=True)]


def coded(step, x):
    """A network whose outputs tell the step they are of: 100 steps more each time."""
    return x * 0.5 + step * 100


def eager(recipe, backend, loop):
    """Decisions, and outputs of :func:`coded` for signals as inputs."""
    cache, outputs = DiffusionCache(recipe), []
    for step, time, signal in zip(*loop, strict=True):
        x = backend.from_host(signal)
        with cache.begin(step, signal=x, time=time) as now:
            outputs.append(backend.to_host(now.apply(x, partial(coded, step))))
    return [record.computed for record in cache.stats.steps], outputs


def traced(recipe, backend, loop):
    """As :func:`eager`: one program where the framework compiles loops, else step by step."""
    numbers = np.array(loop.numbers, np.int32), np.array(loop.times, np.float32)
    inputs = [backend.from_host(array) for array in (*numbers, np.stack(loop.signals))]
    example = inputs[2][0, ...]
    state = TracedCache.start(recipe, backend, example, example)
    _, (computes, outputs) = program(recipe, backend)(state, inputs)
    return [bool(backend.to_host(one)) for one in computes], list(map(backend.to_host, outputs))


@lru_cache(maxsize=4)
def program(recipe, backend):
    """Of a state and steps, times and signals: the state after it, decisions, outputs."""

    def body(state, inputs):
        step, time, signal = inputs
        cache = TracedCache(recipe, backend, state)
        with cache.begin(step, signal=signal, time=time) as now:
            number = backend.xp.astype(step, backend.xp.float32)
            output = now.apply(signal, partial(coded, number))
        return cache.state, (now.computes, output)

    return scan_of(backend, body)


def scan_of(backend, body):
    """``jax.lax.scan`` with `body`, compiled; or the same in Python."""
    if backend.name == "jax":
        import jax

        return jax.jit(partial(jax.lax.scan, body))

    def loop(state, inputs):
        rows = []
        for n in range(inputs[0].shape[0]):
            state, row = body(state, [array[n, ...] for array in inputs])
            rows.append(row)
        return state, tuple(zip(*rows, strict=True))

    return loop
