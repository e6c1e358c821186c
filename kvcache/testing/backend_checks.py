"""The rules that every backend must keep, one check for each.

The docstring of a check tells the author of a backend how its primitives must behave. Expected
values are computed with NumPy on the host, from data that encodes its own position.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from kvcache.backends import HOST_DTYPES, Array, Backend, HostArray, backend_of
from kvcache.errors import BoundsError, DTypeError, ShapeError
from kvcache.storage.layout import TOKENS

from .checks import check, refuses
from .coded import bits, coded, same

SHAPE = (2, 3, 10, 4)
"""Shape of most buffers: every axis of another length, so that mistaking one shows."""
AXES = range(len(SHAPE))
# Names in `xp` for the reference models and for users' code above the caches.
NAMESPACE = (
    "abs add arange argmax asarray astype bool broadcast_to concat cos divide equal exp "
    "expand_dims float32 full greater int32 isfinite less log matmul max maximum mean min minimum "
    "multiply negative ones permute_dims pow reshape result_type sin sqrt squeeze stack subtract "
    "sum take tanh where zeros zeros_like"
).split()
Key: TypeAlias = tuple[slice | Sequence[int], ...]


def _filled(backend: Backend, dtype: str) -> Array:
    """Return a new buffer of `SHAPE` with coded content."""
    return backend.from_host(coded(SHAPE, dtype))


def _other_dtypes(backend: Backend, dtype: str) -> list[str]:
    return [name for name in backend.dtypes if name != dtype]


def _resized(axis: int, length: int) -> tuple[int, ...]:
    """Return `SHAPE` with another length on `axis`."""
    return (*SHAPE[:axis], length, *SHAPE[axis + 1 :])


def _at(axis: int, key: slice | Sequence[int]) -> Key:
    """Return the index of `key` on `axis` of a NumPy array."""
    return (*(slice(None),) * axis, key)


# Host.


@check
def host_round_trip(backend: Backend, dtype: str) -> None:
    """Keep every bit through from_host and to_host, NaN payloads included."""
    host = HOST_DTYPES[dtype]
    if dtype == "bool":
        everything = np.array([False, True])
    elif host.itemsize <= 2:
        everything = np.arange(2 ** (8 * host.itemsize), dtype=f"u{host.itemsize}").view(host)
    else:
        # A prime step: both halves of the word run through all their values.
        everything = np.arange(0, 2**32, 65537, dtype=np.uint32).view(host)
    same(backend.to_host(backend.from_host(everything)), everything)


@check
def host_copies_are_independent(backend: Backend, dtype: str) -> None:
    """Share no memory with the caller in from_host and to_host; give out writeable arrays."""
    source, expected = coded(SHAPE, dtype), coded(SHAPE, dtype)
    array = backend.from_host(source)
    bits(source)[:] = 1
    same(backend.to_host(array), expected)
    out = backend.to_host(array)
    if not out.flags.writeable:
        raise AssertionError("to_host must return an array that its caller may write")
    bits(out)[:] = 1
    same(backend.to_host(array), expected)


@check
def host_cast(backend: Backend, dtype: str) -> None:
    """Cast in from_host, when another dtype is asked for, as NumPy casts."""
    numbers = np.arange(8, dtype=np.float64)
    same(backend.to_host(backend.from_host(numbers, dtype)), numbers.astype(HOST_DTYPES[dtype]))


@check
def dtype_is_named(backend: Backend, dtype: str) -> None:
    """Name the dtype of an array by dtype_name, the inverse of dtype; be found by backend_of.

    Two backends may share their arrays, as NumPy and the array API over it do: either is right.
    """
    array = backend.alloc((1,), dtype)
    assert backend.dtype_name(array) == dtype, backend.dtype_name(array)
    found = backend_of(array)
    assert backend.owns(array), "it does not own its array"
    assert found.owns(array), found.name


# Buffers.


@check
def alloc_is_zero_and_unshared(backend: Backend, dtype: str) -> None:
    """Allocate zeros, in memory of their own: writing one buffer leaves the others alone."""
    zeros = np.zeros(SHAPE, HOST_DTYPES[dtype])
    first, second = backend.alloc(SHAPE, dtype), backend.alloc(SHAPE, dtype)
    same(backend.to_host(first), zeros)
    first = backend.slice_update(first, _filled(backend, dtype), 0, TOKENS)
    same(backend.to_host(first), coded(SHAPE, dtype))
    same(backend.to_host(second), zeros)


@check
def slice_update_writes_there_only(backend: Backend, dtype: str) -> None:
    """Write the update and nothing else: on every axis, at the start, inside and at the end."""
    for axis in AXES:
        for tokens in (1, SHAPE[axis]):
            update = coded(_resized(axis, tokens), dtype, first=500)
            for start in {0, (SHAPE[axis] - tokens) // 2, SHAPE[axis] - tokens}:
                expected = coded(SHAPE, dtype)
                expected[_at(axis, slice(start, start + tokens))] = update
                buffer = _filled(backend, dtype)
                buffer = backend.slice_update(buffer, backend.from_host(update), start, axis)
                same(backend.to_host(buffer), expected)


@check
def slice_update_leaves_the_update_alone(backend: Backend, dtype: str) -> None:
    """Leave the update to its caller: usable again, and never aliased by the buffer."""
    update = backend.from_host(coded(_resized(TOKENS, 3), dtype, first=70))
    one = backend.slice_update(_filled(backend, dtype), update, 0, TOKENS)
    two = backend.slice_update(_filled(backend, dtype), update, 5, TOKENS)
    one = backend.slice_update(one, _filled(backend, dtype), 0, TOKENS)
    same(backend.to_host(update), coded(_resized(TOKENS, 3), dtype, first=70))
    same(backend.to_host(two)[:, :, 5:8], coded(_resized(TOKENS, 3), dtype, first=70))
    # An update as large as the buffer tempts a backend to return it as the new buffer.
    whole = backend.from_host(coded(SHAPE, dtype, first=600))
    three = backend.slice_update(_filled(backend, dtype), whole, 0, TOKENS)
    backend.slice_update(three, update, 0, TOKENS)
    same(backend.to_host(whole), coded(SHAPE, dtype, first=600))


@check
def slice_update_chains(backend: Backend, dtype: str) -> None:
    """Write token after token into the returned buffer, as decoding does, without any sync."""
    buffer = backend.alloc(_resized(TOKENS, 40), dtype)
    for position in range(40):
        token = backend.from_host(coded(_resized(TOKENS, 1), dtype, first=position))
        buffer = backend.slice_update(buffer, token, position, TOKENS)
    same(backend.to_host(buffer), coded(_resized(TOKENS, 40), dtype))


@check
def slice_update_refuses(backend: Backend, dtype: str) -> None:
    """Refuse an update out of bounds, misshapen or of another dtype, and change nothing."""
    buffer, length = _filled(backend, dtype), SHAPE[TOKENS]
    update = backend.from_host(coded(_resized(TOKENS, 2), dtype, first=90))
    # -1 counts from the end in NumPy, 2**31 wraps in int32, and JAX clamps the others.
    for start in (-1, length - 1, length, 2**31):
        with refuses(BoundsError, "start + tokens <= length", str(start)):
            backend.slice_update(buffer, update, start, TOKENS)
    for shape in ((1, *SHAPE[1:2], 1, SHAPE[3]), (*SHAPE[:2], 1, 1), SHAPE[1:], (1,)):
        with refuses(ShapeError, str(shape)):
            backend.slice_update(buffer, backend.alloc(shape, dtype), 0, TOKENS)
    for other in _other_dtypes(backend, dtype):
        with refuses(DTypeError, "Cast it first"):
            backend.slice_update(buffer, backend.alloc(SHAPE, other), 0, TOKENS)
    same(backend.to_host(buffer), coded(SHAPE, dtype))


@check
def scatter_writes_rows(backend: Backend, dtype: str) -> None:
    """Write single rows, runs and rows in any order, on every axis; nothing for an empty index."""
    for axis in AXES:
        length = SHAPE[axis]
        for index in (
            [length - 1],
            [0, length - 1],
            list(range(length))[::-1],
            list(range(length)),
        ):
            rows = coded(_resized(axis, len(index)), dtype, first=300)
            expected = coded(SHAPE, dtype)
            expected[_at(axis, index)] = rows
            buffer = _filled(backend, dtype)
            buffer = backend.scatter(buffer, backend.from_host(rows), np.array(index), axis)
            same(backend.to_host(buffer), expected)
    # An empty list is an array of floats to NumPy, and must be taken for an index all the same.
    nothing = backend.slice(_filled(backend, dtype), 0, 0, TOKENS)
    buffer = backend.scatter(_filled(backend, dtype), nothing, [], TOKENS)
    same(backend.to_host(buffer), coded(SHAPE, dtype))


@check
def scatter_refuses(backend: Backend, dtype: str) -> None:
    """Refuse positions outside the buffer and rows unlike it, and change nothing."""
    buffer = _filled(backend, dtype)
    rows = backend.from_host(coded(_resized(TOKENS, 2), dtype, first=90))
    for index in ([0, SHAPE[TOKENS]], [-1, 0]):
        with refuses(BoundsError, "positions must lie in"):
            backend.scatter(buffer, rows, index, TOKENS)
    with refuses(ShapeError, "one row per position"):
        backend.scatter(buffer, rows, [1], TOKENS)
    with refuses(ShapeError, "one dimension"):
        backend.scatter(buffer, rows, [[0, 1]], TOKENS)
    for other in _other_dtypes(backend, dtype):
        with refuses(DTypeError, "Cast it first"):
            backend.scatter(buffer, backend.alloc(_resized(TOKENS, 2), other), [0, 1], TOKENS)
    same(backend.to_host(buffer), coded(SHAPE, dtype))


@check
def gather_reads_rows(backend: Backend, dtype: str) -> None:
    """Read rows in the order asked for, with repeats, on every axis; refuse positions outside."""
    for axis in AXES:
        last = SHAPE[axis] - 1
        for index in ([last], [last, 0, last], []):
            rows = backend.gather(_filled(backend, dtype), np.array(index, np.int32), axis)
            same(
                backend.to_host(rows),
                np.take(coded(SHAPE, dtype), index, axis).reshape(_resized(axis, len(index))),
            )
    for index in ([SHAPE[TOKENS]], [-1]):
        with refuses(BoundsError, "positions must lie in"):
            backend.gather(_filled(backend, dtype), index, TOKENS)


@check
def slice_reads_a_range(backend: Backend, dtype: str) -> None:
    """Read a range on every axis, empty and whole ones included; refuse bounds outside."""
    for axis in AXES:
        length = SHAPE[axis]
        for start, stop in {(0, length), (1, length), (0, length - 1), (1, 1)}:
            part = backend.slice(_filled(backend, dtype), start, stop, axis)
            same(backend.to_host(part), coded(SHAPE, dtype)[_at(axis, slice(start, stop))])
    for start, stop in ((-1, 2), (0, SHAPE[TOKENS] + 1), (3, 2)):
        with refuses(BoundsError, "0 <= start <= stop <= length"):
            backend.slice(_filled(backend, dtype), start, stop, TOKENS)


@check
def concat_joins(backend: Backend, dtype: str) -> None:
    """Join one, two or three arrays, on every axis."""
    for axis in AXES:
        for count in (1, 2, 3):
            parts = [coded(SHAPE, dtype, first=100 * i) for i in range(count)]
            joined = backend.concat([backend.from_host(part) for part in parts], axis)
            same(backend.to_host(joined), np.concatenate(parts, axis))


# Several arrays at once.


def _unlike(backend: Backend, dtype: str) -> tuple[Array, Array]:
    """Return two new buffers with other contents and other last axes, as of keys and values."""
    other = coded(_resized(3, 2), dtype, first=900)
    return _filled(backend, dtype), backend.from_host(other)


@check
def write_slices_writes_all(backend: Backend, dtype: str) -> None:
    """Write every update to its own buffer, on one axis or on one for each, and nothing else."""
    for axes, axis in (((TOKENS, TOKENS), TOKENS), ((1, TOKENS), (1, TOKENS))):
        buffers = _unlike(backend, dtype)
        hosts = [backend.to_host(buffer) for buffer in buffers]
        updates = [
            coded((*host.shape[:own], 2, *host.shape[own + 1 :]), dtype, first=300 + 100 * own)
            for host, own in zip(hosts, axes, strict=True)
        ]
        arrays = tuple(map(backend.from_host, updates))
        written = backend.write_slices(buffers, arrays, 1, 3, axis)
        for host, own, update in zip(hosts, axes, updates, strict=True):
            host[_at(own, slice(1, 3))] = update
        _same_all(backend, written, hosts)
        _same_all(backend, arrays, updates)


@check
def write_row_sets_writes_all(backend: Backend, dtype: str) -> None:
    """Write rows to every buffer at the same positions: scattered ones, runs, any order."""
    for index in ([6, 0, 3], [4, 5, 6], [9]):
        buffers = _unlike(backend, dtype)
        hosts = [backend.to_host(buffer) for buffer in buffers]
        rows = [coded(host[:, :, index].shape, dtype, first=300 + host.shape[3]) for host in hosts]
        arrays = tuple(map(backend.from_host, rows))
        written = backend.write_row_sets(buffers, arrays, np.array(index, np.int32), TOKENS)
        for host, own_rows in zip(hosts, rows, strict=True):
            host[:, :, index] = own_rows
        _same_all(backend, written, hosts)
        _same_all(backend, arrays, rows)


def _same_all(backend: Backend, arrays: Sequence[Array], expected: Sequence[HostArray]) -> None:
    """Raise AssertionError unless all arrays equal the expected ones bit for bit."""
    for array, host in zip(arrays, expected, strict=True):
        same(backend.to_host(array), host)


@check
def evaluate_changes_nothing(backend: Backend, dtype: str) -> None:
    """Begin to compute arrays by evaluate, without a change of their content."""
    buffer, other = _unlike(backend, dtype)
    expected = backend.to_host(other)
    backend.evaluate(buffer, other)
    same(backend.to_host(buffer), coded(SHAPE, dtype))
    same(backend.to_host(other), expected)


# Ownership.


@check
def copies_outlive_their_source(backend: Backend, dtype: str) -> None:
    """Return copies from gather and concat: their source may be consumed afterwards."""
    buffer = _filled(backend, dtype)
    rows = backend.gather(buffer, list(range(SHAPE[TOKENS])), TOKENS)
    whole = backend.concat([buffer], TOKENS)
    update = backend.from_host(coded(SHAPE, dtype, first=800))
    buffer = backend.slice_update(buffer, update, 0, TOKENS)
    same(backend.to_host(rows), coded(SHAPE, dtype))
    same(backend.to_host(whole), coded(SHAPE, dtype))
    same(backend.to_host(buffer), coded(SHAPE, dtype, first=800))


@check
def free_spares_others(backend: Backend, dtype: str) -> None:
    """Free one buffer and leave copies of it and other buffers alone."""
    buffer, other = _filled(backend, dtype), _filled(backend, dtype)
    copy = backend.concat([buffer], TOKENS)
    backend.free(buffer)
    backend.sync(copy, other)
    same(backend.to_host(copy), coded(SHAPE, dtype))
    same(backend.to_host(other), coded(SHAPE, dtype))


# In programs.


@check
def conditions_choose(backend: Backend, dtype: str) -> None:
    """Return from traced_cond the results of one branch, chosen by a bool scalar."""
    first, second = (coded(SHAPE, dtype, first=start) for start in (0, 100))
    operands = backend.from_host(first), backend.from_host(second)
    for chosen, expected in ((True, first), (False, second)):
        condition = backend.from_host(np.asarray(chosen))
        first_result, _ = backend.traced_cond(
            condition, lambda a, b: (a, b), lambda a, b: (b, a), *operands
        )
        same(backend.to_host(first_result), expected)


@check
def detached_is_the_same(backend: Backend, dtype: str) -> None:
    """Detach an array from its graph of operations without changing its values."""
    same(backend.to_host(backend.detached(_filled(backend, dtype))), coded(SHAPE, dtype))


# Exchange and namespace.


@check
def dlpack_from_numpy(backend: Backend, dtype: str) -> None:
    """Take over a NumPy array, bit for bit, wherever NumPy itself can export it."""
    source = coded(SHAPE, dtype)
    try:
        source.__dlpack__()
    except (BufferError, TypeError, RuntimeError):
        # NumPy has no DLPack type for bfloat16 and float8: the fault is not the backend's.
        return
    array = backend.from_dlpack(source)
    assert backend.owns(array), f"the array is not on {backend.spec}"
    same(backend.to_host(array), source)


@check
def dlpack_from_itself(backend: Backend, dtype: str) -> None:
    """Take over an array of its own unchanged."""
    same(backend.to_host(backend.from_dlpack(_filled(backend, dtype))), coded(SHAPE, dtype))


@check
def namespace_has_the_standard_names(backend: Backend, dtype: str) -> None:
    """Offer in `xp` the array-API names used by code above the caches."""
    missing = [name for name in NAMESPACE if not hasattr(backend.xp, name)]
    assert not missing, f"xp lacks {', '.join(missing)}"
