"""The recurrent cache: states of many sequences in one pool, and earlier ones kept."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Sequence
from typing import Self

import numpy as np

from kvcache._checks import as_index, as_indices, as_room, as_sizes, check_ids, check_range
from kvcache.backends import Backend, get_backend
from kvcache.errors import KVCacheError, NotSupportedError, ShapeError, TrimError
from kvcache.snapshots.rows import TokenRows
from kvcache.snapshots.snapshot import CacheSpec, Part
from kvcache.snapshots.visibility import Visibility

from .latest import LatestPass
from .owned import Commit
from .runs import Held, end_of
from .state_history import StateHistory
from .state_passes import StatePasses
from .state_room import find_room
from .state_slots import LayerForm


class RecurrentCache(StatePasses):
    """States of recurrent layers, for many sequences: one behind the end of each, and kept ones.

    For linear attention, state space models and short convolutions; in a :class:`WrapperCache`
    beside caches of keys and values, for hybrid models::

        cache.set_layer(layer)
        states = cache.get_states()       # [runs, ...], or None: all sequences are fresh
        for run in cache.runs:            # run.sequence, run.cuts, ...
            ...
        cache.put_states(conv, matrix, kept={(sequence, position): (conv_there, matrix_there)})

    resume_points: states that there is room for besides one of each sequence and one of each in a
        pass. Kept states, those of drafts and resident snapshots share it. Where more is wanted,
        snapshots are copied to the host, then states of drafts dropped, and then kept ones, of the
        sequence idle longest first.

    A state is a few arrays of any shapes and dtypes, one row per sequence. It cannot be cut back:
    a sequence goes back, and is copied, only up to positions where a state is held. These are its
    end, and positions that were scheduled before their tokens came, or are of a draft.

    Sequences with a common prefix share its states. A pass never writes to a state that is history,
    so that nothing is copied when one of them goes on.

    Passes are also available as plans for compiled programs, as those of :class:`CausalCache`::

        cache.allocate(range(layers), ((32, 128, 128), "float32"), ((8192, 3), "bfloat16"))
        plan, state = cache.plan(batch), cache.program_state
        states = functional.get_states(state, plan, layer)          # in the program
        state = functional.put_states(state, plan, layer, *states)
        cache.program_state = state                                 # back on the host

    A planned pass keeps no states at cuts. One of several steps (``plan_steps``) keeps those of
    scheduled positions, where each is the end of a step.
    """

    def __init__(self, resume_points: int = 16) -> None:
        super().__init__(as_room(resume_points, "resume_points"))

    def allocate(self, layers: Iterable[int], *arrays: tuple[Sequence[int], str]) -> None:
        """Allocate the buffers of all `layers` now, or of none, instead of at their first put.

        arrays: shape, without the axis of sequences, and dtype of each array of a state.

        Raises: ShapeError for no array, or for a layer that exists with others; ValueError for
            sizes below 1, DTypeError, KVCacheError before :meth:`init`.
        """
        if not arrays:
            raise ShapeError("a state is one array or more; got none.")
        shapes = tuple(_as_shape(shape) for shape, _ in arrays)
        form = LayerForm(shapes, tuple(dtype for _, dtype in arrays))
        with self.lock:
            self._sized().allocate(as_indices(layers, "layers"), form)

    @property
    def nbytes(self) -> int:
        """Bytes of the memory of all layers put so far, in use or not."""
        return self._sized().nbytes

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
                f"{reprlib.repr([0, *held])}; got {length}. schedule() it before its tokens come, "
                "or checkpoint() before a draft."
            )
        kept = self._known.kept(source, held, length)
        # Kept states stay so: the end of the target is one, unless it is the end of the source.
        resumed = {p for p in kept if p < end} - self._known.drafts(source, held)
        points = {p for p in self._known.points.get(source, ()) if p <= length}
        return self._replacing(target, kept, frozenset(resumed | points))

    def _replacing(self, sequence: int, held: Held, points: frozenset[int]) -> Commit:
        """Return a commit to let a sequence hold just `held`, and leave the current pass."""

        def commit() -> None:
            self._known = self._known.replacing(sequence, held, points)

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

    def latest_pass(self, sequence: int) -> LatestPass:
        with self.lock:
            current = self._known.current
            if current is None:
                return LatestPass()
            starts = [run.position for run in current.runs if run.sequence == sequence]
            start = starts[0] if starts and sequence not in current.detached else None
            put, expected = current.put, current.expected
            return LatestPass(start, put | expected, not put <= expected)

    def _check_ids(self, *sequences: int) -> None:
        check_ids(self.max_sequences, *sequences)

    # Snapshots.

    @property
    def specs(self) -> list[CacheSpec]:
        # The state behind p is the row of p - 1, and all that is needed to go on at p. Layers
        # differ in dtypes, which are unknown before the first put: the arrays tell them.
        self._check_ids()
        return [CacheSpec("recurrent", Visibility(window=1), ())]

    def schedule(self, sequence: int, positions: Iterable[int]) -> None:
        """Keep the states behind `positions` once their tokens come, where layers give them.

        Positions before the end of the sequence are ignored: their states are gone, or kept. So
        are those inside of planned passes.
        """
        sequence, points = as_index(sequence, "sequence"), as_indices(positions, "positions")
        self._check_ids(sequence)
        with self.lock:
            end = end_of(self._history().get(sequence))
            self._known = self._known.scheduling(sequence, points, end)

    def checkpoint(self, sequence: int) -> None:
        sequence = as_index(sequence, "sequence")
        self._check_ids(sequence)
        with self.lock:
            end = end_of(self._history().get(sequence))
            self._known = self._known.drafting(sequence, end)

    def capture(self, sequence: int, start: int, stop: int) -> list[Part]:
        [spec], held = self.specs, self._history().get(sequence, {})
        kept = self._known.kept(sequence, held, stop)
        inside = {p: slot for p, slot in kept.items() if start < p}
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
        if self._known.has_plans:
            raise KVCacheError(
                "a program has the states of this cache, so none is written. Assign the state that "
                "it returns to program_state first."
            )
        content = rows.read(index[-1:])
        [slot], sequences = find_room(slots, self._known, 1, 1)
        # In the middle of its first pass, a pool lacks layers. Later, sequences have no states of
        # a layer that is added, and no pass would put one that the model lacks.
        extend = not self._known.sequences
        add_layers = slots.prepare_rows(slot, content, extend=extend)
        restore = self._replacing(sequence, {position: slot}, frozenset())

        def commit() -> None:
            add_layers()
            self._known = self._known._replace(sequences=sequences)
            restore()

        return commit

    # Copies.

    def to_backend(self, backend: str | Backend) -> Self:
        target, clone = get_backend(backend), self._shallow_copy()
        clone._known, clone._before = StateHistory(), None
        with self.lock:  # other threads may change sequences meanwhile
            if self._slots is not None:
                clone._slots = self._slots.copied(target, clone.lock)
                sequences = {
                    sequence: self._known.kept(sequence, held, end_of(held))
                    for sequence, held in self._history().items()
                }
                points = {
                    sequence: frozenset(held.keys() & self._known.points.get(sequence, ()))
                    for sequence, held in sequences.items()
                }
                clone._known = StateHistory(sequences, points)
        return clone

    def prepare_close(self) -> Commit:
        slots = self._slots
        if slots is None:
            return lambda: None
        spill = slots.prepare_spill()  # snapshots outlive the cache

        def commit() -> None:
            spill()
            self._known, self._before, self._slots = StateHistory(), None, None
            slots.free()

        return commit


def _as_shape(sizes: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of an array of one state. Raises: ValueError for sizes below 1."""
    return tuple(as_sizes(**{f"axis {number}": size for number, size in enumerate(sizes)}))
