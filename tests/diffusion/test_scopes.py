"""BlockRange: which blocks every step computes, what the signal is, and what is corrected."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from kvcache import get_backend
from kvcache.diffusion import (
    Accumulated,
    BlockRange,
    DiffusionCache,
    HoldOutput,
    HoldResidual,
    Interval,
    Recipe,
    RelativeChange,
    Taylor,
    Threshold,
    TracedCache,
)

NUMPY = get_backend("numpy")
ENDS = [(0, 0), (1, 0), (0, 1), (1, 1), (2, 1), (1, 3), (3, 0)]


def array(backend, value, shape=(1, 2, 3)):
    return backend.from_host(np.full(shape, value, np.float32))


class Blocks(Sequence[Callable[[Any], Any]]):
    """Block i adds 10**i times the present step to each array, and notes that it ran."""

    def __init__(self, count):
        self.count, self.step, self.ran = count, 0, list[int]()

    def __len__(self):
        return self.count

    def __getitem__(self, which):
        if isinstance(which, slice):
            return [self[i] for i in range(*which.indices(self.count))]
        number = range(self.count)[which]
        return lambda x: self.block(number, x)

    def block(self, i, x):
        self.ran.append(i)
        added = 10**i * self.step
        return tuple(a + added for a in x) if isinstance(x, tuple) else x + added

    def take(self):
        ran, self.ran = self.ran, []
        return ran


@pytest.mark.parametrize(("first", "last"), ENDS)
def test_either_end_is_always_computed(backend, first, last):
    """Numbers in decimal: the digit of block i is the step it was computed in."""
    cache, blocks = DiffusionCache(Recipe(Interval(3), HoldResidual())), Blocks(5)
    for step in range(5):
        blocks.step = step + 1
        found = BlockRange(first, last).run(cache, step, array(backend, 0), blocks)
        computed = step // 3 * 3 + 1
        digits = [computed if first <= i < 5 - last else step + 1 for i in range(5)]
        ran = [i for i in range(5) if digits[i] == step + 1]
        assert blocks.take() == ran
        expected = sum(10**i * digit for i, digit in enumerate(digits))
        np.testing.assert_array_equal(backend.to_host(found), np.float32(expected))


def test_a_single_block_may_be_skipped():
    cache, blocks = DiffusionCache(Recipe(Interval(2), HoldResidual())), Blocks(3)
    for step in range(4):
        BlockRange(1, 1).run(cache, step, array(NUMPY, 0), blocks)
    assert blocks.take() == [0, 1, 2, 0, 2] * 2


@pytest.mark.parametrize("first", [1, 2])
def test_the_signal_is_what_the_first_ones_add(backend, first):
    """Whatever comes in: also where that changes much more than it."""
    cache, blocks = DiffusionCache(Recipe(Threshold(0.4), HoldOutput())), Blocks(4)
    for step, number in enumerate((4, 5, 6, 3)):
        blocks.step = number
        BlockRange(first).run(cache, step, array(backend, 1000 * step**2), blocks)
    first_change, *changes = [record.change for record in cache.stats.steps]
    assert np.isnan(first_change)
    assert changes == pytest.approx([1 / 4, 2 / 4, 3 / 6], rel=1e-3)
    assert [record.computed for record in cache.stats.steps] == [True, False, True, True]


@pytest.mark.parametrize("first", [0, 1, 2])
@pytest.mark.parametrize("policy", [Interval(2), Threshold(0.5)], ids=repr)
def test_blocks_may_write_to_what_they_are_given(backend, policy, first):
    """Of that the residual is kept, and the signal measured, as if they did not."""

    def adding(number):
        def block(x):
            x += number
            return x

        return block

    cache = DiffusionCache(Recipe(policy, HoldResidual()))
    for step in range(4):
        signal = None if first else array(backend, 1)
        x = array(backend, 1 + step)
        found = BlockRange(first).run(
            cache, step, x, [adding(1), adding(2), adding(4)], signal=signal
        )
        np.testing.assert_array_equal(backend.to_host(found), np.full((1, 2, 3), 8.0 + step))
    assert cache.stats.skipped == (2 if policy == Interval(2) else 3)


def test_any_other_signal_goes_before():
    for signal in (lambda value: value, lambda value: lambda: value):
        cache, blocks = DiffusionCache(Recipe(Accumulated(0.4))), Blocks(3)
        for step, number in enumerate((4, 5)):
            given = signal(array(NUMPY, 10 + step))
            blocks.step = number
            BlockRange(1).run(cache, step, array(NUMPY, 0), blocks, signal=given)
        assert cache.stats.steps[1].change == pytest.approx(0.1)


def test_without_first_blocks_a_signal_is_needed():
    cache, blocks = DiffusionCache(Recipe(Threshold())), Blocks(3)
    with pytest.raises(ValueError, match=r"RelativeChange measures an array.*got none"):
        BlockRange(0, 1).run(cache, 0, array(NUMPY, 0), blocks)
    assert cache.stats.steps == ()
    BlockRange(0, 1).run(cache, 0, array(NUMPY, 0), blocks, signal=array(NUMPY, 1))
    assert len(cache.stats.steps) == 1


def test_nothing_is_measured_unless_asked_for():
    class Watched(RelativeChange):
        def change(self, *args):
            raise AssertionError

    cache, blocks = DiffusionCache(Recipe(Interval(2))), Blocks(3)
    for step in range(3):
        BlockRange(1).run(cache, step, array(NUMPY, 0), blocks)
    assert cache.nbytes == 24, "one residual, no signal"


@pytest.mark.parametrize("how", ["eager", "traced"])
def test_image_and_text_go_through_together(backend, how):
    """The first of them is measured."""
    recipe = Recipe(Threshold(0.3), HoldResidual())
    shapes = ((1, 2, 3), (1, 5, 2))
    x = tuple(array(backend, 0, shape) for shape in shapes)
    cache = DiffusionCache(recipe)
    state = TracedCache.start(recipe, backend, x, x[0])
    blocks, found = Blocks(3), []
    for step, number in enumerate((4, 5, 9)):
        blocks.step = number
        cache = cache if how == "eager" else TracedCache(recipe, backend, state)
        x = array(backend, 0, shapes[0]), array(backend, 1000 * step, shapes[1])
        image, text = BlockRange(1, 1).run(cache, step, x, blocks)
        state = None if how == "eager" else cache.state
        assert (tuple(image.shape), tuple(text.shape)) == shapes
        found.append([int(backend.to_host(a).max()) for a in (image, text)])
    assert found == [[444, 444], [545, 1545], [999, 2999]]


def test_in_a_program(backend):
    """As eagerly, block by block."""
    recipe = Recipe(Accumulated(0.5), Taylor(1))
    eager_cache, blocks = DiffusionCache(recipe), Blocks(4)
    state = TracedCache.start(recipe, backend, array(backend, 0), array(backend, 0))
    for step, number in enumerate((4, 5, 6, 3, 3)):
        blocks.step = number
        x = array(backend, 100 * step)
        traced_cache = TracedCache(recipe, backend, state)
        found = BlockRange(1, 1).run(traced_cache, step, x, blocks)
        ran = blocks.take()
        expected = BlockRange(1, 1).run(eager_cache, step, x, blocks)
        state = traced_cache.state
        np.testing.assert_allclose(backend.to_host(found), backend.to_host(expected), rtol=1e-6)
        eagerly = blocks.take()
        assert ran == eagerly or backend.name == "jax"  # which traces both branches
    assert eager_cache.stats.skipped == int(backend.to_host(state.run.skipped)) == 3


@pytest.mark.one_backend(name="jax")
def test_under_jit():
    """The default signal is traced as well."""
    jax = pytest.importorskip("jax")
    backend = get_backend("jax")
    recipe = Recipe(Threshold(0.3), HoldResidual())
    weights = jax.numpy.asarray([0.5, 2.0, 3.0])
    blocks = [lambda x, w=w: x + w * jax.numpy.tanh(x) for w in weights]

    @jax.jit
    def program(state, step, x):
        cache = TracedCache(recipe, backend, state)
        return BlockRange(1, 1).run(cache, step, x, blocks), cache.state

    state = TracedCache.start(recipe, backend, array(backend, 0), array(backend, 0))
    cache = DiffusionCache(recipe)
    for step, value in enumerate((0.5, 0.55, 1.5, 1.6)):
        x = array(backend, value)
        found, state = program(state, step, x)
        np.testing.assert_allclose(found, BlockRange(1, 1).run(cache, step, x, blocks), rtol=1e-5)
    assert [record.computed for record in cache.stats.steps] == [True, False, True, False]
    assert int(state.run.skipped) == 2


def test_options_reach_the_cache():
    cache, blocks = DiffusionCache(Recipe(Interval(2), Taylor(1)), ("a", "b")), Blocks(3)
    for step in range(2):
        BlockRange(1).run(cache, step, array(NUMPY, 0), blocks, stream="b", time=0.5 - step / 2)
    assert [record.stream for record in cache.stats.steps] == ["b", "b"]
    with pytest.raises(ValueError, match="a time must be finite; got nan"):
        BlockRange(1).run(cache, 2, array(NUMPY, 0), blocks, time=float("nan"))


@pytest.mark.parametrize(
    ("first", "last", "blocks"), [(1, 0, 1), (2, 1, 3), (0, 3, 3), (4, 0, 3), (0, 5, 3), (0, 0, 0)]
)
def test_something_must_be_left(first, last, blocks):
    cache, layers = DiffusionCache(Recipe(Interval())), Blocks(blocks)
    message = f"{first} first and {last} last of {blocks} blocks leave none to skip. Make the scope"
    with pytest.raises(ValueError, match=message):
        BlockRange(first, last).run(cache, 0, array(NUMPY, 0), layers)
    assert (layers.take(), cache.stats.steps) == ([], ())


@pytest.mark.parametrize(("first", "last"), [(-1, 0), (0, -1)])
def test_no_range(first, last):
    with pytest.raises(ValueError, match=f"blocks count from 0; got first {first}, last {last}"):
        BlockRange(first, last)


def test_a_first_block_that_fails_begins_no_step():
    cache, blocks = DiffusionCache(Recipe(Interval())), Blocks(2)
    with pytest.raises(ZeroDivisionError):
        BlockRange(1).run(cache, 0, array(NUMPY, 0), [lambda x: 1 // 0, *blocks])
    assert cache.stats.steps == ()
    BlockRange(1).run(cache, 0, array(NUMPY, 0), blocks)
