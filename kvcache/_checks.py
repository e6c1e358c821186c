"""Argument checks shared by several caches, and conversion of integers at the public doors."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Sequence
from typing import SupportsIndex

import numpy as np
import numpy.typing as npt

from kvcache._reductions import any_of
from kvcache._types import Int32s
from kvcache.backends.integers import as_index

NO_LIMIT = 2**31 - 1
"""Positions are int32, so a window of so many tokens, or more, hides nothing."""

__all__ = [
    "NO_LIMIT",
    "as_batch_indices",
    "as_budget",
    "as_index",
    "as_indices",
    "as_int32s",
    "as_limit",
    "as_room",
    "as_sizes",
    "as_tokens_or_none",
    "check_ids",
    "check_range",
    "check_sizes",
]


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
    return [as_index(number, f"each of {name}") for number in numbers]


def as_int32s(values: npt.ArrayLike, name: str) -> Int32s:
    """Return a list or array of integers as a new int32 array. name: of the numbers, a plural.

    Raises: ValueError for anything else, and for integers beyond int32.
    """
    array = _as_array(values, name)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(
            f"{name} are lists of integers; got {array.dtype} {array.shape}. "
            "Give a list, or an array of one dimension."
        )
    narrow = array.astype(np.int32)
    if any_of(narrow != array):  # astype wraps numbers beyond int32 without a word
        raise ValueError(f"{name} are int32; got {array.min()} to {array.max()}.")
    return narrow


def as_batch_indices(values: Sequence[int], tokens: int, name: str) -> tuple[int, ...]:
    """Return indices into a batch of so many tokens, given as integers or as a mask of bools.

    Raises: ValueError for anything else, and for indices without a token.
    """
    if isinstance(values, tuple) and not values:  # of nearly every pass: no need of an array
        return ()
    # NumPy would make one object of a set or an iterator.
    array = _as_array(values if hasattr(values, "__getitem__") else _listed(values), name)
    if array.dtype == np.bool_ and array.shape == (tokens,):
        return tuple(np.flatnonzero(array).tolist())
    integers = array.ndim == 1 and (not array.size or array.dtype.kind in "iu")
    if not integers or (array.size and not (array.min() >= 0 and array.max() < tokens)):
        raise ValueError(
            f"{name} holds batch indices, 0 to {tokens - 1}; got {reprlib.repr(values)}. "
            "A mask has one bool per token."
        )
    return tuple(array.tolist())


def _listed(values: object) -> object:
    return list(values) if isinstance(values, Iterable) else values


def _as_array(values: object, name: str) -> npt.NDArray[np.generic]:
    try:
        return _read(values)
    except Exception as error:  # nested lists of unequal lengths, a tracer
        raise ValueError(
            f"{name} must be a list of integers on the host; got {reprlib.repr(values)}."
        ) from error


def _read(values: object) -> npt.NDArray[np.generic]:
    try:
        return np.asarray(values)
    except TypeError:  # NumPy reads no memory of another device
        if hasattr(values, "tolist"):  # an array, perhaps of bools
            return np.asarray(values.tolist())
        if not isinstance(values, Iterable):
            raise
        return np.asarray(as_indices(values, "a list"))


def as_budget(value: SupportsIndex | None, unit: str) -> int | None:
    """Return a budget as an int, or None, for no limit, as it is. unit: of it, for the error.

    Raises: TypeError for no integer (a bool is none either), ValueError for a negative one.
    """
    if value is None:
        return None
    if isinstance(value, bool):
        raise TypeError(f"budget must be an integer; got {value}. Give {unit}, or None.")
    budget = as_index(value, "budget")
    if budget < 0:
        raise ValueError(f"a budget is {unit} >= 0, or None for no limit; got {budget}.")
    return budget


def as_limit(value: SupportsIndex | None, name: str) -> int | None:
    """Return a limit in tokens as an int, None for one too large to matter.

    Programs use ``sys.maxsize`` or ``2**31 - 1`` for "no limit". Such a number must not enter the
    int32 arithmetic of masks.

    Raises: TypeError for no integer, ValueError for one below 1.
    """
    limit = as_tokens_or_none(value, name)
    return None if limit is None or limit >= NO_LIMIT else limit


def as_tokens_or_none(value: SupportsIndex | None, name: str) -> int | None:
    """Return a number of tokens as an int, or None as it is.

    Raises: TypeError for no integer, ValueError for one below 1.
    """
    if value is None:
        return None
    tokens = as_index(value, name)
    if tokens < 1:
        raise ValueError(f"{name} must be >= 1 token, or None for no limit; got {tokens}.")
    return tokens


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


def as_room(value: SupportsIndex, name: str) -> int:
    """Return a number of tokens, heads or dimensions to make room for, 0 to ``2**31 - 1``.

    Raises: TypeError for no integer, ValueError for one out of range.
    """
    room = as_index(value, name)
    if not 0 <= room <= NO_LIMIT:
        raise ValueError(f"{name} must be 0 to 2**31 - 1; got {room}.")
    return room


def check_sizes(**sizes: int) -> None:
    """Raise ValueError unless every size is at least 1; its keyword names it in the error."""
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be >= 1; got {value}.")


def check_range(start: int, stop: int | None) -> None:
    """Raise ValueError unless ``[start, stop)`` is a range of positions; None: to the end."""
    if start < 0 or (stop is not None and stop < start):
        raise ValueError(f"a range must satisfy 0 <= start <= stop; got [{start}, {stop}).")
