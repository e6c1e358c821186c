"""The encoder cache: what cross-attention reads, computed once per sequence."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from kvcache._checks import check_ids, check_range, check_sizes
from kvcache.backends import Array, Backend, CacheConfig, HostArray, get_backend, transfer
from kvcache.errors import DTypeError, KVCacheError, ShapeError
from kvcache.snapshots.rows import LayerRows, TokenRows, Visibility
from kvcache.snapshots.snapshot import CacheSpec, Part
from kvcache.storage.layout import TOKEN_AXIS
from kvcache.storage.masks import device_mask

from .base import Cache, Commit
from .batch import Batch


@dataclass
class _Entry:
    """Encoder output of one sequence, and the position that it came in at."""

    position: int
    layers: dict[int, tuple[Array, Array]] = field(default_factory=dict)


class EncoderCache(Cache):
    """Keys and values of an encoder's output, one set per sequence, whatever the position.

    A pass whose batch names `multimodal` tokens brings encoder output for their sequences;
    :meth:`put` stores it, instead of what they had. Other passes only :meth:`get`.
    """

    def __init__(self) -> None:
        self._config = CacheConfig()
        self._backend: Any = None
        self._entries: dict[int, _Entry] = {}
        self._passing = self._entries  # a reserve pass has its own, and leaves nothing behind
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
        """`capacity` and `max_batch` are ignored: an encoder's output is as long as it is."""
        check_sizes(max_sequences=max_sequences)
        self._backend = get_backend(backend)
        self._dtype, self._max_sequences = dtype, max_sequences
        self._backend.dtype(dtype)

    @property
    def encoder_cached(self) -> bool:
        """Whether every sequence of the current pass has its encoder output stored."""
        return self._batch is not None and all(s in self._entries for s in self._sequences())

    # Passes.

    def prepare_forward(self, batch: Batch, reserve: bool) -> Commit:
        if self._backend is None:
            raise KVCacheError("a cache is sized first. Call init.")
        check_ids(self._max_sequences, *set(batch.sequences.tolist()))

        def commit() -> None:
            self._batch = batch
            self._passing = {} if reserve else self._entries

        return commit

    def _sequences(self) -> list[int]:
        """Sequences of the pass, in order of appearance."""
        if self._batch is None:
            raise KVCacheError("put and get belong to a pass. Call start_forward first.")
        return list(dict.fromkeys(self._batch.sequences.tolist()))

    def _arriving(self) -> dict[int, int]:
        """Sequences whose encoder output this pass brings, and the positions of the latest."""
        sequences = self._sequences()
        batch: Any = self._batch
        if not batch.multimodal and len(sequences) == 1:
            return {sequences[0]: 0}
        return {int(batch.sequences[i]): int(batch.positions[i]) for i in batch.multimodal}

    # LayerRows.

    def set_layer(self, layer: int) -> None:
        self._layer = layer

    def put(self, keys: Array, values: Array | None = None) -> None:
        """Store encoder output ``[kv_heads, frames, head_dim]`` of the sequences it arrives for.

        For several sequences in one pass the frames of the first come first, equally many each.
        """
        arriving = self._arriving()
        if values is None:
            raise DTypeError(
                f"values must be {self._dtype} arrays of {self._backend.spec}, as the keys; "
                "got None. Put both."
            )
        parts = list(
            zip(
                self._split("keys", keys, self._config.key_layout, len(arriving)),
                self._split("values", values, self._config.value_layout, len(arriving)),
                strict=True,
            )
        )
        frames = keys.shape[TOKEN_AXIS[self._config.key_layout]]
        if values.shape[TOKEN_AXIS[self._config.value_layout]] != frames:
            raise ShapeError(
                f"keys and values have the same frames; got {tuple(keys.shape)} and "
                f"{tuple(values.shape)}."
            )
        for (sequence, position), part in zip(arriving.items(), parts, strict=True):
            entry = self._passing.setdefault(sequence, _Entry(position))
            entry.position = position
            entry.layers[self._layer] = part

    def _split(self, name: str, array: Array, layout: str, parts: int) -> list[Array]:
        """Copies of the frames of each of the sequences that have some in `array`."""
        if not self._backend.owns(array) or self._backend.dtype_name(array) != self._dtype:
            raise DTypeError(
                f"{name} must be {self._dtype} arrays of {self._backend.spec}; got "
                f"{type(array).__name__} of {getattr(array, 'dtype', 'no dtype')}. Convert them."
            )
        axis = TOKEN_AXIS[layout]
        if len(array.shape) != 3 or not parts or array.shape[axis] % parts:
            raise ShapeError(
                f"{name} hold equally many frames in layout {layout!r} for each of the {parts} "
                f"sequences with multimodal tokens in the batch; got {tuple(array.shape)}."
            )
        frames = array.shape[axis] // parts
        read = self._backend.slice
        pieces = [read(array, i * frames, (i + 1) * frames, axis) for i in range(parts)]
        return [self._backend.concat([piece], axis) for piece in pieces]

    def get(self) -> tuple[Array, Array | None, Array | None]:
        """Keys and values of the pass's sequences, in order of appearance.

        The mask is None for one sequence: every token sees all of its encoder's output. For
        several it is ``[tokens, frames]``, and keeps each to its own.
        """
        sequences = self._sequences()
        parts = [self._entry(sequence).layers[self._layer] for sequence in sequences]
        if len(parts) == 1:
            return (*parts[0], None)
        axis = TOKEN_AXIS[self._config.key_layout]
        owners = np.repeat(sequences, [keys.shape[axis] for keys, _ in parts])
        batch: Any = self._batch
        return (
            self._backend.concat([keys for keys, _ in parts], axis),
            self._backend.concat(
                [values for _, values in parts], TOKEN_AXIS[self._config.value_layout]
            ),
            device_mask(self._backend, self._config.mask_dtype, batch.sequences[:, None] == owners),
        )

    def _entry(self, sequence: int) -> _Entry:
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
                self._entries[target] = _Entry(shared.position, dict(shared.layers))

        return commit

    def prepare_remove(self, sequence: int, start: int, stop: int | None) -> Commit:
        check_ids(self._max_sequences, sequence)
        check_range(start, stop)
        entry = self._entries.get(sequence)
        gone = (
            entry is not None
            and start <= entry.position
            and (stop is None or entry.position < stop)
        )

        def commit() -> None:
            if gone:
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
        """Nothing: what an encoder has put out stays."""

    def capture(self, sequence: int, start: int, stop: int) -> list[Part]:
        """The encoder's output as one row at its position, copied to the host."""
        [(kind, visibility, dtype)] = self.specs
        entry, rows = self._entries.get(sequence), TokenRows(np.empty(0, np.int32))
        if entry is not None and start <= entry.position < stop:
            layers: LayerRows = {
                layer: (self._row(keys, "key_layout"), self._row(values, "value_layout"))
                for layer, (keys, values) in entry.layers.items()
            }
            rows = TokenRows(np.array([entry.position], np.int32), layers)
        return [Part(kind, visibility, rows, dtype)]

    def _row(self, array: Array, layout: str) -> HostArray:
        """``[frames, kv_heads, 1, head_dim]``: one row of all frames."""
        axes = [getattr(self._config, layout).index(axis) for axis in "thd"]
        host: HostArray = self._backend.to_host(array).transpose(axes)
        return np.array(host[:, :, None], order="C")

    def prepare_restore(
        self, sequence: int, parts: Sequence[Sequence[Part]], position: int
    ) -> Commit:
        if sequence in self._entries:
            raise ValueError(f"what is restored goes to an empty sequence; {sequence} holds some.")
        latest = [part.rows for [part] in parts if part.rows.positions.size][-1:]
        entries = [self._entry_of(rows) for rows in latest]

        def commit() -> None:
            for entry in entries:
                self._entries[sequence] = entry

        return commit

    def _entry_of(self, rows: TokenRows) -> _Entry:
        layers = {
            layer: (self._frames(keys, "key_layout"), self._frames(values, "value_layout"))
            for layer, (keys, values) in rows.read(np.array([rows.positions.size - 1])).items()
        }
        return _Entry(int(rows.positions[-1]), layers)

    def _frames(self, row: HostArray | None, layout: str) -> Array:
        if row is None:
            raise ShapeError("an encoder's output has values in every layer.")
        axes = ["thd".index(axis) for axis in getattr(self._config, layout)]
        frames: Array = self._backend.from_host(row[:, :, 0].transpose(axes))
        return frames

    def to_backend(self, backend: str | Backend) -> Self:
        where, twin = get_backend(backend), copy(self)
        vars(twin).pop("lock", None)
        twin._batch = None
        if self._backend is not None:
            where.dtype(self._dtype)
            twin._backend = where
        twin._passing = twin._entries = self._carried_over(where)
        return twin

    def _carried_over(self, where: Backend) -> dict[int, _Entry]:
        """All entries there, in the same memory if it can be: nobody ever writes to it."""
        pairs = [pair for entry in self._entries.values() for pair in entry.layers.values()]
        once = {id(part): part for pair in pairs for part in pair}  # sequences may share them
        there = {key: transfer(part, self._backend, where) for key, part in once.items()}
        return {
            sequence: _Entry(
                entry.position,
                {layer: (there[id(k)], there[id(v)]) for layer, (k, v) in entry.layers.items()},
            )
            for sequence, entry in self._entries.items()
        }

    def close(self) -> None:
        self._entries.clear()
        self._batch = None
