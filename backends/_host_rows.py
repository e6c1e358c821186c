"""Writes of rows to host memory, and the look at numbers that comes first, by NumPy.

For the NumPy backend, and for every framework whose arrays NumPy sees without a copy: it takes half
of the time that others take to write a few rows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from .arrays import HostArray
from .dtypes import HOST_DTYPES
from .nonfinite import LARGEST_BITS

_FLOAT32, _BFLOAT16 = HOST_DTYPES["float32"], HOST_DTYPES["bfloat16"]
# Elements up to which a dot product of bfloat16, which has no BLAS, beats two passes over bits.
_SHORT = 1024
# By dtype, because NumPy takes a microsecond to find the name of one: that of its bits, and those
# of its largest number, shifted to drop the sign.
_BITS = {
    HOST_DTYPES[name]: (np.dtype(f"u{HOST_DTYPES[name].itemsize}"), 2 * bits)
    for name, bits in LARGEST_BITS.items()
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
    kind, largest = _BITS[first.dtype]
    for array in arrays:
        bits = array.view(kind)
        shifted = bits + bits
        # The largest by its index: in a fraction of the time of max().
        if array.size and shifted.item(shifted.argmax()) > largest:
            return False
    return True


class HostRowIndex:
    """Positions of the tokens of a pass in buffers ``[heads, tokens, dim]`` in host memory."""

    def __init__(self, positions: HostArray) -> None:
        self.positions = positions
        self._lines: dict[tuple[int, ...], tuple[HostArray, np.dtype[np.void]]] = {}

    def write(self, buffers: Sequence[HostArray], rows: Sequence[HostArray]) -> bool:
        """Write `rows` to these positions of their buffers; return whether these are compact.

        Others are left as they are.
        """
        places, lines, new = [], [], []
        for buffer, update in zip(buffers, rows, strict=True):
            if not buffer.flags.c_contiguous:
                return False
            place, line = self._lines_of(buffer)
            places.append(place)
            lines.append(buffer.view(line))
            new.append(np.ascontiguousarray(update).view(line))
        # Python runs no signal handler while a list is extended.
        _ = [*map(np.ndarray.put, lines, places, new)]
        return True

    def _lines_of(self, buffer: HostArray) -> tuple[HostArray, np.dtype[np.void]]:
        """Return the places of the rows in a buffer of whole lines, and the dtype of a line.

        A line is the bytes of one head of a token: NumPy writes such by an index in less than half
        the time that it takes for elements.
        """
        form = *buffer.shape, buffer.itemsize
        found = self._lines.get(form)
        if found is None:
            heads, cells, dim, itemsize = form
            places = np.add.outer(np.arange(heads) * cells, self.positions).reshape(-1)
            found = self._lines[form] = places, np.dtype((np.void, dim * itemsize))
        return found
