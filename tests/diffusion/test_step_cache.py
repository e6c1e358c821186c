"""What is kept between denoising steps: what was set, once each, and nothing that was let go of."""

import gc
from weakref import WeakValueDictionary, ref

import numpy as np
import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from kvcache import BoundsError, KVCacheError, UnknownBackendError, UnknownStreamError
from kvcache.diffusion import HitStats, StepCache


def feature(backend, value=1.0, size=6):
    return backend.from_host(np.full((2, size), value, np.float32))


# Against a dict.

LAYERS, NUMBERS = st.integers(-1, 4), st.integers(-1, 3)
ARRAYS = st.none() | st.integers(1, 4)


class AgainstADict(RuleBasedStateMachine):
    """Nobody but the cache holds the arrays; array n has n bytes."""

    @initialize(num_layers=st.integers(0, 4), streams=st.sampled_from([1, 3, ("a", "b")]))
    def start(self, num_layers, streams):
        self.cache = StepCache(num_layers, streams)
        self.slots = {"constant": None}
        for stream in range(streams) if isinstance(streams, int) else streams:
            self.slots |= {(stream, layer): None for layer in range(num_layers)}
        self.alive = WeakValueDictionary()
        self.hits = self.misses = 0

    def array(self, number):
        fresh = np.zeros(number or 0, np.uint8)
        return None if number is None else self.alive.setdefault(number, fresh)

    def slot(self, layer, stream):
        """Where an address leads; None if nowhere."""
        streams = self.cache.streams
        if isinstance(stream, int) and 0 <= stream < len(streams):
            stream = streams[stream]
        return (stream, layer) if (stream, layer) in self.slots else None

    @rule(layer=LAYERS, stream=NUMBERS | st.sampled_from("abc"), number=ARRAYS)
    def set(self, layer, stream, number):
        slot = self.slot(layer, stream)
        if slot is None:
            with pytest.raises((BoundsError, UnknownStreamError), match="Nothing was changed"):
                self.cache.set(layer, object(), stream)
        else:
            self.cache.set(layer, self.array(number), stream)
            self.slots[slot] = number

    @rule(layer=LAYERS, stream=NUMBERS | st.sampled_from("abc"))
    def get(self, layer, stream):
        slot = self.slot(layer, stream)
        if slot is None:
            with pytest.raises((BoundsError, UnknownStreamError)):
                self.cache.get(layer, stream)
        else:
            number = self.slots[slot]
            assert self.cache.get(layer, stream) is (None if number is None else self.alive[number])
            self.hits += number is not None
            self.misses += number is None

    @rule(number=ARRAYS)
    def constant(self, number):
        self.cache.constant = self.array(number)
        self.slots["constant"] = number

    @rule()
    def free(self):
        self.cache.free()
        self.slots = dict.fromkeys(self.slots)

    @invariant()
    def holds_what_the_dict_says(self):
        cache = self.cache
        held = list(dict.fromkeys(filter(None, self.slots.values())))
        assert [array.size for array in cache.arrays()] == held
        assert set(self.alive) == set(held)
        assert cache.nbytes == sum(held)
        assert cache.stats == (self.hits, self.misses)
        constant = self.slots["constant"]
        assert cache.constant is (None if constant is None else self.alive[constant])


TestAgainstADict = AgainstADict.TestCase


# When to compute everything.


@pytest.mark.parametrize(
    ("interval", "steps"), [(1, [0, 1, 2, 3, 4, 5, 6]), (3, [0, 3, 6]), (5, [0, 5]), (99, [0])]
)
def test_the_first_step_of_each_interval_refreshes(interval, steps):
    cache = StepCache(1)
    assert [step for step in range(7) if cache.should_refresh(step, interval)] == steps
    assert cache.should_refresh(np.int64(steps[-1]), np.int64(interval)) is True


@pytest.mark.parametrize(("step", "interval"), [(3, 0), (3, -1), (-1, 1), (-2, -2)])
def test_what_is_no_step_or_interval(step, interval):
    message = f"an interval is at least 1 .*; got step {step} and interval {interval}"
    with pytest.raises(ValueError, match=message):
        StepCache.should_refresh(step, interval)


def test_a_network_that_computes_deep_layers_every_third_step():
    deep, steps, computed = range(2, 6), range(7), []
    cache = StepCache(6, streams=1)
    for step in steps:
        for layer in deep:
            if cache.should_refresh(step, 3):
                computed.append((step, layer))
                cache.set(layer, np.array([step, layer]))
            found = cache.get(layer)
            assert found is not None
            assert found.tolist() == [step // 3 * 3, layer]
    assert computed == [(step, layer) for step in (0, 3, 6) for layer in deep]
    assert cache.stats == HitStats(hits=28, misses=0)


# Streams.


def test_named_streams_have_numbers_too():
    cache = StepCache(2, streams=["cond", "uncond"])
    assert cache.streams == ("cond", "uncond")
    cache.set(1, "c", "cond")
    cache.set(1, "u", 1)
    assert cache.get(1) == cache.get(1, 0) == cache.get(1, "cond") == "c"
    assert cache.get(1, np.int8(1)) == cache.get(1, "uncond") == "u"
    assert cache.arrays() == ["c", "u"]


def test_two_numbered_streams_by_default():
    cache = StepCache(3)
    assert (cache.num_layers, cache.streams) == (3, (0, 1))
    cache.set(0, "u", stream=1)
    assert (cache.get(0), cache.get(0, 1)) == (None, "u")
    assert cache.stats == (1, 1)


def test_stream_by_stream_then_layer_by_layer():
    cache = StepCache(2, streams=2)
    for stream, layer in ((1, 0), (0, 1), (1, 1), (0, 0)):
        cache.set(layer, f"{stream}{layer}", stream)
    cache.constant = "text"
    assert cache.arrays() == ["text", "00", "01", "10", "11"]
    assert repr(cache) == "<StepCache num_layers=2 streams=(0, 1) holds 5 arrays>"


# Refusals.


@pytest.mark.parametrize(("layer", "remedy"), [(3, 4), (7, 8), (-1, 1)])
def test_a_layer_there_is_not(layer, remedy):
    cache = StepCache(3)
    cache.set(2, "kept")
    message = rf"got {layer} with 3 layers\. Count layers from 0, .* StepCache\({remedy}\)\."
    with pytest.raises(BoundsError, match=message):
        cache.set(layer, "new")
    with pytest.raises(IndexError, match=message):
        cache.get(layer)
    assert cache.arrays() == ["kept"]
    assert cache.stats == (0, 0)


@pytest.mark.parametrize(
    ("streams", "stream", "message"),
    [
        (2, 2, "one of 0, 1, or its number from 0 on; got 2"),
        (2, -1, "got -1"),
        (2, "cond", "one of 0, 1, .* got 'cond'"),
        (("cond", "uncond"), "neg", "one of 'cond', 'uncond', .* got 'neg'.*streams="),
        (("cond", "uncond"), 2, "got 2"),
    ],
)
def test_a_stream_there_is_not(streams, stream, message):
    cache = StepCache(1, streams)
    cache.set(0, "kept")
    with pytest.raises(UnknownStreamError, match=message):
        cache.set(0, "new", stream)
    with pytest.raises(LookupError, match=message):
        cache.get(0, stream)
    assert cache.arrays() == ["kept"]
    assert issubclass(UnknownStreamError, KVCacheError)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((-1,), ValueError, "num_layers must be >= 0; got -1"),
        ((2.5,), TypeError, "float"),
        ((1, 0), ValueError, "at least one stream, .* got 0"),
        ((1, ()), ValueError, r"at least one stream, .* got \(\)"),
        ((1, ("a", "b", "a")), ValueError, "each of another name; got .*'a', 'b', 'a'"),
        ((1, "cond"), TypeError, r"got one string: write \('cond',\)"),
        ((1, 1.5), TypeError, "float"),
    ],
)
def test_a_cache_that_cannot_be(arguments, error, message):
    with pytest.raises(error, match=message):
        StepCache(*arguments)


def test_what_is_no_number_is_no_layer():
    cache = StepCache(2)
    for layer in (1.0, "1", None):
        with pytest.raises(TypeError, match="cannot be interpreted as an integer"):
            cache.set(layer, "new")
    assert cache.arrays() == []


# Who holds what.


def test_what_it_lets_go_of_is_freed_at_once(backend):
    cache = StepCache(2)
    cache.set(0, feature(backend))
    cache.set(1, feature(backend), stream=1)
    cache.constant = feature(backend)
    first, second, text = ref(cache.get(0)), ref(cache.get(1, 1)), ref(cache.constant)
    cache.set(0, feature(backend))
    assert first() is None
    cache.set(1, None, stream=1)
    assert second() is None
    cache.constant = feature(backend)
    assert text() is None
    rest = [ref(array) for array in cache.arrays()]
    cache.free()
    assert [array() for array in rest] == [None, None]


def test_what_others_hold_stays_whole(backend):
    cache, mine = StepCache(2), feature(backend, 7)
    cache.set(0, mine)
    cache.set(0, mine)  # again: what it lets go of is what it takes
    cache.set(1, mine)
    cache.constant = mine
    cache.set(0, None)
    assert cache.get(1) is cache.constant is mine
    cache.free()
    assert cache.arrays() == []
    np.testing.assert_array_equal(backend.to_host(mine), np.full((2, 6), 7, np.float32))


def test_an_array_in_two_slots_leaves_with_the_last():
    cache, array = StepCache(2), np.ones(3)
    gone = ref(array)
    cache.set(0, array)
    cache.set(1, array)
    del array
    cache.set(0, None)
    assert gone() is cache.get(1)
    cache.set(1, None)
    assert gone() is None


def test_bytes_of_each_array_once(backend):
    cache, array = StepCache(3), feature(backend)
    assert cache.nbytes == 0
    cache.set(0, array)
    cache.set(2, array, stream=1)
    cache.set(1, feature(backend))  # equal, but another
    cache.constant = backend.from_host(np.zeros((5, 3), np.int8))
    assert cache.nbytes == 48 + 48 + 15
    assert len(cache.arrays()) == 3
    assert type(cache.nbytes) is int


def test_bytes_of_dtypes_that_kvcache_never_writes():
    cache = StepCache(1)
    cache.set(0, np.zeros(4, np.complex128))
    assert cache.nbytes == 64


def test_what_has_no_size_can_be_held_but_not_counted():
    cache = StepCache(1)
    cache.set(0, ("two", "tensors"))
    assert cache.get(0) == ("two", "tensors")
    with pytest.raises(UnknownBackendError, match="tuple"):
        _ = cache.nbytes


def allocated(backend):
    """Bytes that the framework says it has handed out."""
    if backend.name == "mlx":
        import mlx.core as mx

        return mx.get_active_memory()
    if backend.name == "jax":
        import jax

        return sum(array.nbytes for array in jax.live_arrays())
    import torch

    return torch.cuda.memory_allocated()


@pytest.mark.parametrize("backend", ["mlx", "jax", "torch:cuda", "jax:gpu"], indirect=True)
def test_many_steps_allocate_as_much_as_one(backend):
    gc.collect()  # what other tests left
    size, before, used = 1 << 18, allocated(backend), []
    cache = StepCache(3)
    for step in range(5):
        for layer, stream in ((0, 0), (2, 0), (2, 1)):
            cache.set(layer, feature(backend, step, size), stream)
        backend.sync(*cache.arrays())
        used.append(allocated(backend) - before)
    assert cache.nbytes == 3 * 2 * size * 4
    assert max(used) == min(used) >= cache.nbytes
    cache.free()
    assert allocated(backend) == before


# The end of a run.


def test_a_run_ends_with_an_empty_cache():
    cache = StepCache(2)
    with cache as entered:
        assert entered is cache
        cache.constant = np.ones(2)
        cache.set(1, np.ones(3), 1)
        assert cache.get(1, 1) is not None
        gone = [ref(array) for array in cache.arrays()]
    assert [array() for array in gone] == [None, None]
    assert cache.stats == (1, 0), "still there to be read"


def test_also_after_an_exception():
    cache, gone = StepCache(2), []

    def run():
        with cache:
            cache.set(1, np.ones(3))
            gone.append(ref(cache.get(1)))
            raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        run()
    assert gone[0]() is None
    assert cache.arrays() == []


def test_free_is_not_the_end():
    cache = StepCache(2, streams=("a", "b"))
    for run in ("first", "second"):
        cache.free()
        cache.free()
        assert cache.get(1, "b") is cache.constant is None
        cache.set(1, run, "b")
        cache.constant = run
        assert cache.get(1, "b") == cache.constant == run
    assert cache.stats == (2, 2)
