"""DiffusionCache: the uncached result where nothing is skipped, order, failures, ownership."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple
from weakref import ref

import numpy as np
import pytest

from kvcache import (
    Backend,
    DTypeError,
    ShapeError,
    StepOrderError,
    UnknownStreamError,
    get_backend,
)
from kvcache.backends import backend_of
from kvcache.diffusion import (
    TIMESTEP,
    Accumulated,
    DiffusionCache,
    DiffusionStats,
    HoldOutput,
    HoldResidual,
    Interval,
    Limits,
    Magnitude,
    Recipe,
    RelativeChange,
    StepMask,
    StepRecord,
    Taylor,
    Threshold,
)

NUMPY = get_backend("numpy")
PREDICTORS = [HoldOutput(), HoldResidual(), Taylor(0, True), Taylor(1), Taylor(3), Taylor(2, True)]
each_predictor = pytest.mark.parametrize("predictor", PREDICTORS, ids=repr)
NOTHING = [
    Threshold(0),
    Accumulated(0),
    Accumulated(0, measure=TIMESTEP),
    Magnitude([1] * 9, 0),
    Interval(1),
    StepMask([True] * 9),
]
"""Policies that skip nothing."""


def ones(backend, value=1.0, shape=(2, 3)):
    return backend.from_host(np.full(shape, value, np.float32))


def never(x):
    raise AssertionError("a skipped step calls no network")


def boom(x):
    raise RuntimeError("out of memory")


# Nothing skipped.


@each_predictor
@pytest.mark.parametrize("policy", NOTHING, ids=repr)
def test_what_skips_nothing_changes_nothing(backend, policy, predictor):
    """Bit for bit."""
    xp, dt = backend.xp, 0.1

    def net(x):
        return xp.tanh(x * 1.7) - 0.3 * x * x

    start = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)
    x = plain = backend.from_host(start)
    cache = DiffusionCache(Recipe(policy, predictor))
    for step in range(9):
        plain = plain + dt * net(plain)
        x = x + dt * cache.run(step, x, net, signal=x)
    np.testing.assert_array_equal(backend.to_host(x), backend.to_host(plain))
    assert cache.stats.skip_rate == 0
    assert len(cache.stats.steps) == 9


def test_something_skipped_changes_something():
    """Otherwise the test before would say nothing."""
    x = plain = ones(NUMPY)
    cache = DiffusionCache(Recipe(Interval(2)))
    for step in range(3):
        plain = plain + plain * plain
        x = x + cache.run(step, x, lambda x: x * x)
    assert (x != plain).all()


# The order of steps.


def numbered(cache, step, stream=0):
    """What comes of a step whose network gives its number: that of the computed step."""
    return float(cache.run(step, ones(NUMPY), lambda x: x * step, stream=stream)[0, 0])


def held(recipe=None, *args, **options):
    return DiffusionCache(recipe or Recipe(Interval(3), HoldOutput()), *args, **options)


def test_a_step_is_passed_once():
    cache = held()
    numbered(cache, 4)
    message = r"a step is passed once; stream 0 has passed step 4\. Number the calls"
    with pytest.raises(StepOrderError, match=message):
        numbered(cache, 4)
    numbered(cache, 5)
    with pytest.raises(StepOrderError, match="passed step 5"):
        cache.begin(5)


def test_steps_may_be_left_out():
    cache = held()
    assert [numbered(cache, step) for step in (0, 2, 7, 9, 30, 31)] == [0, 0, 0, 9, 9, 9]


@pytest.mark.parametrize("again", [0, 3])
def test_a_step_before_the_last_begins_a_run(again):
    cache = held(Recipe(Interval(9), HoldOutput(), Limits(max_skips=5)))
    first = [numbered(cache, step) for step in range(5)]
    assert first == [0] * 5
    old = list(map(ref, cache.arrays()))
    assert [numbered(cache, step) for step in range(again, again + 8)] == [
        *[again] * 6, again + 6, again + 7,
    ]  # fmt: skip
    assert [record.step for record in cache.stats.steps] == list(range(again, again + 8))
    assert math.isnan(cache.stats.steps[0].change) is False  # an interval measures nothing
    assert not any(array() for array in old)


def test_a_new_run_measures_anew(backend):
    """Shapes, too, may be others then."""
    cache = DiffusionCache(Recipe(Threshold(0.5), Taylor(2)))
    for shape in ((2, 3), (1, 5)):
        for step, value in enumerate((1.0, 1.25, 1.75)):
            x = ones(backend, value, shape)
            assert tuple(cache.run(step, x, lambda x: x, signal=x).shape) == shape
        changes = [record.change for record in cache.stats.steps]
        assert math.isnan(changes[0])
        assert changes[1:] == [0.25, 0.75]
        assert cache.nbytes == 3 * math.prod(shape) * 4  # two computed steps and the reference


def test_streams_have_runs_of_their_own():
    cache = held(None, ["cond", "uncond"])
    assert cache.streams == ("cond", "uncond")
    assert [numbered(cache, step, "cond") for step in range(4)] == [0, 0, 0, 3]
    assert [numbered(cache, step, 1) for step in (1, 2, 3)] == [1, 1, 1]
    assert numbered(cache, 0, "cond") == 0  # begins anew
    assert numbered(cache, 4, "uncond") == 4
    assert [record[:3] for record in cache.stats.steps] == [
        (1, "uncond", True), (2, "uncond", False), (3, "uncond", False),
        (0, "cond", True), (4, "uncond", True),
    ]  # fmt: skip
    with pytest.raises(StepOrderError, match="stream 'uncond' has passed step 4"):
        numbered(cache, 4, "uncond")


def test_streams_measure_each_their_own():
    cache = DiffusionCache(Recipe(Threshold(0.5), HoldOutput()), 2)
    for step, values in enumerate([(1, 1), (1, 2), (2, 2)]):
        for stream, value in enumerate(values):
            x = ones(NUMPY, value)
            cache.run(step, x, lambda x: x, signal=x, stream=stream)
    assert [record.computed for record in cache.stats.steps] == [1, 1, 0, 1, 1, 0]
    assert [record.change for record in cache.stats.steps[2:]] == [0, 1, 1, 0]


def test_shared_streams_go_by_the_first_that_comes():
    """In whatever order; what the others give as a signal is not even asked for."""
    cache = DiffusionCache(Recipe(Threshold(0.5), HoldOutput()), ("cond", "uncond"), shared=True)
    calls = []
    for step, value in enumerate((1, 1, 2)):
        order = ("uncond", "cond") if step == 1 else ("cond", "uncond")
        for stream, signal in zip(order, (ones(NUMPY, value), boom), strict=True):

            def network(x, call=(step, stream)):
                calls.append(call)
                return x + len(calls)

            cache.run(step, ones(NUMPY), network, signal=signal, stream=stream)
    assert calls == [(0, "cond"), (0, "uncond"), (2, "cond"), (2, "uncond")]
    assert [record.stream for record in cache.stats.steps] == [
        "cond", "uncond", "uncond", "cond", "cond", "uncond",
    ]  # fmt: skip
    for stream in ("cond", "uncond"):
        with pytest.raises(StepOrderError, match=f"stream '{stream}' has passed step 2"):
            cache.begin(2, stream=stream)


def test_shared_streams_begin_anew_together():
    cache = held(None, 2, shared=True)
    for step in range(3):
        assert [numbered(cache, step, stream) for stream in (0, 1)] == [0, 0]
    assert cache.nbytes == 48
    assert numbered(cache, 1, 1) == 1
    assert cache.nbytes == 24, "what the other stream held is of the run before"
    assert [record[:3] for record in cache.stats.steps] == [(1, 1, True)]
    assert numbered(cache, 1, 0) == 1
    assert [numbered(cache, 2, stream) for stream in (0, 1)] == [1, 1]


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("number", [0, 2, 5])
def test_a_restart_begins_a_run_of_every_stream(shared, number):
    """Whatever its number: after the last one, before it, or the same."""
    cache = held(streams=2, shared=shared)
    for step in range(3):
        numbered(cache, step), numbered(cache, step, 1)
    before = cache.stats
    with cache.begin(number, restart=True, stream=1) as now:
        assert now.computes
        assert cache.stats == before
        now.apply(ones(NUMPY), lambda x: x * 10)
    assert cache.stats.steps == (StepRecord(number, 1, True, 0),)
    assert numbered(cache, number + 1, 1) == 10
    assert numbered(cache, number + 1, 0) == number + 1  # nothing is left to predict it from


@pytest.mark.parametrize("policy", [Interval(2), Threshold(9)], ids=repr)
def test_a_restart_measures_nothing_of_the_run_before(policy):
    cache = held(Recipe(policy, HoldOutput()))
    for step in range(2):
        cache.run(step, ones(NUMPY), lambda x: x, signal=ones(NUMPY))
    # Another shape would be refused within a run.
    wide = ones(NUMPY, 2.0, (5, 3))
    with pytest.raises(ZeroDivisionError), cache.begin(2, signal=wide, restart=True):
        raise ZeroDivisionError
    assert len(cache.stats.steps) == 2
    with cache.begin(2, signal=wide, restart=True) as now:
        assert np.array_equal(now.apply(wide, lambda x: x), wide)
    assert [record.step for record in cache.stats.steps] == [2]
    with pytest.raises(ValueError, match=r"steps count from 0; got -1\."):
        cache.begin(-1, restart=True)


def test_the_first_step_is_not_negative():
    with pytest.raises(ValueError, match=r"steps count from 0; got -1\."):
        held().begin(-1)


def test_a_stream_that_joins_where_others_skip_is_computed():
    cache = held(None, 2, shared=True)
    numbered(cache, 0, 0)
    numbered(cache, 1, 0)
    assert numbered(cache, 1, 1) == 1
    assert [numbered(cache, 2, stream) for stream in (0, 1)] == [0, 1]


def test_steps_do_not_overlap():
    for options in ({}, {"streams": 2, "shared": True}):
        cache = held(None, **options)
        first, second = cache.begin(0), cache.begin(1)
        first.commit()
        numbered(cache, 2)
        message = r"a step ends before another begins .*; step 1 of stream 0 came too late"
        with pytest.raises(StepOrderError, match=message):
            second.commit()
        with pytest.raises(StepOrderError, match="step 0 of stream 0 came too late"):
            first.commit()
        assert [record.step for record in cache.stats.steps] == [0, 2]


def test_a_join_overlaps_as_well():
    cache = held(None, 2, shared=True)
    numbered(cache, 0, 0)
    joined = cache.begin(0, stream=1)
    numbered(cache, 1, 0)
    with pytest.raises(StepOrderError, match="step 0 of stream 1 came too late"):
        joined.commit()


def test_a_step_does_not_outlive_a_reset():
    cache = held()
    numbered(cache, 0)
    with pytest.raises(StepOrderError, match="or a reset; step 1 of stream 0"), cache.begin(1):
        cache.reset()
    assert cache.stats.steps == ()
    assert cache.arrays() == []


def test_streams_on_their_own_may_overlap():
    cache = held(None, 2)
    with cache.begin(0, stream=0) as first, cache.begin(0, stream=1) as second:
        first.apply(ones(NUMPY), lambda x: x)
        second.apply(ones(NUMPY), lambda x: x)
    assert len(cache.stats.steps) == 2
    assert cache.nbytes == 48


def test_a_step_that_is_not_committed_never_was():
    cache = held()
    cache.begin(0).apply(ones(NUMPY), lambda x: x)
    assert cache.stats.steps == ()
    assert cache.arrays() == []
    assert numbered(cache, 0) == 0


# Sites.


def test_sites_are_kept_apart(backend):
    """One decision for all; one that comes up in a skipped step is computed in it."""
    cache, calls = DiffusionCache(Recipe(Interval(3), HoldResidual())), []

    def network(site, step):
        return lambda x: calls.append((step, site)) or x + 10 * site + step

    for step in range(4):
        with cache.begin(step) as now:
            assert now.computes is (step % 3 == 0)
            for site in (1, 2) if step != 1 else (1, 2, 3):
                x = ones(backend, 100 * step)
                found = backend.to_host(now.apply(x, network(site, step), site=site))
                made = 1 if site == 3 else step // 3 * 3
                np.testing.assert_array_equal(found, 100.0 * step + 10 * site + made)
    assert calls == [(0, 1), (0, 2), (1, 3), (3, 1), (3, 2)]
    assert cache.nbytes == 3 * 24


TWICE = {
    "apply": lambda step, x: step.apply(x, lambda x: x * 7),
    "predict": lambda step, x: step.predict(x),
    "record": lambda step, x: step.record(x, x * 7),
    "ask": lambda step, x: step.computes_at(),
}


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("second", TWICE)
@pytest.mark.parametrize("first", ["apply", "predict", "record"])
def test_a_site_is_passed_once(backend, first, second, number):
    """In a step that is skipped, and one that is computed: as if it had not come again."""
    caches = [DiffusionCache(Recipe(Interval(3), HoldResidual())) for _ in range(2)]
    x = ones(backend)
    for cache in caches:
        for step in range(number):
            cache.run(step, x, lambda x: x * 3)
        with cache.begin(number) as now:
            TWICE[first](now, x)
            if cache is caches[0]:
                with pytest.raises(StepOrderError, match="it has passed 'network' before"):
                    TWICE[second](now, x)
    assert caches[0].stats == caches[1].stats
    results = [backend.to_host(cache.run(number + 1, x, never)) for cache in caches]
    np.testing.assert_array_equal(*results)
    made = {"apply": {1: 3, 3: 7}, "predict": {1: 3, 3: 3}, "record": {1: 7, 3: 7}}
    assert results[0].max() == made[first][number]


def test_a_network_cannot_pass_its_own_site():
    cache = held()
    with cache.begin(0) as now, pytest.raises(StepOrderError, match="'network' before"):
        now.apply(ones(NUMPY), lambda x: now.apply(x, lambda x: x))


def test_without_a_function(backend):
    """For callers that cannot pass one: the same decisions and outputs."""
    cache, reference = (DiffusionCache(Recipe(Interval(2), HoldResidual())) for _ in range(2))
    for step in range(5):
        x = ones(backend, step)
        with cache.begin(step) as now:
            if now.computes_at():
                found = x * 3 + step
                now.record(x, found)
            else:
                found = now.predict(x)
        expected = reference.run(step, x, lambda x, step=step: x * 3 + step)
        np.testing.assert_array_equal(backend.to_host(found), backend.to_host(expected))
    assert cache.stats == reference.stats
    with (
        cache.begin(5) as now,
        pytest.raises(StepOrderError, match="'other' has not been computed yet"),
    ):
        now.predict(x, site="other")


# A call that raises has changed nothing.


class Bad(NamedTuple):
    """A call, and what it raises."""

    call: Callable[[DiffusionCache, Backend], Any]
    error: type[Exception]
    message: str


def bad(error, message, step=3, network=None,
        signal=2.0, x=(2, 3), **options):  # fmt: skip
    """A step with a signal of this value, or what a function makes of the backend."""

    def call(cache, backend):
        value = signal(backend) if callable(signal) else signal and ones(backend, signal)
        given = ones(backend, 1.0, x)
        return cache.run(step, given, network or (lambda x: x), signal=value, **options)

    return Bad(call, error, message)


def wider(x):
    return ones(backend_of(x), 1, (2, 6))


def other_dtype(x):
    return backend_of(x).from_host(np.ones(x.shape, np.int32))


COMPUTES = {"signal": 9.0}
BAD = {
    "the network raises": bad(RuntimeError, "out of memory", network=boom, **COMPUTES),
    "the network raises in a new run": bad(RuntimeError, "out of memory", 0, boom),
    "the signal raises": bad(RuntimeError, "out of memory", signal=lambda b: lambda: boom(b)),
    "no signal": bad(ValueError, "RelativeChange measures an array.*got none", signal=None),
    "a signal function gives none": bad(
        ValueError, "measures an array.*got none", signal=lambda b: lambda: None
    ),
    "the signal has another shape": bad(
        ShapeError, r"a signal must keep its shape.*2, 3.*2, 4.*reset\(\)",
        signal=lambda b: ones(b, 1.0, (2, 4)),
    ),
    "a skipped input has another shape": bad(
        ShapeError, "what goes into a site must keep its shape .*2, 3.*got.*2, 4", x=(2, 4)
    ),
    "a computed input has another shape": bad(
        ShapeError, "what goes into a site must keep its shape .*2, 3.*got.*1, 3", x=(1, 3),
        **COMPUTES,
    ),
    "the output has another shape": bad(
        ShapeError, "shape .*2, [36].*2, [36]", network=wider, **COMPUTES
    ),
    "the output is two": bad(ShapeError, "shape", network=lambda x: (x, x), **COMPUTES),
    "an unknown name": bad(UnknownStreamError, "one of 'a', 'b'.*got 'c'", stream="c"),
    "an unknown number": bad(UnknownStreamError, "got 2", stream=2),
    "a negative step": bad(ValueError, "steps count from 0; got -1", -1),
    "the same step": bad(StepOrderError, "stream 'a' has passed step 2", 2),
    "half a step": bad(TypeError, "float", 2.5),
    "no time": bad(ValueError, "a time must be finite; got nan", time=math.nan),
    "the end of time": bad(ValueError, "a time must be finite; got -inf", time=-math.inf),
    "beyond float32": bad(ValueError, "a time must be finite; got 1e[+]300", time=1e300),
}  # fmt: skip
RESIDUAL = {
    "the output has another dtype": bad(DTypeError, "dtype", network=other_dtype, **COMPUTES)
}
TAYLOR = {
    f"time {time} again": bad(ValueError, f"different times; got {time}.0 twice", time=time,
                              **COMPUTES)
    for time in (0, 1)
}  # fmt: skip
OF_OUTPUTS, OF_RESIDUALS = (HoldOutput(), Taylor(2)), (HoldResidual(), Taylor(2, True))
CASES = {
    **{name: (case, OF_OUTPUTS + OF_RESIDUALS) for name, case in BAD.items()},
    **{name: (case, OF_RESIDUALS) for name, case in RESIDUAL.items()},
    **{name: (case, (OF_OUTPUTS[1], OF_RESIDUALS[1])) for name, case in TAYLOR.items()},
}


def under_way(backend, predictor):
    """Steps 0 and 1 computed, 2 skipped; stream b has been through one step."""
    cache = DiffusionCache(Recipe(Accumulated(0.5), predictor), ("a", "b"))
    for step, signal in enumerate((1.0, 2.0, 2.0)):
        cache.run(step, ones(backend), lambda x, s=step: x * (s + 5), signal=ones(backend, signal))
    cache.run(7, ones(backend), lambda x: x, signal=ones(backend), stream="b")
    assert [record.computed for record in cache.stats.steps] == [True, True, False, True]
    return cache


@pytest.mark.parametrize(("case", "predictors"), CASES.values(), ids=CASES)
def test_what_fails_changes_nothing(backend, case, predictors):
    for predictor in predictors:
        check_nothing_changes(backend, predictor, case)


def check_nothing_changes(backend, predictor, case):
    cache, reference = under_way(backend, predictor), under_way(backend, predictor)
    stats, arrays, nbytes = repr(cache.stats), cache.arrays(), cache.nbytes
    values = [backend.to_host(array).copy() for array in arrays]
    for _ in range(2):
        with pytest.raises(case.error, match=f"(?s){case.message}"):
            case.call(cache, backend)
    assert (repr(cache.stats), cache.nbytes) == (stats, nbytes)
    assert list(map(id, cache.arrays())) == list(map(id, arrays))
    for array, value in zip(arrays, values, strict=True):
        np.testing.assert_array_equal(backend.to_host(array), value)
    for step, signal in ((3, 2.5), (4, 2.5), (5, 9.0), (6, 9.0)):
        signals, x = ones(backend, signal), ones(backend, step)
        both = [c.run(step, x, lambda x: x * 11, signal=signals) for c in (cache, reference)]
        np.testing.assert_array_equal(*map(backend.to_host, both))
    assert repr(cache.stats) == repr(reference.stats)


def test_a_failing_first_step_leaves_an_empty_cache():
    cache = DiffusionCache(Recipe(Threshold(), Taylor(1)))
    with pytest.raises(RuntimeError, match="out of memory"):
        cache.run(0, ones(NUMPY), boom, signal=ones(NUMPY))
    assert (cache.arrays(), cache.stats.steps) == ([], ())
    cache.run(0, ones(NUMPY), lambda x: x, signal=ones(NUMPY))


@pytest.mark.parametrize(
    ("streams", "error", "message"),
    [
        (0, ValueError, "at least one stream"),
        ((), ValueError, "at least one stream"),
        (("a", "a"), ValueError, "each of another name"),
        ("ab", TypeError, r"write \('ab',\)"),
    ],
)
def test_no_streams(streams, error, message):
    with pytest.raises(error, match=message):
        DiffusionCache(Recipe(Interval()), streams)


# Whose arrays they are.


def overwrite(array):
    """In place, where the framework has that."""
    if hasattr(array, "at") and not hasattr(array, "data_ptr") and not hasattr(array, "flags"):
        try:
            array[...] = -999.0  # MLX
        except TypeError:
            return  # JAX
    else:
        array[...] = -999.0


@each_predictor
def test_callers_may_write_to_what_they_gave_and_got(backend, predictor):
    mask = StepMask([True, True, False, False, True, False])
    recipes = [
        Recipe(mask, predictor),
        Recipe(Threshold(0.3), predictor),
        Recipe(Accumulated(0.3), predictor),
    ]
    for recipe in recipes:
        results = []
        changes = []
        for writes in (False, True):
            cache, outputs = DiffusionCache(recipe), []
            for step in range(6):
                x, signal = ones(backend, 1 + step), ones(backend, 2 + step // 2)
                made = ones(backend, 10 * step)
                found = cache.run(step, x, lambda x, made=made: made, signal=signal)
                outputs.append(backend.to_host(found).copy())
                if writes:
                    list(map(overwrite, (x, signal, made, found)))
            results.append(outputs)
            changes.append(repr(cache.stats))
        np.testing.assert_array_equal(*results)
        assert changes[0] == changes[1]
        assert "computed=False" in changes[0]


@pytest.mark.one_backend(name="torch")
@each_predictor
def test_networks_may_write_to_what_they_are_given(backend, predictor):
    """Where arrays can be written to at all."""
    outputs = []
    for writes in (False, True):
        cache = DiffusionCache(Recipe(Interval(2), predictor))

        def net(x, factor, writes=writes):
            if not writes:
                return x * factor
            x *= factor
            return x

        for step in range(6):
            x = ones(backend, 2.0 + step)
            given = cache.run(step, x, lambda x, step=step: net(x, 1 + step))
            outputs.append(backend.to_host(given).copy())
    np.testing.assert_array_equal(outputs[:6], outputs[6:])


def test_it_does_write_in_this_test():
    array = ones(NUMPY)
    overwrite(array)
    assert (array == -999).all()
    torch = pytest.importorskip("torch")
    tensor = torch.ones(3)
    overwrite(tensor)
    assert (tensor == -999).all()


def test_what_it_gives_shares_memory_with_nothing_it_keeps():
    for predictor in PREDICTORS:
        cache = DiffusionCache(Recipe(Interval(2), predictor))
        for step in range(4):
            x, signal = ones(NUMPY), ones(NUMPY)
            found = cache.run(step, x, lambda x: x, signal=signal)
            for array in cache.arrays():
                assert not any(np.shares_memory(array, other) for other in (x, signal, found))


# How much it holds, and how long.


@pytest.mark.parametrize(
    ("policy", "reference"),
    [(Interval(1), 0), (Threshold(0), 1), (Accumulated(0), 1), (Accumulated(0, (1,), TIMESTEP), 0)],
    ids=repr,
)
@each_predictor
def test_holds_what_it_looks_at(backend, policy, reference, predictor):
    """`keeps` outputs per stream and site, and one signal."""
    with DiffusionCache(Recipe(policy, predictor), 2) as cache:
        assert cache.nbytes == 0
        for step in range(6):
            for stream in range(2):
                with cache.begin(step, signal=ones(backend, 1, (2, 5)), stream=stream) as now:
                    for site in range(3):
                        now.apply(ones(backend), lambda x: x, site=site)
            kept = min(step + 1, predictor.keeps)
            assert len(cache.arrays()) == 2 * (3 * kept + reference)
            assert cache.nbytes == 2 * (3 * kept * 24 + reference * 40)
        assert f"holds {cache.nbytes} bytes" in repr(cache)
        cache.reset()
        assert (cache.nbytes, cache.arrays(), cache.stats.steps) == (0, [], ())
        assert numbered(cache, 0) == 0 if policy.signal is None else True


@pytest.mark.parametrize("how", ["reset", "exit", "exception", "run", "slide"])
def test_freed_means_freed(backend, how):
    """By reset, at the end of a with, by a new run, and where newer steps push out older."""
    cache = DiffusionCache(Recipe(Threshold(0), Taylor(1)))
    for step in range(3):
        cache.run(step, ones(backend), lambda x: x, signal=ones(backend))
    arrays = cache.arrays()
    backend.sync(*arrays)
    if type(arrays[0]).__module__.startswith("mlx"):
        pytest.skip("MLX arrays have no weak references; see the next test")
    alive = list(map(ref, arrays))
    assert len(alive) == 3
    del arrays
    if how == "reset":
        cache.reset()
    elif how == "exit":
        with cache:
            pass
    elif how == "exception":
        with pytest.raises(RuntimeError), cache:
            boom(None)
    elif how == "run":
        cache.run(0, ones(backend), lambda x: x, signal=ones(backend))
    else:
        for step in (3, 4):
            cache.run(step, ones(backend), lambda x: x, signal=ones(backend))
    assert not any(array() for array in alive)


@pytest.mark.one_backend(name="mlx")
def test_mlx_gets_its_memory_back():
    mx = pytest.importorskip("mlx.core")

    def run(cache):
        for step in range(5):
            x = mx.full((64, 1024), 1.0 + step)
            mx.eval(cache.run(step, x, lambda x: x * 2, signal=x), cache.arrays())

    for predictor in PREDICTORS:
        before = mx.get_active_memory()
        cache = DiffusionCache(Recipe(Threshold(0.01), predictor))
        run(cache)
        held = mx.get_active_memory() - before
        assert cache.nbytes <= held < cache.nbytes + 2**16
        cache.reset()
        assert mx.get_active_memory() - before < 2**12


@pytest.mark.one_backend(name="jax")
def test_jax_gets_its_arrays_back():
    jax = pytest.importorskip("jax")
    large = 4321

    def live():
        return sum(array.size == large for array in jax.live_arrays())

    for predictor in PREDICTORS:
        with DiffusionCache(Recipe(Threshold(0.01), predictor)) as cache:
            for step in range(5):
                x = jax.numpy.full((1, large), 1.0 + step)
                cache.run(step, x, lambda x: x * 2, signal=x)
            del x
            assert live() == predictor.keeps + 1 == len(cache.arrays())
        assert live() == 0


# What comes to the host.


@pytest.mark.parametrize(
    ("policy", "reads"),
    [
        (Threshold(0.5), 1),
        (Accumulated(0.5), 1),
        (Accumulated(0.5, measure=TIMESTEP), 0),
        (Interval(3), 0),
        (StepMask([True, False]), 0),
        (Magnitude([1.0] * 9), 0),
    ],
    ids=repr,
)
def test_one_scalar_per_decision(backend, policy, reads, monkeypatch):
    """At most; shared streams wait for one between them."""
    owner, shapes = type(backend), []
    to_host = owner.to_host
    monkeypatch.setattr(
        owner, "to_host", lambda self, array: shapes.append(array.shape) or to_host(self, array)
    )
    for shared in (False, True):
        cache = DiffusionCache(Recipe(policy, Taylor(1, True)), 2, shared=shared)
        for step in range(6):
            shapes.clear()
            for stream in range(2):
                x = ones(backend, 1 + step)
                cache.run(step, x, lambda x: x * 2, signal=x, stream=stream)
            decisions = (1 if shared else 2) * (step > 0)
            assert [tuple(shape) for shape in shapes] == [()] * reads * decisions


@pytest.mark.one_backend(name="torch")
def test_torch_reads_no_other_scalar():
    """That a condition or an index might wait for."""
    pytest.importorskip("torch")
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name = str(function)
            waits = ("_local_scalar_dense", "nonzero", "equal.", "is_nonzero", "item")
            reads.extend(name for wait in waits if wait in name and "not_equal" not in name)
            return function(*args, **(kwargs or {}))

    reads = []
    with Watch():
        float(torch.ones(1).sum())
    assert reads, "it does watch"
    reads.clear()
    for predictor in PREDICTORS:
        for policy in (Threshold(0.5), Accumulated(0.5), Interval(2)):
            cache = DiffusionCache(Recipe(policy, predictor))
            with Watch():
                for step in range(6):
                    x = torch.full((2, 3), 1.0 + step)
                    cache.run(step, x, lambda x: x * 2, signal=x)
            assert cache.stats.skipped
    assert reads == []


def test_a_signal_function_is_called_once_per_decision_and_only_then():
    calls = []
    for policy, expected in (
        (Threshold(0.5), 4),
        (Interval(2), 0),
        (Accumulated(1, (1,), TIMESTEP), 0),
    ):
        cache = DiffusionCache(Recipe(policy))
        for step in range(4):
            cache.run(step, ones(NUMPY), lambda x: x, signal=lambda: calls.append(1) or ones(NUMPY))
        assert len(calls) == expected
        calls.clear()


# Numbers.


def test_stats():
    cache = DiffusionCache(Recipe(Accumulated(0.5), HoldOutput()), ("a", "b"))
    assert cache.stats == DiffusionStats(())
    assert (cache.stats.computed, cache.stats.skipped, cache.stats.skip_rate) == (0, 0, 0.0)
    for step, value in enumerate((1.0, 1.25, 1.5, 3.0)):
        cache.run(step, ones(NUMPY), lambda x: x, signal=ones(NUMPY, value), stream="a")
    cache.run(5, ones(NUMPY), lambda x: x, signal=ones(NUMPY), stream="b")
    first, *rest, other = cache.stats.steps
    assert (first[:3], other[:3]) == ((0, "a", True), (5, "b", True))
    assert math.isnan(first.change)
    assert math.isnan(other.change)
    assert rest == [
        StepRecord(1, "a", False, 0.25),
        StepRecord(2, "a", False, pytest.approx(0.2)),
        StepRecord(3, "a", True, 1.0),
    ]
    assert (cache.stats.computed, cache.stats.skipped) == (3, 2)
    assert cache.stats.skip_rate == pytest.approx(0.4)
    cache.reset()
    assert cache.stats.steps == ()


def test_a_step_tells_what_was_decided():
    cache = DiffusionCache(Recipe(Threshold(0.5), HoldOutput()))
    told = []
    for step, value in enumerate((1.0, 1.25, 2.0)):
        with cache.begin(step, signal=ones(NUMPY, value)) as now:
            told.append((now.computes, now.change))
            now.apply(ones(NUMPY), lambda x: x)
    assert math.isnan(told[0][1])
    assert (told[0][0], *told[1:]) == (True, (False, 0.25), (True, 1.0))


def test_times_are_numbers_of_steps_unless_given():
    """With a line through the last two steps: 2 per step, or 2 per tenth."""
    for times, expected in (
        ((None,) * 5, [0, 2, 4, 6, 8]),
        ((1, 0.9, 0.7, 0.4, 0), [0, 2, 6, 12, 20]),
    ):
        cache = DiffusionCache(Recipe(StepMask([1, 1, 0, 0, 0]), Taylor(1)))
        found = [
            float(cache.run(n, ones(NUMPY), lambda x, n=n: x * 2 * n, time=time)[0, 0])
            for n, time in enumerate(times)
        ]
        assert found == pytest.approx(expected, rel=1e-5)


def test_float64_stays():
    for predictor in PREDICTORS:
        cache = DiffusionCache(Recipe(Interval(2), predictor))
        for step in range(4):
            assert cache.run(step, np.ones((1, 2)), lambda x: x).dtype == np.float64


def test_relative_change_is_the_default():
    assert Threshold().signal == RelativeChange("computed")
    assert Accumulated().signal == RelativeChange("previous")
    assert Recipe(Interval()).predictor == HoldResidual()


def test_who_joins_a_skipped_step_with_nothing_to_go_by_is_computed():
    cache = DiffusionCache(Recipe(Interval(3), HoldOutput()), ("a", "b"), shared=True)
    x = np.ones((2, 3), np.float32)
    for step, streams in enumerate(("a", "ab", "ab")):
        for stream in streams:
            cache.run(step, x, lambda x: x + 1, stream=stream)
    ran = [(record.step, record.stream, record.computed) for record in cache.stats.steps]
    assert ran == [
        (0, "a", True),
        (1, "a", False),
        (1, "b", True),
        (2, "a", False),
        (2, "b", False),
    ]
    assert cache.stats.computed == 2


def test_a_signal_without_axes_is_refused(backend):
    cache = DiffusionCache(Recipe(Threshold(0.1)))
    scalar = backend.from_host(np.float32(1))
    with pytest.raises(ShapeError, match="at least one axis"):
        cache.begin(0, signal=scalar)
    assert not cache.arrays()


def test_shapes_are_checked_before_the_network_runs():
    cache = DiffusionCache(Recipe(Interval(1)))
    cache.run(0, np.ones((2, 3), np.float32), lambda x: x)
    with pytest.raises(ShapeError, match="what goes into a site"):
        cache.run(1, np.ones((3, 3), np.float32), lambda x: pytest.fail("ran"))


@pytest.mark.one_backend(name="torch")
@pytest.mark.parametrize("predictor", [HoldOutput(), HoldResidual(), Taylor(1)])
def test_no_autograd_graph_is_kept(predictor):
    torch = pytest.importorskip("torch")
    weight = torch.ones(3, requires_grad=True)
    cache = DiffusionCache(Recipe(Interval(2), predictor))
    for step in range(3):
        cache.run(step, torch.ones(2, 3), lambda x: x * weight)
    assert cache.arrays()
    assert not any(array.requires_grad for array in cache.arrays())


def test_integers_are_held_exactly(backend):
    cache = DiffusionCache(Recipe(Interval(2), HoldOutput()))
    exact = backend.from_host(np.full((2, 3), 2**24 + 1, np.int32))
    found = [cache.run(step, exact, lambda x: x) for step in range(2)][1]
    np.testing.assert_array_equal(backend.to_host(found), 2**24 + 1)
