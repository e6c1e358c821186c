"""Passes over recurrent layers: the part of the recurrent cache that a model sees."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NoReturn

import numpy as np

from kvcache._checks import as_index, as_sizes, check_ids
from kvcache._interrupts import uninterrupted
from kvcache._locks import Lock
from kvcache.backends import Array, Backend, CacheConfig, get_backend
from kvcache.errors import KVCacheError, NotSupportedError

from .batch import Batch
from .latest import Progress
from .owned import Commit
from .plan import PoolState, StatePlan
from .planning import Planned, PlanningCache, no_layers
from .runs import (
    Sequences,
    StatePass,
    begun_pass,
    check_appended,
    checked_cuts,
    end_of,
    runs_of,
    step_slots,
    steps_of,
)
from .state_calls import Run, StatesAtCuts
from .state_history import StateHistory
from .state_room import find_room
from .state_slots import StateSlots


class StatePasses(PlanningCache[StatePlan, PoolState]):
    """A cache of recurrent states, as far as its passes go.

    resume_points: states that there is room for besides those of sequences and passes.
    """

    def __init__(self, resume_points: int) -> None:
        super().__init__()
        self.resume_points = resume_points
        self._slots: StateSlots | None = None
        self._max_sequences = self._layer = 0
        self._known = StateHistory()
        self._before: StateHistory | None = None  # as it was before the pass just begun

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
            self._known, self._before = StateHistory(), None
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
    def max_sequences(self) -> int:
        self._sized()
        return self._max_sequences

    def share_lock(self, lock: Lock) -> None:
        super().share_lock(lock)
        if self._slots is not None:
            self._slots.lock = lock

    # Passes.

    def prepare_forward(self, batch: Batch, reserve: bool) -> Commit:
        runs = runs_of(batch)
        check_ids(self.max_sequences, *(run.sequence for run in runs))
        self._before, known = None, self._going_on()
        if reserve:
            zeros, none = np.zeros(len(runs), np.int32), np.empty(0, np.int32)
            resumes = any(run.position for run in runs)
            begun = StatePass(tuple(runs), zeros, none, resumes, stores=False)
            return self._beginning(known, known.sequences, begun)
        return self._beginning(known, *self._begun(known, runs))

    def _going_on(self) -> StateHistory:
        """Return the history that a new pass goes on from: planned passes stay, others are over."""
        known = self._known
        return known if known.has_plans else known._replace(sequences=self._history(), begun=())

    def _begun(self, known: StateHistory, runs: Sequence[Run]) -> tuple[Sequences, StatePass]:
        """Return a new pass, and the sequences before all passes without what gave way for it.

        Raises: ValueError, CacheFullError.
        """
        slots, ahead = self._sized(), known.ahead()
        check_appended(runs, ahead)
        before = [ahead[run.sequence][run.position] if run.position else 0 for run in runs]
        if known.points or known.marks:
            runs = [known.with_cuts(run) for run in runs]
        wanted = sum(1 + len(run.cuts) for run in runs)
        free, sequences = find_room(slots, known, len(runs), wanted)
        return sequences, begun_pass(runs, np.array(before, np.int32), free, slots.layers)

    def _beginning(self, known: StateHistory, sequences: Sequences, begun: StatePass) -> Commit:
        """Return the commit to begin a pass, which :meth:`revert_forward` undoes."""
        after = known._replace(sequences=sequences, begun=(*known.begun, begun))

        def commit() -> None:
            self._before = self._known
            self._known = after

        return commit

    def revert_forward(self) -> None:
        if self._before is not None:
            self._known = self._before

    def pass_progress(self) -> Progress:
        return Progress.COMPLETE if self._known.complete else Progress.PARTIAL

    def note_whole(self) -> None:
        self._known = self._known.settled()

    def drop_pass(self) -> None:
        self._known = self._known._replace(begun=())

    def _history(self) -> Sequences:
        """Return the slots of all sequences, with those of passes that are finished."""
        known = self._known
        return known.sequences if self.is_unfinished() else known.ahead()

    def _current(self) -> StatePass:
        if not self._known.begun:
            raise KVCacheError("put_states and get_states belong to a pass. Call start_forward.")
        return self._known.begun[-1]

    def _eager(self) -> StatePass:
        """Return the current pass, to be put here and by no program."""
        current = self._current()
        if current.planned and not current.complete:
            raise KVCacheError(
                "this pass was planned, and a program has its states. Call functional.get_states "
                "and put_states in the program, or start_forward here."
            )
        return current

    # Layers.

    def set_layer(self, layer: int) -> None:
        self._layer = layer if type(layer) is int else as_index(layer, "layer")

    @property
    def runs(self) -> tuple[Run, ...]:
        return self._current().runs

    def get_states(self) -> tuple[Array, ...] | None:
        slots = self._sized()
        with self.lock:  # another thread may write to the buffers, and so consume them
            current = self._eager()
            if not current.resumes:
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
            current = self._eager()
            if self._layer in current.put and current.complete:
                self._refuse_shared(slots, current)
            at_cuts = {} if kept is None else checked_cuts(current, kept)
            slots.check(self._layer, arrays, len(current.runs))
            for state in at_cuts.values():
                slots.check_like(self._layer, state, arrays)
            taken = current.behind
            if at_cuts:
                index = np.array([current.at_cuts[cut] for cut in at_cuts], np.int32)
                taken = np.concatenate([taken, index])
            slots.put(self._layer, arrays, [*at_cuts.values()], taken)
            self._known = self._known.with_current(current.with_put(self._layer, at_cuts))

    def _refuse_shared(self, slots: StateSlots, current: StatePass) -> None:
        """Raise KVCacheError if a complete pass left states that others have as well.

        Until then a layer may be put again, as after a put that was interrupted at its end.
        """
        held = {slot for states in self._known.sequences.values() for slot in states.values()}
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

    # Programs.

    def export_programs(self) -> PoolState:
        return self._sized().export()

    def prepare_import(self, state: PoolState) -> Commit:
        take_over = self._sized().prepare_import(state)

        def commit() -> None:
            take_over()
            self._known = self._known.carried_out()

        return commit

    def has_plans(self) -> bool:
        return self._known.has_plans

    def prepare_replan(self, batch: Batch) -> Commit:
        remaining = self._known.before_failed(batch)
        # Now, because a step between the first and the last of several leaves no state.
        check_appended(runs_of(batch), remaining.ahead())

        def commit() -> None:
            self._known = remaining

        return commit

    def tokens_begun(self) -> int:
        return sum(run.stop - run.start for run in self._current().runs)

    def pass_savepoint(self) -> Callable[[], None]:
        before = self._known

        def undo() -> None:
            self._known = before

        return undo

    def plan_begun(self, tokens: int | None, reads: bool) -> StatePlan:
        current = self._current()
        if not current.stores:
            raise NotSupportedError("a reserve pass has no plan: it stores nothing. Use allocate.")
        extra = 0 if tokens is None else tokens - self.tokens_begun()
        if extra and self.tokens_begun() > len(current.runs):
            raise NotSupportedError(
                "a recurrent layer computes every token of a run, so only decode steps, of one "
                f"token for each sequence, are padded; got {self.tokens_begun()} tokens of "
                f"{len(current.runs)} sequences. Plan them without tokens=."
            )
        # Edge padding: the last run is written again, to its own slot, with equal rows.
        slots = current.before, current.behind
        plan = self._device_plan(*(np.pad(index, (0, extra), "edge") for index in slots))
        self._known = self._known.with_current(current.as_plan())
        return plan

    def begin_steps(self, batch: Batch, steps: int, reads: bool) -> Planned[StatePlan]:
        runs, undo = steps_of(batch, steps), self.pass_savepoint()
        check_ids(self.max_sequences, *(run.sequence for run in runs))
        known = self._going_on()
        sequences, begun = self._begun(known, runs)
        plan = self._device_plan(*step_slots(begun, steps))
        planned = begun._replace(planned=True)
        self._known = known._replace(sequences=sequences, begun=(*known.begun, planned))
        return Planned(plan, undo)

    def _device_plan(self, before: np.ndarray, behind: np.ndarray) -> StatePlan:
        """Return a plan, stacked along a first axis for several steps.

        Raises: KVCacheError before any layer was allocated.
        """
        slots = self._sized()
        if not slots.layers:
            raise no_layers()
        move = slots.backend.from_host
        return StatePlan(move(before), move(behind), slots.likes(before.shape[:-1]))

    # Looking.

    def next_position(self, sequence: int) -> int:
        sequence = as_index(sequence, "sequence")
        check_ids(self.max_sequences, sequence)
        with self.lock:
            return end_of(self._history().get(sequence))
