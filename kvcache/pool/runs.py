"""Passes over recurrent layers: the runs of a batch, and the slots of their states."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np

from kvcache._checks import as_index
from kvcache._types import Int32s
from kvcache.backends.arrays import Arrays
from kvcache.errors import StateError

from .batch import Batch
from .state_calls import Run

Held: TypeAlias = dict[int, int]
"""The slots of one sequence by the position that the state is behind, ascending.

The last is that of its end, and the others are kept to go back to. Replaced, never changed.
"""
Sequences: TypeAlias = Mapping[int, Held]
"""By sequence, the one idle longest first; empty sequences are left out."""
Cut: TypeAlias = tuple[int, int]
"""Sequence and position."""


class StatePass(NamedTuple):
    """A pass on the host; replaced, never changed.

    before: slot of the state that each run begins with, 0 for none. behind: slot for the state
    behind each run. resumes: whether any run begins with a state. at_cuts: slots for the states at
    cuts. expected: layers to put; those put are `put`. recorded: by cut, the layers that gave a
    state. detached: sequences changed since it began, which it changes no more. stores: False for
    a reserve pass. planned: True if programs put its layers.
    """

    runs: tuple[Run, ...]
    before: Int32s
    behind: Int32s
    resumes: bool
    at_cuts: Mapping[Cut, int] = {}
    expected: frozenset[int] = frozenset()
    put: frozenset[int] = frozenset()
    recorded: Mapping[Cut, frozenset[int]] = {}
    detached: frozenset[int] = frozenset()
    stores: bool = True
    planned: bool = False

    @property
    def complete(self) -> bool:
        """True if every layer that was allocated when the pass began has been put, one at least."""
        return not self.stores or (bool(self.put) and self.expected <= self.put)

    @property
    def slots(self) -> set[int]:
        """Slots that the pass may still read or write."""
        return {*self.before.tolist(), *self.written}

    @property
    def written(self) -> set[int]:
        """Slots that the pass writes."""
        return {*self.behind.tolist(), *self.at_cuts.values()}

    def after(
        self,
        sequences: Sequences,
        points: Mapping[int, frozenset[int]],
        marks: Mapping[int, int],
    ) -> Sequences:
        """Return `sequences`, those before this pass, as they are once it is history.

        points: scheduled positions by sequence, at which states are kept. marks: where the last
        checkpoint of a sequence is. A run that begins there keeps its states, and the one that it
        begins with; any other gives up what such a run has kept.
        """
        changed = dict(sequences)
        for run, slot in zip(self.runs, self.behind.tolist(), strict=self.stores):
            if run.sequence in self.detached:
                continue
            held = changed.pop(run.sequence, {})  # popped, and so moved to the end
            own, mark = points.get(run.sequence, ()), marks.get(run.sequence)
            draft = run.position == mark
            if not draft:
                first = run.position if mark is None else min(mark, run.position)
                held = {p: held[p] for p in held if p < first or p in own}
            cuts = ((run.sequence, position) for position in run.cuts if draft or position in own)
            inside = {cut[1]: self.at_cuts[cut] for cut in cuts if self._is_whole(cut)}
            changed[run.sequence] = {**held, **inside, run.end: slot}
        return changed

    def _is_whole(self, cut: Cut) -> bool:
        """Return whether every layer gave a state at a cut, as programs do."""
        if self.planned:
            return True
        return bool(self.put) and self.recorded.get(cut, frozenset()) >= self.put

    def with_put(self, layer: int, cuts: Iterable[Cut]) -> StatePass:
        """Return the pass with one more layer put, and its states at `cuts` given."""
        given = {cut: self.recorded.get(cut, frozenset()) | {layer} for cut in cuts}
        return self._replace(put=self.put | {layer}, recorded={**self.recorded, **given})

    def as_plan(self) -> StatePass:
        """Return the pass for programs, which give states behind ends only."""
        runs = tuple(run._replace(cuts=()) for run in self.runs)
        return self._replace(runs=runs, at_cuts={}, put=frozenset(), recorded={}, planned=True)

    def carried_out(self) -> StatePass:
        """Return the pass as its program leaves it: complete, if it was planned."""
        return self._replace(put=self.expected) if self.planned else self

    def without(self, sequence: int) -> StatePass:
        """Return the pass with one more sequence detached."""
        return self._replace(detached=self.detached | {sequence})


def end_of(held: Held | None) -> int:
    """Return the position after the last token of a sequence; 0 for an empty one."""
    return next(reversed(held)) if held else 0


def runs_of(batch: Batch) -> list[Run]:
    """Return the runs of a batch, without cuts.

    Raises: ValueError unless the tokens of each sequence are adjacent and positions go up by one.
    """
    ids = batch.sequences.tolist()
    if len(set(ids)) == len(ids):  # a decode step: no arrays are needed
        tokens = enumerate(zip(ids, batch.positions.tolist(), strict=True))
        return [Run(sequence, i, i + 1, position) for i, (sequence, position) in tokens]
    positions, sequences = batch.positions.astype(np.int64), batch.sequences
    same = np.diff(sequences) == 0
    starts = [0, *(np.flatnonzero(~same) + 1).tolist()]
    ids = sequences[starts].tolist()
    if len(set(ids)) < len(ids) or (np.diff(positions)[same] != 1).any():
        raise ValueError(
            "a recurrent layer computes the tokens of a sequence in one run: in a batch they are "
            f"adjacent, and positions go up by one; got positions {positions.tolist()} of "
            f"sequences {sequences.tolist()}. Sort the batch, or make several passes."
        )
    stops = [*starts[1:], len(batch)]
    firsts = positions[starts].tolist()
    return [Run(*numbers) for numbers in zip(ids, starts, stops, firsts, strict=True)]


def check_appended(runs: Iterable[Run], sequences: Sequences) -> None:
    """Raise ValueError unless every run goes on where its sequence ends."""
    for run in runs:
        end = end_of(sequences.get(run.sequence))
        if run.position != end:
            raise ValueError(
                f"a state goes on at its own position: the next token of sequence {run.sequence} "
                f"is {end}; got {run.position}. Remove what comes behind it, or restore a snapshot."
            )


def steps_of(batch: Batch, steps: int) -> list[Run]:
    """Return the runs of so many decode steps, without cuts: one step after the other in each.

    Raises: ValueError for a batch with two tokens of a sequence.
    """
    sequences, positions = batch.sequences.tolist(), batch.positions.tolist()
    if len(set(sequences)) < len(sequences):
        raise ValueError(f"a decode step has one token per sequence; got {sequences}.")
    pairs = enumerate(zip(sequences, positions, strict=True))
    return [
        Run(sequence, number * steps, (number + 1) * steps, position)
        for number, (sequence, position) in pairs
    ]


def step_slots(state_pass: StatePass, steps: int) -> tuple[Int32s, Int32s]:
    """Return the slots that each step reads, and those that it writes, ``[steps, runs]`` each.

    A step reads what the one before wrote. It writes to the same slot again, unless that state is
    behind a cut.
    """
    written = np.array(
        [
            [
                state_pass.at_cuts.get((run.sequence, run.position + step + 1), slot)
                for run, slot in zip(state_pass.runs, state_pass.behind.tolist(), strict=True)
            ]
            for step in range(steps)
        ],
        np.int32,
    )
    return np.concatenate([state_pass.before[None], written[:-1]]), written


def begun_pass(
    runs: Sequence[Run], before: Int32s, free: Sequence[int], layers: Iterable[int]
) -> StatePass:
    """Return a pass whose states go to `free` slots; where they are few, its first cuts get none.

    before: slot of the state that each run begins with. layers: those with memory.
    """
    cuts = [(run.sequence, position) for run in runs for position in run.cuts]
    at_cuts = dict(zip(reversed(cuts), free[len(runs) :], strict=False))
    if len(at_cuts) < len(cuts):
        runs = [
            run._replace(cuts=tuple(p for p in run.cuts if (run.sequence, p) in at_cuts))
            for run in runs
        ]
    return StatePass(
        tuple(runs),
        before,
        np.array(free[: len(runs)], np.int32),
        bool(before.any()),
        at_cuts,
        frozenset(layers),
    )


def checked_cuts(current: StatePass, kept: object) -> dict[Cut, Arrays]:
    """Return the states of `kept`, which a model gave.

    Raises: TypeError unless it has tuples of arrays by sequence and position; StateError unless all
        are behind cuts of the pass.
    """
    if not isinstance(kept, dict | Mapping):  # a dict, as in most passes, is known at once
        raise _malformed(f"a {type(kept).__name__}")
    checked = {}
    for key, state in kept.items():
        if not isinstance(key, tuple) or len(key) != 2:
            raise _malformed(f"the key {reprlib.repr(key)}")
        if not isinstance(state, Sequence):  # an array would be taken apart along its first axis
            raise _malformed(f"a {type(state).__name__} behind {key}")
        cut = as_index(key[0], "sequence"), as_index(key[1], "position")
        if cut not in current.at_cuts:
            wanted = reprlib.repr(sorted(current.at_cuts))
            raise StateError(
                f"a state is kept behind one of the cuts of the pass, {wanted} by sequence and "
                f"position; got {cut}. schedule() other positions before the pass."
            )
        checked[cut] = tuple(state)
    return checked


def _malformed(got: str) -> TypeError:
    return TypeError(
        "kept has states by sequence and position, each a tuple of arrays: {(sequence, position): "
        f"(array, ...)}}; got {got}."
    )
