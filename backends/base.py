"""The contract between caches and array frameworks.

A backend translates a dozen primitives to one framework. It knows arrays but no caches: caches
make all their decisions above it, on the host.

**Ownership.** A buffer handed to :meth:`Backend.slice_update` or :meth:`Backend.scatter`
is gone: only the returned one lives. Frameworks that write in place return the same
object; functional ones (JAX) return another that took over the memory. Code that keeps
to this rule runs at O(tokens written) on both kinds, never O(capacity).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import lru_cache
from itertools import repeat
from typing import ClassVar, ParamSpec, TypeAlias, TypeVar, TypeVarTuple, Unpack

import numpy as np
import numpy.typing as npt

from kvcache.errors import BackendNotAvailableError, BoundsError, DTypeError, ShapeError

from .arrays import Array, Arrays, DType, HostArray, Namespace, NativeArray, TracedIndex
from .config import CacheConfig
from .dtypes import HOST_DTYPES
from .nonfinite import dtype_label, replaced, substitutes

P = ParamSpec("P")
R = TypeVar("R")
Ts = TypeVarTuple("Ts")

FastKey: TypeAlias = tuple[type, tuple[int, ...], *tuple[Hashable, ...]]
"""Type, shape, and anything else that must match for two updates to be alike."""


class Backend(ABC):
    """One array framework on one device.

    Public primitives check their arguments on the host and raise before anything is
    touched: JAX would clamp an out-of-range write onto older tokens, NumPy and torch would
    broadcast or cast. A subclass implements the hooks behind them (``write_slice``,
    ``write_rows``, ``read_rows``, ``read_slice``), which may assume good arguments.

    ``axis``, ``start`` and ``stop`` are host ints, ``axis`` not negative; an ``index`` is a
    host integer array. Instances are cheap and independent of each other.
    """

    name: ClassVar[str]
    """Registry name, for example ``"torch"``."""
    modules: ClassVar[tuple[str, ...]] = ()
    """Top-level modules that define the framework's array types; default: the name."""
    array_types: ClassVar[tuple[type, ...]] = ()
    """Array types, where a compiler has to look them up; others are found by module."""
    config: ClassVar[CacheConfig] = CacheConfig()
    """Layout of caches on this backend unless the model overrides it."""
    slices_are_views: ClassVar[bool] = True
    """True if :meth:`slice` costs nothing. Where it copies, caches return whole buffers."""
    device: str
    """Device the backend allocates on, in the framework's words, for example ``"cuda:0"``."""
    xp: Namespace
    """Array-API namespace for code written above the caches."""

    def __init__(self, device: str | None = None) -> None:
        self._dtypes = self._framework_dtypes()
        self._dtype_names = {dtype: name for name, dtype in self._dtypes.items()}

    # Devices and dtypes.

    @staticmethod
    @abstractmethod
    def devices() -> list[str]:
        """Return the usable devices of the framework, the default one first."""

    @staticmethod
    @abstractmethod
    def device_of(array: Array) -> str:
        """Return the device of `array`, in the form for the constructor."""

    @abstractmethod
    def _framework_dtypes(self) -> Mapping[str, DType]:
        """Return the dtypes of the framework by name, as far as it has those of `HOST_DTYPES`."""

    @property
    def spec(self) -> str:
        """``name:device``, the name of this backend for :func:`kvcache.get_backend`."""
        return f"{self.name}:{self.device}"

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Names of the dtypes of the framework; others raise :class:`DTypeError`."""
        return tuple(self._dtypes)

    def dtype(self, name: str) -> DType:
        """Return the framework's dtype called `name`.

        Raises: DTypeError if it has none.
        """
        try:
            return self._dtypes[name]
        except KeyError:
            raise DTypeError(
                f"{self.name} has no dtype {name!r}; it has {', '.join(self._dtypes)}."
            ) from None

    def dtype_name(self, array: Array) -> str:
        """Return the name of the dtype of `array`.

        Raises: DTypeError for a dtype that has no name here.
        """
        try:
            return self._dtype_names[array.dtype]
        except (KeyError, AttributeError, TypeError):
            raise DTypeError(
                f"kvcache on {self.name} handles arrays of {', '.join(self._dtypes)}; "
                f"got {type(array).__name__} of {getattr(array, 'dtype', 'no dtype')}."
            ) from None

    def owns(self, array: Array) -> bool:
        """Return whether `array` is of this framework and on this device."""
        is_foreign = root_modules(type(array)).isdisjoint(self.modules or (self.name,))
        return not is_foreign and self.device_of(array) == self.device

    def fast_key(self, array: Array) -> FastKey:
        """Return a key, equal for arrays alike in every checked property. Begins with type, shape.

        Cheap to make and to compare: a decode step with the key of the last one skips the full
        check.
        """
        return type(array), array.shape, array.dtype

    # Buffers.

    @abstractmethod
    def alloc(self, shape: Sequence[int], dtype: str) -> Array:
        """Return a new buffer of zeros, without shared memory.

        Zeros, because hidden slots still enter attention, where 0 times NaN is NaN.
        """

    def slice_update(self, buffer: Array, update: Array, start: int, axis: int) -> Array:
        """Write `update` at ``[start, start + n)`` of `axis`, n = ``update.shape[axis]``.

        Consumes `buffer`; returns the buffer to use from now on. O(size of `update`).

        Raises: ShapeError, BoundsError, DTypeError; nothing has been written then.
        """
        tokens, last_start = _fitting(buffer.shape, update.shape, axis)
        if buffer.dtype != update.dtype:  # spares the call in nearly every case
            _check_dtype(buffer, update)
        if not 0 <= start <= last_start:
            raise BoundsError(
                f"a write must satisfy 0 <= start and start + tokens <= length; got {start} + "
                f"{tokens} for {last_start + tokens} on axis {axis}. Nothing was written."
            )
        return self.write_slice(buffer, update, start, start + tokens, axis)

    def scatter(self, buffer: Array, rows: Array, index: npt.ArrayLike, axis: int) -> Array:
        """Write ``rows[i]`` at position ``index[i]`` of `axis`; the positions must differ.

        Consumes `buffer`; returns the buffer to use from now on. O(size of `rows`).

        Raises: ShapeError, BoundsError, DTypeError; nothing has been written then.
        """
        checked = _host_index(index, buffer.shape[axis], axis)
        count, _ = _fitting(buffer.shape, rows.shape, axis)
        _check_dtype(buffer, rows)
        if count != checked.size:
            raise ShapeError(
                f"one row per position; got {count} rows for {checked.size} positions."
            )
        return self.write_rows(buffer, rows, checked, axis) if checked.size else buffer

    def gather(self, buffer: Array, index: npt.ArrayLike, axis: int) -> Array:
        """Return a copy of the rows at `index` of `axis`, in that order. Raises: as `scatter`."""
        return self.read_rows(buffer, _host_index(index, buffer.shape[axis], axis), axis)

    def slice(self, buffer: Array, start: int, stop: int, axis: int) -> Array:
        """Return rows ``[start, stop)`` of `axis`, a view where possible. Raises: BoundsError."""
        if not 0 <= start <= stop <= buffer.shape[axis]:
            raise BoundsError(
                f"a range must satisfy 0 <= start <= stop <= length; "
                f"got [{start}, {stop}) of {buffer.shape[axis]} on axis {axis}."
            )
        return self.read_slice(buffer, start, stop, axis)

    @abstractmethod
    def concat(self, arrays: Sequence[Array], axis: int) -> Array:
        """Return a new array, even of a single one, without memory shared with `arrays`."""

    def free(self, buffer: Array) -> None:  # noqa: B027 - a framework may have nothing to do
        """Free the memory of `buffer` now, unless a view still uses it.

        Using `buffer` afterwards is an error where the framework can tell (torch, JAX).
        NumPy and MLX free memory with the last reference, so drop it as well.
        """

    # Hooks behind the primitives: a framework provides them, arguments already checked.

    @abstractmethod
    def write_slice(self, buffer: Array, update: Array, start: int, stop: int, axis: int) -> Array:
        """Do :meth:`slice_update` at ``[start, stop)`` without checks, for checked arguments."""

    @abstractmethod
    def write_rows(self, buffer: Array, rows: Array, index: HostArray, axis: int) -> Array:
        """Do :meth:`scatter` without checks; `index` is int32 and not empty."""

    @abstractmethod
    def read_rows(self, buffer: Array, index: HostArray, axis: int) -> Array:
        """Do :meth:`gather` without checks; `index` is int32."""

    @abstractmethod
    def read_slice(self, buffer: Array, start: int, stop: int, axis: int) -> Array:
        """Do :meth:`slice` without checks, for checked arguments."""

    # For pools, where sequences share buffers: NaN of one would reach the output of another.

    def replace_nonfinite(self, arrays: Arrays, axes: Sequence[int]) -> Arrays:
        """Return `arrays`, of one layer of a pool, with finite numbers only.

        Where a key or a value is NaN or infinite, the key is 0 and the value the largest power of
        two of the dtype: in pairs where both arrays have one shape, else for the whole token. Keys
        alone become the root of that power.

        arrays: keys and values, or keys alone. axes: the token axis of each.

        Waits for no computation: where the framework computes asynchronously, this is one more.
        """
        return self.traced_replace_nonfinite(arrays, axes)

    def write_finite_slices(
        self, buffers: Arrays, updates: Arrays, start: int, stop: int, axes: Sequence[int]
    ) -> Arrays:
        """Do :meth:`write_slice` for the arrays of a layer, after :meth:`replace_nonfinite`."""
        finite = self.replace_nonfinite(updates, axes)
        # map and repeat instead of a loop: this runs for every layer of every pass.
        return tuple(map(self.write_slice, buffers, finite, repeat(start), repeat(stop), axes))

    def write_finite_rows(
        self, buffers: Arrays, rows: Arrays, index: HostArray, axes: Sequence[int]
    ) -> Arrays:
        """Do :meth:`write_rows` for the arrays of a layer, after :meth:`replace_nonfinite`."""
        finite = self.replace_nonfinite(rows, axes)
        return tuple(map(self.write_rows, buffers, finite, repeat(index), axes))

    def detached(self, array: Array) -> Array:
        """Return `array` without its autograd graph (torch), or unchanged."""
        return array

    # To and from the host, and other frameworks.

    @abstractmethod
    def from_host(self, array: npt.ArrayLike, dtype: str | None = None) -> Array:
        """Return a copy on the device, equal bit for bit; cast on the host if `dtype` differs."""

    @abstractmethod
    def to_host(self, array: Array) -> HostArray:
        """Return a NumPy copy of `array`, equal bit for bit, owned by the caller."""

    def from_dlpack(self, array: object) -> Array:
        """Return `array` of another framework as one of this, sharing memory where both allow.

        Raises: DTypeError where the two cannot: DLPack has no dtype in common (bfloat16 and
            float8, if one of them is NumPy), or one needs compact memory (JAX; a view of a part of
            a cache is not). Go through :meth:`to_host` and :meth:`from_host` then.
        """
        try:
            return self.import_dlpack(array)
        except (BufferError, RuntimeError, TypeError, ValueError, AttributeError) as error:
            raise DTypeError(
                f"{self.name} cannot take over {type(array).__name__} of "
                f"{getattr(array, 'dtype', 'no dtype')} by DLPack ({error}). "
                "Copy it through the host: to_host of its backend, then from_host."
            ) from error

    @abstractmethod
    def import_dlpack(self, array: object) -> Array:
        """Do :meth:`from_dlpack`; may raise whatever the framework raises."""

    def sync(self, *arrays: Array) -> None:  # noqa: B027 - eager CPU frameworks have nothing to do
        """Return once every one of `arrays` has been computed and written."""

    # For programs above the caches.

    def compile(self, function: Callable[P, R], donate: Sequence[int] = ()) -> Callable[P, R]:
        """Return `function`, of arrays and containers of arrays, compiled if that makes it faster.

        JAX compiles it once per shape of its arguments; eager frameworks return it unchanged. It
        has to be pure: everything it needs is an argument or a constant.

        donate: positions of arguments whose buffers it consumes, as :meth:`slice_update` does.
        """
        return function

    def traced_form(self, buffer: Array) -> Array:
        """Return `buffer` in the form for compiled programs (bits, if need be); consumes it.

        :meth:`from_traced` undoes that. The ``traced_`` functions below accept either form.
        """
        return buffer

    def from_traced(self, buffer: Array, dtype: str) -> Array:
        """Undo :meth:`traced_form` of a buffer of `dtype`; consumes it."""
        return buffer

    def traced_index(self, start: int | list[int]) -> TracedIndex:
        """Return host ints as an argument of programs, without recompilation when they change."""
        return start

    # Under a tracer there is no device, so no instance, and no value to check: these are class
    # methods, and know nothing but their arguments.

    @classmethod
    def traced_replace_nonfinite(cls, arrays: Arrays, axes: Sequence[int]) -> Arrays:
        """Do :meth:`replace_nonfinite` in a program."""
        numbers = substitutes(dtype_label(arrays[0].dtype), len(arrays))
        if not numbers:
            return arrays
        return replaced(cls.xp, arrays, axes, numbers, cls.xp.isfinite)

    @classmethod
    def traced_write(cls, buffer: NativeArray, rows: Array, index: Array, axis: int) -> Array:
        """Write ``rows[i]`` at position ``index[i]`` of `axis`; consumes `buffer`.

        A position may occur twice, with equal rows.
        """
        buffer[(*FULL_SLICES[axis], index)] = rows
        written: Array = buffer
        return written

    @classmethod
    def traced_append(
        cls, buffer: NativeArray, rows: Array, start: NativeArray, axis: int
    ) -> Array:
        """Write `rows` at ``[start, start + n)`` of `axis`; consumes `buffer`.

        A range beyond the end overwrites nothing below `start`; rows inside may be written.
        """
        if start + rows.shape[axis] <= buffer.shape[axis]:
            buffer[(*FULL_SLICES[axis], slice(start, start + rows.shape[axis]))] = rows
        written: Array = buffer
        return written

    @classmethod
    def traced_read(
        cls, buffer: Array, start: NativeArray, length: int, axis: int, dtype: DType
    ) -> Array:
        """Return `length` positions of `axis` from `start` on, in the framework's `dtype`."""
        return buffer[(*FULL_SLICES[axis], slice(start, start + length))]

    @classmethod
    def traced_cond(
        cls,
        condition: Array | bool,
        yes: Callable[[Unpack[Ts]], R],
        no: Callable[[Unpack[Ts]], R],
        *operands: *Ts,
    ) -> R:
        """Run just one of ``yes(*operands)`` and ``no(*operands)``, of the same structure."""
        return yes(*operands) if condition else no(*operands)

    # For the adapters.

    def _host(self, array: npt.ArrayLike, dtype: str | None) -> HostArray:
        """Return `array` as a compact NumPy array, of `dtype` if given. Raises: DTypeError."""
        host = np.asarray(array)
        name = dtype or host.dtype.name
        self.dtype(name)
        # Not every framework takes negative strides or foreign byte orders. The reshape undoes
        # the axis that ascontiguousarray gives to a scalar.
        return np.ascontiguousarray(host, HOST_DTYPES[name]).reshape(host.shape)

    def _check_device(self, device: str | None, usable: Sequence[str]) -> str:
        """Return `device`, or the first usable one for None.

        Raises: BackendNotAvailableError for any other.
        """
        if device is not None and device not in usable:
            raise BackendNotAvailableError(
                f"{self.name} has no device {device!r} here; it has {', '.join(usable)}."
            )
        return device or usable[0]


# Cached, because every put asks for it, for very few types.
@lru_cache(maxsize=256)
def root_modules(kind: type) -> frozenset[str]:
    """Return the top-level modules of a type and its bases."""
    return frozenset(base.__module__.partition(".")[0] for base in kind.__mro__)


FULL_SLICES = tuple((slice(None),) * axis for axis in range(8))
"""Full slices for the axes in front: ``(*FULL_SLICES[axis], key)`` indexes `axis` by key."""


# Cached, because checking a shape in Python costs as much as a small write, and shapes repeat.
@lru_cache(maxsize=1024)
def _fitting(have: tuple[int, ...], new: tuple[int, ...], axis: int) -> tuple[int, int]:
    """Return the number of rows in `new`, and their last possible start on `axis` of `have`.

    Raises: ShapeError where another axis differs.
    """
    have, new = tuple(have), tuple(new)
    if len(have) != len(new) or have[:axis] + have[axis + 1 :] != new[:axis] + new[axis + 1 :]:
        raise ShapeError(
            f"an update must match its buffer on every axis but {axis}; got {new} for {have}."
        )
    return new[axis], have[axis] - new[axis]


def _check_dtype(buffer: Array, update: Array) -> None:
    """Raise DTypeError unless the two have one dtype."""
    if buffer.dtype != update.dtype:
        raise DTypeError(
            f"an update must have the dtype of its buffer; got {update.dtype} for "
            f"{buffer.dtype}. Cast it first."
        )


def _host_index(index: npt.ArrayLike, length: int, axis: int) -> HostArray:
    """Return `index` as int32, checked against an axis of `length`.

    Raises: ShapeError, DTypeError, BoundsError.
    """
    checked = np.asarray(index)
    if checked.ndim != 1:
        raise ShapeError(f"an index must have one dimension; got shape {checked.shape}.")
    if checked.size and checked.dtype.kind not in "iu":
        raise DTypeError(f"an index must hold integers; got {checked.dtype}.")
    if checked.size and not (checked.min() >= 0 and checked.max() < length):
        raise BoundsError(
            f"positions must lie in [0, {length}) on axis {axis}; "
            f"got {checked.min()} to {checked.max()}."
        )
    return checked.astype(np.int32, copy=False)
