"""Checks of arguments, made on the host before anything is touched."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from kvcache.errors import (
    BackendNotAvailableError,
    BoundsError,
    DTypeError,
    ShapeError,
    TracedArrayError,
)

from .arrays import Array, HostArray


# Cached, because checking a shape in Python costs as much as a small write, and shapes repeat.
@lru_cache(maxsize=1024)
def fitting(have: tuple[int, ...], new: tuple[int, ...], axis: int) -> tuple[int, int]:
    """Return the number of rows in `new`, and their last possible start on `axis` of `have`.

    Raises: ShapeError where another axis differs.
    """
    have, new = tuple(have), tuple(new)
    if len(have) != len(new) or have[:axis] + have[axis + 1 :] != new[:axis] + new[axis + 1 :]:
        raise ShapeError(
            f"an update must match its buffer on every axis but {axis}; got {new} for {have}."
        )
    return new[axis], have[axis] - new[axis]


def check_dtype(buffer: Array, update: Array) -> None:
    """Raise DTypeError unless the two have one dtype."""
    if buffer.dtype != update.dtype:
        raise DTypeError(
            f"an update must have the dtype of its buffer; got {update.dtype} for "
            f"{buffer.dtype}. Cast it first."
        )


def host_index(index: npt.ArrayLike, length: int, axis: int) -> HostArray:
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


def refuse_traced(array: Array) -> NoReturn:
    """Raise TracedArrayError for `array`."""
    raise TracedArrayError(
        "a transform (jit, vmap, grad, compile) does not see that a cache changes when it is "
        f"called; got {type(array).__name__} that is being traced. Call the pure functions of "
        "kvcache.functional inside of transforms."
    )


# Cached, because every put asks for it, for very few types.
@lru_cache(maxsize=256)
def root_modules(kind: type) -> frozenset[str]:
    """Return the top-level modules of a type and its bases."""
    # Not builtins: every type has `object` among its bases, and would be of that module.
    return frozenset(base.__module__.partition(".")[0] for base in kind.__mro__) - {"builtins"}


def checked_device(name: str, device: str | None, usable: Sequence[str]) -> str:
    """Return `device` of the backend `name`, or the first usable one for None.

    Raises: BackendNotAvailableError for any other.
    """
    if device is not None and device not in usable:
        raise BackendNotAvailableError(
            f"{name} has no device {device!r} here; it has {', '.join(usable)}."
        )
    return device or usable[0]
