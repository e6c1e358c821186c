"""Encoder output of one sequence: entries of an encoder cache, and rows of a snapshot.

A row is one frame: all frames of an output have the position of the token that brought it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

from kvcache.backends import Backend, transfer
from kvcache.errors import ShapeError
from kvcache.snapshots.rows import LayerRows, TokenRows
from kvcache.storage.arrays import LayerArrays, NamedArray, check_layer_form, concat_layers

from .layouts import ArrayLayout, Arrays

ROW_AXES = "htd"
"""Axes of encoder output on the host: kv_heads, frames, head_dim."""


class Entry(NamedTuple):
    """Encoder output of one sequence, and its position in the sequence; never changed.

    layers: the output by layer. rows: the same as rows on the host, while a later output takes its
    place. An output that was not kept has neither. before: the output that it replaced.
    """

    position: int
    layers: Mapping[int, Arrays]
    before: Entry | None = None
    rows: LayerRows | None = None

    @property
    def kept(self) -> bool:
        """True if its output is there, and not only its position."""
        return bool(self.layers or self.rows)

    def chain(self) -> Iterator[Entry]:
        """Yield this entry and those that it replaced, the latest first."""
        entry: Entry | None = self
        while entry is not None:
            yield entry
            entry = entry.before

    def below(self, position: int) -> Entry | None:
        """Return the latest entry below `position`, None if there is none."""
        return next((entry for entry in self.chain() if entry.position < position), None)

    def forgotten(self) -> Entry:
        """Return the entry without its output."""
        return Entry(self.position, {}, self.before)

    def without(self, start: int, stop: int | None) -> Entry | None:
        """Return the entry that is the latest once positions ``[start, stop)`` are removed."""
        latest: Entry | None = None
        for entry in [*self.chain()][::-1]:  # no recursion: a sequence may have had many images
            position = position_after(entry.position, start, stop)
            if position is not None:
                latest = entry._replace(position=position, before=latest)
        return latest


Entries: TypeAlias = Mapping[int, Entry]
"""Latest entries by sequence: replaced, not changed, so that a pass keeps those it began with."""


def position_after(position: int, start: int, stop: int | None) -> int | None:
    """Return `position` once ``[start, stop)`` is removed; None if it lies in there."""
    if position < start:
        return position
    return None if stop is None or position < stop else position - (stop - start)


def transferred(
    entries: Entries, layouts: Sequence[ArrayLayout], source: Backend, target: Backend
) -> Entries:
    """Return `entries` on `target`, sharing memory where possible: it is never written to."""
    chains = [entry for latest in entries.values() for entry in latest.chain()]
    layers = [arrays for entry in chains for arrays in entry.layers.values()]
    # By identity, so that sequences with a common output still share it afterwards.
    distinct = {
        id(array): (array, layout.axes)
        for arrays in layers
        for array, layout in zip(arrays, layouts, strict=True)
    }
    moved = {key: transfer(array, source, target, axes) for key, (array, axes) in distinct.items()}

    def on_target(latest: Entry) -> Entry:
        *earlier, first = latest.chain()
        moved_entry = moved_from(first, None)
        for entry in reversed(earlier):
            moved_entry = moved_from(entry, moved_entry)
        return moved_entry

    def moved_from(entry: Entry, before: Entry | None) -> Entry:
        layers = {
            layer: tuple(moved[id(array)] for array in arrays)
            for layer, arrays in entry.layers.items()
        }
        return entry._replace(layers=layers, before=before)

    return {sequence: on_target(latest) for sequence, latest in entries.items()}


# Rows.


def captured(
    backend: Backend, layouts: Sequence[ArrayLayout], entry: Entry | None, start: int, stop: int
) -> TokenRows:
    """Return the frames of all outputs kept at positions ``[start, stop)``, on the host.

    Raises: ShapeError for an output with other numbers of frames in other layers.
    """
    chain = [] if entry is None else [*entry.chain()][::-1]
    inside = [entry for entry in chain if entry.kept and start <= entry.position < stop]
    if not inside:
        return TokenRows(np.empty(0, np.int32))
    outputs = [_rows_of(backend, layouts, entry) for entry in inside]
    counts = [_frames(rows) for rows in outputs]
    positions = np.repeat(np.array([entry.position for entry in inside], np.int32), counts)
    layers = outputs[0]
    if len(outputs) > 1:
        layers = {layer: concat_layers([rows[layer] for rows in outputs]) for layer in layers}
    return TokenRows(positions, layers)


def _rows_of(backend: Backend, layouts: Sequence[ArrayLayout], entry: Entry) -> LayerRows:
    if entry.rows:
        return entry.rows
    return {layer: _to_rows(backend, layouts, arrays) for layer, arrays in entry.layers.items()}


def _to_rows(backend: Backend, layouts: Sequence[ArrayLayout], arrays: Arrays) -> LayerArrays:
    rows = []
    for layout, array in zip(layouts, arrays, strict=True):
        order = [layout.axes.index(axis) for axis in ROW_AXES]
        frames = np.array(backend.to_host(array).transpose(order), order="C")
        rows.append(NamedArray(layout.name, frames))
    return tuple(rows)


def _frames(rows: LayerRows) -> int:
    """Return the number of frames of one output. Raises: ShapeError unless layers agree."""
    counts: set[int] = {array.data.shape[1] for arrays in rows.values() for array in arrays}
    if len(counts) > 1:
        raise ShapeError(
            "output in a snapshot has as many frames in every layer; got "
            f"{', '.join(map(str, sorted(counts)))}."
        )
    return counts.pop()


def restored(parts: Sequence[TokenRows], stop: int) -> Entry | None:
    """Return the latest of all outputs before `stop` in `parts`, with the rows of each."""
    entry: Entry | None = None
    for rows in parts:
        content = rows.content()
        positions, starts = np.unique(rows.positions, return_index=True)
        bounds = [*starts.tolist(), rows.positions.size]
        for position, first, end in zip(positions.tolist(), bounds, bounds[1:], strict=False):
            if position < stop:
                layers = {
                    layer: tuple(array._replace(data=array.data[:, first:end]) for array in arrays)
                    for layer, arrays in content.items()
                }
                entry = Entry(position, {}, entry, layers)
    return entry


def on_device(backend: Backend, layouts: Sequence[ArrayLayout], entry: Entry, dtype: str) -> Entry:
    """Return `entry` with its output on the device, copied there if it is on the host.

    Raises: ShapeError for rows without values; SnapshotMismatchError for rows of another form or
        dtype.
    """
    if entry.rows is None:
        return entry
    layers = {
        layer: _from_rows(backend, layouts, rows, dtype) for layer, rows in entry.rows.items()
    }
    return Entry(entry.position, layers, entry.before)


def _from_rows(
    backend: Backend, layouts: Sequence[ArrayLayout], rows: LayerArrays, dtype: str
) -> Arrays:
    """Return the rows of one layer in the layouts of the cache, with finite numbers only."""
    if len(rows) != len(layouts):
        raise ShapeError("an encoder's output has values in every layer.")
    check_layer_form([rows], [layout.name for layout in layouts], len(ROW_AXES), dtype)
    orders = ([ROW_AXES.index(axis) for axis in layout.axes] for layout in layouts)
    # Copies: a snapshot may go on holding these rows, and a framework may share their memory.
    copies = [np.array(a.data.transpose(o), order="C") for a, o in zip(rows, orders, strict=True)]
    axes = (layout.axes for layout in layouts)
    return finite_output(backend, layouts, tuple(map(backend.from_host_axes, copies, axes)))


def finite_output(backend: Backend, layouts: Sequence[ArrayLayout], arrays: Arrays) -> Arrays:
    """Return output with finite numbers only: sequences beside this one read it, too."""
    return backend.replace_nonfinite(arrays, tuple(layout.token_axis for layout in layouts))
