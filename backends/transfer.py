"""Arrays from one backend to another."""

from __future__ import annotations

from kvcache.errors import DTypeError

from .arrays import Array
from .base import Backend


def transfer(array: Array, source: Backend, target: Backend) -> Array:
    """Return `array` of `source` as one of `target`, bit for bit; shares memory if the two can.

    Otherwise it goes through the host. To write to either array, copy the result first and
    sync that copy: it may still be reading the memory of `array`.

    Raises: DTypeError if the target lacks the dtype.
    """
    target.dtype(source.dtype_name(array))
    source.sync(array)
    try:
        shared = target.from_dlpack(array)
    except DTypeError:
        return target.from_host(source.to_host(array))
    # DLPack may have left it on the device that it came from.
    return shared if target.owns(shared) else target.from_host(source.to_host(array))
