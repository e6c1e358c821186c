"""The encoder cache: keys and values for cross-attention, stored once per sequence."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from kvcache._checks import check_ids, check_range, check_sizes
from kvcache.backends import Array, Backend, CacheConfig, HostArray, get_backend, transfer
from kvcache.errors import DTypeError, KVCacheError, ShapeError
from kvcache.snapshots.rows import LayerRows, TokenRows
from kvcache.snapshots.snapshot import CacheSpec, Part
from kvcache.snapshots.visibility import Visibility
from kvcache.storage.arrays import LayerArrays, NamedArray
from kvcache.storage.masks import device_mask

from .base import Cache, Commit
from .batch import Batch
from .buffers import ArrayLayout, Arrays, kv_layouts

FRAME_AXES = "thd"
"""Axes of encoder output on the host, without the row axis: frames, kv_heads, head_dim."""


@dataclass
class _Entry:
    """Encoder output of one sequence by layer, and its position in the sequence."""

    position: int
    layers: dict[int, Arrays] = field(default_factory=dict)


class EncoderCache(Cache):
    """Keys and values of encoder output, one set per sequence, visible from all its tokens.

    For models with cross-attention: vision (Llama 3.2), speech (Whisper). A pass with `multimodal`
    tokens in its batch brings encoder output for their sequences, and :meth:`put` replaces the
    earlier output of these. Other passes only :meth:`get`.
    """

    def __init__(self) -> None:
        super().__init__()
        self._config = CacheConfig()
        self._backend: Backend | None = None
        self._entries: dict[int, _Entry] = {}
        # Entries that `put` writes to: a reserve pass has others, and so leaves no trace.
        self._passing = self._entries
        self._layer = 0
        self._batch: Batch | None = None

    def set_config(self, config: CacheConfig) -> None:
        if self._backend is not None:
            raise KVCacheError("set_config comes before init. Make a new cache.")
        self._config = config

    def init(
        self,
        backend: str | Backend,
        dtype: str = "float32",
        *,
        max_sequences: int = 1,
        capacity: int = 1,
        max_batch: int = 1,
    ) -> None:
        """Size the cache. Output has any length, so `capacity` and `max_batch` are ignored."""
        check_sizes(max_sequences=max_sequences)
        self._backend = get_backend(backend)
        self._dtype, self._max_sequences = dtype, max_sequences
        self._backend.dtype(dtype)

    def _bound(self) -> Backend:
        """Return the backend. Raises: KVCacheError before :meth:`init`."""
        if self._backend is None:
            raise KVCacheError("a cache is sized first. Call init.")
        return self._backend

    @property
    def _layouts(self) -> tuple[ArrayLayout, ...]:
        return kv_layouts(self._config)

    @property
    def encoder_cached(self) -> bool:
        """True if every sequence of the current pass has its encoder output stored."""
        return self._batch is not None and all(
            sequence in self._entries for sequence in _sequences(self._batch)
        )

    # Passes.

    def prepare_forward(self, batch: Batch, reserve: bool) -> Commit:
        self._bound()
        check_ids(self._max_sequences, *set(batch.sequences.tolist()))

        def commit() -> None:
            self._batch = batch
            self._passing = {} if reserve else self._entries

        return commit

    def _current(self) -> Batch:
        if self._batch is None:
            raise KVCacheError("put and get belong to a pass. Call start_forward first.")
        return self._batch

    # Layers.

    def set_layer(self, layer: int) -> None:
        self._layer = layer

    def put(self, keys: Array, values: Array | None = None) -> None:
        """Store encoder output, ``[kv_heads, frames, head_dim]``, of the multimodal tokens.

        For several sequences in one pass, the arrays hold equally many frames of each, one
        sequence after the other. Frames are copied; NaN and infinity are replaced, as in a
        :class:`CausalCache`.

        Raises: DTypeError, ShapeError, KVCacheError without a pass; nothing is stored then.
        """
        arriving = _arriving(self._current())
        if values is None:
            raise DTypeError(
                f"values must be {self._dtype} arrays of {self._bound().spec}, as the keys; "
                "got None. Put both."
            )
        for layout, array in zip(self._layouts, (keys, values), strict=True):
            self._check(layout, array, len(arriving))
        frames = [
            array.shape[layout.token_axis]
            for layout, array in zip(self._layouts, (keys, values), strict=True)
        ]
        if frames[0] != frames[1]:
            raise ShapeError(
                f"keys and values have the same frames; got {tuple(keys.shape)} and "
                f"{tuple(values.shape)}."
            )
        # All pieces are made before the first is stored: an error stores nothing.
        pieces = [
            self._split(layout, array, len(arriving))
            for layout, array in zip(self._layouts, self._finite((keys, values)), strict=True)
        ]
        for (sequence, position), arrays in zip(
            arriving.items(), zip(*pieces, strict=True), strict=True
        ):
            entry = self._passing.setdefault(sequence, _Entry(position))
            entry.position = position
            entry.layers[self._layer] = arrays

    def _finite(self, arrays: Arrays) -> Arrays:
        """Return `arrays` with finite numbers only: neighbours meet them in :meth:`get`."""
        return self._bound().replace_nonfinite(
            arrays, [layout.token_axis for layout in self._layouts]
        )

    def _check(self, layout: ArrayLayout, array: Array, parts: int) -> None:
        """Raise DTypeError or ShapeError unless `array` holds frames for `parts` sequences."""
        backend = self._bound()
        if not backend.owns(array) or backend.dtype_name(array) != self._dtype:
            raise DTypeError(
                f"{layout.name} must be {self._dtype} arrays of {backend.spec}; got "
                f"{type(array).__name__} of {getattr(array, 'dtype', 'no dtype')}. Convert them."
            )
        axis = layout.token_axis
        if len(array.shape) != 3 or not parts or array.shape[axis] % parts:
            raise ShapeError(
                f"{layout.name} hold equally many frames in layout {layout.axes!r} for each of "
                f"the {parts} sequences with multimodal tokens in the batch; "
                f"got {tuple(array.shape)}."
            )

    def _split(self, layout: ArrayLayout, array: Array, parts: int) -> list[Array]:
        """Return copies of the frames in `array`, cut into `parts` arrays of equal length."""
        backend, axis = self._bound(), layout.token_axis
        frames = array.shape[axis] // parts
        pieces = [backend.slice(array, i * frames, (i + 1) * frames, axis) for i in range(parts)]
        # concat copies even a single array, where a slice may be a view of the caller's memory.
        return [backend.concat([piece], axis) for piece in pieces]

    def get(self) -> tuple[Array, Array | None, Array | None]:
        """Return keys and values of the pass's sequences, in order of appearance.

        Both are ``[kv_heads, frames, head_dim]`` (layout ``"htd"``), concatenated over the
        sequences. The mask is None for one sequence, whose tokens see all frames. For several it
        is ``[tokens, frames]``, and every token sees the frames of its own sequence only.

        Raises: KVCacheError without a pass, or for a sequence without output in this layer.
        """
        batch, backend = self._current(), self._bound()
        sequences = _sequences(batch)
        outputs = [self._entry(sequence).layers[self._layer] for sequence in sequences]
        if len(outputs) == 1:
            keys, values = outputs[0]
            return keys, values, None
        key_axis, value_axis = (layout.token_axis for layout in self._layouts)
        owners = np.repeat(sequences, [keys.shape[key_axis] for keys, _ in outputs])
        return (
            backend.concat([keys for keys, _ in outputs], key_axis),
            backend.concat([values for _, values in outputs], value_axis),
            device_mask(backend, self._config.mask_dtype, batch.sequences[:, None] == owners),
        )

    def _entry(self, sequence: int) -> _Entry:
        """Return the output of a sequence in the current pass, else the stored output.

        Raises: KVCacheError if it has none in the current layer.
        """
        entry = self._passing.get(sequence) or self._entries.get(sequence)
        if entry is None or self._layer not in entry.layers:
            raise KVCacheError(
                f"layer {self._layer} of sequence {sequence} holds no encoder output. "
                "Put it in a pass whose batch names its multimodal token."
            )
        return entry

    # Sequences.

    def prepare_copy_prefix(self, source: int, target: int, length: int) -> Commit:
        check_ids(self._max_sequences, source, target)
        entry = self._entries.get(source)
        shared = entry if entry is not None and entry.position < length else None

        def commit() -> None:
            if shared is None:
                self._entries.pop(target, None)
            else:
                # A dict of its own, so that a put for one sequence leaves the other alone. The
                # arrays are shared: puts replace arrays, and never write to them.
                self._entries[target] = _Entry(shared.position, dict(shared.layers))

        return commit

    def prepare_remove(self, sequence: int, start: int, stop: int | None) -> Commit:
        check_ids(self._max_sequences, sequence)
        check_range(start, stop)
        entry = self._entries.get(sequence)
        removed = (
            entry is not None
            and start <= entry.position
            and (stop is None or entry.position < stop)
        )

        def commit() -> None:
            if removed:
                del self._entries[sequence]
            elif entry is not None and stop is not None and entry.position >= stop:
                entry.position -= stop - start

        return commit

    def can_resume(self, sequence: int, position: int) -> bool:
        return True

    # Snapshots.

    @property
    def max_sequences(self) -> int:
        return self._max_sequences

    @property
    def specs(self) -> list[CacheSpec]:
        return [CacheSpec("encoder", Visibility(window=0), self._dtype)]

    def next_position(self, sequence: int) -> int:
        entry = self._entries.get(sequence)
        return 0 if entry is None else entry.position + 1

    def schedule(self, sequence: int, positions: Iterable[int]) -> None:
        """Do nothing: encoder output stays."""

    def capture(self, sequence: int, start: int, stop: int) -> list[Part]:
        """Return encoder output as one row at its position, copied to the host."""
        [spec] = self.specs
        entry, rows = self._entries.get(sequence), TokenRows(np.empty(0, np.int32))
        if entry is not None and start <= entry.position < stop:
            layers = {layer: self._as_row(arrays) for layer, arrays in entry.layers.items()}
            rows = TokenRows(np.array([entry.position], np.int32), layers)
        return [Part(spec, rows)]

    def _as_row(self, arrays: Arrays) -> LayerArrays:
        """Return all frames as one row, ``[frames, kv_heads, 1, head_dim]``, for each array."""
        # The axis of length 1 is the token axis: the frames count as one token.
        return tuple(
            NamedArray(layout.name, self._frames_of(array, layout)[:, :, None])
            for layout, array in zip(self._layouts, arrays, strict=True)
        )

    def _frames_of(self, array: Array, layout: ArrayLayout) -> HostArray:
        order = [layout.axes.index(axis) for axis in FRAME_AXES]
        return np.array(self._bound().to_host(array).transpose(order), order="C")

    def prepare_restore(
        self, sequence: int, parts: Sequence[Sequence[Part]], position: int
    ) -> Commit:
        if sequence in self._entries:
            raise ValueError(f"what is restored goes to an empty sequence; {sequence} holds some.")
        # A sequence has one output: that of the latest snapshot with any.
        latest = [part.rows for [part] in parts if part.rows.positions.size][-1:]
        entries = [self._entry_of(rows) for rows in latest]  # copied now, as it may raise

        def commit() -> None:
            for entry in entries:
                self._entries[sequence] = entry

        return commit

    def _entry_of(self, rows: TokenRows) -> _Entry:
        """Return the last of `rows` as an entry, copied to the device."""
        last: LayerRows = rows.read(np.array([rows.positions.size - 1]))
        layers = {layer: self._from_row(arrays) for layer, arrays in last.items()}
        return _Entry(int(rows.positions[-1]), layers)

    def _from_row(self, row: LayerArrays) -> Arrays:
        if len(row) != len(self._layouts):
            raise ShapeError("an encoder's output has values in every layer.")
        arrays = tuple(
            self._bound().from_host(
                array.data[:, :, 0].transpose([FRAME_AXES.index(axis) for axis in layout.axes])
            )
            for layout, array in zip(self._layouts, row, strict=True)
        )
        return self._finite(arrays)

    def to_backend(self, backend: str | Backend) -> Self:
        target, clone = get_backend(backend), copy(self)
        clone.lock, clone._batch = threading.RLock(), None
        entries: dict[int, _Entry] = {}
        if self._backend is not None:
            target.dtype(self._dtype)
            clone._backend = target
            entries = self._transferred(self._backend, target)
        clone._passing = clone._entries = entries
        return clone

    def _transferred(self, source: Backend, target: Backend) -> dict[int, _Entry]:
        """Return all entries on `target`, sharing memory where possible: it is never written to."""
        layers = [arrays for entry in self._entries.values() for arrays in entry.layers.values()]
        # By identity, so that sequences with a common output still share it afterwards.
        distinct = {id(array): array for arrays in layers for array in arrays}
        moved = {key: transfer(array, source, target) for key, array in distinct.items()}
        return {
            sequence: _Entry(
                entry.position,
                {
                    layer: tuple(moved[id(array)] for array in arrays)
                    for layer, arrays in entry.layers.items()
                },
            )
            for sequence, entry in self._entries.items()
        }

    def close(self) -> None:
        self._entries.clear()
        self._batch = None


def _sequences(batch: Batch) -> list[int]:
    """Return the sequences of a batch, in order of appearance."""
    return list(dict.fromkeys(batch.sequences.tolist()))


def _arriving(batch: Batch) -> dict[int, int]:
    """Return the sequences with new encoder output in a pass, and the position of each."""
    sequences = _sequences(batch)
    # With one sequence there is no doubt, so its batch need not name a token.
    if not batch.multimodal and len(sequences) == 1:
        return {sequences[0]: 0}
    return {int(batch.sequences[i]): int(batch.positions[i]) for i in batch.multimodal}
