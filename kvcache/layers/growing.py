"""The growing per-layer cache: every token stays."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import ClassVar, Self, cast

import numpy as np

from kvcache._checks import NO_LIMIT, as_index, as_indices, as_room
from kvcache._types import Int32s
from kvcache.backends import Array, Backend
from kvcache.errors import StateError, TrimError
from kvcache.snapshots.rows import Slots, TokenRows
from kvcache.snapshots.schedule import ResumePoints
from kvcache.snapshots.visibility import Visibility
from kvcache.storage.admission import Admission
from kvcache.storage.arrays import check_layer_form, concat_layers
from kvcache.storage.lengths import round_up

from .buffers import AXES, NAMES, Arrays, GrowingBuffers
from .checkpoint import Checkpoint, Names, checked_accepted, savepoint
from .columns import MOST_SPARE, Sizes
from .exports import State
from .padding import check_padding, common_padding, without_padding
from .pinning import LayerPins
from .reading import ReadableCache
from .rewind import Rewind
from .state import LayerState


class KVCache(ReadableCache):
    """Growing cache for one layer: every token stays.

    ::

        cache = kvcache.KVCache()
        K, V = cache.update(k, v)      # [B, kv_heads, L, head_dim] -> [B, kv_heads, n, head_dim]
        mask = cache.mask(L)           # [L, n], True = attend; None = everything is visible

    backend: name or :class:`~kvcache.Backend`; None takes that of the first array.
    step: buffers grow to multiples of this many tokens, and by half at least. The first update
        leaves room for half a step, up to 128 tokens, unless it fits into `capacity`.
    dtype: of keys and values; None takes those of the first ones, which may differ.
    capacity: tokens to make room for at the first update already.
    layout: "bhtd", or "bthd" for keys and values ``[B, tokens, kv_heads, head_dim]``. Snapshots,
        files and copies know no layout: they go to a cache of either.
    """

    kind: ClassVar[str] = "kv"
    _changing: ClassVar[Names] = (
        "_buffers",
        "_pins",
        "_points",
        "_offset",
        "_room",
        "_padding",
        "_checkpoint",
        "_export",
        "rewound",
    )
    """Attributes that calls assign to; their objects have savepoints of their own."""

    def __init__(
        self,
        backend: str | Backend | None = None,
        step: int = 256,
        dtype: str | None = None,
        *,
        capacity: int = 0,
        layout: str = "bhtd",
    ) -> None:
        self._configure(backend, step, dtype, capacity, layout)

    def _configure(
        self,
        backend: str | Backend | None,
        step: int,
        dtype: str | None,
        capacity: int,
        layout: str,
    ) -> None:
        """Check and keep the options common to all kinds; start empty.

        Not in ``__init__``, whose signature differs by kind.
        """
        self._capacity = as_room(capacity, "capacity")
        self._step = as_index(step, "step")
        if self._step < 1:
            raise ValueError(f"step must be >= 1 token; got {step}.")
        if self._step > NO_LIMIT:
            raise ValueError(f"step must be < 2**31 tokens; got {step}.")
        self._asked_backend, self._asked_dtype = backend, dtype
        self._admission = Admission(backend, dtype, layout)
        self._start()

    def _start(self) -> None:
        """Become empty, keeping the options."""
        self._admission.forget()
        self._buffers = None
        self._room = self._capacity
        self._pins: LayerPins | None = None
        self._points = ResumePoints()
        self._offset = 0
        self._padding = None
        self._checkpoint: Checkpoint | None = None
        self._export = None
        self.rewound = Rewind(0)

    def __repr__(self) -> str:
        place = self.backend.spec if self.backend else "the backend of its first array"
        return f"<{type(self).__name__} offset={self.offset} len={self.len} on {place}>"

    # Writing and reading.

    def update(self, keys: Array, values: Array) -> tuple[Array, Array]:
        """Append L >= 1 tokens; return all keys and values visible to their queries.

        keys, values: ``[B, kv_heads, L, head_dim]``, or as `layout` says; head_dims and dtypes of
            the two may differ. The arrays are copied, and stay the caller's.

        Returns keys and values with n columns instead of L, ascending by position: read-only, and
        valid until the next call that changes the cache. n is the number of tokens held, of a
        rotating cache those in the windows of the queries, or more where the backend pads (JAX
        returns its whole buffer): :meth:`mask` hides the rest.

        On torch, gradients flow to the keys and values of this update; earlier ones are constants.

        Raises: ShapeError, DTypeError, UnknownBackendError, TracedArrayError inside of a transform
            (use :mod:`kvcache.functional` there), ExportedError; the cache is unchanged then.
        """
        start, buffers = self._offset, self._buffers
        if buffers is None:
            return self._updated_with_room(keys, values)
        stop = start + self._admission.validate(keys, values)
        if stop > buffers.capacity:
            return self._updated_with_room(keys, values)
        try:
            columns = buffers.append(keys, values, start, stop)
            if self._admission.requires_grad:
                columns = buffers.with_gradients(columns, (keys, values), start)
            self._offset = stop  # last: if anything raises, these slots still count as empty
        except BaseException:
            buffers.take_back(stop)
            raise
        return columns

    def _updated_with_room(self, keys: Array, values: Array) -> tuple[Array, Array]:
        """Do an :meth:`update` for which buffers have to be made or to grow."""

        def update() -> tuple[Array, Array]:
            tokens = self._admission.validate(keys, values)
            self._with_room(self._offset + tokens)
            return self.update(keys, values)

        return self._atomic(update)

    def _with_room(self, slots: int, spare: bool = True) -> GrowingBuffers:
        if self._buffers is None:
            backend, geometry = self._admission.bound()
            check_padding(self._padding, geometry.batch)
            sizes = Sizes.on(backend, self._step, None)
            self._buffers = GrowingBuffers(backend, geometry, sizes)
            self._pins = LayerPins(self._buffers, self._padding)
            slots = self._first_room(slots) if spare else slots
        self._buffers.grow(slots, spare)
        return self._buffers

    def _first_room(self, slots: int) -> int:
        # Half a step more, unless told, so that the tokens right after a prompt move nothing.
        return max(self._room, slots + min(self._step, MOST_SPARE) // 2 * (self._room < slots))

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` more tokens, so that they move nothing.

        Before the first update, which tells the sizes of a token, the room is made then.

        Raises: ValueError for less than none; ExportedError; whatever the framework raises if
            memory runs out. The cache is unchanged then.
        """
        self.check_not_exported()
        room = self._offset + as_room(tokens, "tokens")
        if self._buffers is None:
            self._room = max(self._room, room)
        else:
            self._atomic(partial(self._buffers.grow, room, False))

    def savepoint(self) -> Callable[[], None]:
        parts = self._admission, self._points, self._buffers, self._pins
        return savepoint(self, self._changing, parts)

    # Going back.

    def can_trim(self, tokens: int) -> bool:
        tokens = as_index(tokens, "tokens")
        return self._export is None and 0 <= tokens <= self._offset

    def check_trim(self, tokens: int) -> None:
        self.check_not_exported()
        if not self.can_trim(tokens):
            raise TrimError(
                f"trim takes back 0 to {self._offset} tokens, those seen; got {tokens}."
            )

    def trim(self, tokens: int) -> None:
        tokens = as_index(tokens, "tokens")
        self.check_trim(tokens)
        self._atomic(partial(self._rewind, self._offset - tokens))

    def _rewind(self, offset: int) -> None:
        """Forget the tokens from `offset` on; resume points behind are ahead again."""
        # Rows wholly before `offset` stay resident: their slots are not written again.
        if self._pins is not None and self._pins.rows:
            self._pins.spill(offset)
        self._points.take_back(offset)
        if self._buffers is not None:
            self._buffers.take_back(self._slot(self._buffers, self._offset))
        self.rewound = Rewind.after(self.rewound, offset, self._offset)
        self._offset = offset
        self._checkpoint = None

    def checkpoint(self) -> None:
        self.check_not_exported()
        self._checkpoint = Checkpoint(self._offset)

    def check_rollback(self, accepted: int) -> None:
        self._checked_rollback(accepted)

    def _checked_rollback(self, accepted: int) -> tuple[Checkpoint, int]:
        """Return the open checkpoint and `accepted` as an int. Raise TrimError if either is bad."""
        self.check_not_exported()
        checkpoint = self._checkpoint
        mark = None if checkpoint is None else checkpoint.offset
        _, accepted = checked_accepted(mark, self._offset, accepted)
        return cast(Checkpoint, checkpoint), accepted

    def rollback(self, accepted: int = 0) -> None:
        self._return_to(*self._checked_rollback(accepted))

    def _return_to(self, checkpoint: Checkpoint, accepted: int) -> None:
        self._atomic(partial(self._rewind, checkpoint.offset + accepted))

    def reset(self) -> None:
        self._atomic(self._forget)

    def _forget(self) -> None:
        # Buffers that a program has are left to it, and pinned rows were spilled at the export.
        self._points.forget(0)  # or they would be spilled, too
        if self._pins is not None:
            self._pins.spill()  # snapshots outlive the buffers that their rows are in
        self._start()

    # Rows.

    def _drop_buffers(self) -> None:
        # Snapshots have nothing in them: their rows were spilled as the tokens were taken back.
        self._buffers, self._pins = None, None

    def _set_padding(self, padding: Int32s | None) -> None:
        self._padding = padding

    def _slots_of_row(self, padding: int) -> Slots:
        return np.arange(padding, self._offset)

    def _positions_of_all(self, caches: Sequence[Self], stop: int, padding: int) -> Int32s:
        return np.arange(stop, dtype=np.int32)

    def _padding_array(self) -> Array:
        """Return the padding on the device, of no elements if there is none."""
        return self._on_device(() if self._padding is None else self._padding)[0]

    # For compiled programs.

    def _check_written(self, buffers: GrowingBuffers, state: State, offset: int) -> int:
        written = int(buffers.backend.to_host(cast(LayerState, state).written))
        if offset > written:
            raise StateError(
                f"a program appends tokens up to its offset; got offset {offset} with {written} "
                "written. Change it by functional.append and functional.trim only."
            )
        return written

    def _state_maker(
        self, capacity: int, owner: int, likes: tuple[Array, Array]
    ) -> Callable[[Array, Array], State]:
        padding = self._padding_array()
        numbers = self._offset, np.arange(capacity), owner, self._offset
        offset, positions, owner_array, written = self._on_device(*numbers)
        return lambda keys, values: LayerState(
            keys, values, offset, positions, likes, owner_array, written, padding
        )

    # Snapshots.

    @property
    def visibility(self) -> Visibility:
        return Visibility()

    def schedule(self, positions: Iterable[int]) -> None:
        """Check `positions` and do nothing: every position of a growing cache stays resumable."""
        self.check_not_exported()
        as_indices(positions, "positions")

    def capture(self, start: int, stop: int) -> TokenRows:
        self.check_not_exported()
        if self._pins is None:
            return TokenRows(np.empty(0, np.int32))
        rows = self._pins.capture(*self._held(), start, stop)
        return self._points.add_to(rows, start, stop)

    def restore_rows(self, parts: Sequence[TokenRows], offset: int, backend: Backend) -> None:
        indices = [np.flatnonzero(self.visibility.needed(r.positions, offset)) for r in parts]
        needed = [(rows, index) for rows, index in zip(parts, indices, strict=True) if index.size]
        if (arrays := self._resident(needed, backend)) is not None:
            held = sum(index.size for _, index in needed)
            self._atomic(partial(self._fill, arrays, held, offset, self._padding))
            return
        # 0: see LayerPins.read. Rows of a file may be of any form.
        layers = [rows.read(index).get(0, ()) for rows, index in needed]
        padding = common_padding(layers, self._padding)
        layers = [without_padding(arrays)[0] for arrays in layers]
        check_layer_form(layers, NAMES, AXES, self.dtype, least=len(NAMES), mixed=True)
        self._fill_from_host(concat_layers(layers), offset, backend, padding)

    def _resident(
        self, needed: Sequence[tuple[TokenRows, Slots]], backend: Backend
    ) -> Arrays | None:
        """Return rows that caches of `backend` hold, uncopied where slices are views.

        None where some are elsewhere, or in another layout, or have padding.
        """
        parts = []
        for rows, index in needed:
            owner = rows.owner
            if not isinstance(owner, LayerPins) or self._padding is not None:
                return None
            if not owner.serves(backend, self._admission.axis):
                return None
            parts.append(owner.arrays(rows.slots[index]))
        if len(parts) == 1:
            return parts[0]
        return tuple([backend.concat(p, self._admission.axis) for p in zip(*parts, strict=True)])

    def _held(self) -> tuple[Int32s, Slots]:
        """Return the positions held, ascending, and their slots."""
        return np.arange(self._offset, dtype=np.int32), np.arange(self._offset)

    def _slot(self, buffers: GrowingBuffers, position: int) -> int:
        """Return the slot of the token at a position to come, or among the latest ones."""
        return position

    def _least_held(self, offset: int) -> int:
        return offset

    def _most_held(self, offset: int) -> int:
        return offset

    def _held_of(self, buffers: GrowingBuffers, arrays: Arrays, backend: Backend) -> Arrays:
        width = min(buffers.capacity, round_up(self._offset, backend.config.padding))
        return tuple([backend.slice(array, 0, width, buffers.axis) for array in arrays])

    def _place(self, arrays: Arrays, held: int, offset: int, spare: bool) -> GrowingBuffers:
        buffers, width = self._with_room(0, False), arrays[0].shape[self._admission.axis]
        resized = buffers.sizes.grown if spare else buffers.sizes.fitted
        sizes = resized(max(self._first_room(held), width) if spare else width)
        buffers.hold(arrays, sizes)
        buffers.take_back(width)  # columns behind those held may have other tokens
        return buffers

    def _adopt(self, source: Self, buffers: GrowingBuffers) -> None:
        self._admission.adopt(source._admission)
        pins = LayerPins(buffers, source._padding)
        self._padding = source._padding
        # Last, and in one statement: with tokens but without buffers it would be no cache.
        self._buffers, self._pins, self._offset, self.rewound = (
            buffers,
            pins,
            source._offset,
            Rewind(0, refilled=True),
        )

    @property
    def options(self) -> Mapping[str, int | str | None]:
        options: dict[str, int | str | None] = {"step": self._step, "dtype": self._asked_dtype}
        if self._capacity:
            options["capacity"] = self._capacity
        if self._admission.layout != "bhtd":
            options["layout"] = self._admission.layout
        return options
