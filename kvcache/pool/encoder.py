"""The encoder cache: keys and values for cross-attention, stored once per sequence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Self

import numpy as np

from kvcache._checks import as_index, as_indices, as_sizes, check_ids, check_range
from kvcache._interrupts import uninterrupted
from kvcache.backends import Array, Backend, CacheConfig, get_backend
from kvcache.errors import DTypeError, KVCacheError
from kvcache.snapshots.snapshot import CacheSpec, Part
from kvcache.snapshots.visibility import Visibility
from kvcache.storage.masks import device_mask

from .base import Cache
from .batch import Batch
from .frames import arriving_in, frame_counts, sequences_of, split_frames
from .latest import LatestPass, Progress
from .layouts import ArrayLayout, Arrays, kv_layouts
from .output import (
    Entries,
    Entry,
    captured,
    finite_output,
    on_device,
    position_after,
    restored,
    transferred,
)
from .owned import Commit


class EncoderCache(Cache):
    """Keys and values of encoder output, one set per sequence, visible from all its tokens.

    For models with cross-attention: vision (Llama 3.2), speech (Whisper). A pass with `multimodal`
    tokens in its batch brings encoder output for their sequences, and :meth:`put` replaces the
    earlier output of these. Other passes only :meth:`get`.

    The earlier output of a sequence with resume points, or with an owner (a prefix cache), is kept
    beside the latest: snapshots hold all of it, and a sequence that goes back sees it again. Of
    other sequences it is dropped; to go back before the output in its place, put it again.

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
        self._scheduled: set[int] = set()  # sequences with resume points
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

    def pass_progress(self) -> Progress:
        """Return how far the output has come that the current pass brings.

        It is whole once every layer that was ever stored has been put, one at least. That tells
        nothing of the tokens of a pass, so then, too, it is for others to say more.
        """
        if not self._stores or self._batch is None:
            return Progress.NOTHING
        put = self._put_layers
        if not self._batch.multimodal and not put:
            return Progress.NOTHING
        if not self._known <= put:
            return Progress.PARTIAL
        return Progress.NOTHING if put else Progress.BLANK

    def note_whole(self) -> None:
        self._known |= self._put_layers

    def _stored(self) -> Entries:
        """Return all output stored, that of the current pass included once this is complete."""
        if not self._put_layers or not self._stores or not self.pass_complete():
            return self._entries
        stored = dict(self._entries)
        for sequence, position in self._arriving.items():
            if sequence in self._staged:
                earlier, output = stored.get(sequence), self._staged[sequence].layers
                layers = output if earlier is None else {**earlier.layers, **output}
                stored[sequence] = Entry(position, layers, self._replaced(sequence, position))
        return stored

    def _replaced(self, sequence: int, position: int) -> Entry | None:
        """Return the entry of a sequence before the one that takes its place at `position`."""
        earlier = self._entries.get(sequence)
        before = None if earlier is None else earlier.below(position)
        keeps = sequence in self._scheduled or self.owners.of(sequence) is not None
        return before if keeps or before is None else before.forgotten()

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
            self.owners.all_gone()
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
            sequence in put or (sequence in self._entries and self._entries[sequence].kept)
            for sequence in sequences_of(self._batch)
        )

    # Passes.

    def prepare_forward(self, batch: Batch, reserve: bool) -> Commit:
        self._bound()
        check_ids(self._max_sequences, *set(batch.sequences.tolist()))
        arriving = arriving_in(batch)

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
        arriving = arriving_in(self._current())
        if values is None:
            raise DTypeError(
                f"values must be {self._dtype} arrays of {self._bound().spec}, as the keys; "
                "got None. Put both."
            )
        # All pieces are made before the first is stored: an error stores nothing.
        lengths = frame_counts(self._layouts[0], keys, len(arriving), frames)
        pieces = [
            split_frames(self._bound(), self._dtype, layout, array, lengths)
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

    def get(self) -> tuple[Array, Array | None, Array | None]:
        """Return keys and values of the pass's sequences, in order of appearance.

        Both are ``[kv_heads, frames, head_dim]`` (layout ``"htd"``), concatenated over the
        sequences. The mask is None for one sequence, whose tokens see all frames. For several it
        is ``[tokens, frames]``, and every token sees the frames of its own sequence only.

        Raises: KVCacheError without a pass, or for a sequence without output in this layer.
        """
        batch, backend = self._current(), self._bound()
        sequences = sequences_of(batch)
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
        stored, entries = self._stored().get(source), dict(self._entries)
        entry = None if stored is None else stored.below(length)
        if source == target and entry is stored and entry is not None:
            return lambda: None
        # Arrays are shared: puts replace them, and never write to them.
        self._set(entries, target, entry)
        return lambda: self._replace(entries, target, None)

    def _set(self, entries: dict[int, Entry], sequence: int, entry: Entry | None) -> None:
        """Make `entry` the latest of a sequence in `entries`, copied to the device if need be."""
        entries.pop(sequence, None)
        if entry is not None:
            entries[sequence] = on_device(self._bound(), self._layouts, entry, self._dtype)

    def _replace(self, entries: Entries, sequence: int, arriving: int | None) -> None:
        """Store `entries`, in which `sequence` has changed.

        arriving: position at which to store what the current pass brings for it; None: not at all.
        """
        self._entries = entries
        if sequence not in entries:
            self._scheduled.discard(sequence)
        self._arriving.pop(sequence, None)
        if arriving is not None:
            self._arriving[sequence] = arriving

    def prepare_remove(self, sequence: int, start: int, stop: int | None) -> Commit:
        check_ids(self._max_sequences, sequence)
        check_range(start, stop)
        entries, arrival = dict(self._entries), self._arriving.get(sequence)
        entry = self._stored().get(sequence)
        self._set(entries, sequence, None if entry is None else entry.without(start, stop))
        arriving = None if arrival is None else position_after(arrival, start, stop)
        return lambda: self._replace(entries, sequence, arriving)

    def check_source(self, source: int) -> None:
        """Accept every source: a sequence without output, of text alone, is a source as well."""

    def holds_tokens(self, sequence: int) -> bool:
        return sequence in self._stored()

    def can_resume(self, sequence: int, position: int) -> bool:
        position, entry = as_index(position, "position"), self._latest(sequence)
        visible = None if entry is None else entry.below(position)
        return visible is None or visible.kept

    def _latest(self, sequence: int) -> Entry | None:
        """Return the latest entry of a sequence, None without output."""
        return self._stored().get(self._checked_id(sequence))

    def _checked_id(self, sequence: int) -> int:
        sequence = as_index(sequence, "sequence")
        self._bound()
        check_ids(self._max_sequences, sequence)
        return sequence

    def latest_pass(self, sequence: int) -> LatestPass:
        put, known = self._put_layers, self._known
        start = self._arriving.get(sequence) if sequence in self._staged else None
        return LatestPass(start, put | known, not put <= known)

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
        entry = self._latest(sequence)
        return 0 if entry is None else entry.position + 1

    def schedule(self, sequence: int, positions: Iterable[int]) -> None:
        """Keep all output of a sequence from now on, until it is empty, whatever the positions."""
        sequence = self._checked_id(sequence)
        as_indices(positions, "positions")
        with self.lock:
            self._scheduled.add(sequence)

    def capture(self, sequence: int, start: int, stop: int) -> list[Part]:
        """Return encoder output, a row for each frame at its position, copied to the host."""
        [spec] = self.specs
        entry = self._stored().get(sequence)
        return [Part(spec, captured(self._bound(), self._layouts, entry, start, stop))]

    def prepare_restore(
        self, sequence: int, parts: Sequence[Sequence[Part]], position: int
    ) -> Commit:
        if sequence in self._stored():
            raise ValueError(f"what is restored goes to an empty sequence; {sequence} holds some.")
        latest = restored([part.rows for [part] in parts], position)
        if latest is None:
            return lambda: None
        entry = on_device(self._bound(), self._layouts, latest, self._dtype)  # now, as it may raise
        entries, known = {**self._entries, sequence: entry}, self._known | entry.layers.keys()

        def commit() -> None:
            self._replace(entries, sequence, None)
            self._known = known

        return commit

    def to_backend(self, backend: str | Backend) -> Self:
        target, clone = get_backend(backend), self._shallow_copy()
        clone.drop_pass()
        clone._scheduled = set()  # resume points stay with this cache
        with self.lock:  # other threads may change sequences meanwhile
            if self._backend is not None:
                target.dtype(self._dtype)
                clone._backend = target
                clone._entries = transferred(self._stored(), self._layouts, self._backend, target)
        return clone

    def prepare_close(self) -> Commit:
        def commit() -> None:
            self._forget_all()
            self._backend = None

        return commit
