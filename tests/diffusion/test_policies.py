"""Decisions: every policy, limit and signal against the oracle, on every framework."""

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvcache import get_backend
from kvcache.diffusion import (
    TIMESTEP,
    Accumulated,
    HoldOutput,
    Interval,
    Limits,
    Magnitude,
    Recipe,
    RelativeChange,
    SkipPolicy,
    StepMask,
    Taylor,
    Threshold,
    TimestepChange,
)
from kvcache.diffusion.policies import StepFacts

from .oracle import (
    POLICIES,
    POLYNOMIALS,
    STEPS,
    Loop,
    eager,
    fixed,
    limits,
    loops,
    traced,
    whole_decisions,
)

NUMPY = get_backend("numpy")
each_policy = pytest.mark.parametrize("kind", POLICIES, ids=lambda kind: kind.__name__)


def decisions(recipe, loop=None, how=eager):
    """One letter per step: C, computed, or a dot."""
    return "".join("C" if computed else "." for computed in how(recipe, NUMPY, loop or fixed())[0])


# Against the oracle.


@each_policy
@settings(max_examples=100)
@given(data=st.data(), limits=limits(), loop=loops())
def test_decides_as_the_oracle(kind, data, limits, loop):
    recipe = Recipe(data.draw(POLICIES[kind]), HoldOutput(), limits)
    expected = whole_decisions(recipe, loop)
    assert eager(recipe, NUMPY, loop)[0] == expected


def check_same_specs(recipe, backend, loop, how):
    """Decided as the oracle does; and outputs are those of NumPy."""
    expected = whole_decisions(recipe, loop)
    computed, outputs = how(recipe, backend, loop)
    assert computed == expected
    reference = eager(recipe, NUMPY, loop)[1]
    for output, other in zip(outputs, reference, strict=True):
        np.testing.assert_allclose(output, other, rtol=1e-4, atol=1e-2)


@each_policy
@settings(max_examples=12)
@given(data=st.data(), limits=limits(), loop=loops())
def test_decides_alike_everywhere(backend, kind, data, limits, loop):
    check_same_specs(Recipe(data.draw(POLICIES[kind]), Taylor(1), limits), backend, loop, eager)


@each_policy
@settings(max_examples=4)
@given(data=st.data(), limits=limits(), several=st.lists(loops(STEPS), min_size=4, max_size=4))
def test_decides_alike_in_a_program(backend, kind, data, limits, several):
    recipe = Recipe(data.draw(POLICIES[kind]), Taylor(1), limits)
    for loop in several:
        check_same_specs(recipe, backend, loop, traced)


@each_policy
@settings(max_examples=30)
@given(data=st.data(), limits=limits(), loop=loops(), again=loops())
def test_a_second_run_is_decided_as_the_first(kind, data, limits, loop, again):
    recipe = Recipe(data.draw(POLICIES[kind]), HoldOutput(), limits)
    both = Loop(*(first + second for first, second in zip(loop, again, strict=True)))
    expected = whole_decisions(recipe, loop) + whole_decisions(recipe, again)
    assert whole_decisions(recipe, both) == expected
    assert traced(recipe, NUMPY, both)[0] == expected
    assert eager(recipe, NUMPY, both)[0] == expected[len(loop.numbers) :]  # stats of the last run


# What is never skipped.

MEASURING = [
    *(kind(1e30, measure=measure) for kind in (Threshold, Accumulated)
      for measure in (RelativeChange("previous"), RelativeChange("computed"))),
    Accumulated(1e30, (0.0,), RelativeChange()),
    Accumulated(1e30, (1.0, -3.0, 0.0), RelativeChange()),
]  # fmt: skip


@pytest.mark.parametrize("how", [eager, traced])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("policy", MEASURING, ids=str)
def test_what_cannot_be_measured_is_computed(backend, policy, bad, how):
    signals = list(map(np.copy, fixed(5).signals))
    signals[2][1, 1] = bad
    recipe = Recipe(policy, HoldOutput(), Limits(max_consecutive_skips=9))
    computed, outputs = how(recipe, backend, fixed(5)._replace(signals=signals))
    assert computed[:3] == [True, False, True]
    assert computed[4] is False or computed[3] is True  # once there is a good reference again
    assert np.isfinite(outputs[1]).all()


@pytest.mark.parametrize("step", range(1, 4))
def test_after_a_bad_signal_it_goes_on(step):
    signals = list(map(np.copy, fixed(7).signals))
    signals[step][0, 0] = math.nan
    recipe = Recipe(Threshold(0.5), HoldOutput(), Limits(max_consecutive_skips=9))
    found = decisions(recipe, fixed(7)._replace(signals=signals))
    assert found == "C" + "." * (step - 1) + "CC" + "." * (5 - step)


@settings(max_examples=100)
@given(rescale=POLYNOMIALS, loop=loops(), seed=st.integers(0, 9))
@example(rescale=[-1.0, -1.0], loop=fixed(), seed=0)
@example(rescale=[0.0], loop=fixed(), seed=0)
@example(rescale=[-1e38, 0.0, 0.0, 0.0], loop=fixed(), seed=0)
def test_a_threshold_of_0_skips_nothing(rescale, loop, seed):
    scale = 10.0 ** np.random.default_rng(seed).integers(-40, 38)
    for measure in (RelativeChange("previous"), RelativeChange("computed"), TIMESTEP):
        times = [time * scale for time in loop.times]
        for policy in (Accumulated(0.0, rescale, measure), Threshold(0, measure)):
            assert all(eager(Recipe(policy), NUMPY, loop._replace(times=times))[0])
    assert all(eager(Recipe(Magnitude([1.0] * STEPS * 3, 0)), NUMPY, loop)[0])


def drift(rescale, changes):
    """Whether the last of these changes computes, and what all add up to."""
    policy = Accumulated(1e30, rescale)
    memory = (np.float32(0),)
    with np.errstate(all="ignore"):
        for change in changes:
            facts = StepFacts(np.int32(1), np.float32(change), np.int32(0))
            computes, memory = policy.should_compute(np, facts, memory)
    assert memory[0].dtype == np.float32
    return bool(computes), float(memory[0])


@pytest.mark.parametrize(
    ("rescale", "changes", "computes", "total"),
    [
        ([2.0, 1.0, 0.5], [3.0], False, 21.5),
        ([2.0, 1.0, 0.5], [3.0, 1.0], False, 25.0),
        ([1.0, -2.0], [0.5, 3.0], False, 1.0),  # -1.5 is nothing, not less
        ([-1.0], [0.5, 7.0], False, 0.0),
        ([0.25], [0.5, 7.0], False, 0.5),
        ([1e30, 0.0, 0.0], [1e9, 0.0], True, math.inf),
        ([-1e30, 0.0, 0.0], [1e9, 0.0], True, math.inf),
        ([1e30, -1e38, 0.0, 0.0], [1e9], True, math.inf),
        ([1.0, 0.0], [math.inf], True, math.inf),
        ([-1.0, 0.0], [math.inf], True, math.inf),
        ([0.0], [math.nan, 0.0], True, math.inf),
    ],
)
def test_polynomials(rescale, changes, computes, total):
    assert drift(rescale, changes) == (computes, total)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_ratio_that_is_no_number_computes(bad):
    recipe = Recipe(
        Magnitude([1, 1, bad, 1, 1, 1, 1, 1], 0.5), limits=Limits(max_consecutive_skips=9)
    )
    assert decisions(recipe, fixed(8)) == "C.C....."


def test_a_policy_may_keep_nothing_of_its_own_and_still_not_skip_over_nan():
    class Never(SkipPolicy):
        signal = RelativeChange()

        def should_compute(self, xp, facts, memory):
            return facts.step < 0, memory

    signals = [*fixed(3).signals, np.full((2, 3), np.nan, np.float32), *fixed(3).signals]
    loop = fixed(7)._replace(signals=signals)
    assert decisions(Recipe(Never(), HoldOutput()), loop) == "C..CC.."
    assert decisions(Recipe(Never(), HoldOutput()), loop, traced) == "C..CC.."


# By hand.

NEVER = StepMask([False] * 40)


@pytest.mark.parametrize("how", [eager, traced])
@pytest.mark.parametrize(
    ("policy", "limits", "expected"),
    [
        (Interval(1), Limits(), "CCCCCCCCCCCC"),
        (Interval(3), Limits(), "C..C..C..C.."),
        (Interval(3), Limits(warmup=5), "CCCCC..C..C."),
        (Interval(5), Limits(max_consecutive_skips=2), "C..C..C..C.."),
        (NEVER, Limits(), "C..........."),
        (NEVER, Limits(warmup=3), "CCC........."),
        (NEVER, Limits(tail=3, steps=12), "C........CCC"),
        (NEVER, Limits(tail=3, steps=10), "C......CCCCC"),
        (NEVER, Limits(steps=10), "C.........CC"),
        (NEVER, Limits(warmup=5, tail=5, steps=8), "CCCCCCCCCCCC"),
        (NEVER, Limits(max_consecutive_skips=0), "CCCCCCCCCCCC"),
        (NEVER, Limits(max_consecutive_skips=1), "C.C.C.C.C.C."),
        (NEVER, Limits(max_consecutive_skips=4), "C....C....C."),
        (NEVER, Limits(max_skips=0), "CCCCCCCCCCCC"),
        (NEVER, Limits(max_skips=5), "C.....CCCCCC"),
        (NEVER, Limits(2, 1, 2, 5, 12), "CC..C..C.CCC"),
        (StepMask([0, 0, 1, 0]), Limits(), "C.C.CCCCCCCC"),
        (Threshold(1.0), Limits(), "C....C....C."),  # its own longest run
        (Threshold(1.0), Limits(max_consecutive_skips=6), "C......C...."),
        (Threshold(2.0, TimestepChange("computed")), Limits(), "C.C.C.C.C.C."),
        (Threshold(2.0, TimestepChange("previous")), Limits(), "C....C....C."),
        (Accumulated(2.5, measure=TIMESTEP), Limits(), "C..C..C..C.."),
        (Accumulated(3.0, measure=TIMESTEP), Limits(), "C..C..C..C.."),  # 3 is not below 3
        (Accumulated(3.5, (0.5, 0), TIMESTEP), Limits(max_consecutive_skips=9), "C......C...."),
        (Accumulated(3.5, (0.5, 0), TIMESTEP), Limits(), "C....C....C."),
        (Accumulated(5, measure=TimestepChange("computed")), Limits(), "C..C..C..C.."),
        (Magnitude([1.0] * 12), Limits(), "C...C...C..."),  # its own longest run
        (Magnitude([1.0] * 12), Limits(max_consecutive_skips=7), "C.......C..."),
        (Magnitude([0.5] * 12, 1.3), Limits(), "C..C..C..C.."),  # 1/2 + 3/4, + 7/8
        (Magnitude([2.0, 0.5] * 6, 2.0), Limits(), "C...C...C..."),
        (Magnitude([1.0] * 8), Limits(), "C...C...CCCC"),  # beyond the last ratio
    ],
)
def test_by_hand(policy, limits, expected, how):
    assert decisions(Recipe(policy, HoldOutput(), limits), how=how) == expected


def test_a_computed_step_does_not_count_into_the_next_drift():
    """By Limits as well as by the policy; the change to the step after it does."""
    recipe = Recipe(Accumulated(2.5, measure=TIMESTEP), limits=Limits(warmup=5))
    assert decisions(recipe) == "CCCCC..C..C."


def test_mean_over_mean():
    old, new = np.array([[1, -3], [0, 4]], np.float16), np.array([[2, -3], [0, 1]], np.float16)
    found = RelativeChange().change(np, new, old)
    assert (float(found), found.dtype) == (0.5, np.float32)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_does_not_overflow_the_mean(backend, dtype):
    """Sums of it would, and so would the difference of numbers of either sign."""
    if dtype not in backend.dtypes:
        pytest.skip(f"{backend.name} has no {dtype}")
    large = np.full((2, 4000), 60000, np.float32)
    one, other = (backend.from_host(a, dtype) for a in (large, -large))
    found = RelativeChange().change(backend.xp, other, one)
    assert backend.dtype_name(found) == "float32"
    assert float(backend.to_host(found)) == pytest.approx(2.0, rel=1e-6)


# What is no policy.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Interval(0), r"an interval must be >= 1 step; got 0"),
        (lambda: StepMask([]), r"an entry per step; got none"),
        (lambda: Magnitude([]), r"an entry per step; got none"),
        (lambda: Threshold(-0.1), r"finite and >= 0 \(0 skips nothing\); got -0.1"),
        (lambda: Threshold(math.nan), r"finite and >= 0 .*; got nan"),
        (lambda: Accumulated(math.inf), r"finite and >= 0 .*; got inf"),
        (lambda: Magnitude([1.0], -1), r"finite and >= 0 .*; got -1"),
        (lambda: Accumulated(0.1, ()), r"rescale must be finite coefficients; got \(\)"),
        (lambda: Accumulated(0.1, (1, math.nan)), r"finite coefficients; got \(1, nan\)"),
        (lambda: RelativeChange("last"), r"since is one of .*'previous', 'computed'.*got 'last'"),
        (lambda: Limits(warmup=-1), r"warmup must be >= 0 steps; got -1"),
        (lambda: Limits(tail=-1, steps=3), r"tail must be >= 0 steps; got -1"),
        (
            lambda: Limits(max_consecutive_skips=-2),
            r"max_consecutive_skips must be >= 0 steps; got -2",
        ),
        (lambda: Limits(max_skips=-1), r"max_skips must be >= 0 steps; got -1"),
        (lambda: Limits(steps=0), r"steps must be >= 1; got 0"),
        (lambda: Limits(tail=2), r"a tail of 2 steps ends where the run does: give steps, too"),
    ],
)
def test_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_tables_are_kept_as_given():
    """A policy is what it was made as, whatever becomes of a caller's list."""
    mask, ratios, rescale = [0, 1], [1, 0.5], [2, 0]
    policies = StepMask(mask), Magnitude(ratios), Accumulated(0.1, rescale)
    for table in (mask, ratios, rescale):
        table.clear()
    assert policies == (StepMask((False, True)), Magnitude((1.0, 0.5)), Accumulated(0.1, (2.0, 0)))
    assert hash(Recipe(policies[0])) == hash(Recipe(StepMask([False, True])))


@pytest.mark.parametrize("how", [eager, traced])
def test_a_policy_is_told_of_skips_and_the_change(how):
    """In the first step of a run there is none, whatever the run before has left."""
    told = []

    class Told(Interval):
        signal = TimestepChange()

        def should_compute(self, xp, facts, memory):
            told.append(tuple(map(float, facts)))
            return super().should_compute(xp, facts, memory)

    steps, times = [0, 1, 4, 5, 0, 1], [1.0, 0.75, 0.5, 0.125, 1.0, 0.5]
    how(Recipe(Told(3)), NUMPY, fixed(6)._replace(numbers=steps, times=times))
    none = pytest.approx(math.nan, nan_ok=True)
    assert told == [
        (0, none, 0), (1, 0.25, 0), (4, 0.25, 1), (5, 0.375, 2), (0, none, 0), (1, 0.5, 0),
    ]  # fmt: skip


def test_a_run_starts_before_its_first_step():
    state = Recipe(Accumulated(0.5)).start()
    assert [int(number) for number in state[:4]] == [-1, 0, 0, 0]
    assert [float(number) for number in state.memory] == [0.0]
