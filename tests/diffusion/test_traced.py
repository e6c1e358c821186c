"""TracedCache: the same recipe inside a program; where nothing compiles, the same step by step."""

import math
from functools import partial

import numpy as np
import pytest

from kvcache import DTypeError, ShapeError, StepOrderError, get_backend
from kvcache.diffusion import (
    TIMESTEP,
    Accumulated,
    DiffusionCache,
    HoldOutput,
    HoldResidual,
    Interval,
    Limits,
    Magnitude,
    Recipe,
    StepMask,
    Taylor,
    Threshold,
    TracedCache,
)

from .oracle import Loop, eager, fixed, scan_of, traced

NUMPY = get_backend("numpy")
NOTHING = [
    Threshold(0),
    Accumulated(0),
    Accumulated(0, measure=TIMESTEP),
    Magnitude([1] * 9, 0),
    Interval(1),
    StepMask([True] * 9),
]
PREDICTORS = [HoldOutput(), HoldResidual(), Taylor(0, True), Taylor(1), Taylor(3), Taylor(2, True)]
SOME = [
    Recipe(Threshold(0.5), HoldOutput()),
    Recipe(Accumulated(0.5, (1, 2, 0)), Taylor(2, True), Limits(1, 1, 3, 5, 9)),
    Recipe(Accumulated(2.5, measure=TIMESTEP), HoldResidual()),
    Recipe(Magnitude([0.9] * 9, 0.3), Taylor(1)),
    Recipe(StepMask([1, 0, 1, 0]), HoldResidual()),
]


def ones(backend, value=1.0, shape=(2, 3)):
    return backend.from_host(np.full(shape, value, np.float32))


def denoised(backend, recipe, start, steps):
    """After so many steps with a network of which every operation is exact, cached or not."""

    def net(x):
        return abs(x - 3) - backend.xp.floor(x * 0.5)

    def body(carry, inputs):
        x, state = carry
        if recipe is None:
            return (x + 0.5 * net(x), state), ()
        cache = TracedCache(recipe, backend, state)
        velocity = cache.run(inputs[0], x, net, signal=x)
        return (x + 0.5 * velocity, cache.state), ()

    state = () if recipe is None else TracedCache.start(recipe, backend, start, start)
    numbers = backend.from_host(np.arange(steps, dtype=np.int32))
    (x, _), _ = scan_of(backend, body)((start, state), (numbers,))
    return backend.to_host(x)


START = np.arange(-6, 6, dtype=np.float32).reshape(2, 2, 3)


@pytest.mark.parametrize(
    ("policy", "predictor"), list(zip(NOTHING, PREDICTORS, strict=True)), ids=repr
)
def test_what_skips_nothing_changes_nothing(backend, policy, predictor):
    """Bit for bit."""
    start = backend.from_host(START)
    found = denoised(backend, Recipe(policy, predictor), start, 9)
    np.testing.assert_array_equal(found, denoised(NUMPY, None, START, 9))


@pytest.mark.parametrize("predictor", PREDICTORS, ids=repr)
@pytest.mark.parametrize("policy", NOTHING, ids=repr)
def test_with_every_predictor(policy, predictor):
    plain = denoised(NUMPY, None, START, 9)
    np.testing.assert_array_equal(denoised(NUMPY, Recipe(policy, predictor), START, 9), plain)
    skipping = denoised(NUMPY, Recipe(Interval(2), predictor), START, 9)
    assert (skipping != plain).any(), "this network does show what is skipped"


# Runs.


def test_a_run_begins_where_steps_do_not_go_up(backend):
    """At the same step again, too: a program cannot raise for a value."""
    numbers = [0, 1, 2, 3, 3, 4, 5, 0, 1, 2, 7]
    times = [float(n) for n in range(11)]
    chance = np.random.default_rng(1).normal(2, 0.2, (11, 2, 3)).astype(np.float32)
    recipe = Recipe(Accumulated(0.3), Taylor(1), Limits(max_skips=2))
    computed, outputs = traced(recipe, backend, Loop(numbers, times, list(chance)))
    start = 0
    for end in (4, 7, 11):
        part = slice(start, end)
        alone = eager(recipe, NUMPY, Loop(numbers[part], times[part], list(chance[part])))
        assert computed[part] == alone[0]
        assert not all(alone[0])
        np.testing.assert_allclose(outputs[part], alone[1], rtol=1e-5)
        start = end


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nothing_of_the_run_before_shows_through(backend, bad):
    """Not even 0 times what was not finite."""
    recipe = Recipe(StepMask([True, False, True, False]), Taylor(2))
    signals = [np.full((2, 3), value, np.float32) for value in (bad, bad, bad, bad, 1, 1, 2, 2)]
    loop = Loop([0, 1, 2, 3] * 2, [0.0, 1, 2, 3] * 2, signals)
    with np.errstate(all="ignore"):
        computed, outputs = traced(recipe, backend, loop)
    assert computed == [True, False] * 4
    # coded: 0.5 * signal + 100 * step; then a line through the computed steps 0 and 2.
    assert [output[0, 0] for output in outputs[4:]] == [0.5, 0.5, 201, 301.25]


def test_times_that_are_equal_show(backend):
    recipe = Recipe(StepMask([True, True, False]), Taylor(1))
    _, outputs = traced(recipe, backend, fixed(3)._replace(times=[1.0, 1.0, 2.0]))
    assert np.isfinite(outputs[1]).all()
    assert not np.isfinite(outputs[2]).any()


# A step.


def test_a_state_is_a_value(backend):
    """Two steps from the same state are two futures of it; an exception makes none."""
    recipe = Recipe(Interval(9), HoldOutput())
    state = TracedCache.start(recipe, backend, ones(backend))
    first = TracedCache(recipe, backend, state)
    first.run(0, ones(backend), lambda x: x * 5)
    futures = [TracedCache(recipe, backend, first.state) for _ in range(2)]
    found = [c.run(step, ones(backend), lambda x: x * 7) for step, c in enumerate(futures[::-1])]
    assert [backend.to_host(x).max() for x in found] == [7, 5]
    failing = TracedCache(recipe, backend, first.state)
    with pytest.raises(StepOrderError, match="'network' before"):
        twice(failing.begin(1), ones(backend))
    assert failing.state is first.state
    assert int(backend.to_host(state.run.computed)) == 0


def twice(step, x):
    with step:
        step.apply(x, lambda x: x)
        step.apply(x, lambda x: x)


def test_networks_may_write_to_what_they_are_given(backend):
    recipe = Recipe(Interval(2), HoldResidual())
    state = TracedCache.start(recipe, backend, outputs=backend.from_host(np.ones(3, np.float32)))

    def net(x):
        x += 5
        return x

    for step in range(4):
        cache = TracedCache(recipe, backend, state)
        given = cache.run(step, backend.from_host(np.full(3, step, np.float32)), net)
        np.testing.assert_array_equal(backend.to_host(given), np.full(3, step + 5.0))
        state = cache.state


def test_sites_of_one_step(backend):
    """One that comes up in a skipped step is computed in it, as others are not."""
    recipe, calls = Recipe(Interval(3), HoldResidual()), []
    state = TracedCache.start(recipe, backend, {1: ones(backend), "b": ones(backend, 1, (1, 4))})
    given = {1: (2, 3), "b": (1, 4)}
    found = []
    for step in range(5):
        cache = TracedCache(recipe, backend, state)
        with cache.begin(step) as now:
            for site in (1, "b") if step else (1,):
                x = ones(backend, 100 * step, given[site])
                out = now.apply(
                    x, lambda x, call=(step, site): calls.append(call) or x + call[0] + 1, site=site
                )
                assert tuple(out.shape) == given[site]
                found.append(float(backend.to_host(out)[0, 0]))
        state = cache.state
    assert found == [1, 101, 102, 201, 202, 304, 304, 404, 404]
    if backend.name != "jax":  # there both branches are traced
        assert calls == [(0, 1), (1, "b"), (3, 1), (3, "b")]


def test_several_arrays(backend):
    """A tuple stays one where the step is skipped."""
    for predictor in (HoldOutput(), Taylor(1, residual=True)):
        recipe = Recipe(Interval(2), predictor)
        pair = ones(backend, 2), ones(backend, 3, (1, 4, 1))
        state = TracedCache.start(recipe, backend, pair)
        for step in range(4):
            cache = TracedCache(recipe, backend, state)
            found = cache.run(step, list(pair), lambda pair: (pair[0] * 2, pair[1] * 3))
            state = cache.state
            assert isinstance(found, tuple)
            assert [backend.to_host(a).max() for a in found] == [4, 9]
            assert [tuple(a.shape) for a in found] == [(2, 3), (1, 4, 1)]


def test_refused(backend):
    recipe = Recipe(Interval(2), HoldResidual())
    x = ones(backend)
    cache = TracedCache(recipe, backend, TracedCache.start(recipe, backend, x))
    with cache.begin(0) as now:
        now.apply(x, lambda x: x)
        with pytest.raises(StepOrderError, match="passes a site once; it has passed 'network'"):
            now.apply(x, lambda x: x)
        with pytest.raises(KeyError, match="other"):
            now.apply(x, lambda x: x, site="other")
    cache = TracedCache(recipe, backend, TracedCache.start(recipe, backend, x))
    with pytest.raises(ShapeError, match="a residual needs outputs with the shape"):
        cache.run(0, x, lambda x: ones(backend, 1, (2, 4)))
    with pytest.raises(DTypeError, match="a residual needs outputs with the dtype"):
        cache.run(0, x, lambda x: backend.from_host(np.ones((2, 3), np.int32)))
    with pytest.raises(ValueError, match="RelativeChange measures an array: give one like it"):
        TracedCache.start(Recipe(Threshold()), backend, x)
    measured = TracedCache.start(Recipe(Threshold()), backend, x, x)
    with pytest.raises(ValueError, match=r"measures an array.*got none"):
        TracedCache(Recipe(Threshold()), backend, measured).run(0, x, lambda x: x)


def test_start_holds_what_it_will(backend):
    """New zeros: as many arrays as predictor and signal need."""
    example, signal = ones(backend, 7), ones(backend, 7, (1, 2))
    for predictor in PREDICTORS:
        state = TracedCache.start(Recipe(Threshold(), predictor), backend, example, signal)
        ((name, history),) = state.sites.items()
        assert (name, len(history.kept), len(history.times)) == ("network", *[predictor.keeps] * 2)
        arrays = [state.reference, *(array for (array,) in history.kept)]
        assert [tuple(a.shape) for a in arrays] == [(1, 2), *[(2, 3)] * predictor.keeps]
        assert not any(backend.to_host(array).any() for array in arrays)
        assert len(set(map(id, arrays))) == len(arrays)
    assert TracedCache.start(Recipe(Interval()), backend, example).reference == ()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtypes_stay(backend, dtype):
    if dtype not in backend.dtypes:
        pytest.skip(f"{backend.name} has no {dtype}")
    recipe = Recipe(Accumulated(1e9, (1,)), Taylor(1, residual=True), Limits(warmup=2))
    x = backend.from_host(np.full((2, 3), 2.0, np.float32), dtype)
    state = TracedCache.start(recipe, backend, x, x)
    for step in range(4):
        cache = TracedCache(recipe, backend, state)
        found = cache.run(step, x, lambda x, step=step: x * (2 + step), signal=x)
        state = cache.state
        assert backend.dtype_name(found) == dtype
        assert backend.dtype_name(state.reference) == dtype
        assert {backend.dtype_name(a) for (a,) in state.sites["network"].kept} == {dtype}
    assert backend.to_host(found).astype(np.float32).max() == 10


# Under jax.jit.


@pytest.fixture
def jax_backend():
    pytest.importorskip("jax")
    return get_backend("jax")


def step_of(recipe, backend, network):
    def step(state, number, x):
        cache = TracedCache(recipe, backend, state)
        return cache.run(number, x, network, signal=x), cache.state

    return step


@pytest.mark.one_backend(name="jax")
@pytest.mark.parametrize("recipe", SOME, ids=repr)
def test_a_donated_state_is_given_up(jax_backend, recipe):
    """Every array of it, in every step, and outputs are as without donation."""
    import jax

    step = step_of(recipe, jax_backend, lambda x: x * x)
    donating, keeping = jax.jit(step, donate_argnums=0), jax.jit(step)
    x = ones(jax_backend)
    state, kept = (TracedCache.start(recipe, jax_backend, x, x) for _ in range(2))
    for number in range(9):
        x = ones(jax_backend, 1 + number / 8)
        leaves = jax.tree.leaves(state)
        out, state = donating(state, np.int32(number), x)
        expected, kept = keeping(kept, np.int32(number), x)
        assert all(leaf.is_deleted() for leaf in leaves)
        np.testing.assert_array_equal(out, expected)
    assert not x.is_deleted()
    assert int(state.run.skipped) == int(kept.run.skipped) > 0


@pytest.mark.one_backend(name="jax")
@pytest.mark.parametrize("recipe", SOME, ids=repr)
def test_nothing_in_the_program_waits_for_the_host(jax_backend, recipe):
    import jax

    x = jax.ShapeDtypeStruct((2, 3), np.float32)
    state = TracedCache.start(recipe, jax_backend, x, x)
    number = jax.ShapeDtypeStruct((), np.int32)
    program = jax.jit(step_of(recipe, jax_backend, lambda x: x * x)).lower(state, number, x)
    text = program.as_text()
    assert "stablehlo.case" in text  # what is not taken is not run
    assert not any(word in text for word in ("callback", "custom_call", "infeed", "send"))


@pytest.mark.one_backend(name="jax")
def test_a_skipped_step_does_not_run_the_network(jax_backend):
    import jax

    calls = []

    def network(step, x):
        jax.debug.callback(lambda step: calls.append(int(step)), step)
        return x + step

    recipe = Recipe(Interval(3), HoldResidual())

    def body(carry, step):
        x, state = carry
        cache = TracedCache(recipe, jax_backend, state)
        return (cache.run(step, x, partial(network, step)), cache.state), ()

    x = ones(jax_backend)
    state = TracedCache.start(recipe, jax_backend, x)
    (x, _), _ = jax.jit(partial(jax.lax.scan, body))((x, state), jax.numpy.arange(8))
    jax.effects_barrier()
    assert sorted(calls) == [0, 3, 6]
    assert float(x[0, 0]) == 1 + 0 * 3 + 3 * 3 + 6 * 2


@pytest.mark.one_backend(name="jax")
def test_one_program_serves_every_step(jax_backend):
    """The state keeps its shapes and dtypes, so nothing is compiled again."""
    import jax

    x = ones(jax_backend)
    for recipe in SOME[:2]:
        traces = []
        step = step_of(recipe, jax_backend, lambda x: traces.append(1) or x * 2)  # noqa: B023
        program, state = jax.jit(step), TracedCache.start(recipe, jax_backend, x, x)
        for number in range(4):
            _, state = program(state, np.int32(number), x)
        assert len(traces) == 1


@pytest.mark.one_backend(name="jax")
def test_start_takes_shapes_alone(jax_backend):
    import jax

    recipe = Recipe(Threshold(), Taylor(1))
    x = jax.ShapeDtypeStruct((2, 3), jax.numpy.bfloat16)
    shape = jax.eval_shape(lambda x: (x * 2, x[0]), x)
    state = TracedCache.start(recipe, jax_backend, shape, x)
    assert [(a.shape, str(a.dtype)) for a in state.sites["network"].kept[1]] == [
        ((2, 3), "bfloat16"),
        ((3,), "bfloat16"),
    ]
    assert str(state.reference.dtype) == "bfloat16"


@pytest.mark.one_backend(name="jax")
def test_it_decides_as_the_eager_cache_does(jax_backend):
    """A loop that feeds on itself, with a network that is not exact."""
    import jax

    def network(x):
        return jax.numpy.tanh(x) - 0.2 * x

    times = [1.0, 0.9, 0.85, 0.7, 0.65, 0.5, 0.3, 0.2, 0.1, 0.0]
    x = start = ones(jax_backend, 1.5)
    recipe = Recipe(Accumulated(0.08), Taylor(1), Limits(max_consecutive_skips=2))
    eager_cache = DiffusionCache(recipe)
    y, state = start, TracedCache.start(recipe, jax_backend, start, start)

    @jax.jit
    def program(state, step, y, time):
        cache = TracedCache(recipe, jax_backend, state)
        return cache.run(step, y, network, signal=y, time=time), cache.state

    for step, time in enumerate(times[:-1]):
        gap = times[step + 1] - time
        x = x - gap * eager_cache.run(step, x, network, signal=x, time=time)
        velocity, state = program(state, step, y, time)
        y = y - gap * velocity
    np.testing.assert_allclose(x, y, rtol=1e-5)
    assert int(state.run.skipped) == eager_cache.stats.skipped > 2
    assert int(state.run.computed) == eager_cache.stats.computed > 2
