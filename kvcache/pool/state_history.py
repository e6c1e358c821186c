"""The sequences of a recurrent pool on the host, with the passes that are not over."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from .batch import Batch
from .runs import Held, Sequences, StatePass, end_of
from .state_calls import Run


class StateHistory(NamedTuple):
    """Sequences, and passes on them; replaced, never changed, so that keeping one undoes changes.

    sequences: slots of their states before the passes. points: scheduled positions by sequence.
    begun: passes, oldest first: the current one is the last. Several were planned for programs.
    marks: by sequence, where its last checkpoint is: a pass that goes on there is a draft.
    """

    sequences: Mapping[int, Held] = {}
    points: Mapping[int, frozenset[int]] = {}
    begun: tuple[StatePass, ...] = ()
    marks: Mapping[int, int] = {}

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
            sequences = state_pass.after(sequences, self.points, self.marks)
        return sequences

    def drafts(self, sequence: int, held: Held) -> set[int]:
        """Return the positions in `held`, of a sequence, whose states are there to go back only.

        They are those of the last draft, with its beginning and its end, where no resume point is.
        """
        mark, points = self.marks.get(sequence), self.points.get(sequence, ())
        return set() if mark is None else {p for p in held if p >= mark and p not in points}

    def kept(self, sequence: int, held: Held, stop: int) -> Held:
        """Return what is held up to `stop`, without the states of a draft before."""
        given_up = self.drafts(sequence, held) - {stop, end_of(held)}
        return {p: slot for p, slot in held.items() if p <= stop and p not in given_up}

    def with_cuts(self, run: Run) -> Run:
        """Return a run with its cuts: resume points inside of it, and all positions of a draft."""
        inside = range(run.position + 1, run.end)
        if self.marks.get(run.sequence) == run.position:
            return run._replace(cuts=tuple(inside))
        points = self.points.get(run.sequence, ())
        return run._replace(cuts=tuple(sorted(point for point in points if point in inside)))

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
        marks = {s: mark for s, mark in self.marks.items() if s != sequence}
        return StateHistory(
            {**others, sequence: held} if held else others,
            {**schedules, sequence: points} if points and held else schedules,
            tuple([state_pass.without(sequence) for state_pass in self.begun]),
            marks,
        )

    def scheduling(self, sequence: int, positions: Iterable[int], end: int) -> StateHistory:
        """Return this history with `positions` scheduled, as far as their tokens are to come.

        end: of the sequence. Positions before it are forgotten, where neither a pass begun goes by
        them nor a draft.
        """
        runs = (run for begun in self.begun for run in begun.runs if run.sequence == sequence)
        oldest = min([end, self.marks.get(sequence, end), *(run.position for run in runs)])
        known = {p for p in self.points.get(sequence, ()) if p >= oldest}
        first = self._next(sequence, end)
        points = frozenset(known.union(p for p in positions if p >= max(1, first)))
        return self._replace(points={**self.points, sequence: points})

    def _next(self, sequence: int, end: int) -> int:
        """Return where the next pass over a sequence goes on, which ends at `end` for now."""
        # The slots of planned passes are settled: too late for positions inside of them.
        return end_of(self.ahead().get(sequence)) if self.has_plans else end

    def drafting(self, sequence: int, end: int) -> StateHistory:
        """Return this history with a checkpoint at the end of a sequence, its only one.

        end: of the sequence.
        """
        sequences = {
            s: self.kept(s, held, end) if s == sequence else held
            for s, held in self.sequences.items()
        }
        marks = {**self.marks, sequence: self._next(sequence, end)}
        return self._replace(sequences=sequences, marks=marks)

    def before_failed(self, batch: Batch) -> StateHistory:
        """Return this history as before the first planned pass that has tokens of `batch`."""
        for number, state_pass in enumerate(self.begun):
            if any(_has_token(batch, run.sequence, run.end) for run in state_pass.runs):
                return self._replace(begun=self.begun[:number])
        return self


def _has_token(batch: Batch, sequence: int, end: int) -> bool:
    return bool((batch.positions[batch.sequences == sequence] < end).any())
