"""The encoder cache: keys and values for cross-attention, stored once per sequence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Self

import numpy as np

from kvcache._checks import as_index, as_indices, as_sizes, check_ids, check_range
from kvcache._interrupts import uninterrupted
from kvcache.backends import Array, Backend, CacheConfig, get_backend
from kvcache.errors import DTypeError, KVCacheError, ShapeError
from kvcache.snapshots.rows import LayerRows, TokenRows
from kvcache.snapshots.snapshot import CacheSpec, Part
from kvcache.snapshots.visibility import Visibility
from kvcache.storage.masks import device_mask

from .base import Cache, Commit
from .batch import Batch
from .checks import check_dtype, check_sizes_of
from .layouts import ArrayLayout, Arrays, kv_layouts
from .output import Entries, Entry, finite_output, from_row, position_after, to_row, transferred


class EncoderCache(Cache):
    """Keys and values of encoder output, one set per sequence, visible from all its tokens.

    For models with cross-attention: vision (Llama 3.2), speech (Whisper). A pass with `multimodal`
    tokens in its batch brings encoder output for their sequences, and :meth:`put` replaces the
    earlier output of these. Other passes only :meth:`get`.

    Output is replaced once a pass has put it for every layer that was ever stored. Until then only
    the pass itself reads what it put. A sequence that is removed meanwhile is read by the pass to
    its end.
    """

    def __init__(self) -> None:
        super().__init__()
        self._config = CacheConfig()
        self._backend: Backend | None = None
        self._forget_all()

    def _forget_all(self) -> None:
        self._entries: Entries = {}
        self._known: frozenset[int] = frozenset()  # layers ever stored
        self._layer = 0
        self._before: dict[str, object] | None = None  # the state before the pass just begun
        self.drop_pass()

    def drop_pass(self) -> None:
        """End the current pass, and forget what it put."""
        self._batch: Batch | None = None
        self._stores = False  # False without a pass, and for a reserve pass, which leaves no trace
        self._seen: Entries = {}  # stored output as the pass found it
        self._staged: Entries = {}  # output that the pass has put
        self._put_layers: frozenset[int] = frozenset()  # its layers
        # Positions of the sequences whose output the pass brings, as far as it is to be stored.
        self._arriving: dict[int, int] = {}

    def pass_complete(self) -> bool:
        """Return whether nothing is missing of the output that the current pass brings.

        Missing is a layer that was ever stored and has not been put. True without a pass, and for
        a pass that brings nothing.
        """
        if not self._stores or self._batch is None:
            return True
        brings = bool(self._batch.multimodal or self._put_layers)
        return not brings or self._known <= self._put_layers

    def _stored(self) -> Entries:
        """Return all output stored, that of the current pass included once this is complete."""
        if not self._put_layers or not self._stores or not self.pass_complete():
            return self._entries
        stored = dict(self._entries)
        for sequence, position in self._arriving.items():
            if sequence in self._staged:
                earlier = stored.get(sequence, Entry(position, {})).layers
                layers = {**earlier, **self._staged[sequence].layers}
                stored[sequence] = Entry(position, layers)
        return stored

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
        [max_sequences] = as_sizes(max_sequences=max_sequences)
        target = get_backend(backend)
        target.dtype(dtype)  # raises if the backend lacks it
        with uninterrupted():
            self._forget_all()
            self._backend, self._dtype, self._max_sequences = target, dtype, max_sequences

    @property
    def backend(self) -> Backend | None:
        return self._backend

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
        """True if every sequence of the current pass has encoder output, stored or put by it."""
        put = self._arriving.keys() & self._staged.keys() if self._stores else set()
        return self._batch is not None and all(
            sequence in self._entries or sequence in put for sequence in _sequences(self._batch)
        )

    # Passes.

    def prepare_forward(self, batch: Batch, reserve: bool) -> Commit:
        self._bound()
        check_ids(self._max_sequences, *set(batch.sequences.tolist()))
        arriving = _arriving(batch)

        self._before = None

        def commit() -> None:
            self._before = dict(vars(self))
            known = self._known | self._put_layers if self.pass_complete() else self._known
            self._entries, self._known = self._stored(), known
            self.drop_pass()
            self._seen, self._arriving = self._entries, arriving
            self._batch, self._stores = batch, not reserve

        return commit

    def revert_forward(self) -> None:
        if self._before is not None:
            vars(self).update(self._before)

    def _current(self) -> Batch:
        self._before = None  # the pass has begun, so output that it replaced may go
        if self._batch is None:
            raise KVCacheError("put and get belong to a pass. Call start_forward first.")
        return self._batch

    # Layers.

    def set_layer(self, layer: int) -> None:
        self._layer = layer if type(layer) is int else as_index(layer, "layer")

    def put(
        self, keys: Array, values: Array | None = None, frames: Sequence[int] | None = None
    ) -> None:
        """Store encoder output, ``[kv_heads, frames, head_dim]``, of the multimodal tokens.

        frames: for several sequences in one pass, number of frames of each. The arrays hold them
            one sequence after the other, in the order of the multimodal tokens. None for one
            sequence: all of them.

        Frames are copied; NaN and infinity are replaced, as in a :class:`CausalCache`.

        Raises: DTypeError, ShapeError, ValueError for frames below 1, KVCacheError without a pass;
            nothing is stored then.
        """
        arriving = _arriving(self._current())
        if values is None:
            raise DTypeError(
                f"values must be {self._dtype} arrays of {self._bound().spec}, as the keys; "
                "got None. Put both."
            )
        # All pieces are made before the first is stored: an error stores nothing.
        lengths = self._lengths(keys, len(arriving), frames)
        pieces = [
            self._split(layout, array, lengths)
            for layout, array in zip(self._layouts, (keys, values), strict=True)
        ]
        outputs = [
            finite_output(self._bound(), self._layouts, output)
            for output in zip(*pieces, strict=True)
        ]
        with self.lock:
            staged = dict(self._staged)
            for (sequence, position), output in zip(arriving.items(), outputs, strict=True):
                layers = staged[sequence].layers if sequence in staged else {}
                staged[sequence] = Entry(position, {**layers, self._layer: output})
            self._staged, self._put_layers = staged, self._put_layers | {self._layer}

    def _lengths(self, keys: Array, sequences: int, frames: Sequence[int] | None) -> list[int]:
        """Return the number of frames of each sequence in `keys`.

        Raises: ShapeError, ValueError.
        """
        if not sequences:
            raise ShapeError(
                "output is of sequences with multimodal tokens in the batch, which names none. "
                "Name them: Batch(..., multimodal=[...])."
            )
        if frames is None and sequences == 1 and len(keys.shape) == 3:
            return [keys.shape[self._layouts[0].token_axis]]
        lengths = as_indices(frames or (), "frames")
        if len(lengths) != sequences:
            raise ShapeError(
                f"{sequences} sequences bring output in this pass, and each has a number of "
                f"frames; got frames={frames}. Say them: put(keys, values, frames=[...])."
            )
        if min(lengths) < 1:
            raise ValueError(f"every sequence has at least one frame; got {lengths}.")
        return lengths

    def _split(self, layout: ArrayLayout, array: Array, lengths: Sequence[int]) -> list[Array]:
        """Return copies of the frames in `array`, cut into arrays of `lengths` frames."""
        backend, axis = self._bound(), layout.token_axis
        check_dtype(backend, self._dtype, layout.name, array)
        if len(array.shape) != 3 or array.shape[axis] != sum(lengths):
            raise ShapeError(
                f"{layout.name} hold {' + '.join(map(str, lengths))} frames in layout "
                f"{layout.axes!r} (h kv_heads, t frames, d head_dim), as many as the keys; got "
                f"{tuple(array.shape)}."
            )
        check_sizes_of(layout, tuple(array.shape))
        stops = np.cumsum(lengths).tolist()
        pieces = [
            backend.slice(array, stop - length, stop, axis)
            for stop, length in zip(stops, lengths, strict=True)
        ]
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
        outputs = [self._output(sequence) for sequence in sequences]
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

    def _output(self, sequence: int) -> Arrays:
        """Return the output of a sequence in the current pass, else that stored before it.

        Raises: KVCacheError if it has none in the current layer.
        """
        for entries in (self._staged, self._seen):
            if sequence in entries and self._layer in entries[sequence].layers:
                return entries[sequence].layers[self._layer]
        raise KVCacheError(
            f"layer {self._layer} of sequence {sequence} holds no encoder output. "
            "Put it in a pass whose batch names its multimodal token."
        )

    # Sequences.

    def prepare_copy_prefix(self, source: int, target: int, length: int) -> Commit:
        check_ids(self._max_sequences, source, target)
        entry, entries = self._stored().get(source), dict(self._entries)
        if entry is None or entry.position >= length:
            entries.pop(target, None)
        elif source == target:
            return lambda: None
        else:
            entries[target] = entry  # arrays are shared: puts replace them, and never write to them
        return lambda: self._replace(entries, target, None)

    def _replace(self, entries: Entries, sequence: int, arriving: int | None) -> None:
        """Store `entries`, in which `sequence` has changed.

        arriving: position at which to store what the current pass brings for it; None: not at all.
        """
        self._entries = entries
        self._arriving.pop(sequence, None)
        if arriving is not None:
            self._arriving[sequence] = arriving

    def prepare_remove(self, sequence: int, start: int, stop: int | None) -> Commit:
        check_ids(self._max_sequences, sequence)
        check_range(start, stop)
        entries, arrival = dict(self._entries), self._arriving.get(sequence)
        entries.pop(sequence, None)
        entry = self._stored().get(sequence)
        position = None if entry is None else position_after(entry.position, start, stop)
        if entry is not None and position is not None:
            entries[sequence] = entry._replace(position=position)
        arriving = None if arrival is None else position_after(arrival, start, stop)
        return lambda: self._replace(entries, sequence, arriving)

    def check_source(self, source: int) -> None:
        """Accept every source: a sequence without output, of text alone, is a source as well."""

    def holds_tokens(self, sequence: int) -> bool:
        return sequence in self._stored()

    def can_resume(self, sequence: int, position: int) -> bool:
        as_index(position, "position")
        self._checked_id(sequence)
        return True

    def _checked_id(self, sequence: int) -> int:
        sequence = as_index(sequence, "sequence")
        self._bound()
        check_ids(self._max_sequences, sequence)
        return sequence

    # Snapshots.

    @property
    def max_sequences(self) -> int:
        self._bound()
        return self._max_sequences

    @property
    def specs(self) -> list[CacheSpec]:
        self._bound()
        return [CacheSpec("encoder", Visibility(window=0), self._dtype)]

    def next_position(self, sequence: int) -> int:
        entry = self._stored().get(self._checked_id(sequence))
        return 0 if entry is None else entry.position + 1

    def schedule(self, sequence: int, positions: Iterable[int]) -> None:
        """Do nothing: encoder output stays."""

    def capture(self, sequence: int, start: int, stop: int) -> list[Part]:
        """Return encoder output as one row at its position, copied to the host."""
        [spec] = self.specs
        entry, rows = self._stored().get(sequence), TokenRows(np.empty(0, np.int32))
        if entry is not None and start <= entry.position < stop:
            layers = {
                layer: to_row(self._bound(), self._layouts, arrays)
                for layer, arrays in entry.layers.items()
            }
            rows = TokenRows(np.array([entry.position], np.int32), layers)
        return [Part(spec, rows)]

    def prepare_restore(
        self, sequence: int, parts: Sequence[Sequence[Part]], position: int
    ) -> Commit:
        if sequence in self._stored():
            raise ValueError(f"what is restored goes to an empty sequence; {sequence} holds some.")
        # A sequence has one output: that of the latest snapshot with any before the position.
        held = [(part.rows, np.searchsorted(part.rows.positions, position)) for [part] in parts]
        latest = [(rows, int(count) - 1) for rows, count in held if count]
        if not latest:
            return lambda: None
        entry = self._entry_of(*latest[-1])  # copied now, as it may raise
        entries, known = {**self._entries, sequence: entry}, self._known | entry.layers.keys()

        def commit() -> None:
            self._replace(entries, sequence, None)
            self._known = known

        return commit

    def _entry_of(self, rows: TokenRows, index: int) -> Entry:
        """Return one of `rows` as an entry, copied to the device."""
        last: LayerRows = rows.read(np.array([index]))
        layers = {
            layer: from_row(self._bound(), self._layouts, arrays) for layer, arrays in last.items()
        }
        return Entry(int(rows.positions[index]), layers)

    def to_backend(self, backend: str | Backend) -> Self:
        target, clone = get_backend(backend), self._shallow_copy()
        clone.drop_pass()
        with self.lock:  # other threads may change sequences meanwhile
            if self._backend is not None:
                target.dtype(self._dtype)
                clone._backend = target
                clone._entries = transferred(self._stored(), self._backend, target)
        return clone

    def prepare_close(self) -> Commit:
        def commit() -> None:
            self._forget_all()
            self._backend = None

        return commit


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
