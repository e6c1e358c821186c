"""Arrays cross between frameworks with their bits, and without a copy where both allow it."""

import math

import numpy as np
import pytest

from kvcache import KVCache, KVCacheError, get_backend
from kvcache.testing.coded import coded, same

SHAPE = (1, 2, 16, 8)
ALL = ("numpy", "torch", "jax", "mlx", "array_api:array_api_strict")
# NumPy's own DLPack knows none of these, in either direction.
NOT_IN_NUMPY = {"bfloat16", "float8_e4m3fn", "float8_e5m2"}


def installed(*specs):
    """Backends by name; skips the test if one is missing."""
    try:
        return [get_backend(spec) for spec in specs]
    except ImportError as error:
        pytest.skip(str(error))


def aligned(dtype="float32", offset=0):
    """A NumPy array that begins `offset` bytes behind a multiple of 64."""
    source = coded(SHAPE, dtype)
    memory = np.zeros(source.nbytes + 128, np.uint8)
    start = -memory.ctypes.data % 64 + offset
    array = memory[start : start + source.nbytes].view(source.dtype).reshape(SHAPE)
    array[...] = source
    assert array.ctypes.data % 64 == offset
    return array


def address(array):
    """Where the first element lies."""
    for name in ("data_ptr", "unsafe_buffer_pointer"):
        if hasattr(array, name):
            return getattr(array, name)()
    return array.ctypes.data


@pytest.mark.parametrize("dtype", get_backend("numpy").dtypes)
@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("source", ALL)
def test_every_bit_crosses(source, target, dtype):
    exporter, importer = installed(source, target)
    for backend in (exporter, importer):
        if dtype not in backend.dtypes:
            pytest.skip(f"{backend.name} has no {dtype}")
    array = exporter.from_host(coded(SHAPE, dtype))
    exporter.sync(array)
    if dtype in NOT_IN_NUMPY and source != target and "numpy" in (source, target):
        with pytest.raises(KVCacheError, match="through the host"):
            importer.from_dlpack(array)
        crossed = importer.from_host(exporter.to_host(array))
    else:
        crossed = importer.from_dlpack(array)
    same(importer.to_host(crossed), coded(SHAPE, dtype))
    same(exporter.to_host(array), coded(SHAPE, dtype))


SHARING = [
    (source, target)
    for source in ("numpy", "torch", "jax")
    for target in ("numpy", "torch", "jax")
    if source != target
]


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "int32", "bool"])
@pytest.mark.parametrize(("source", "target"), SHARING)
def test_memory_is_shared(source, target, dtype):
    exporter, importer = installed(source, target)
    # NumPy aligns as it likes; what torch and JAX allocate is aligned anyway.
    array = aligned(dtype) if source == "numpy" else exporter.from_host(coded(SHAPE, dtype))
    assert address(array) % 64 == 0
    assert address(importer.from_dlpack(array)) == address(array)


@pytest.mark.parametrize("dtype", ["bfloat16", "float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize(("source", "target"), [("torch", "jax"), ("jax", "torch")])
def test_memory_of_small_floats_is_shared(source, target, dtype):
    exporter, importer = installed(source, target)
    array = exporter.from_host(coded(SHAPE, dtype))
    assert address(importer.from_dlpack(array)) == address(array)


@pytest.mark.one_backend(name="torch")
def test_what_is_written_shows_on_the_other_side():
    """Where both may be written. A JAX array must never change, so nobody writes to those."""
    numpy, torch = installed("numpy", "torch")
    array = aligned()
    tensor = torch.from_dlpack(array)
    array[0, 1, 3] = 7
    assert bool((tensor[0, 1, 3] == 7).all())
    tensor[0, 0, 2] = 9
    assert (array[0, 0, 2] == 9).all()
    back = numpy.from_dlpack(tensor)
    back[0, 0, 1] = 5
    assert (array[0, 0, 1] == 5).all()


@pytest.mark.one_backend(name="jax")
def test_jax_copies_what_is_not_aligned():
    """Bit for bit all the same."""
    (jax,) = installed("jax")
    for offset in (4, 16, 32):
        array = aligned(offset=offset)
        crossed = jax.from_dlpack(array)
        jax.sync(crossed)
        assert address(crossed) != address(array)
        same(jax.to_host(crossed), coded(SHAPE, "float32"))


@pytest.mark.one_backend(name="mlx")
@pytest.mark.parametrize("source", ["numpy", "torch", "jax"])
def test_mlx_copies_what_comes_in(source):
    exporter, mlx = installed(source, "mlx")
    array = aligned() if source == "numpy" else exporter.from_host(aligned())
    crossed = mlx.from_dlpack(array)
    mlx.sync(crossed)
    if source == "jax":
        array.delete()
    else:
        array[...] = 0
    same(mlx.to_host(crossed), coded(SHAPE, "float32"))


@pytest.mark.one_backend(name="mlx")
@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
@pytest.mark.parametrize("target", ["numpy", "torch"])
def test_mlx_can_be_viewed(target, dtype):
    """Twice, and both views lie at one address: neither is a copy."""
    mlx, importer = installed("mlx", target)
    array = mlx.from_host(coded(SHAPE, dtype))
    mlx.sync(array)
    one, two = importer.from_dlpack(array), importer.from_dlpack(array)
    assert address(one) == address(two)
    same(importer.to_host(one), coded(SHAPE, dtype))


@pytest.mark.cross_backend
def test_bfloat16_of_mlx_through_torch():
    """`torch.asarray` makes something else of it; this does not."""
    mlx, torch = installed("mlx", "torch")
    array = mlx.from_host(coded(SHAPE, "bfloat16"))
    mlx.sync(array)
    same(torch.to_host(torch.from_dlpack(array)), coded(SHAPE, "bfloat16"))


def test_its_own_arrays_stay_what_they_are(backend):
    array = backend.from_host(aligned())
    assert backend.from_dlpack(array) is array or backend.name == "array_api"


def test_what_is_no_array(backend):
    for thing in ([1.0], None, 3, "text"):
        with pytest.raises((KVCacheError, TypeError, AttributeError)):
            backend.from_dlpack(thing)


def crossing(exporter, importer, array):
    """Through DLPack or, where that is refused, by what the error advises.

    What a cache holds is a part of a larger buffer, and JAX takes whole ones only.
    """
    exporter.sync(array)
    try:
        return importer.from_dlpack(array)
    except KVCacheError as error:
        if "through the host" not in str(error):
            raise
    return importer.from_host(exporter.to_host(array))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("target", ALL)
@pytest.mark.parametrize("source", ALL)
def test_a_cache_takes_what_another_holds(source, target, dtype):
    """From one framework's cache into another's, as the error message of a mix-up advises."""
    exporter, importer = installed(source, target)
    for backend in (exporter, importer):
        if dtype not in backend.dtypes:
            pytest.skip(f"{backend.name} has no {dtype}")
    first, second = KVCache(exporter), KVCache(importer)
    update = [exporter.from_host(coded(SHAPE, dtype, first)) for first in (0, 500)]
    first.update(*update)
    held = [exporter.slice(part, 0, SHAPE[2], 2) for part in first.state]
    moved = [crossing(exporter, importer, part) for part in held]
    second.update(*moved)
    for part, start in zip(second.state, (0, 500), strict=True):
        same(importer.to_host(part)[:, :, : SHAPE[2]], coded(SHAPE, dtype, start))
    first.reset()
    for part, start in zip(second.state, (0, 500), strict=True):
        same(importer.to_host(part)[:, :, : SHAPE[2]], coded(SHAPE, dtype, start))


# The bounds and the host side, where a silent mistake would cost tokens.


@pytest.mark.parametrize(
    "index",
    [
        np.array([2**32]),
        np.array([2**31]),
        np.array([-(2**32)]),
        np.array([2**63], np.uint64),
        [2**40],
        [0.0],
        [1.5],
        np.array([True, False]),
        ["1"],
        [None],
        [[0]],
        0,
    ],
    ids=repr,
)
def test_positions_are_whole_numbers_within_bounds(backend, index):
    """Nothing wraps, is rounded, or is taken for a mask."""
    buffer = backend.from_host(aligned())
    row = backend.alloc((1, 2, math.prod(np.shape(index)), 8), "float32")
    calls = [
        lambda: backend.scatter(buffer, row, index, 2),
        lambda: backend.gather(buffer, index, 2),
    ]
    for call in calls:
        with pytest.raises((IndexError, TypeError, ValueError)) as caught:
            call()
        assert isinstance(caught.value, KVCacheError), repr(caught.value)
    same(backend.to_host(buffer), coded(SHAPE, "float32"))


@pytest.mark.parametrize("kind", [list, tuple, np.int8, np.int64, np.uint16, np.uint64])
def test_positions_may_come_in_any_whole_type(backend, kind):
    index = kind([3, 1]) if kind in (list, tuple) else np.array([3, 1], kind)
    buffer = backend.from_host(aligned())
    expected = coded(SHAPE, "float32")[:, :, [3, 1]]
    same(backend.to_host(backend.gather(buffer, index, 2)), expected)
    buffer = backend.scatter(buffer, backend.from_host(expected), index, 2)
    same(backend.to_host(buffer), coded(SHAPE, "float32"))


def test_host_arrays_in_any_memory_order(backend):
    source = coded(SHAPE, "float32")
    for array in (
        source.transpose(0, 1, 3, 2),
        source[:, ::-1],
        source[:, :, 3::4, 1:5],
        np.asfortranarray(source),
        source.astype(">f4"),
        np.broadcast_to(source[:1, :1], SHAPE),
    ):
        expected = np.ascontiguousarray(array).astype("<f4", copy=False)
        same(backend.to_host(backend.from_host(array)), expected)


def test_read_only_host_arrays(backend):
    source = coded(SHAPE, "float32")
    source.flags.writeable = False
    array = backend.from_host(source)
    array = backend.slice_update(array, backend.alloc((1, 2, 1, 8), "float32"), 0, 2)
    assert not backend.to_host(array)[:, :, 0].any()
    same(source, coded(SHAPE, "float32"))


def test_scalars_and_empty_arrays(backend):
    for shape in ((), (0,), (1, 0, 3), (1,)):
        array = backend.from_host(np.ones(shape, np.float32))
        assert tuple(array.shape) == shape
        same(backend.to_host(array), np.ones(shape, np.float32))
        assert tuple(backend.alloc(shape, "int32").shape) == shape


def test_sync_of_anything(backend):
    backend.sync()
    backend.sync(backend.alloc((2,), "float32"), backend.alloc((0,), "int32"))
