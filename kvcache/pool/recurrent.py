"""The recurrent cache: states of many sequences in one pool, and earlier ones kept."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import NoReturn, Self

import numpy as np

from kvcache._checks import as_index, as_indices, as_room, as_sizes, check_ids, check_range
from kvcache._interrupts import uninterrupted
from kvcache._locks import Lock
from kvcache.backends import Array, Backend, CacheConfig, get_backend
from kvcache.errors import KVCacheError, NotSupportedError, TrimError
from kvcache.snapshots.rows import TokenRows
from kvcache.snapshots.snapshot import CacheSpec, Part
from kvcache.snapshots.visibility import Visibility

from .base import Cache
from .batch import Batch
from .owned import Commit
from .runs import (
    Held,
    Sequences,
    StatePass,
    begun_pass,
    check_appended,
    checked_cuts,
    end_of,
    runs_of,
    with_cuts,
)
from .state_calls import Run, StatesAtCuts
from .state_room import find_room
from .state_slots import StateSlots


class RecurrentCache(Cache):
    """States of recurrent layers, for many sequences: one behind the end of each, and kept ones.

    For linear attention, state space models and short convolutions; in a :class:`WrapperCache`
    beside caches of keys and values, for hybrid models::

        cache.set_layer(layer)
        states = cache.get_states()       # [runs, ...], or None: all sequences are fresh
        for run in cache.runs:            # run.sequence, run.cuts, ...
            ...
        cache.put_states(conv, matrix, kept={(sequence, position): (conv_there, matrix_there)})

    resume_points: states that there is room for besides one of each sequence and one of each in a
        pass. Kept states and resident snapshots share it. Where more is wanted, snapshots are
        copied to the host, and then kept states dropped, of the sequence idle longest first.

    A state is a few arrays of any shapes and dtypes, one row per sequence. It cannot be cut back:
    a sequence goes back, and is copied, only up to positions where a state is held. These are its
    end, and positions that were scheduled before their tokens came.

    Sequences with a common prefix share its states. A pass never writes to a state that is history,
    so that nothing is copied when one of them goes on.
    """

    def __init__(self, resume_points: int = 16) -> None:
        super().__init__()
        self.resume_points = as_room(resume_points, "resume_points")
        self._slots: StateSlots | None = None
        self._max_sequences = self._layer = 0
        self._forget_all()

    def _forget_all(self) -> None:
        self._sequences: Sequences = {}  # without the current pass
        self._points: Mapping[int, frozenset[int]] = {}  # scheduled positions by sequence
        self._pass: StatePass | None = None
        self._before: tuple[Sequences, StatePass | None] | None = None  # the pass just begun

    def set_config(self, config: CacheConfig) -> None:
        """Do nothing: a state has no layout but its own."""

    def init(
        self,
        backend: str | Backend,
        dtype: str = "float32",
        *,
        max_sequences: int = 1,
        capacity: int = 1,
        max_batch: int = 1,
    ) -> None:
        """Size the cache. States have dtypes of their own and any length, so the rest is ignored.

        max_batch: there is room for a pass over so many sequences, however full the cache is.
        """
        max_sequences, max_batch = as_sizes(max_sequences=max_sequences, max_batch=max_batch)
        runs = min(max_sequences, max_batch)
        # One more, for the zeros that a fresh sequence begins with.
        count = 1 + max_sequences + runs + self.resume_points
        slots = StateSlots(get_backend(backend), count, self.lock)
        with uninterrupted():
            self._forget_all()
            self.owners.all_gone()
            self._slots, self._max_sequences = slots, max_sequences

    def _sized(self) -> StateSlots:
        """Return the slots. Raises: KVCacheError before :meth:`init`."""
        if self._slots is None:
            raise KVCacheError("a cache is sized before it is used. Call init first.")
        return self._slots

    @property
    def backend(self) -> Backend | None:
        return None if self._slots is None else self._slots.backend

    @property
    def nbytes(self) -> int:
        """Bytes of the memory of all layers put so far, in use or not."""
        return self._sized().nbytes

    def share_lock(self, lock: Lock) -> None:
        super().share_lock(lock)
        if self._slots is not None:
            self._slots.lock = lock

    # Passes.

    def prepare_forward(self, batch: Batch, reserve: bool) -> Commit:
        slots, self._before = self._sized(), None
        check_ids(self._max_sequences, *set(batch.sequences.tolist()))
        runs, sequences = runs_of(batch), self._history()
        if reserve:
            begun = StatePass(tuple(runs), np.zeros(len(runs), np.int32), stores=False)
        else:
            check_appended(runs, sequences)
            before = [sequences[run.sequence][run.position] if run.position else 0 for run in runs]
            runs = [with_cuts(run, self._points.get(run.sequence, ())) for run in runs]
            wanted = sum(1 + len(run.cuts) for run in runs)
            free, sequences = find_room(slots, sequences, set(), len(runs), wanted)
            begun = begun_pass(runs, np.array(before, np.int32), free, slots.layers)

        def commit() -> None:
            self._before = self._sequences, self._pass
            self._sequences, self._pass = sequences, begun

        return commit

    def revert_forward(self) -> None:
        if self._before is not None:
            self._sequences, self._pass = self._before

    def pass_complete(self) -> bool:
        return self._pass is None or self._pass.complete

    def drop_pass(self) -> None:
        self._pass = None

    def _history(self) -> Sequences:
        """Return the slots of all sequences, with those of a pass that is finished."""
        if self._pass is None or self.is_unfinished():
            return self._sequences
        return self._pass.after(self._sequences, self._points)

    def _current(self) -> StatePass:
        if self._pass is None:
            raise KVCacheError("put_states and get_states belong to a pass. Call start_forward.")
        return self._pass

    # Layers.

    def set_layer(self, layer: int) -> None:
        self._layer = layer if type(layer) is int else as_index(layer, "layer")

    @property
    def runs(self) -> tuple[Run, ...]:
        return self._current().runs

    def get_states(self) -> tuple[Array, ...] | None:
        slots = self._sized()
        with self.lock:  # another thread may write to the buffers, and so consume them
            current = self._current()
            if not any(run.position for run in current.runs):
                return None
            if self._layer in slots.layers:
                return slots.get(self._layer, current.before)
            if not current.stores:  # of a reserve pass, to allocate memory
                return None
            raise KVCacheError(
                f"layer {self._layer} was never put, and sequences of the pass have tokens. Put "
                "every layer in every pass."
            )

    def put_states(self, *arrays: Array, kept: StatesAtCuts | None = None) -> None:
        slots = self._sized()
        with self.lock:
            current = self._current()
            if current.complete and self._layer in current.put:
                self._refuse_shared(slots, current)
            at_cuts = {} if not kept else checked_cuts(current, kept)
            slots.check(self._layer, arrays, len(current.runs))
            for state in at_cuts.values():
                slots.check_like(self._layer, state, arrays)
            taken = [*current.behind, *(current.at_cuts[cut] for cut in at_cuts)]
            slots.put(self._layer, arrays, [*at_cuts.values()], np.array(taken, np.int32))
            self._pass = current.with_put(self._layer, at_cuts)

    def _refuse_shared(self, slots: StateSlots, current: StatePass) -> None:
        """Raise KVCacheError if a complete pass left states that others have as well.

        Until then a layer may be put again, as after a put that was interrupted at its end.
        """
        held = {slot for states in self._sequences.values() for slot in states.values()}
        if current.detached or not (held | slots.pinned).isdisjoint(current.written):
            raise KVCacheError(
                "the states of a complete pass are history once a snapshot or another sequence has "
                f"them; layer {self._layer} was put. Call start_forward for the next tokens."
            )

    def put(
        self, keys: Array, values: Array | None = None, frames: Sequence[int] | None = None
    ) -> None:
        """Refuse: a recurrent layer has no keys. Raises: NotSupportedError."""
        self._refuse_keys()

    def get(self) -> tuple[Array, Array | None, Array | None]:
        """Refuse: a recurrent layer has no keys. Raises: NotSupportedError."""
        self._refuse_keys()

    def _refuse_keys(self) -> NoReturn:
        raise NotSupportedError(
            "a RecurrentCache holds states, no keys and values. Call get_states and put_states."
        )

    # Sequences.

    def prepare_copy_prefix(self, source: int, target: int, length: int) -> Commit:
        self._check_ids(source, target)
        if length < 0:
            raise ValueError(f"a prefix has a length >= 0; got {length}.")
        return self._cut(source, target, length)

    def _cut(self, source: int, target: int, length: int) -> Commit:
        """Return a commit to make `target` hold just what `source` holds up to `length`.

        Raises: TrimError if no state is held there.
        """
        held = self._history().get(source, {})
        end = end_of(held)
        if 0 < length < end and length not in held:
            raise TrimError(
                "a recurrent layer goes back, or is copied, only to positions with a state, "
                f"{reprlib.repr([0, *held])}; got {length}. schedule() it before its tokens come."
            )
        kept = {position: slot for position, slot in held.items() if position <= length}
        # Kept states stay so: the end of the target is one, unless it is the end of the source.
        points = self._points.get(source, frozenset())
        points = frozenset(p for p in {*kept, *points} if p <= length and (p < end or p in points))
        return self._replacing(target, kept, points)

    def _replacing(self, sequence: int, held: Held, points: frozenset[int]) -> Commit:
        """Return a commit to let a sequence hold just `held`, and leave the current pass."""

        def commit() -> None:
            others = {s: states for s, states in self._sequences.items() if s != sequence}
            schedules = {s: own for s, own in self._points.items() if s != sequence}
            changed = {**others, sequence: held} if held else others
            scheduled = {**schedules, sequence: points} if points and held else schedules
            current = None if self._pass is None else self._pass.without(sequence)
            self._sequences, self._points, self._pass = changed, scheduled, current

        return commit

    def prepare_remove(self, sequence: int, start: int, stop: int | None) -> Commit:
        self._check_ids(sequence)
        check_range(start, stop)
        end = end_of(self._history().get(sequence))
        if stop is None or stop >= end:
            return self._cut(sequence, sequence, start)
        if start == stop:
            return lambda: None
        raise NotSupportedError(
            f"a state cannot forget tokens before its last; got [{start}, {stop}) of {end} tokens. "
            "Remove up to the end, and compute the later tokens again."
        )

    def holds_tokens(self, sequence: int) -> bool:
        return sequence in self._history()

    def can_resume(self, sequence: int, position: int) -> bool:
        sequence, position = as_index(sequence, "sequence"), as_index(position, "position")
        self._check_ids(sequence)
        with self.lock:
            return position == 0 or position in self._history().get(sequence, {})

    def _check_ids(self, *sequences: int) -> None:
        check_ids(self.max_sequences, *sequences)

    # Snapshots.

    @property
    def max_sequences(self) -> int:
        self._sized()
        return self._max_sequences

    @property
    def specs(self) -> list[CacheSpec]:
        # The state behind p is the row of p - 1, and all that is needed to go on at p. Layers
        # differ in dtypes, which are unknown before the first put: the arrays tell them.
        self._check_ids()
        return [CacheSpec("recurrent", Visibility(window=1), ())]

    def next_position(self, sequence: int) -> int:
        sequence = as_index(sequence, "sequence")
        self._check_ids(sequence)
        with self.lock:
            return end_of(self._history().get(sequence))

    def schedule(self, sequence: int, positions: Iterable[int]) -> None:
        """Keep the states behind `positions` once their tokens come, where layers give them.

        Positions before the end of the sequence are ignored: their states are gone, or kept.
        """
        sequence, points = as_index(sequence, "sequence"), as_indices(positions, "positions")
        self._check_ids(sequence)
        with self.lock:
            end = max(1, end_of(self._history().get(sequence)))
            known = {*self._points.get(sequence, ()), *points}
            ahead = frozenset(position for position in known if position >= end)
            self._points = {**self._points, sequence: ahead}

    def capture(self, sequence: int, start: int, stop: int) -> list[Part]:
        [spec], held = self.specs, self._history().get(sequence, {})
        inside = {p: slot for p, slot in held.items() if start < p <= stop}
        if not inside:
            return [Part(spec, TokenRows(np.empty(0, np.int32)))]
        positions = np.array([*inside], np.int64) - 1
        taken = np.array([*inside.values()], np.int64)
        return [Part(spec, TokenRows.resident(positions.astype(np.int32), self._sized(), taken))]

    def prepare_restore(
        self, sequence: int, parts: Sequence[Sequence[Part]], position: int
    ) -> Commit:
        if sequence in self._history():
            raise ValueError(f"what is restored goes to an empty sequence; {sequence} holds some.")
        if not position:
            return lambda: None
        slots, all_rows = self._sized(), [part.rows for [part] in parts]
        indices = [np.flatnonzero(rows.positions == position - 1) for rows in all_rows]
        pairs = zip(all_rows, indices, strict=True)
        rows, index = [pair for pair in pairs if pair[1].size][-1]
        if rows.owner is slots:
            [slot] = rows.slots[index[-1:]].tolist()
            return self._replacing(sequence, {position: slot}, frozenset())
        content = rows.read(index[-1:])
        reserved = set() if self._pass is None else self._pass.slots
        [slot], sequences = find_room(slots, self._sequences, reserved, 1, 1)
        add_layers = slots.prepare_rows(slot, content)
        restore = self._replacing(sequence, {position: slot}, frozenset())

        def commit() -> None:
            add_layers()
            self._sequences = sequences
            restore()

        return commit

    # Copies.

    def to_backend(self, backend: str | Backend) -> Self:
        target, clone = get_backend(backend), self._shallow_copy()
        clone._forget_all()
        with self.lock:  # other threads may change sequences meanwhile
            if self._slots is not None:
                clone._slots = self._slots.copied(target, clone.lock)
                clone._sequences = self._history()
                clone._points = {
                    sequence: frozenset(held.keys() & self._points.get(sequence, frozenset()))
                    for sequence, held in clone._sequences.items()
                }
        return clone

    def prepare_close(self) -> Commit:
        slots = self._slots
        if slots is None:
            return lambda: None
        spill = slots.prepare_spill()  # snapshots outlive the cache

        def commit() -> None:
            spill()
            self._forget_all()
            self._slots = None
            slots.free()

        return commit
