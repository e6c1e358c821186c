"""Argument checks shared by several caches.

Integers come in many kinds: of Python, NumPy scalars, 0-d arrays of every framework. They are
taken here, at the door, so that all code behind it computes with plain ints: unsigned NumPy
integers wrap around, and arrays compare and hash by rules of their own.
"""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Iterable, Sequence
from typing import SupportsIndex

import numpy as np
import numpy.typing as npt

from kvcache._types import Int32s

NO_LIMIT = 2**31 - 1
"""Positions are int32, so a window of so many tokens, or more, hides nothing."""


def as_index(value: SupportsIndex, name: str) -> int:
    """Return a host integer of any kind as an int. name: of the argument, for the error.

    Raises: TypeError for anything else, floats included.
    """
    try:
        return operator.index(value)
    except Exception as error:  # a framework raises what it likes, a tracer for example
        raise TypeError(f"{name} must be an integer; got {reprlib.repr(value)}.") from error


def as_indices(values: Iterable[SupportsIndex], name: str) -> list[int]:
    """Return host integers of any kind as ints, from a list, an iterator or an array.

    Raises: TypeError for anything else; a mask of bools is no list of numbers either.
    """
    # At once: an array would give its elements one by one, each a copy from its device.
    listed = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(listed, Iterable):
        raise TypeError(f"{name} must be a list of integers; got {reprlib.repr(values)}.")
    numbers = list(listed)
    if any(isinstance(number, bool) for number in numbers):
        raise TypeError(f"{name} must be a list of integers; got bools, {reprlib.repr(values)}.")
    return [as_index(number, name) for number in numbers]


def as_int32s(values: npt.ArrayLike, name: str) -> Int32s:
    """Return a list or array of integers as a new int32 array. name: of the numbers, a plural.

    Raises: ValueError for anything else, and for integers beyond int32.
    """
    array = _as_array(values, name)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(f"{name} are lists of integers; got {array.dtype} {array.shape}.")
    narrow = array.astype(np.int32)
    if (narrow != array).any():  # astype wraps numbers beyond int32 without a word
        raise ValueError(f"{name} are int32; got {array.min()} to {array.max()}.")
    return narrow


def as_batch_indices(values: Sequence[int], tokens: int, name: str) -> tuple[int, ...]:
    """Return indices into a batch of so many tokens, given as integers or as a mask of bools.

    Raises: ValueError for anything else, and for indices without a token.
    """
    array = _as_array(values if hasattr(values, "__getitem__") else list(values), name)
    if array.dtype == np.bool_ and array.shape == (tokens,):
        return tuple(np.flatnonzero(array).tolist())
    integers = array.ndim == 1 and (not array.size or array.dtype.kind in "iu")
    if not integers or (array.size and not (array.min() >= 0 and array.max() < tokens)):
        raise ValueError(
            f"{name} holds batch indices, 0 to {tokens - 1}; got {reprlib.repr(values)}. "
            "A mask has one bool per token."
        )
    return tuple(array.tolist())


def _as_array(values: npt.ArrayLike, name: str) -> npt.NDArray[np.generic]:
    try:
        return np.asarray(values)
    except Exception as error:  # nested lists, an array that is not on the host, a tracer
        raise ValueError(
            f"{name} must be a list of integers on the host; got {reprlib.repr(values)}."
        ) from error


def as_limit(value: SupportsIndex | None, name: str) -> int | None:
    """Return a limit in tokens as an int, None for one too large to matter.

    Programs use ``sys.maxsize`` or ``2**31 - 1`` for "no limit". Such a number must not enter the
    int32 arithmetic of masks.

    Raises: TypeError for no integer, ValueError for one below 1.
    """
    if value is None:
        return None
    limit = as_index(value, name)
    if limit < 1:
        raise ValueError(f"{name} must be >= 1 token, or None for no limit; got {limit}.")
    return limit if limit < NO_LIMIT else None


def check_ids(max_sequences: int, *ids: int) -> None:
    """Raise ValueError unless all of `ids` lie in ``[0, max_sequences)``."""
    if not all(0 <= sequence < max_sequences for sequence in ids):
        raise ValueError(
            f"sequence ids must lie in [0, {max_sequences}), as many as max_sequences; "
            f"got {', '.join(map(str, ids))}."
        )


def as_sizes(**sizes: SupportsIndex) -> list[int]:
    """Return sizes as ints; the keywords name them in errors.

    Raises: TypeError for no integer, ValueError for one below 1.
    """
    checked = {name: as_index(value, name) for name, value in sizes.items()}
    check_sizes(**checked)
    return list(checked.values())


def check_sizes(**sizes: int) -> None:
    """Raise ValueError unless every size is at least 1; its keyword names it in the error."""
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be >= 1; got {value}.")


def check_range(start: int, stop: int | None) -> None:
    """Raise ValueError unless ``[start, stop)`` is a range of positions; None: to the end."""
    if start < 0 or (stop is not None and stop < start):
        raise ValueError(f"a range must satisfy 0 <= start <= stop; got [{start}, {stop}).")
