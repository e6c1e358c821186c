"""What a skipped step gives: the polynomial through the kept steps, in exact arithmetic."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcache import DTypeError, ShapeError, get_backend
from kvcache.diffusion import (
    DiffusionCache,
    HoldOutput,
    HoldResidual,
    Interval,
    Recipe,
    StepMask,
    Taylor,
    TracedCache,
)

from .oracle import scan_of

NUMPY = get_backend("numpy")
SHAPE = (2, 3)


def through(points, at):
    """The polynomial through these points (Neville's scheme: no weights as in the code)."""
    values = [y for _, y in points]
    for size in range(1, len(points)):
        for i in range(len(points) - size):
            left, right = points[i][0], points[i + size][0]
            values[i] = ((at - right) * values[i] + (left - at) * values[i + 1]) / (left - right)
    return values[0]


def polynomial(coefficients, time):
    """Exact in float64 for the few bits that are used here."""
    return sum(c * time**n for n, c in enumerate(coefficients))


def predictions(order, coefficients, steps):
    """Exact, by element; of computed steps what they gave."""
    found, known = [], []
    for time, computed in steps:
        true = polynomial(coefficients, time)
        if computed:
            known.append((Fraction(time), true))
            found.append(true)
            continue
        latest = known[-order - 1 :]
        flat = [
            through([(t, Fraction(float(y.flat[e]))) for t, y in latest], Fraction(time))
            for e in range(true.size)
        ]
        found.append(np.array([float(value) for value in flat]).reshape(true.shape))
    return found


def cached(backend, predictor, trajectory, steps):
    """Outputs of a cache. Inputs differ from step to step; a residual follows the trajectory."""
    recipe = Recipe(StepMask([computed for _, computed in steps]), predictor)
    cache, outputs = DiffusionCache(recipe), []
    for number, (time, _) in enumerate(steps):
        x, out = step_of(predictor, trajectory, number, time)
        given = [backend.from_host(array.astype(np.float32)) for array in (x, out)]
        result = cache.run(number, given[0], lambda x, out=given[1]: out, time=time)
        outputs.append(backend.to_host(result) - (x if predictor.residual else 0))
    return outputs


def step_of(predictor, trajectory, number, time):
    x = np.full(SHAPE, 64.0 * number)
    return x, trajectory(time) + (x if predictor.residual else 0)


def compiled(backend, predictor, trajectory, steps):
    """As :func:`cached`, in a program."""
    recipe = Recipe(StepMask([computed for _, computed in steps]), predictor)
    pairs = [step_of(predictor, trajectory, n, time) for n, (time, _) in enumerate(steps)]
    numbers = np.arange(len(steps), dtype=np.int32)
    times = np.array([time for time, _ in steps], np.float32)
    stacked = (np.stack(arrays).astype(np.float32) for arrays in zip(*pairs, strict=True))
    inputs = [backend.from_host(array) for array in (numbers, times, *stacked)]

    def body(state, inputs):
        number, time, x, out = inputs
        cache = TracedCache(recipe, backend, state)
        result = cache.run(number, x, lambda _: out, time=time)
        return cache.state, (result,)

    state = TracedCache.start(recipe, backend, inputs[2][0, ...])
    _, (results,) = scan_of(backend, body)(state, inputs)
    return [
        backend.to_host(result) - (x if predictor.residual else 0)
        for result, (x, _) in zip(results, pairs, strict=True)
    ]


def check(how, backend, predictor, degree, steps):
    """Against exact arithmetic, on a polynomial of this degree in every element."""
    chance = np.random.default_rng(degree)
    coefficients = chance.integers(-2, 3, (degree + 1, *SHAPE)).astype(float)
    expected = predictions(predictor.order, coefficients, steps)
    found = how(backend, predictor, lambda time: polynomial(coefficients, time), steps)
    for n, (got, wanted) in enumerate(zip(found, expected, strict=True)):
        # What cancels in float32: the values, the powers of the times, and the inputs.
        times = [abs(time) for time, _ in steps[: n + 1]]
        size = 20 * (1 + max(times)) ** degree * amplified(predictor.order, steps[: n + 1])
        np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-6 * (size + 64 * len(steps)))


def amplified(order, steps):
    """The sum of the sizes of the weights, for a step that is predicted."""
    (time, computed), known = steps[-1], [time for time, computed in steps if computed]
    latest = known[-order - 1 :]
    if computed:
        return 1.0
    return sum(abs(math.prod((time - b) / (a - b) for b in latest if b != a)) for a in latest)


GAPS = st.lists(st.integers(1, 6), min_size=2, max_size=9)
PATTERN = st.lists(st.booleans(), min_size=8, max_size=8)


def steps_of(gaps, computed, falling):
    """Times in eighths, upwards or downwards; the first step is computed in any case."""
    times = np.cumsum([0, *gaps]) / 8 * (-1 if falling else 1)
    return list(zip(times.tolist(), [True, *computed], strict=False))


@pytest.mark.parametrize("how", [cached, compiled])
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("order", range(5))
@settings(max_examples=25)
@given(gaps=GAPS, computed=PATTERN, falling=st.booleans(), degree=st.integers(0, 5))
def test_is_the_polynomial_through_the_last_steps(
    how, order, residual, gaps, computed, falling, degree
):
    """Of lower order until there are enough of them, whatever the true degree is."""
    steps = steps_of(gaps, computed, falling)
    check(how, NUMPY, Taylor(order, residual), degree, steps)


@pytest.mark.parametrize("how", [cached, compiled])
@pytest.mark.parametrize("order", range(5))
def test_on_every_backend(backend, order, how):
    pattern = [False, True, False, True, True, True, False, False, True, True, False]
    steps = steps_of([1, 3, 2, 1, 4, 1, 2, 3, 1, 1, 2], pattern, falling=True)
    check(how, backend, Taylor(order, residual=order % 2 == 1), order, steps)


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("order", range(5))
@settings(max_examples=20)
@given(
    gaps=st.lists(st.integers(1, 6), min_size=7, max_size=7), leading=st.sampled_from([0, 2, -3])
)
def test_the_error_is_that_of_one_degree_more(order, residual, gaps, leading):
    """None for degree `order`; above it the leading term times the distance to each known time."""
    times = (np.cumsum([0, *gaps]) / 8).tolist()[: order + 2]
    steps = [(time, n <= order) for n, time in enumerate(times)]
    chance = np.random.default_rng(order)
    coefficients = [*chance.integers(-2, 3, (order + 1, *SHAPE)), np.full(SHAPE, leading)]
    found = cached(
        NUMPY, Taylor(order, residual), lambda time: polynomial(coefficients, time), steps
    )
    error = polynomial(coefficients, times[-1]) - found[-1]
    expected = leading * math.prod(times[-1] - time for time in times[:-1])
    tolerance = 1e-4 * amplified(order, steps) * (1 + times[-1]) ** (order + 1)
    np.testing.assert_allclose(error, np.full(SHAPE, expected), rtol=1e-3, atol=tolerance)
    assert not leading or order > 1 or abs(error).min() > tolerance


@pytest.mark.parametrize("order", range(5))
def test_weights_are_1_in_sum_and_0_for_what_is_unknown(order):
    for count in range(1, order + 2):
        times = tuple(map(np.float32, (5.0, 4.0, 2.5, 1.0, 0.0)[: order + 1]))
        weights = Taylor(order).weights(np, times, count, np.float32(6.5))
        assert sum(weights) == pytest.approx(1, abs=1e-4)
        assert all(weights[:count])
        assert not any(weights[count:])
        if count <= order:  # nor may it matter what is there
            strange = tuple(map(np.float32, (*times[:count], *[5.0, math.nan, math.inf, 6.5])))
            with np.errstate(all="ignore"):
                again = Taylor(order).weights(np, strange[: order + 1], count, np.float32(6.5))
            assert again == weights


# Holding.


def test_holds_the_latest_output(backend):
    steps = [(0.0, True), (1.0, False), (2.0, True), (3.0, False), (7.0, False)]
    found = cached(backend, HoldOutput(), lambda time: np.full(SHAPE, 100 + time), steps)
    assert [output.min() for output in found] == [100, 100, 102, 102, 102]
    assert all((output == output.min()).all() for output in found)


def test_adds_the_latest_residual_to_what_comes_in(backend):
    cache = DiffusionCache(Recipe(Interval(3), HoldResidual()))
    results = [
        backend.to_host(
            cache.run(
                step, backend.from_host(np.full(SHAPE, 10.0**step, np.float32)),
                lambda x, step=step: x * 2 + step,
            )
        )
        for step in range(6)
    ]  # fmt: skip
    assert [result[0, 0] for result in results] == [2, 11, 101, 2003, 11003, 101003]


def test_several_arrays_are_predicted_each_by_its_own(backend):
    """Of different shapes, by a line in time; a site that gives a tuple goes on giving one."""
    cache = DiffusionCache(Recipe(StepMask([True, True, False]), Taylor(1, residual=True)))
    for step in range(3):
        pair = [backend.from_host(np.full(shape, 5.0, np.float32)) for shape in ((2, 3), (2, 4, 1))]
        found = cache.run(step, pair, lambda pair, step=step: [pair[0] + step, pair[1] - 3 * step])
    assert isinstance(found, tuple)
    assert [backend.to_host(array).tolist() for array in found] == [
        np.full((2, 3), 7.0).tolist(),
        np.full((2, 4, 1), -1.0).tolist(),
    ]


@pytest.mark.parametrize("predictor", [HoldOutput(), HoldResidual(), Taylor(1), Taylor(2, True)])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_dtypes_stay(backend, dtype, predictor):
    if dtype not in backend.dtypes:
        pytest.skip(f"{backend.name} has no {dtype}")
    x = backend.from_host(np.full(SHAPE, 2.0, np.float32), dtype)
    cache = DiffusionCache(Recipe(StepMask([True, True, True, False]), predictor))
    for step in range(4):
        found = cache.run(step, x, lambda x, step=step: x * 2**step)
        assert backend.dtype_name(found) == dtype
    expected = {1: 8.0, 2: 12.0, 3: 14.0}[predictor.keeps]
    np.testing.assert_array_equal(backend.to_host(found).astype(np.float32), expected)
    assert {backend.dtype_name(array) for array in cache.arrays()} == {dtype}
    assert cache.nbytes == predictor.keeps * 6 * 2


def test_it_extrapolates_in_float32(backend):
    """What is added up on the way is out of reach of float16."""
    if "float16" not in backend.dtypes:
        pytest.skip(f"{backend.name} has no float16")
    cache = DiffusionCache(Recipe(StepMask([True, True, True, False]), Taylor(2)))
    for step, value in enumerate((30000.0, 30016.0, 30048.0, 0.0)):
        x = backend.from_host(np.full(SHAPE, value, np.float32), "float16")
        found = cache.run(step, x, lambda x: x)
    np.testing.assert_array_equal(backend.to_host(found), np.float16(30096))  # of -90048 and more


# What cannot be.


@pytest.mark.parametrize("order", [-1, 5])
def test_orders(order):
    with pytest.raises(ValueError, match=f"order must be 0 to 4, .*; got {order}"):
        Taylor(order)


def test_keeps_as_many_steps_as_it_looks_at():
    assert [Taylor(order).keeps for order in range(5)] == [1, 2, 3, 4, 5]
    assert (HoldOutput().keeps, HoldOutput().residual) == (1, False)
    assert (HoldResidual().keeps, HoldResidual().residual) == (1, True)
    assert Taylor(2, residual=True).residual is True


@pytest.mark.parametrize("predictor", [HoldResidual(), Taylor(2, residual=True)])
def test_residuals_need_outputs_like_inputs(backend, predictor):
    x = backend.from_host(np.ones((2, 3), np.float32))
    wide, whole = (backend.from_host(np.ones(s, d)) for s, d in (((2, 4), "f4"), ((2, 3), "i4")))
    cache = DiffusionCache(Recipe(Interval(), predictor))
    with pytest.raises(ShapeError, match=r"the shape of .*2, 4.* for .*2, 3.*HoldOutput"):
        cache.run(0, x, lambda x: wide)
    with pytest.raises(DTypeError, match=r"the dtype of .*int32.* for .*float32.*HoldOutput"):
        cache.run(0, x, lambda x: whole)
    with pytest.raises(ShapeError, match="a residual needs outputs with the shape"):
        cache.run(0, x, lambda x: (x, x))
    assert cache.arrays() == []
    assert DiffusionCache(Recipe(Interval(), HoldOutput())).run(0, x, lambda x: wide) is wide


@pytest.mark.parametrize("times", [(1, 1), (1, 2, 1), (4, 3, 2, 3), (1, 1 + 1e-9)])
def test_extrapolation_needs_different_times(times):
    cache = DiffusionCache(Recipe(Interval(1), Taylor(3)))
    x = np.ones(SHAPE, np.float32)
    for step, time in enumerate(times[:-1]):
        cache.run(step, x, lambda x: x, time=time)
    message = r"computed steps need different times; got \d.0 twice. Leave time out"
    with pytest.raises(ValueError, match=message):
        cache.run(9, x, lambda x: x, time=times[-1])
    cache.run(9, x, lambda x: x, time=0)


def test_a_time_may_come_again_once_it_is_forgotten():
    for predictor, times in ((Taylor(1), (1, 2, 1, 2)), (HoldOutput(), (1, 1, 1)),
                             (Taylor(2), (1, 2, 3, 1, 2))):  # fmt: skip
        cache = DiffusionCache(Recipe(Interval(1), predictor))
        for step, time in enumerate(times):
            cache.run(step, np.ones(SHAPE, np.float32), lambda x: x, time=time)
