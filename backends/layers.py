"""The part of a backend that moves all arrays of a layer at once.

Nothing can come between them then: a layer whose keys are written and whose values are not is lost
if the write overwrote something still needed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from .arrays import Array, Arrays, HostArray, RowIndex
from .indexing import Axes, axes_of
from .traced import TracedFunctions


class LayerHooks(ABC, TracedFunctions):
    """Hooks for all arrays of a layer; by default each calls the hook for one array."""

    # Of one array.

    @abstractmethod
    def write_slice(self, buffer: Array, update: Array, start: int, stop: int, axis: int) -> Array:
        """See :meth:`Backend.write_slice`."""

    @abstractmethod
    def write_rows(self, buffer: Array, rows: Array, index: HostArray, axis: int) -> Array:
        """See :meth:`Backend.write_rows`."""

    @abstractmethod
    def read_slice(self, buffer: Array, start: int, stop: int, axis: int) -> Array:
        """See :meth:`Backend.read_slice`."""

    # Of all.

    def write_slices(
        self, buffers: Arrays, updates: Arrays, start: int, stop: int, axis: Axes
    ) -> Arrays:
        """Do :meth:`write_slice` for all `buffers`, ``updates[i]`` to ``buffers[i]``.

        If it raises, no buffer is written or consumed. A framework whose writes can fail overrides
        this default, which keeps that promise for the first buffer only.
        """
        return tuple(
            self.write_slice(buffer, update, start, stop, own_axis)
            for buffer, update, own_axis in zip(
                buffers, updates, axes_of(buffers, axis), strict=True
            )
        )

    def write_row_sets(self, buffers: Arrays, rows: Arrays, index: HostArray, axis: Axes) -> Arrays:
        """Do :meth:`write_rows` for all `buffers`, ``rows[i]`` to ``buffers[i]``.

        If it raises, no buffer is written or consumed; see :meth:`write_slices`.
        """
        return tuple(
            self.write_rows(buffer, own_rows, index, own_axis)
            for buffer, own_rows, own_axis in zip(
                buffers, rows, axes_of(buffers, axis), strict=True
            )
        )

    def read_slices(self, buffers: Arrays, start: int, stop: int, axis: Axes) -> Arrays:
        """Do :meth:`read_slice` for all `buffers`."""
        return tuple(
            self.read_slice(buffer, start, stop, own_axis)
            for buffer, own_axis in zip(buffers, axes_of(buffers, axis), strict=True)
        )

    # For pools, where sequences share buffers: NaN of one would reach the output of another.

    def replace_nonfinite(self, arrays: Arrays, axis: Axes) -> Arrays:
        """Return `arrays`, of one layer of a pool, with finite numbers only.

        Where a key or a value is NaN or infinite, the key is 0 and the value the largest power of
        two of the dtype: in pairs where both arrays have one shape, else for the whole token. Keys
        alone become the root of that power.

        arrays: keys and values, or keys alone. axis: that of the tokens.

        Waits for no computation: where the framework computes asynchronously, this is one more.
        """
        return self.traced_replace_nonfinite(arrays, axis)

    def write_finite_slices(
        self, buffers: Arrays, updates: Arrays, start: int, stop: int, axis: Axes
    ) -> Arrays:
        """Do :meth:`write_slices` after :meth:`replace_nonfinite`."""
        return self.write_slices(buffers, self.replace_nonfinite(updates, axis), start, stop, axis)

    def row_index(self, index: HostArray) -> RowIndex:
        """Return `index`, int32 and not empty, in the form for :meth:`write_finite_row_sets`.

        A pool asks for it once per pass, and writes every layer with it. By default `index` itself.
        """
        return index

    def write_finite_row_sets(
        self, buffers: Arrays, rows: Arrays, index: RowIndex, axis: Axes
    ) -> Arrays:
        """Do :meth:`write_row_sets` after :meth:`replace_nonfinite`.

        index: of :meth:`row_index`.
        """
        return self.write_row_sets(buffers, self.replace_nonfinite(rows, axis), index, axis)
