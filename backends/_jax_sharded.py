"""JAX on the devices of a mesh: each has its part of the kv_heads, of the batch, or of both.

Tokens are never divided, and the programs here move whole tokens. So every device writes and reads
its own part, and no program has a collective.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import repeat
from typing import ClassVar, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec, Sharding

from kvcache.errors import NotSupportedError, ShapeError, UnknownBackendError

from ._jax import JaxBackend
from .arrays import DType, HostArray, NativeArray, NativeArrays, RowIndex
from .base import Backend
from .dtypes import HOST_DTYPES
from .indexing import Axes
from .layers import LayerHooks

MeshAxes: TypeAlias = tuple[str, ...]
"""Axes of the mesh over which an axis of an array is divided; () for none."""
KEY_AXES = {"b": "batch", "h": "kv_heads", "t": "tokens", "d": "head_dim"}
"""The axes of keys, in their order: a sharding is given for these."""


class ShardedJaxBackend(JaxBackend):
    """History divided over the devices of a mesh; all other arrays whole on each of them.

    sharding: of keys ``[B, kv_heads, tokens, head_dim]``.

    Keys and values may come in any sharding over the devices of the mesh. In another one than that
    of their buffer they are resharded first, which moves the tokens of the update and no others.

    Raises: UnknownBackendError for anything but a NamedSharding over a mesh of devices,
        NotSupportedError for one that divides tokens or head_dim.
    """

    moved_by: ClassVar[str] = "Move it with jax.device_put to a sharding over that mesh."

    def __init__(self, sharding: NamedSharding) -> None:
        self._mesh, self._divided = _checked(sharding)
        Backend.__init__(self)  # not that of JaxBackend, which chooses a device
        self.sharding = sharding
        self.device = _described(self._mesh, self._divided)
        # Of all arrays but history.
        self._device = self._named(PartitionSpec())
        self._copy_only = self._mesh.devices.flat[0].platform == "cpu"

    def owns(self, array: NativeArray) -> bool:
        if not isinstance(array, jax.Array) or isinstance(array, jax.core.Tracer):
            return super().owns(array)
        return bool(array.sharding.device_set == self._device.device_set)

    # Where arrays lie.

    def sharding_of(self, shape: Sequence[int], axes: str) -> NamedSharding:
        """Return the sharding of an array of history; `axes` as in :meth:`alloc_axes`.

        Raises: ShapeError for a batch or kv_heads that cannot be divided.
        """
        # Axes without a letter are whole: "." names no axis of the mesh.
        letters = axes.ljust(len(shape), ".")
        return self._named(PartitionSpec(*map(self._mesh_axes, shape, letters)))

    def _mesh_axes(self, size: int, letter: str) -> MeshAxes | None:
        names = self._divided.get("h" if letter == "c" else letter, ())
        if not names:
            return None
        if letter == "c" and size % _count(self._mesh, names):
            return None  # the second axis of this state has no heads
        _check_divided(self._mesh, KEY_AXES.get(letter, "channels"), size, names)
        return names

    def _named(self, spec: PartitionSpec) -> NamedSharding:
        return NamedSharding(self._mesh, spec, memory_kind=self.sharding.memory_kind)

    def alloc_axes(self, shape: Sequence[int], dtype: str, axes: str) -> NativeArray:
        sharding = self.sharding_of(shape, axes)
        return jnp.zeros(tuple(shape), self.dtype(dtype), device=sharding)

    def traced_zeros(self, shape: Sequence[int], dtype: str, axes: str = "") -> NativeArray:
        return _zeros(tuple(shape), self._traced_dtype(dtype), self.sharding_of(shape, axes))()

    # Writing and reading. What is written is resharded before a buffer is consumed.

    def write_slice(
        self, buffer: NativeArray, update: NativeArray, start: int, stop: int, axis: int
    ) -> NativeArray:
        return super().write_slice(buffer, _placed(update, buffer), start, stop, axis)

    def write_rows(
        self, buffer: NativeArray, rows: NativeArray, index: HostArray, axis: int
    ) -> NativeArray:
        return super().write_rows(buffer, _placed(rows, buffer), index, axis)

    def write_slices(
        self, buffers: NativeArrays, updates: NativeArrays, start: int, stop: int, axis: Axes
    ) -> NativeArrays:
        placed = tuple(map(_placed, updates, buffers))
        return super().write_slices(buffers, placed, start, stop, axis)

    def write_row_sets(
        self, buffers: NativeArrays, rows: NativeArrays, index: HostArray, axis: Axes
    ) -> NativeArrays:
        return super().write_row_sets(buffers, tuple(map(_placed, rows, buffers)), index, axis)

    def write_finite_slices(
        self, buffers: NativeArrays, updates: NativeArrays, start: int, stop: int, axis: Axes
    ) -> NativeArrays:
        placed = tuple(map(_placed, updates, buffers))
        return super().write_finite_slices(buffers, placed, start, stop, axis)

    def write_finite_row_sets(
        self, buffers: NativeArrays, rows: NativeArrays, index: RowIndex, axis: Axes
    ) -> NativeArrays:
        placed = tuple(map(_placed, rows, buffers))
        return super().write_finite_row_sets(buffers, placed, index, axis)

    def replace_nonfinite(self, arrays: NativeArrays, axis: Axes) -> NativeArrays:
        keys = arrays[0]
        # Keys and values of one shape are looked at in pairs; others have axes of their own.
        placed = [_placed(array, keys) if array.shape == keys.shape else array for array in arrays]
        return super().replace_nonfinite(tuple(placed), axis)

    # Rows of a divided axis, which are those of sequences, are gathered first: which device has a
    # row afterwards depends on all of them.

    def read_rows(self, buffer: NativeArray, index: HostArray, axis: int) -> NativeArray:
        return _divided_like(buffer, super().read_rows(_gathered(buffer, axis), index, axis), axis)

    def read_slice(self, buffer: NativeArray, start: int, stop: int, axis: int) -> NativeArray:
        rows = super().read_slice(_gathered(buffer, axis), start, stop, axis)
        return _divided_like(buffer, rows, axis)

    def read_slices(self, buffers: NativeArrays, start: int, stop: int, axis: Axes) -> NativeArrays:
        return LayerHooks.read_slices(self, buffers, start, stop, axis)  # one by one

    def concat(self, arrays: Sequence[NativeArray], axis: int) -> NativeArray:
        first = _gathered(arrays[0], axis)
        return _divided_like(
            arrays[0], super().concat([*map(_placed, arrays, repeat(first))], axis), axis
        )

    # To and from the host.

    def from_host(self, array: npt.ArrayLike, dtype: str | None = None) -> NativeArray:
        return _put(self._host(array, dtype).copy(), self._device)

    def from_host_axes(self, array: npt.ArrayLike, axes: str) -> NativeArray:
        host = self._host(array, None)
        return _put(host.copy(), self.sharding_of(host.shape, axes))

    def to_host(self, array: NativeArray) -> HostArray:
        """Do :meth:`Backend.to_host`, part by part.

        Raises: NotSupportedError for an array of which other processes have parts.
        """
        host = np.empty(array.shape, HOST_DTYPES[self.dtype_name(array)])
        # Parts by their place, because several devices may have the same one.
        parts = {str(shard.index): shard for shard in array.addressable_shards}
        places = array.sharding.devices_indices_map(array.shape).values()
        if len(parts) < len({*map(str, places)}):
            raise NotSupportedError(
                "a process reads the part of an array that its own devices have; other processes "
                "have parts of this one. Gather it in all of them at once "
                "(jax.experimental.multihost_utils.process_allgather), or divide only over devices "
                "of one process."
            )
        for shard in parts.values():
            host[shard.index] = np.asarray(shard.data)
        return host

    def import_dlpack(self, array: object) -> NativeArray:
        if isinstance(array, jax.Array) and self.owns(array):
            return array
        raise BufferError("the memory of one device is not that of several")


def _checked(sharding: object) -> tuple[Mesh, dict[str, MeshAxes]]:
    """Return the mesh, and by letter of :data:`KEY_AXES` the axes of the mesh that divide it."""
    if not isinstance(sharding, NamedSharding) or not isinstance(sharding.mesh, Mesh):
        raise UnknownBackendError(
            "caches are divided by a NamedSharding over a mesh of devices, that of keys "
            f"[B, kv_heads, tokens, head_dim]; got {sharding!r}."
        )
    entries = [*sharding.spec, *[None] * len(KEY_AXES)]
    if len(sharding.spec) > len(KEY_AXES) or not all(map(_is_entry, entries)):
        raise UnknownBackendError(
            f"a sharding names axes of the mesh, or None, for {', '.join(KEY_AXES.values())}; got "
            f"{sharding.spec}."
        )
    divided = {
        letter: (entry,) if isinstance(entry, str) else tuple(entry or ())
        for letter, entry in zip(KEY_AXES, entries, strict=False)
    }
    if divided["t"] or divided["d"]:
        raise NotSupportedError(
            f"a cache is divided over kv_heads and batch, not over tokens or head_dim; got "
            f"{sharding.spec}. Put None there."
        )
    return sharding.mesh, divided


def _is_entry(entry: object) -> bool:
    return entry is None or isinstance(entry, str | tuple)


def _described(mesh: Mesh, divided: dict[str, MeshAxes]) -> str:
    """Return a mesh and what is divided over it in words: no spec leads to it."""
    parts = [
        f"{KEY_AXES[letter]} over {', '.join(f'{name}={mesh.shape[name]}' for name in names)}"
        for letter, names in divided.items()
        if names
    ]
    return ", ".join([f"{mesh.size} {mesh.devices.flat[0].platform} devices", *parts])


def _count(mesh: Mesh | AbstractMesh, names: MeshAxes) -> int:
    """Return the number of devices that something divided over these axes is divided over."""
    return int(np.prod([mesh.shape[name] for name in names], dtype=int))


def _check_divided(mesh: Mesh | AbstractMesh, what: str, size: int, names: MeshAxes) -> None:
    """Raise ShapeError unless `size` can be divided over these axes of the mesh."""
    devices = _count(mesh, names)
    if size % devices:
        raise ShapeError(
            f"{what} divided over the {devices} devices of mesh axis {', '.join(names)} must be a "
            f"multiple of {devices}; got {size}. Take an axis of the mesh whose size divides it, "
            "or None in the sharding: every device then has all of it."
        )


@lru_cache(maxsize=1024)
def _alike(given: Sharding, wanted: Sharding) -> bool:
    """Return whether arrays in both can meet in one program without being moved.

    Axes of a mesh may be part of the type of an array, so those of a single device count, too.
    """
    if not isinstance(given, NamedSharding) or not isinstance(wanted, NamedSharding):
        return given == wanted
    same_place = (given.mesh, given.memory_kind) == (wanted.mesh, wanted.memory_kind)
    return same_place and _trimmed(given.spec) == _trimmed(wanted.spec)


def _trimmed(spec: PartitionSpec) -> list[object]:
    """Return the entries of `spec` without those at its end that divide nothing."""
    entries = [*spec]
    while entries and not entries[-1]:
        entries.pop()
    return entries


def _placed(array: NativeArray, like: NativeArray) -> NativeArray:
    """Return `array` in the sharding of `like`."""
    if _alike(array.sharding, like.sharding):
        return array
    return jax.device_put(array, like.sharding)


def _divided_like(source: NativeArray, result: NativeArray, axis: int) -> NativeArray:
    """Return `result`, of rows of `source` along `axis`, in the sharding of `source`.

    Raises: ShapeError if there is another number of rows, which cannot be divided.
    """
    sharding = source.sharding
    if _alike(result.sharding, sharding) or not isinstance(sharding, NamedSharding):
        return result
    _check_divided(sharding.mesh, f"axis {axis}", result.shape[axis], _names(sharding, axis))
    return jax.device_put(result, sharding)


def _gathered(array: NativeArray, axis: int) -> NativeArray:
    """Return `array` with the whole of `axis` on every device, itself if it is there."""
    sharding = array.sharding
    if not isinstance(sharding, NamedSharding) or not _names(sharding, axis):
        return array
    spec = PartitionSpec(*sharding.spec[:axis], None, *sharding.spec[axis + 1 :])
    whole = NamedSharding(sharding.mesh, spec, memory_kind=sharding.memory_kind)
    return jax.device_put(array, whole)


def _names(sharding: NamedSharding, axis: int) -> MeshAxes:
    """Return the axes of the mesh that `axis` is divided over."""
    entry = sharding.spec[axis] if axis < len(sharding.spec) else None
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def _put(host: HostArray, sharding: NamedSharding) -> NativeArray:
    if sharding.is_fully_addressable:
        return jax.device_put(host, sharding)
    # device_put would first compare the arrays of all processes.
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


@lru_cache(maxsize=256)
def _zeros(shape: tuple[int, ...], dtype: DType, sharding: NamedSharding) -> jax.stages.Wrapped:
    """Return a program that makes zeros, which keeps the sharding inside of another one, too."""
    # Twice the same: device_put gives their types to explicit axes of a mesh, and without
    # out_shardings the other ones are left to XLA.
    return jax.jit(
        lambda: jax.device_put(jnp.zeros(shape, dtype), sharding), out_shardings=sharding
    )
