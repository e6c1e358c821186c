"""The part of a backend that compiled programs call."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar, TypeVarTuple, Unpack

from .arrays import Array, Arrays, DType, Namespace, NativeArray
from .blocks import BlockReads, attend_eagerly
from .indexing import FULL_SLICES, Axes
from .nonfinite import replace_floats
from .products import Scoring

R = TypeVar("R")
Ts = TypeVarTuple("Ts")


class TracedFunctions:
    """Functions of arrays that a compiler may be tracing.

    Under a tracer there is no device, so no instance, and no value to check: these are class
    methods, and know nothing but their arguments.
    """

    xp: Namespace
    """Array-API namespace for code written above the caches."""

    @classmethod
    def check_type(cls, kind: type) -> None:
        """Raise UnknownBackendError for a type of arrays that no cache can hold."""

    @classmethod
    def whole_beside(cls, array: Array) -> object | None:
        """Return a sharding whose arrays are whole on every device of `array`; None for one device.

        It is one for :func:`get_backend`.
        """
        return None

    @classmethod
    def is_traced(cls, array: Array) -> bool:
        """Return whether a transform (jit, vmap, compile) traces `array`: it has no values yet.

        Asked only for arrays unlike those of the last update, so it may take a microsecond.
        """
        return False

    @classmethod
    def is_deleted(cls, array: Array) -> bool:
        """Return whether a program consumed `array`, so that it cannot be read any more."""
        return False

    @classmethod
    def traced_replace_nonfinite(cls, arrays: Arrays, axis: Axes) -> Arrays:
        """Do :meth:`Backend.replace_nonfinite` in a program."""
        return replace_floats(cls.xp, arrays, axis, cls.xp.isfinite)

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
    def traced_read_rows(cls, buffer: Array, index: Array, axis: int, dtype: DType) -> Array:
        """Return a copy of the positions at `index` of `axis`, in the framework's `dtype`."""
        return buffer[(*FULL_SLICES[axis], index)]

    @classmethod
    def traced_attention(
        cls, q: NativeArray, buffers: Arrays, likes: Arrays, scoring: Scoring, reads: BlockReads
    ) -> Array:
        """Return attention of the queries of a pass, in the layout of the keys.

        q: in that layout. buffers: of keys and values, or of keys, which then serve as values, each
            with an empty array like it in `likes`.

        The caller has checked the arguments. By default, looks at the values of `reads`.
        """
        read_rows = cls.traced_read_rows
        out: Array = attend_eagerly(cls.xp, read_rows, q, buffers, likes, scoring, reads)
        return out

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
