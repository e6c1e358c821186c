"""Writes of rows to host memory, and the look at numbers that comes first, by NumPy.

For the NumPy backend, and for every framework whose arrays NumPy sees without a copy: it takes half
of the time that others take to write a few rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .arrays import HostArray, NativeArray, NativeArrays
from .dtypes import HOST_DTYPES
from .nonfinite import LARGEST_BITS

_FLOAT32, _BFLOAT16 = HOST_DTYPES["float32"], HOST_DTYPES["bfloat16"]
# Elements up to which a dot product of bfloat16, which has no BLAS, beats two passes over bits.
_SHORT = 1024
# By dtype, because NumPy takes a microsecond to find the name of one: that of its bits, signed and
# not, and the bits of its largest number.
_BITS = {
    kind: (np.dtype(f"i{kind.itemsize}"), np.dtype(f"u{kind.itemsize}"), LARGEST_BITS[name])
    for name, kind in HOST_DTYPES.items()
    if name in LARGEST_BITS
}


def all_finite(arrays: Sequence[HostArray]) -> bool:
    """Return whether all numbers are finite; False also for some that are, but very large."""
    first, last = arrays[0], arrays[-1]
    if first.dtype == _FLOAT32 or (first.dtype == _BFLOAT16 and first.size <= _SHORT):
        # A dot product is finite only if all its factors are, wherever they stand.
        if first.size == last.size:
            return math.isfinite(np.vdot(first, last))
        return all(math.isfinite(np.vdot(array, array)) for array in arrays)
    if first.dtype not in _BITS:
        return True  # integers
    signed, unsigned, largest = _BITS[first.dtype]
    lowest = largest | 1 << 8 * signed.itemsize - 1
    # Infinity and NaN are beyond the largest number and, as unsigned integers, the lowest. The
    # extreme by its index: in a fraction of the time of max().
    for array in arrays:
        if array.size:
            above, below = array.view(signed), array.view(unsigned)
            if above.item(above.argmax()) > largest or below.item(below.argmax()) > lowest:
                return False
    return True


class HostLayer(tuple[NativeArray, ...]):
    """The buffers of a layer, ``[heads, tokens, dim]`` in host memory, with views to write rows by.

    A pool keeps it in the place of the tuple that it was made of, so that views are made once.

    lines: the memory of every buffer as lines, ``[heads, tokens, 1]``: the bytes of one head of a
        token. NumPy writes such by an index in less than half the time that it takes for elements.
    kinds, sizes: their dtypes, and heads and tokens of each.
    """

    lines: Sequence[HostArray]
    kinds: Sequence[np.dtype[np.void]]
    sizes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, buffers: NativeArrays, memory: Sequence[HostArray]) -> HostLayer | None:
        """Return a layer of `buffers`, or None if these are not compact.

        memory: the buffers as NumPy sees them.
        """
        if not all(array.flags.c_contiguous for array in memory):
            return None
        layer = cls(buffers)
        layer.kinds = [np.dtype((np.void, array.shape[2] * array.itemsize)) for array in memory]
        layer.lines = [*map(np.ndarray.view, memory, layer.kinds)]
        layer.sizes = tuple([array.shape[:2] for array in memory])
        return layer


class HostRowIndex:
    """Positions of the tokens of a pass in buffers of a :class:`HostLayer`."""

    def __init__(self, positions: HostArray) -> None:
        self.positions = positions
        self._places: dict[tuple[tuple[int, ...], ...], Sequence[HostArray]] = {}

    def write(self, layer: HostLayer, rows: Sequence[HostArray]) -> None:
        """Write `rows` to these positions of their buffers."""
        places = self._places.get(layer.sizes)
        if places is None:
            places = self._places[layer.sizes] = [*map(self._places_in, layer.sizes)]
        try:
            new = [*map(np.ndarray.view, rows, layer.kinds)]
        except ValueError:  # their dim is not compact
            new = [*map(np.ndarray.view, map(np.ascontiguousarray, rows), layer.kinds)]
        # Python runs no signal handler while a list is extended.
        _ = [*map(np.ndarray.put, layer.lines, places, new)]

    def _places_in(self, size: tuple[int, ...]) -> HostArray:
        """Return the places of the rows, of all heads, in lines of so many heads and tokens."""
        heads, tokens = size
        return np.add.outer(np.arange(heads) * tokens, self.positions).reshape(-1)
