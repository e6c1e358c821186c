"""Transfer of arrays between backends."""

from __future__ import annotations

from kvcache.errors import DTypeError

from .arrays import Array
from .base import Backend


def transfer(array: Array, source: Backend, target: Backend, axes: str = "") -> Array:
    """Return `array` of `source` as an array of `target`, equal bit for bit.

    axes: of history, as in :meth:`Backend.alloc_axes`.

    The two share memory where the frameworks can; otherwise the host copies. Before writing to
    either array, copy the result and sync the copy: it may still be reading the memory of `array`.

    Raises: DTypeError if the target lacks the dtype.
    """
    target.dtype(source.dtype_name(array))
    source.sync(array)  # DLPack hands over memory that a lazy framework may not have written yet
    try:
        shared = target.from_dlpack(array)
    except DTypeError:
        return target.from_host_axes(source.to_host(array), axes)
    # A backend of others may leave the array on the device of `source`.
    if target.owns(shared):
        return shared
    return target.from_host_axes(source.to_host(array), axes)
