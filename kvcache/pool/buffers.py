"""Buffers of a pool on the device, for every layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import chain, repeat
from typing import TypeAlias

import numpy as np

from kvcache._types import Indices, Int32s
from kvcache.backends import Array, Backend, HostArray, nbytes, transfer
from kvcache.backends.base import FastKey
from kvcache.errors import KVCacheError, SnapshotMismatchError
from kvcache.snapshots.rows import LayerRows
from kvcache.storage.arrays import LayerArrays, NamedArray, check_layer_form
from kvcache.storage.lengths import padded_index

from .checks import check_arrays, check_fit
from .exchange import check_form, convert, form_of, traced_form_of
from .layouts import HOST_LAYOUT, ArrayLayout, Arrays
from .originals import OriginalKeys, Shift
from .owned import Commit
from .plan import Pass, PoolState
from .rows import PendingRows, PendingWrites

Likeness: TypeAlias = tuple[int, *tuple[FastKey, ...]]
"""Number of tokens in a pass, and a key of every array put in it."""


class PoolBuffers:
    """Buffers of `cells` cells for every layer, allocated by the first put of the layer.

    layouts: of the arrays of a layer. Layers may differ in heads and head_dim, and one may hold
        only the first of the arrays (keys only: latent attention, MLA). Layouts and arrays are
        therefore paired by ``zip(..., strict=False)``.

    Programs may hold the buffers for a time (:meth:`export_state`), and rows may be queued to be
    written (:meth:`enqueue_rows`). Every access settles both first.

    A write or a conversion may consume its buffer (JAX), so its successor is stored in the same
    statement. What fails half-way is done again by the next access: a buffer in either form is
    taken back, and queued rows are written anew, to the same cells.
    """

    def __init__(
        self, backend: Backend, layouts: Sequence[ArrayLayout], dtype: str, cells: int
    ) -> None:
        backend.dtype(dtype)  # raises if the backend lacks it
        self.backend = backend
        self.layouts = tuple(layouts)
        self._token_axes = tuple(layout.token_axis for layout in self.layouts)
        # By the number of arrays of a layer: one axis where all have the same, which is faster.
        self._axes_by_count = [
            axes[0] if len(set(axes)) == 1 else axes
            for axes in (self._token_axes[:count] for count in range(len(self.layouts) + 1))
        ]
        self.dtype = dtype
        self.cells = cells
        self._layers: dict[int, Arrays] = {}
        # What the last arrays of a layer were like: others like them need no checks.
        self._checked: dict[int, Likeness | None] = {}
        self._originals = OriginalKeys(backend, dtype, self.layouts[0])
        # The buffers as exported last, unless the cache has used them since.
        self._exported: PoolState | None = None
        self._maybe_traced = False  # True while any buffer may be in the form for programs
        self.pending = PendingWrites()
        """Rows to write before the next access."""

    def _settled(self) -> dict[int, Arrays]:
        """Return the buffers by layer, back from programs and with all pending rows written."""
        if self._maybe_traced:
            self._take_back()
        if self.pending.queue:
            self.pending.drain()
        return self._layers

    # Programs.

    def export_state(self) -> PoolState:
        """Return all buffers by layer in the form for :mod:`kvcache.functional`."""
        # Exported twice without use in between, the state is the same: no conversion.
        if self._exported is None or self.pending.queue:
            with self.pending.lock:
                layers = self._settled()
                self._maybe_traced = True
                convert(layers, self.backend.traced_form)
                self._exported = dict(layers)
        return self._exported

    def prepare_import(self, state: PoolState) -> Commit:
        """Return a commit to replace the buffers by those of `state`, derived from exported ones.

        Raises: ShapeError if layers, shapes or dtypes differ.
        """
        # Pending rows stay in the queue: they belong in the buffers returned by the programs.
        if self._exported is None:
            expected = traced_form_of(self.backend, self._layers, self.dtype)
        else:
            expected = form_of(self._exported)
        check_form(expected, state)
        imported, layers = dict(state), dict(state)

        def commit() -> None:
            with self.pending.lock:
                self._layers, self._exported, self._maybe_traced = layers, imported, True

        return commit

    def _take_back(self) -> None:
        with self.pending.lock:  # another thread may be reading rows
            self._exported = None
            convert(self._layers, lambda buffer: self.backend.from_traced(buffer, self.dtype))
            self._maybe_traced = False

    # Passes.

    def empty(self, layout: ArrayLayout, lead: tuple[int, ...] = ()) -> Array:
        """Return an array without tokens in `layout`, with the axes `lead` in front."""
        return self.backend.alloc([*lead, *layout.shape(1, 0, 1)], self.dtype)

    def allocate(self, layers: Iterable[int], kv_heads: int, dims: Sequence[int]) -> None:
        """Allocate the buffers of all `layers`, or of none, before their first put.

        dims: head_dim of each array.

        Raises: ShapeError for a layer that exists with other sizes.
        """
        pairs = list(zip(self.layouts, dims, strict=False))
        shapes = [layout.shape(kv_heads, self.cells, dim) for layout, dim in pairs]
        wanted, held = list(layers), self._settled()
        for layer in wanted:
            if layer in held:
                check_fit(self.layouts, layer, shapes, held[layer])
        new = {layer: self._alloc(shapes) for layer in set(wanted) - held.keys()}
        with self.pending.lock:  # another thread may be going through the layers
            held.update(new)

    def put(self, layer: int, arrays: Arrays, forward_pass: Pass) -> None:
        """Store the tokens of a pass in its cells, with finite numbers only.

        Raises: DTypeError, ShapeError. Whatever fails: nothing but cells of the pass was written,
            every buffer is usable, and the first put of a layer has not allocated it.
        """
        likeness = self._likeness(arrays, forward_pass.cells.size)
        if likeness is None or likeness != self._checked.get(layer):
            self._validate(layer, arrays, forward_pass.cells.size, self._settled().get(layer))
        # Another thread may read rows of a snapshot: it must not find consumed buffers.
        with self.pending.lock:
            layers = self._settled()
            buffers = layers.get(layer) or self._alloc_like(arrays)
            axis, first = self._axes_by_count[len(arrays)], forward_pass.first_cell
            if not forward_pass.stores:
                layers[layer] = buffers
            # Unpacked from map(): Python runs signal handlers when a call returns, before its
            # result is assigned, and the buffers may be consumed by then. None runs meanwhile.
            elif first is None:
                index = forward_pass.row_index
                if index is None:
                    index = forward_pass.row_index = self.backend.row_index(forward_pass.cells)
                write_rows = self.backend.write_finite_row_sets
                [layers[layer]] = map(write_rows, (buffers,), (arrays,), (index,), (axis,))
            else:
                write, stop = self.backend.write_finite_slices, first + forward_pass.cells.size
                [layers[layer]] = map(write, (buffers,), (arrays,), (first,), (stop,), (axis,))
        self._checked[layer] = likeness  # at last: what fails here may not have allocated the layer

    def _likeness(self, arrays: Arrays, tokens: int) -> Likeness | None:
        """Return what is checked of `arrays` in a form that is quick to compare, None if unfit."""
        try:
            return tokens, *map(self.backend.fast_key, arrays)
        except (AttributeError, TypeError):  # no arrays of this framework: the check names them
            return None

    def whole(self, layer: int) -> Arrays:
        """Return the buffers of a layer, to be read only. Raises: as :meth:`get`."""
        if layer not in (layers := self._settled()):
            raise KVCacheError(f"layer {layer} was never put. Put it before you get it.")
        return layers[layer]

    def get(self, layer: int, forward_pass: Pass) -> Arrays:
        """Return the arrays of the range of the pass, as views where the framework has views.

        Raises: KVCacheError for a layer that was never put.
        """
        buffers = self.whole(layer)
        start, stop = forward_pass.start, forward_pass.stop
        if start == 0 and stop == self.cells:
            rebinds = self.backend.assignment_rebinds
            return tuple(buffer[...] for buffer in buffers) if rebinds else buffers
        return self.backend.read_slices(buffers, start, stop, self._axes_by_count[len(buffers)])

    # Removal from the middle.

    def prepare_shift(self, cells: Int32s, moved: Int32s, offset: int, shift: Shift) -> Commit:
        """Shift the keys of `cells` by `offset` positions; return the commit, which stores them.

        moved: number of positions by which each of these keys was shifted before, int32 [tokens].

        Raises: DTypeError, ShapeError for a result unlike the keys; whatever `shift` raises.
        """
        keys = {layer: buffers[0] for layer, buffers in self._settled().items()}
        sources, shifted = self._originals.shift(keys, cells, moved, offset, shift)
        keys_alone = {layer: (rows,) for layer, rows in shifted.items()}
        # Queued as restored rows are, so that the commit calls no framework.
        write = partial(self._write_copies, cells, keys_alone)
        to_host = partial(self._copies_to_host, keys_alone, cells.size)
        pending = PendingRows(cells.astype(np.int64), write, to_host)

        def commit() -> None:
            self._originals.buffers.update(sources)
            self.pending.enqueue(pending)

        return commit

    def prepare_copy(self, cells: Int32s, targets: Indices) -> PendingRows:
        """Copy the content of `cells` in all layers, to be queued and written to `targets`.

        targets: as many cells, which may be filled in until the rows are queued.
        """
        index = padded_index(self.backend, cells.astype(np.int64)).astype(np.int32)
        copies = {
            layer: tuple(map(self.backend.gather, buffers, repeat(index), self._token_axes))
            for layer, buffers in self._settled().items()
        }
        originals = self._originals.read(index)
        # What is computed lazily fails here, not in the middle of a later pass.
        self.backend.sync(*chain(*copies.values()), *originals.values())

        def write() -> None:
            own = padded_index(self.backend, targets).astype(np.int32)
            self._write_copies(own, copies)
            self._originals.write(own, originals)

        return PendingRows(targets, write, partial(self._copies_to_host, copies, cells.size))

    def _write_copies(self, cells: Int32s, copies: Mapping[int, Arrays]) -> None:
        """Write queued rows, of the first arrays of a layer or of all; in the passes' thread."""
        for layer, rows in copies.items():
            held, axes = self._layers[layer], self._axes_by_count[len(rows)]
            write, others = self.backend.write_row_sets, held[len(rows) :]
            self._layers[layer] = (*write(held[: len(rows)], rows, cells, axes), *others)

    def _copies_to_host(self, copies: Mapping[int, Arrays], tokens: int) -> LayerRows:
        """Return the first `tokens` queued rows of each layer on the host."""

        def on_host(layout: ArrayLayout, rows: Array) -> NamedArray:
            return NamedArray(
                layout.name, layout.to_host_layout(self.backend.to_host(rows), tokens)
            )

        # A layer may have fewer arrays than there are layouts.
        return {layer: tuple(map(on_host, self.layouts, rows)) for layer, rows in copies.items()}

    # Copies.

    def to_backend(
        self, backend: Backend, layouts: Sequence[ArrayLayout], cells: int
    ) -> PoolBuffers:
        """Return copies of all layers on `backend`. cells: at least as many as here."""
        clone = PoolBuffers(backend, layouts, self.dtype, cells)
        for layer, buffers in self._settled().items():
            parts = zip(buffers, self.layouts, clone.layouts, strict=False)
            clone._layers[layer] = tuple(
                clone._copied(transfer(buffer, self.backend, backend, old.axes), old, new)
                for buffer, old, new in parts
            )
        for layer, keys in self._originals.buffers.items():
            old, new = self.layouts[0], clone.layouts[0]
            moved = transfer(keys, self.backend, backend, old.axes)
            clone._originals.buffers[layer] = clone._copied(moved, old, new)
        return clone

    def _copied(self, rows: Array, old: ArrayLayout, new: ArrayLayout) -> Array:
        """Return a buffer in layout `new`, its first cells a copy of `rows` in layout `old`."""
        if new.axes != old.axes:  # on the host, which moves bits and never computes with them
            order = [old.axes.index(axis) for axis in new.axes]
            turned = self.backend.to_host(rows).transpose(order)
            rows = self.backend.from_host_axes(turned, new.axes)
        tokens = rows.shape[new.token_axis]
        buffer = self.backend.alloc_axes(new.resized(rows, self.cells), self.dtype, new.axes)
        buffer = self.backend.write_slice(buffer, rows, 0, tokens, new.token_axis)
        self.backend.sync(buffer)  # `rows` may share memory with the other pool, soon changed
        return buffer

    # Rows on the host.

    @property
    def token_bytes(self) -> int:
        """Bytes of one cell in all layers allocated."""
        layers = list(self._layers.values())  # a list: a pass may add a layer meanwhile
        shapes = [tuple(buffer.shape) for buffers in layers for buffer in buffers]
        return sum(nbytes(shape, self.dtype) for shape in shapes) // self.cells

    @property
    def layers(self) -> PoolState:
        """Buffers by layer, to look at their numbers and shapes only."""
        return self._layers

    def read(self, cells: Indices) -> LayerRows:
        """Return host copies of the content of `cells`; from any thread.

        Pending rows are overlaid on the copies, not written, and buffers stay in the form for
        programs: a pass or a program may be using them, and on some backends (JAX) a write or a
        conversion would consume them.
        """
        with self.pending.lock:
            rows: LayerRows = {
                layer: tuple(
                    NamedArray(layout.name, self._read_host_rows(buffer, layout, cells))
                    for layout, buffer in zip(self.layouts, buffers, strict=False)
                )
                for layer, buffers in self._layers.items()
            }
            self.pending.overlay(rows, cells)
        return rows

    def _read_host_rows(self, buffer: Array, layout: ArrayLayout, cells: Indices) -> HostArray:
        """Return the rows in `cells` of one array, in :data:`HOST_LAYOUT`."""
        index = padded_index(self.backend, cells)
        rows = self.backend.gather(buffer, index, layout.token_axis)
        rows = self.backend.from_traced(rows, self.dtype)  # consumes the copied rows, if any
        return layout.to_host_layout(self.backend.to_host(rows), cells.size)

    def check_rows(self, *parts: LayerRows) -> None:
        """Raise SnapshotMismatchError unless `parts`, to be restored together, fit the layers.

        Those allocated, and for others one another and rows that are queued already.
        """
        names = [layout.name for layout in self.layouts]
        for layer in dict.fromkeys(layer for rows in parts for layer in rows):
            queued = [] if layer in self._layers else self.pending.rows_of(layer)
            given = [rows.get(layer, ()) for rows in parts]
            check_layer_form([*queued, *given], names, len(HOST_LAYOUT.axes), self.dtype)
            if layer not in self._layers:
                self._check_new(next(arrays for arrays in given if arrays))
        for layer, buffers in list(self._layers.items()):
            pairs = zip(self.layouts, buffers, strict=False)
            own = [layout.sizes(buffer) for layout, buffer in pairs]
            for rows in parts:
                given_sizes = [HOST_LAYOUT.sizes(array.data) for array in rows.get(layer, ())]
                if own != given_sizes:
                    raise SnapshotMismatchError(
                        "a snapshot goes back to layers of the same heads and head_dim; "
                        f"layer {layer} has {own}, got {given_sizes}."
                    )

    def _check_new(self, arrays: LayerArrays) -> None:
        """Raise ShapeError if the backend takes no layer of such rows: a later pass would do so."""
        pairs = zip(self.layouts, arrays, strict=False)
        sizes = [(layout, *HOST_LAYOUT.sizes(array.data)) for layout, array in pairs]
        self._alloc([layout.shape(heads, 0, dim) for layout, heads, dim in sizes])

    def enqueue_rows(self, cells: Indices, rows: LayerRows) -> None:
        """Queue `rows` to be written to `cells` before the next access; from any thread."""
        if rows:
            write = partial(self._write_host_rows, cells, rows)
            self.pending.enqueue(PendingRows(cells, write, lambda: rows))

    def _write_host_rows(self, cells: Indices, rows: LayerRows) -> None:
        """Write queued rows, allocating layers not put yet; in the thread of the passes."""
        # Rows are padded like their index: the last one is written several times.
        index = padded_index(self.backend, cells).astype(np.int32)
        for layer, arrays in rows.items():
            pairs = list(zip(self.layouts, arrays, strict=False))
            moved = tuple(
                self.backend.from_host_axes(layout.from_host_layout(rows.data), layout.axes)
                for layout, rows in ((layout, array.pad(index.size)) for layout, array in pairs)
            )
            buffers = self._layers.get(layer) or self._alloc_like(moved)
            axes = self._axes_by_count[len(moved)]
            # A new layer is stored only once it is written.
            self._layers[layer] = self.backend.write_row_sets(buffers, moved, index, axes)

    def free(self) -> None:
        """Free all memory, and drop pending rows. What fails to be freed goes with its last use."""
        with self.pending.lock:  # another thread may be reading rows
            freed = [*self._layers.values(), tuple(self._originals.buffers.values())]
            self._layers, self._exported, self._maybe_traced = {}, None, False
            self._originals.buffers, self._checked = {}, {}
            self.pending.clear()
            for buffer in (buffer for buffers in freed for buffer in buffers):
                self.backend.free(buffer)

    # Checks.

    def _validate(self, layer: int, arrays: Arrays, tokens: int, buffers: Arrays | None) -> None:
        """Raise DTypeError or ShapeError unless `arrays` hold `tokens` tokens and fit `buffers`."""
        check_arrays(self.backend, self.dtype, self.layouts, arrays, tokens)
        if buffers is not None:
            check_fit(self.layouts, layer, [array.shape for array in arrays], buffers)

    def _alloc_like(self, arrays: Sequence[Array]) -> Arrays:
        pairs = zip(self.layouts, arrays, strict=False)
        return self._alloc([layout.resized(array, self.cells) for layout, array in pairs])

    def _alloc(self, shapes: Iterable[Sequence[int]]) -> Arrays:
        pairs, alloc = zip(self.layouts, shapes, strict=False), self.backend.alloc_axes
        return tuple(alloc(shape, self.dtype, layout.axes) for layout, shape in pairs)
