"""The encoder cache: one output per sequence, whatever the position."""

from __future__ import annotations

import weakref

import numpy as np
import pytest

import kvcache
from kvcache import Batch, CacheConfig, DTypeError, EncoderCache, KVCacheError, ShapeError
from kvcache.backends._numpy import NumpyBackend

from .. import peek
from .failures import failing


class NoDlpack(NumpyBackend):
    """Takes arrays through the host only."""

    def import_dlpack(self, array):
        raise BufferError


def make(backend="numpy", max_sequences=3, **config):
    cache = EncoderCache()
    cache.set_config(CacheConfig(**config))
    cache.init(backend, max_sequences=max_sequences)
    return cache


def output(number, frames=4, width=2):
    return np.full((2, frames, width), number, np.float32)


def arrive(cache, sequence, number, position=0):
    """One image's pass."""
    cache.start_forward(Batch([position], [sequence], [0]))
    cache.put(output(number), output(-number))


def got(cache, sequence, position=50):
    """The number that a text pass of one sequence gets."""
    cache.start_forward(Batch([position], [sequence]))
    keys, values, mask = cache.get()
    assert mask is None
    assert (keys == -values).all()
    return float(keys[0, 0, 0])


def test_every_sequence_has_its_own():
    cache = make()
    arrive(cache, 0, 1)
    arrive(cache, 2, 3)
    assert [got(cache, 0), got(cache, 2)] == [1, 3]
    assert cache.encoder_cached
    cache.start_forward(Batch([0], [1]))
    assert not cache.encoder_cached
    with pytest.raises(KVCacheError, match="layer 0 of sequence 1 holds no encoder output"):
        cache.get()
    arrive(cache, 0, 7)
    assert [got(cache, 0), got(cache, 2)] == [7, 3]


def test_several_arrive_in_one_pass_and_are_kept_apart(backend):
    cache = make(backend, key_layout="thd", value_layout="hdt")
    cache.start_forward(Batch([0, 0, 1, 5], [2, 0, 0, 2], [0, 1]))
    frames = np.arange(6, dtype=np.float32)
    keys = np.repeat(frames[:, None, None], 2, 2)  # thd
    values = np.repeat(frames[None, None], 3, 1)  # hdt
    cache.put(backend.from_host(keys), backend.from_host(values), frames=[3, 3])
    got_keys, got_values, mask = (backend.to_host(part) for part in cache.get())
    np.testing.assert_array_equal(got_keys, keys)
    np.testing.assert_array_equal(got_values, values)
    first, second = [True] * 3 + [False] * 3, [False] * 3 + [True] * 3
    np.testing.assert_array_equal(mask, [first, second, second, first])
    cache.start_forward(Batch([9], [0]))
    np.testing.assert_array_equal(backend.to_host(cache.get()[0]), keys[3:])


def test_the_mask_has_the_dtype_asked_for():
    cache = make(mask_dtype="float32")
    arrive(cache, 0, 1)
    arrive(cache, 1, 2)
    cache.start_forward(Batch([4, 4], [1, 0]))
    keys, _, mask = cache.get()
    assert keys[0, :, 0].tolist() == [2] * 4 + [1] * 4
    low = -np.inf
    np.testing.assert_array_equal(mask, [[0] * 4 + [low] * 4, [low] * 4 + [0] * 4])
    assert mask.dtype == np.float32


def test_it_goes_when_its_position_goes():
    for begin, end, left in [
        (0, None, 0),
        (5, 6, 0),
        (6, None, 1),
        (0, 5, 1),
        (5, 5, 1),
        (6, 9, 1),
    ]:
        cache = make()
        arrive(cache, 0, 1, 5)
        cache.remove(0, begin, end)
        cache.start_forward(Batch([50], [0]))
        assert cache.encoder_cached is bool(left), (begin, end)


def frames_arrive(cache, backend, position, count, sequence=0):
    """An image at `position`, of so many frames, each of which is the position."""
    cache.start_forward(Batch([position], [sequence], [0]))
    array = backend.from_host(np.full((2, count, 3), position, np.float32))
    cache.put(array, array)


def frames_seen(cache, backend, sequence=0, position=60):
    cache.start_forward(Batch([position], [sequence]))
    return backend.to_host(cache.get()[0])[0, :, 0].tolist()


IMAGES = {2: 4, 5: 1, 9: 3}
"""Position of an image, and its frames."""


def shown(backend):
    """A cache with a sequence of three images, and resume points."""
    cache = EncoderCache()
    cache.init(backend, max_sequences=3)
    cache.schedule(0, [1])
    for position, count in IMAGES.items():
        frames_arrive(cache, backend, position, count)
    return cache


def latest(stop):
    """The frames that a token at `stop` sees."""
    before = [position for position in IMAGES if position < stop]
    return [before[-1]] * IMAGES[before[-1]] if before else None


def check_seen(cache, backend, sequence, stop):
    if latest(stop) is None:
        cache.start_forward(Batch([60], [sequence]))
        assert not cache.encoder_cached
    else:
        assert frames_seen(cache, backend, sequence) == latest(stop)


@pytest.mark.parametrize("stop", range(12))
def test_going_back_shows_the_image_before(backend, stop):
    cache = shown(backend)
    assert cache.can_resume(0, stop)
    cache.copy_prefix(0, 1, stop)
    check_seen(cache, backend, 1, stop)
    cache.remove(0, stop)
    check_seen(cache, backend, 0, stop)


@pytest.mark.parametrize("stop", range(1, 12))
def test_a_snapshot_holds_every_image_wherever_it_is_split(backend, stop):
    cache = shown(backend)
    with cache.snapshot(0, 0, 12) as whole:
        first, rest = whole.split(stop)
        cache.restore(1, first)
        check_seen(cache, backend, 1, stop)
        joined = first.merge(rest)
        cache.restore(2, joined)
        check_seen(cache, backend, 2, 12)
        joined.close()
    for back in range(stop - 1, 0, -1):  # as far back as one likes, though the snapshot is closed
        cache.remove(1, back)
        check_seen(cache, backend, 1, back)


def test_an_image_in_front_that_goes_leaves_the_others(backend):
    cache = shown(backend)
    cache.remove(0, 4, 6)  # the second image, and a token before it
    assert cache.next_position(0) == 8
    assert frames_seen(cache, backend) == [9] * 3
    cache.remove(0, 7)
    assert frames_seen(cache, backend) == [2] * 4


def test_an_image_that_was_replaced_is_lost_where_nobody_asked_for_it():
    backend, cache = kvcache.get_backend("numpy"), make()
    frames_arrive(cache, backend, 2, 4)
    frames_arrive(cache, backend, 5, 4)
    assert [cache.can_resume(0, p) for p in (2, 3, 5, 6)] == [True, False, False, True]
    cache.remove(0, 4)
    cache.start_forward(Batch([4], [0]))
    assert not cache.encoder_cached
    with pytest.raises(KVCacheError, match="holds no encoder output"):
        cache.get()
    frames_arrive(cache, backend, 2, 4)
    assert frames_seen(cache, backend) == [2] * 4


def test_copies_keep_every_image(backend):
    cache = shown(backend).to_backend("numpy")
    cache.remove(0, 6)
    assert frames_seen(cache, kvcache.get_backend("numpy")) == [5]


def test_layers_of_other_numbers_of_frames_have_no_snapshot():
    cache = make()
    cache.start_forward(Batch([0], [0], [0]))
    for layer, count in ((0, 2), (1, 3)):
        cache.set_layer(layer)
        array = np.zeros((2, count, 3), np.float32)
        cache.put(array, array)
    with pytest.raises(ShapeError, match="as many frames in every layer; got 2, 3"):
        cache.snapshot(0)


def test_its_position_moves_when_what_is_before_goes():
    cache = make()
    arrive(cache, 0, 1, 5)
    cache.remove(0, 1, 4)  # it is at 2 now
    cache.remove(0, 3)
    assert got(cache, 0) == 1
    cache.remove(0, 2, 3)
    cache.start_forward(Batch([50], [0]))
    assert not cache.encoder_cached


def test_copies_go_their_own_way():
    cache = make()
    arrive(cache, 0, 1, 5)
    cache.copy_prefix(0, 1, 5)  # its position is not part of it
    cache.start_forward(Batch([5], [1]))
    assert not cache.encoder_cached
    cache.copy_prefix(0, 1, 6)
    cache.copy_prefix(0, 2, 9)
    arrive(cache, 0, 8, 5)
    cache.remove(2, 0, 1)
    assert [got(cache, s) for s in (0, 1, 2)] == [8, 1, 1]
    cache.remove(1, 5)
    assert [got(cache, 0), got(cache, 2)] == [8, 1]
    cache.copy_prefix(0, 0, 5)
    cache.start_forward(Batch([5], [0]))
    assert not cache.encoder_cached


def test_what_was_put_is_copied():
    cache = make()
    keys = output(1)
    cache.start_forward(Batch([0], [0], [0]))
    cache.put(keys, -keys)
    keys[:] = 9
    assert got(cache, 0) == 1


def test_a_reserve_pass_works_and_stores_nothing():
    cache = make()
    cache.start_forward(Batch([0], [0], [0]), reserve=True)
    cache.put(output(5), output(-5))
    assert cache.get()[0][0, 0, 0] == 5
    cache.start_forward(Batch([0], [0]))
    assert not cache.encoder_cached
    arrive(cache, 0, 1)
    cache.start_forward(Batch([0], [0]), reserve=True)
    assert cache.encoder_cached
    assert cache.get()[0][0, 0, 0] == 1
    cache.put(output(5), output(-5))
    assert cache.get()[0][0, 0, 0] == 5
    assert got(cache, 0) == 1


@pytest.mark.parametrize(
    ("keys", "values", "error", "message"),
    [
        (output(2), output(2, frames=3), ShapeError, "frames"),
        (
            output(2, frames=3),
            output(2),
            ShapeError,
            "frames",
        ),
        (output(2)[0], output(2), ShapeError, "frames"),
        (output(2), output(2).astype(np.float16), DTypeError, "values must be float32 arrays"),
        (output(2), None, DTypeError, r"values must be float32 arrays .* got None\. Put both\.$"),
        (output(2, frames=6), output(2), ShapeError, "frames"),
    ],
)
def test_what_put_refuses(keys, values, error, message):
    cache = make()
    arrive(cache, 0, 1)
    cache.start_forward(Batch([0, 0], [0, 1], [0, 1]))
    with pytest.raises(error, match=message):
        cache.put(keys, values, frames=[2, 2])
    assert not cache.encoder_cached  # sequence 1 has none
    assert got(cache, 0) == 1


def test_what_else_is_refused():
    cache = EncoderCache()
    with pytest.raises(KVCacheError, match="Call init"):
        cache.start_forward(Batch([0], [0]))
    with pytest.raises(ValueError, match="max_sequences must be >= 1; got 0"):
        cache.init("numpy", max_sequences=0)
    cache.init("numpy", max_sequences=2)
    with pytest.raises(KVCacheError, match=r"^set_config comes before init\. Make a new cache\.$"):
        cache.set_config(CacheConfig())
    with pytest.raises(KVCacheError, match="Call start_forward first"):
        cache.get()
    arrive(cache, 0, 1)
    foreign = "sequence ids must lie in"
    for call in (
        lambda: cache.start_forward(Batch([0], [2])),
        lambda: cache.remove(2, 0),
        lambda: cache.remove(-1, 0),
        lambda: cache.copy_prefix(0, 2, 1),
    ):
        with pytest.raises(ValueError, match=foreign):
            call()
    with pytest.raises(ValueError, match="0 <= start <= stop"):
        cache.remove(0, 2, 1)
    with pytest.raises(KVCacheError, match="knows no order of tokens"):
        cache.set_causal([0])
    cache.start_forward(Batch([1, 1], [0, 1]))  # two sequences, no image
    with pytest.raises(ShapeError, match="sequences with multimodal tokens"):
        cache.put(output(1), output(1))
    assert got(cache, 0) == 1
    cache.close()
    with pytest.raises(KVCacheError, match="Call"):
        cache.get()


def test_output_of_unequal_lengths(backend):
    cache = make(backend)
    cache.start_forward(Batch([0, 0, 0], [2, 0, 1], [0, 1, 2]))
    frames = np.repeat(np.array([5, 7, 9], np.float32), [1, 4, 2])[None, :, None]
    keys, values = backend.from_host(frames), backend.from_host(-frames)
    cache.put(keys, values, frames=[1, 4, 2])
    mask = backend.to_host(cache.get()[2])
    assert mask.sum(1).tolist() == [1, 4, 2]
    for sequence, number, length in [(2, 5, 1), (0, 7, 4), (1, 9, 2)]:
        cache.start_forward(Batch([1], [sequence]))
        assert backend.to_host(cache.get()[0])[0, :, 0].tolist() == [number] * length


@pytest.mark.parametrize(
    ("frames", "error", "message"),
    [
        (None, ShapeError, r"2 sequences bring output .* got frames=None. Say them"),
        ([4], ShapeError, r"got frames=\[4\]"),
        ([1, 1, 2], ShapeError, r"2 sequences bring output"),
        ([1, 2], ShapeError, r"keys hold 1 \+ 2 frames in layout 'htd'"),
        ([4, 0], ValueError, r"every sequence has at least one frame; got \[4, 0\]"),
        ([2.0, 2.0], TypeError, "integer"),
    ],
)
def test_lengths_are_never_guessed(frames, error, message):
    cache = make()
    cache.start_forward(Batch([0, 0], [0, 1], [0, 1]))
    with pytest.raises(error, match=message):
        cache.put(output(1), output(-1), frames=frames)
    assert not cache.encoder_cached


def put_layers(cache, number, layers):
    for layer in layers:
        cache.set_layer(layer)
        cache.put(output(number), output(-number))


def test_output_is_replaced_in_all_layers_or_in_none():
    cache = make()
    cache.start_forward(Batch([3], [0], [0]))
    put_layers(cache, 1, (0, 1))
    cache.start_forward(Batch([4], [0], [0]))
    assert not cache.pass_complete()
    put_layers(cache, 2, [1])
    assert cache.get()[0][0, 0, 0] == 2  # the pass reads what it put
    assert not cache.pass_complete()
    assert cache.next_position(0) == 4  # nobody else does
    for layer in (0, 1):
        cache.set_layer(layer)
        assert got(cache, 0) == 1
    assert cache.pass_complete()  # this one brought nothing
    cache.start_forward(Batch([4], [0], [0]))
    put_layers(cache, 2, (0, 1))
    assert cache.pass_complete()
    assert cache.next_position(0) == 5
    assert set(cache.snapshot(0, 4).parts[0].rows.positions.tolist()) == {4}
    for layer in (0, 1):
        cache.set_layer(layer)
        assert got(cache, 0) == 2


def test_a_pass_that_is_dropped_leaves_nothing():
    cache = make()
    arrive(cache, 0, 1)
    cache.start_forward(Batch([4], [0], [0]))
    put_layers(cache, 2, [0])
    cache.drop_pass()
    with pytest.raises(KVCacheError, match="Call start_forward first"):
        cache.get()
    assert got(cache, 0) == 1
    assert cache.next_position(0) == 1


def test_a_pass_reads_on_what_another_thread_removes():
    cache = make()
    arrive(cache, 0, 1)
    arrive(cache, 1, 2)
    cache.start_forward(Batch([9, 9], [0, 1], [1]))
    put_layers(cache, 3, [0])
    cache.remove(0, 0)
    cache.remove(1, 0)
    assert cache.get()[0][0, :, 0].tolist() == [1] * 4 + [3] * 4
    put_layers(cache, 4, [0])  # of a sequence that is gone: not stored
    cache.start_forward(Batch([0, 0], [0, 1]))
    assert not cache.encoder_cached
    assert not peek.entries(cache)


@pytest.mark.parametrize("hook", ["concat", "read_slice"])
def test_a_put_that_fails_stores_nothing(backend, monkeypatch, hook):
    cache = make(backend)
    cache.start_forward(Batch([0], [0], [0]))
    ones = backend.from_host(output(1))
    cache.put(ones, ones)
    for call in range(1, 5):  # two pieces each of keys and values
        cache.start_forward(Batch([1, 0], [0, 1], [0, 1]))
        with failing(monkeypatch, backend, hook, call):
            cache.put(backend.from_host(output(2)), backend.from_host(output(2)), frames=[1, 3])
        assert not cache.encoder_cached
        cache.start_forward(Batch([2], [0]))
        np.testing.assert_array_equal(backend.to_host(cache.get()[0]), output(1))


def test_restoring_and_moving_that_fail_change_nothing(backend, monkeypatch):
    cache = make(backend)
    for sequence in (0, 2):
        cache.start_forward(Batch([3], [sequence], [0]))
        for layer in (0, 1):
            cache.set_layer(layer)
            cache.put(backend.from_host(output(layer)), backend.from_host(output(9)))
    snapshot = cache.snapshot(0)
    for call in range(1, 5):
        with failing(monkeypatch, backend, "from_host", call):
            cache.restore(1, snapshot)
        with failing(monkeypatch, backend, "to_host", call):
            cache.to_backend(NoDlpack())
        assert sorted(peek.entries(cache)) == [0, 2]
    cache.restore(1, snapshot)
    for sequence in range(3):
        cache.start_forward(Batch([4], [sequence]))
        for layer in (0, 1):
            cache.set_layer(layer)
            np.testing.assert_array_equal(backend.to_host(cache.get()[0]), output(layer))


def test_close_frees_everything():
    cache = make()
    keys = output(1)
    for reserve in (False, True):
        cache.start_forward(Batch([0], [0], [0]), reserve)
        cache.put(keys, keys)
    held = [weakref.ref(array) for array in cache.get()[:2]]
    cache.close()
    assert [reference() for reference in held] == [None, None]
    with pytest.raises(KVCacheError, match="Call init"):
        cache.start_forward(Batch([0], [0]))


def test_an_init_that_fails_binds_nothing():
    cache = EncoderCache()
    with pytest.raises(DTypeError):
        cache.init("numpy", "float7")
    cache.set_config(CacheConfig(key_layout="thd"))


def test_any_number_of_images():
    """Images of a sequence are followed without recursion."""
    cache = make()
    count = 2000
    for image in range(count):
        arrive(cache, 0, image, position=image)
    cache.remove(0, count - 1)
    assert [cache.can_resume(0, position) for position in (0, 1, count)] == [True, False, False]
    cache.start_forward(Batch([count], [0], [0]))
    cache.put(output(7), output(-7))
    assert got(cache.copy(), 0) == 7


def test_what_to_do_is_said():
    cache = make()
    with pytest.raises(
        KVCacheError, match=r"^put and get belong to a pass\. Call start_forward fi"
    ):
        cache.get()
    cache.start_forward(Batch([0], [1]))
    with pytest.raises(KVCacheError) as raised:
        cache.get()
    assert str(raised.value) == (
        "layer 0 of sequence 1 holds no encoder output. "
        "Put it in a pass whose batch names its multimodal token."
    )
    with pytest.raises(KVCacheError, match=r"^a cache is sized first\. Call init\.$"):
        EncoderCache().next_position(0)
