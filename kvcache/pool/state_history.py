"""The sequences of a recurrent pool on the host, with the passes that are not over."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from .batch import Batch
from .runs import Held, Sequences, StatePass, end_of


class StateHistory(NamedTuple):
    """Sequences, and passes on them; replaced, never changed, so that keeping one undoes changes.

    sequences: slots of their states before the passes. points: scheduled positions by sequence.
    begun: passes, oldest first: the current one is the last. Several were planned for programs.
    """

    sequences: Mapping[int, Held] = {}
    points: Mapping[int, frozenset[int]] = {}
    begun: tuple[StatePass, ...] = ()

    @property
    def current(self) -> StatePass | None:
        """The pass begun last."""
        return self.begun[-1] if self.begun else None

    @property
    def complete(self) -> bool:
        """True if every pass was put, or its program has come back."""
        return all(state_pass.complete for state_pass in self.begun)

    @property
    def has_plans(self) -> bool:
        """True while programs have planned passes to carry out."""
        return any(p.planned and not p.complete for p in self.begun)

    def ahead(self) -> Sequences:
        """Return the sequences as they are once all passes are history."""
        sequences = self.sequences
        for state_pass in self.begun:
            sequences = state_pass.after(sequences, self.points)
        return sequences

    def reserved(self) -> set[int]:
        """Return the slots, besides those held before the passes, that a further pass must spare.

        The states that the passes leave, and all that a pass put here still reads. A state that a
        planned pass left for the next one only may be overwritten: programs run in order.
        """
        if not self.begun:
            return set()
        left = {slot for held in self.ahead().values() for slot in held.values()}
        before = {slot for held in self.sequences.values() for slot in held.values()}
        last = self.begun[-1]
        return (left - before) | (last.written if last.planned else last.slots)

    # Changes.

    def with_current(self, current: StatePass) -> StateHistory:
        """Return this history with another current pass."""
        return self._replace(begun=(*self.begun[:-1], current))

    def settled(self) -> StateHistory:
        """Return this history with every layer put in the current pass among those to put."""
        current = self.current
        if current is None:
            return self
        return self.with_current(current._replace(expected=current.expected | current.put))

    def carried_out(self) -> StateHistory:
        """Return this history with the planned passes complete."""
        return self._replace(begun=tuple([state_pass.carried_out() for state_pass in self.begun]))

    def replacing(self, sequence: int, held: Held, points: frozenset[int]) -> StateHistory:
        """Return this history with a sequence that holds just `held`, and left the passes."""
        others = {s: states for s, states in self.sequences.items() if s != sequence}
        schedules = {s: own for s, own in self.points.items() if s != sequence}
        return StateHistory(
            {**others, sequence: held} if held else others,
            {**schedules, sequence: points} if points and held else schedules,
            tuple([state_pass.without(sequence) for state_pass in self.begun]),
        )

    def scheduling(self, sequence: int, positions: Iterable[int], end: int) -> StateHistory:
        """Return this history with `positions` scheduled, as far as their tokens are to come.

        end: of the sequence; scheduled positions before it are forgotten.
        """
        known = {p for p in self.points.get(sequence, ()) if p >= end}
        # The slots of planned passes are settled: too late for positions inside of them.
        first = end_of(self.ahead().get(sequence)) if self.has_plans else end
        points = frozenset(known.union(p for p in positions if p >= max(1, first)))
        return self._replace(points={**self.points, sequence: points})

    def before_failed(self, batch: Batch) -> StateHistory:
        """Return this history as before the first planned pass that has tokens of `batch`."""
        for number, state_pass in enumerate(self.begun):
            if any(_has_token(batch, run.sequence, run.end) for run in state_pass.runs):
                return self._replace(begun=self.begun[:number])
        return self


def _has_token(batch: Batch, sequence: int, end: int) -> bool:
    return bool((batch.positions[batch.sequences == sequence] < end).any())
