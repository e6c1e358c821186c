"""Reductions of small arrays, of which planning a pass makes dozens.

NumPy's own methods take most of a microsecond each, whatever the size, because they choose axes
and an order of blocks first; these take a quarter of that.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from ._types import Bools


def any_of(flags: Bools) -> bool:
    """Return whether one of `flags` is set."""
    return bool(np.count_nonzero(flags))


def all_of(flags: Bools) -> bool:
    """Return whether all of `flags` are set, as they are where there are none."""
    return bool(np.count_nonzero(flags) == flags.size)


def largest(numbers: npt.NDArray[np.integer]) -> int:
    """Return the largest of some integers, at least one."""
    return int(numbers.item(numbers.argmax()))


def smallest(numbers: npt.NDArray[np.integer]) -> int:
    """Return the smallest of some integers, at least one."""
    return int(numbers.item(numbers.argmin()))
