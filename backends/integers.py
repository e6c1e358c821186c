"""Host integers of every kind, as plain ints."""

from __future__ import annotations

import operator
import reprlib
from typing import SupportsIndex


def as_index(value: SupportsIndex, name: str) -> int:
    """Return a host integer of any kind as an int. name: of the argument, for the error.

    Integers are those of Python, NumPy scalars, and 0-d arrays of every framework. Unsigned NumPy
    integers wrap around, and arrays compare and hash by rules of their own, so what computes with
    positions converts them first.

    Raises: TypeError for anything else, floats included.
    """
    try:
        return operator.index(value)
    except Exception as error:  # a framework raises what it likes, for a tracer for example
        raise TypeError(f"{name} must be an integer; got {reprlib.repr(value)}.") from error
