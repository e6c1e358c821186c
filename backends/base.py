"""The contract between caches and array frameworks.

A backend translates a dozen primitives to one framework. It knows arrays but no caches: caches
make all their decisions above it, on the host.

**Ownership.** A buffer handed to :meth:`Backend.slice_update` or :meth:`Backend.scatter`
is gone: only the returned one lives. Frameworks that write in place return the same object;
functional ones (JAX) another that took over the memory. Writes are O(tokens written) on both.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from typing import ClassVar, TypeAlias

import numpy as np
import numpy.typing as npt

from kvcache.errors import BoundsError, DTypeError, ShapeError, UnknownBackendError

from .arguments import check_dtype, fitting, host_index, root_modules
from .arrays import Array, Arrays, DType, HostArray
from .attention import AttentionHooks
from .blocks import BlockReads
from .config import CacheConfig
from .dtypes import HOST_DTYPES
from .integers import as_index
from .layers import LayerHooks
from .products import Scoring
from .programs import P, ProgramForms, R

__all__ = ["Backend", "FastKey", "P", "R"]

FastKey: TypeAlias = tuple[type, tuple[int, ...], *tuple[Hashable, ...]]
"""Type, shape, and anything else that must match for two updates to be alike."""


class Backend(AttentionHooks, ProgramForms, LayerHooks):
    """One array framework on one device.

    Public primitives check their arguments on the host and raise before anything is
    touched: JAX would clamp an out-of-range write onto older tokens, NumPy and torch would
    broadcast or cast. A subclass implements the hooks behind them (``write_slice``,
    ``write_rows``, ``read_rows``, ``read_slice``), which may assume good arguments. Those for all
    buffers of a layer (:class:`LayerHooks`) call them one by one unless overridden.

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
    assignment_rebinds: ClassVar[bool] = False
    """True if item assignment changes an array object and none that shares its memory (MLX).

    Caches then return objects other than their own, so that a change of one never reaches them.
    """
    moved_by: ClassVar[str] = "Convert it with backend.from_dlpack, or through the host."
    """How an array of another device or framework gets here: a sentence for errors."""
    device: str
    """Device the backend allocates on, in the framework's words, for example ``"cuda:0"``."""

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
        """Return the device of `array`, in the form for the constructor.

        Raises: UnknownBackendError for an array that is on several devices.
        """

    @abstractmethod
    def _framework_dtypes(self) -> Mapping[str, DType]:
        """Return the dtypes of the framework by name, as far as it has those of `HOST_DTYPES`."""

    @property
    def spec(self) -> str:
        """``name:device``, the name of this backend for :func:`kvcache.get_backend`."""
        return f"{self.name}:{self.device}"

    @property
    def in_host_memory(self) -> bool:
        """Whether its arrays take up memory of the host, and so none of another device."""
        return False

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
        if root_modules(type(array)).isdisjoint(self.modules or (self.name,)):
            return False
        try:
            return self.device_of(array) == self.device
        except UnknownBackendError:  # on several devices
            return False

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

    def alloc_axes(self, shape: Sequence[int], dtype: str, axes: str) -> Array:
        """Do :meth:`alloc` for history, of which a backend may have a part on each device.

        axes: a letter for each axis from the first on: ``b`` batch, ``h`` kv_heads, ``t`` tokens
            or slots, ``d`` head_dim, ``c`` channels or heads of a recurrent state. Axes without a
            letter are like ``d``.

        Raises: ShapeError for a size that cannot be divided over the devices.
        """
        return self.alloc(shape, dtype)

    def slice_update(self, buffer: Array, update: Array, start: int, axis: int) -> Array:
        """Write `update` at ``[start, start + n)`` of `axis`, n = ``update.shape[axis]``.

        Consumes `buffer`; returns the buffer to use from now on. O(size of `update`).

        Raises: ShapeError, BoundsError, DTypeError; nothing has been written then.
        """
        start = as_index(start, "start")  # unsigned NumPy integers would wrap around below
        tokens, last_start = fitting(buffer.shape, update.shape, axis)
        if buffer.dtype != update.dtype:  # spares the call in nearly every case
            check_dtype(buffer, update)
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
        checked = host_index(index, buffer.shape[axis], axis)
        count, _ = fitting(buffer.shape, rows.shape, axis)
        check_dtype(buffer, rows)
        if count != checked.size:
            raise ShapeError(
                f"one row per position; got {count} rows for {checked.size} positions."
            )
        return self.write_rows(buffer, rows, checked, axis) if checked.size else buffer

    def gather(self, buffer: Array, index: npt.ArrayLike, axis: int) -> Array:
        """Return a copy of the rows at `index` of `axis`, in that order. Raises: as `scatter`."""
        return self.read_rows(buffer, host_index(index, buffer.shape[axis], axis), axis)

    def slice(self, buffer: Array, start: int, stop: int, axis: int) -> Array:
        """Return rows ``[start, stop)`` of `axis`, a view where possible. Raises: BoundsError."""
        start, stop = as_index(start, "start"), as_index(stop, "stop")
        if not 0 <= start <= stop <= buffer.shape[axis]:
            raise BoundsError(
                f"a range must satisfy 0 <= start <= stop <= length; "
                f"got [{start}, {stop}) of {buffer.shape[axis]} on axis {axis}."
            )
        return self.read_slice(buffer, start, stop, axis)

    @abstractmethod
    def concat(self, arrays: Sequence[Array], axis: int) -> Array:
        """Return a new array, even of a single one, without memory shared with `arrays`."""

    def free(self, buffer: Array) -> None:
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

    def owned(self, arrays: Arrays) -> Arrays:
        """Return `arrays` such that no holder of the given ones can change them; no autograd graph.

        Copies where frameworks write in place. Where arrays never change (JAX), these themselves.
        """
        return tuple([self.concat([array], 0) for array in arrays])

    def shared(self, arrays: Arrays) -> Arrays | None:
        """Return arrays equal to `arrays` that can be written to apart from them, without a copy.

        For frameworks that copy an array at the first write if others know it. None elsewhere.
        """
        return None

    def evaluate(self, *arrays: Array) -> None:
        """Begin to compute `arrays`, so that they no longer hold what they are computed from.

        For arrays that a cache keeps but does not return: a lazy framework would keep their
        inputs, and could compute them only in the thread that asked for them.
        """

    # Gradients.

    def requires_grad(self, array: Array) -> bool:
        """Return whether gradients are to flow to `array` (torch).

        Where this may be True, :meth:`fast_key` tells it, too.
        """
        return False

    def with_gradients(self, columns: Array, update: Array, start: int, axis: int) -> Array:
        """Return `columns` with gradients for `update`, which they hold from `start` on.

        The other columns are constants.
        """
        return columns

    def detached(self, array: Array) -> Array:
        """Return `array` without its autograd graph (torch), or unchanged."""
        return array

    # To and from the host, and other frameworks.

    @abstractmethod
    def from_host(self, array: npt.ArrayLike, dtype: str | None = None) -> Array:
        """Return a copy on the device, equal bit for bit; cast on the host if `dtype` differs."""

    def from_host_axes(self, array: npt.ArrayLike, axes: str) -> Array:
        """Do :meth:`from_host` for history; axes and errors as in :meth:`alloc_axes`."""
        return self.from_host(array)

    @abstractmethod
    def to_host(self, array: Array) -> HostArray:
        """Return a NumPy copy of `array`, equal bit for bit, owned by the caller."""

    def from_dlpack(self, array: object) -> Array:
        """Return `array` of another framework as one of this, sharing memory where both allow.

        An array of another device is copied to this one.

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

    def attention_in_blocks(
        self, q: Array, buffers: Arrays, likes: Arrays, scoring: Scoring, reads: BlockReads
    ) -> Array:
        """Do :meth:`traced_attention` as a program of its own.

        Pools call it in place of :meth:`attention` where slices are copies: a pass is then one
        program, compiled for few numbers of tokens and blocks, in place of one for each piece.
        """
        out: Array = self.traced_attention(q, buffers, likes, scoring, reads)
        return out

    def sync(self, *arrays: Array) -> None:
        """Return once every one of `arrays` has been computed and written."""

    # For the adapters.

    def _host(self, array: npt.ArrayLike, dtype: str | None) -> HostArray:
        """Return `array` as a compact NumPy array, of `dtype` if given. Raises: DTypeError."""
        host = np.asarray(array)
        name = dtype or host.dtype.name
        self.dtype(name)
        # Not every framework takes negative strides or foreign byte orders. The reshape undoes
        # the axis that ascontiguousarray gives to a scalar.
        return np.ascontiguousarray(host, HOST_DTYPES[name]).reshape(host.shape)
