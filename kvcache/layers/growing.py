"""The growing per-layer cache: every token stays."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import ClassVar, Self

import numpy as np
import numpy.typing as npt

from kvcache._types import Bools, Int32s
from kvcache.backends import Array, Backend, get_backend
from kvcache.errors import BoundsError, KVCacheError, TrimError
from kvcache.snapshots.rows import Slots, TokenRows
from kvcache.snapshots.schedule import ResumePoints
from kvcache.snapshots.visibility import Visibility
from kvcache.storage.admission import Admission
from kvcache.storage.arrays import LayerArrays
from kvcache.storage.lengths import padded_positions
from kvcache.storage.masks import device_mask

from .buffers import Arrays, GrowingBuffers, place_rows
from .checkpoint import Checkpoint
from .pinning import LayerPins
from .stack import StandaloneCache
from .state import LayerState, RingState


class KVCache(StandaloneCache):
    """Growing cache for one layer: every token stays.

    ::

        cache = kvcache.KVCache()
        K, V = cache.update(k, v)      # [B, kv_heads, L, head_dim] -> [B, kv_heads, n, head_dim]
        mask = cache.mask(L)           # [L, n], True = attend; None = everything is visible

    backend: name or :class:`~kvcache.Backend`; None takes that of the first array.
    step: buffers grow to multiples of this many tokens, and by half at least.
    dtype: of keys and values; None takes that of the first ones.
    """

    kind: ClassVar[str] = "kv"
    _changing: ClassVar[tuple[str, ...]] = (
        "_buffers",
        "_pins",
        "_points",
        "_offset",
        "_checkpoint",
    )
    """Attributes that calls assign to; their objects have savepoints of their own."""

    def __init__(
        self, backend: str | Backend | None = None, step: int = 256, dtype: str | None = None
    ) -> None:
        self._configure(backend, step, dtype)

    def _configure(
        self,
        backend: str | Backend | None,
        step: int,
        dtype: str | None,
        limit: int | None = None,
    ) -> None:
        """Check and keep the options common to all kinds; start empty.

        limit: most slots ever needed. Not in ``__init__``, whose signature differs by kind.
        """
        self._step = operator.index(step)
        if self._step < 1:
            raise ValueError(f"step must be >= 1 token; got {step}.")
        self._limit = limit
        self._asked_backend, self._asked_dtype = backend, dtype
        self._admission = Admission(backend, dtype)
        self._start()

    def _start(self) -> None:
        """Become empty, keeping the options."""
        self._admission.forget()
        self._buffers: GrowingBuffers | None = None
        self._pins: LayerPins | None = None
        self._points = ResumePoints()
        self._offset = 0
        self._checkpoint: Checkpoint | None = None

    def __repr__(self) -> str:
        place = self.backend.spec if self.backend else "the backend of its first array"
        return f"<{type(self).__name__} offset={self.offset} len={self.len} on {place}>"

    # What is held.

    @property
    def offset(self) -> int:
        return self._offset

    @property
    def len(self) -> int:
        """Tokens held."""
        return self._offset

    @property
    def backend(self) -> Backend | None:
        return self._admission.backend

    @property
    def dtype(self) -> str | None:
        return self._admission.dtype

    @property
    def nbytes(self) -> int:
        return self._buffers.nbytes if self._buffers is not None else 0

    @property
    def growths(self) -> int:
        """Number of moves to larger buffers since the last reset."""
        return self._buffers.growths if self._buffers is not None else 0

    @property
    def state(self) -> tuple[Array, ...]:
        """Keys and values held, ``[B, kv_heads, n, head_dim]`` each; () when empty.

        Padded like the result of :meth:`update`, and valid for as long.
        """
        if self._buffers is None or not self._offset:
            return ()
        return self._buffers.view(self.len)

    @property
    def positions(self) -> Int32s:
        """Position of every column of the last `update`, int32 [n]; -1 for padding."""
        return padded_positions(np.arange(self._offset, dtype=np.int32), self._width(self._offset))

    def _width(self, held: int) -> int:
        """Return the number of columns of `update` for `held` slots."""
        return self._buffers.width(held) if self._buffers is not None else 0

    # Writing and reading.

    def update(self, keys: Array, values: Array) -> tuple[Array, Array]:
        """Append L >= 1 tokens; return all keys and values visible to their queries.

        keys, values: ``[B, kv_heads, L, head_dim]``; the two head_dims may differ. The arrays are
            copied, and stay the caller's.

        Returns keys and values with n columns instead of L, valid until the next call that
        changes the cache. n is the number of tokens held, or more where the backend pads (JAX
        returns its whole buffer): :meth:`mask` hides the rest.

        Raises: ShapeError, DTypeError, UnknownBackendError; the cache is unchanged then.
        """
        start, buffers = self._offset, self._buffers
        if buffers is None:
            return self._updated_with_room(keys, values)
        stop = start + self._admission.validate(keys, values)
        if stop > buffers.capacity:
            return self._updated_with_room(keys, values)
        columns = buffers.append(keys, values, start, stop, stop)
        self._offset = stop  # last: if a write raises, its slots still count as empty
        return columns

    def _updated_with_room(self, keys: Array, values: Array) -> tuple[Array, Array]:
        """Do an :meth:`update` for which buffers have to be made or to grow."""
        undo = self.savepoint()
        try:
            tokens = self._admission.validate(keys, values)
            self._with_room(self._slots(self._offset + tokens))
            return self.update(keys, values)
        except BaseException:
            undo()
            raise

    def _with_room(self, slots: int) -> GrowingBuffers:
        """Return the buffers with room for `slots` slots, made here on first use."""
        if self._buffers is None:
            buffers = GrowingBuffers(*self._admission.bound(), self._step, self._limit)
            self._buffers, self._pins = buffers, LayerPins(buffers)
        self._buffers.grow(slots)
        return self._buffers

    def savepoint(self) -> Callable[[], None]:
        own = {name: getattr(self, name) for name in self._changing}
        parts = self._admission, self._points, self._buffers, self._pins
        undos = [part.savepoint() for part in parts if part is not None]

        def undo() -> None:
            for name, value in own.items():
                setattr(self, name, value)
            for undo_part in undos:
                undo_part()

        return undo

    def _atomic(self, change: Callable[[], None]) -> None:
        """Call `change`, which does not overwrite tokens; undo all of it if it raises."""
        undo = self.savepoint()
        try:
            change()
        except BaseException:
            undo()
            raise

    def mask(self, tokens: int, window: int | None = None) -> Array | None:
        """Return the attention mask of the last `tokens` queries over the columns of `update`.

        The mask is ``[tokens, n]`` in the backend's ``mask_dtype`` (``"bool"``: True = attend), or
        None when every column is visible to every query. `window` W lets a token see itself and
        the W - 1 tokens before it. Layers with equal histories can share one mask.

        Raises: ValueError for more tokens than the last update allows, or a window below 1.
        """
        tokens = operator.index(tokens)
        if not 1 <= tokens <= self._maskable():
            raise ValueError(f"mask covers 1 to {self._maskable()} latest tokens; got {tokens}.")
        if window is not None and window < 1:
            raise ValueError(f"window must be >= 1 token; got {window}.")
        queries = np.arange(self._offset - tokens, self._offset, dtype=np.int32)[:, None]
        visible: Bools = np.asarray(self._attended(window).sees(queries, self.positions))
        if visible.all():
            return None  # attention runs faster without a mask
        backend, _ = self._admission.bound()
        return device_mask(backend, backend.config.mask_dtype, visible)

    def _maskable(self) -> int:
        """Return the largest number of latest queries with a mask."""
        return self._offset

    def _attended(self, window: int | None) -> Visibility:
        """Return the rule for masks with a window of `window` tokens, the query included."""
        return Visibility(None if window is None else window - 1)

    # Going back.

    def can_trim(self, tokens: int) -> bool:
        return 0 <= tokens <= self._offset

    def check_trim(self, tokens: int) -> None:
        if not self.can_trim(tokens):
            raise TrimError(
                f"trim takes back 0 to {self._offset} tokens, those seen; got {tokens}."
            )

    def trim(self, tokens: int) -> None:
        tokens = operator.index(tokens)
        self.check_trim(tokens)
        self._atomic(partial(self._rewind, self._offset - tokens))

    def _rewind(self, offset: int) -> None:
        """Forget the tokens from `offset` on; resume points stay scheduled."""
        # Rows wholly before `offset` stay resident: their slots are not written again.
        if self._pins is not None and self._pins.rows:
            self._pins.spill(offset)
        self._points.forget(offset)
        self._offset = offset
        self._checkpoint = None

    def checkpoint(self) -> None:
        self._checkpoint = Checkpoint(self._offset, scheduled=frozenset(self._points.scheduled))

    def check_rollback(self, accepted: int) -> None:
        self._checked_rollback(accepted)

    def _checked_rollback(self, accepted: int) -> tuple[Checkpoint, int]:
        """Return the open checkpoint and `accepted` as an int. Raise TrimError if either is bad."""
        checkpoint = self._checkpoint
        if checkpoint is None:
            raise TrimError("rollback needs an open checkpoint. Call checkpoint() first.")
        accepted = operator.index(accepted)
        since = self._offset - checkpoint.offset
        if not 0 <= accepted <= since:
            raise TrimError(f"accepted must be 0 to {since} tokens, those since; got {accepted}.")
        return checkpoint, accepted

    def rollback(self, accepted: int = 0) -> None:
        self._return_to(*self._checked_rollback(accepted))

    def _return_to(self, checkpoint: Checkpoint, accepted: int) -> None:
        self._atomic(partial(self._rewind, checkpoint.offset + accepted))

    def reset(self) -> None:
        self._atomic(self._forget)

    def _forget(self) -> None:
        if self._pins is not None:
            self._pins.spill()  # snapshots outlive the buffers that their rows are in
        self._start()

    # For compiled programs.

    def export_state(self, tokens: int) -> LayerState | RingState:
        """Return the buffers with room for `tokens` more, for :func:`kvcache.functional.append`.

        Do not use the cache until :meth:`import_state`, which also ends an open checkpoint.

        Raises: KVCacheError for a cache that never held a token: it has no shape yet.
        """
        tokens = operator.index(tokens)
        if self._admission.geometry is None:
            raise KVCacheError("a cache has the shape of its first update. Prefill, then export.")
        undo = self.savepoint()
        try:
            buffers = self._with_room(self._slots(self._offset + tokens))
            return self._exported(buffers, self._on_device(self._offset))
        except BaseException:
            undo()
            raise

    def import_state(self, state: LayerState | RingState) -> None:
        """Take over `state`, derived by programs from one of :meth:`export_state`.

        Consumes the arrays of `state`. Reads its offset, and so waits for the programs.

        Raises: BoundsError if more tokens were appended than it had room for, ShapeError for the
            state of a cache of another shape, KVCacheError if this cache exported none; nothing
            has changed then.
        """
        backend, _ = self._admission.bound()
        buffers = self._buffers
        if buffers is None:
            raise KVCacheError("a state goes back to the cache that exported it; this holds none.")
        offset = int(backend.to_host(state.offset))
        if self._slots(offset) > buffers.capacity:
            raise BoundsError(
                f"a program appends as many tokens as the exported state has room for; {offset} "
                f"came, {buffers.capacity} fit, the others were not written. Export more room."
            )
        undo = self.savepoint()
        try:
            buffers.import_state((state.keys, state.values))
            self._rewind(offset)  # also ends a checkpoint, which cannot undo the work of programs
        except BaseException:
            undo()
            raise

    def _slots(self, offset: int) -> int:
        """Return the number of slots in use after `offset` tokens."""
        return offset

    def _exported(self, buffers: GrowingBuffers, offset: Array) -> LayerState | RingState:
        slots, like = self._on_device(np.arange(buffers.capacity)), buffers.empty()
        keys, values = buffers.export_state()  # last, because it consumes the buffers
        return LayerState(keys, values, offset, slots, like)

    def _on_device(self, numbers: npt.ArrayLike) -> Array:
        backend, _ = self._admission.bound()
        return backend.from_host(np.asarray(numbers), "int32")

    # Snapshots.

    @property
    def visibility(self) -> Visibility:
        return Visibility()

    def schedule(self, positions: Iterable[int]) -> None:
        """Do nothing: every position of a growing cache stays resumable."""

    def capture(self, start: int, stop: int) -> TokenRows:
        if self._pins is None:
            return TokenRows(np.empty(0, np.int32))
        rows = self._pins.capture(*self._held(), start, stop)
        return self._points.add_to(rows, start, stop)

    def restore_rows(self, parts: Sequence[TokenRows], offset: int, backend: Backend) -> None:
        indices = [np.flatnonzero(self.visibility.needed(r.positions, offset)) for r in parts]
        needed = [(rows, index) for rows, index in zip(parts, indices, strict=True) if index.size]
        slots = self._slots_of(np.concatenate([rows.positions[index] for rows, index in needed]))
        layers = [rows.read(index)[0] for rows, index in needed]  # 0: see LayerPins.read
        self._fill_from_host(place_rows(layers, slots, self._slots(offset)), offset, backend)

    def _held(self) -> tuple[Int32s, Slots]:
        """Return the positions held, ascending, and their slots."""
        return np.arange(self._offset, dtype=np.int32), np.arange(self._offset)

    def _slots_of(self, positions: Int32s) -> Slots:
        """Return the slot of each of `positions`."""
        return positions.astype(np.int64)

    # Copies and files.

    @property
    def options(self) -> Mapping[str, int | str | None]:
        return {"step": self._step, "dtype": self._asked_dtype}

    def copy(self) -> Self:
        clone = self.make(self._asked_backend, self.options)
        if self._buffers is not None and self._offset:
            clone._fill(self._buffers.held_slice(self.len), self._offset)
        return clone

    def to_backend(self, backend: str | Backend) -> Self:
        target = get_backend(backend)
        clone = self.make(target, self.options)
        if self._buffers is not None and self._offset:
            buffers = clone._fill(self._buffers.transferred(target, self.len), self._offset)
            # The copy may still be reading the memory of this cache, which may change next.
            target.sync(*buffers.arrays)
        return clone

    def to_layer(self) -> LayerArrays:
        if self._buffers is None or not self._offset:
            return ()
        return self._buffers.to_host(self.len)

    def from_layer(self, arrays: LayerArrays, offset: int) -> None:
        if self.backend is None:
            raise KVCacheError("a cache that is filled from the host names a backend; got none.")
        self._fill_from_host(arrays, offset, self.backend)

    def _fill_from_host(self, layer: LayerArrays, offset: int, backend: Backend) -> None:
        def fill() -> None:
            self._fill(tuple(backend.from_host(array.data) for array in layer), offset)

        self._atomic(fill)

    def _fill(self, arrays: Arrays, offset: int) -> GrowingBuffers:
        """Copy `arrays` into the first slots of an empty cache; the next token is at `offset`."""
        keys, values = arrays
        slots = self._admission.validate(keys, values)
        buffers = self._with_room(slots)
        buffers.arrays = buffers.written(arrays, 0, slots)
        buffers.backend.evaluate(*buffers.arrays)
        # A checkpoint opened while empty knows nothing of these tokens.
        self._offset, self._checkpoint = offset, None
        return buffers
