"""Checks of recurrent states under random calls, in a pool and per layer.

Every state has a number that no other has, coded into its bits. The oracle is a list: for each
sequence the numbers of its states by position.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from kvcache.backends import Backend, HostArray
from kvcache.backends.arrays import Arrays
from kvcache.layers.recurrent import StateCache
from kvcache.pool.batch import Batch
from kvcache.pool.recurrent import RecurrentCache

from .checks import check
from .coded import coded, same

CALLS = 60
"""Random calls of one run."""
SEQUENCES = 2
PROBE = SEQUENCES
"""Sequence into which states are copied to be looked at."""


def _state(backend: Backend, dtype: str, number: int) -> tuple[HostArray, HostArray]:
    """Return state `number`: ``[1, 3, 4]``, and ``[1, 5]`` of another dtype if there is one."""
    other = "float32" if "float32" in backend.dtypes else dtype
    return (
        coded((1, 3, 1, 4), dtype, number)[:, :, 0],
        coded((1, 1, 1, 5), other, number)[:, 0, 0],
    )


def _states(backend: Backend, dtype: str, numbers: list[int]) -> Arrays:
    """Return several states, one per row."""
    columns = zip(*(_state(backend, dtype, number) for number in numbers), strict=True)
    return tuple(backend.from_host(np.concatenate(column)) for column in columns)


def _check(backend: Backend, dtype: str, arrays: Arrays, number: int, row: int = 0) -> None:
    """Raise AssertionError unless a row of `arrays` is state `number`."""
    for array, expected in zip(arrays, _state(backend, dtype, number), strict=True):
        same(backend.to_host(array)[row : row + 1], expected)


class _Sequences:
    """A recurrent pool, and the numbers of the states that it has to have.

    held: by sequence, numbers by position; the last is that of the end.
    """

    def __init__(self, backend: Backend, dtype: str, chance: random.Random) -> None:
        self.backend, self.dtype, self.chance = backend, dtype, chance
        self.cache = RecurrentCache(resume_points=100)
        self.cache.init(backend, max_sequences=SEQUENCES + 1, max_batch=SEQUENCES)
        self.held: list[dict[int, int]] = [{} for _ in range(SEQUENCES)]
        self.last = 0

    def end(self, sequence: int) -> int:
        return max(self.held[sequence], default=0)

    def _new(self) -> int:
        self.last += 1
        return self.last

    def any_sequence(self) -> int:
        return self.chance.randrange(SEQUENCES)

    def any_position(self, sequence: int) -> int:
        """Return a position at which a sequence has a state, or 0."""
        return self.chance.choice([0, *self.held[sequence]])

    # Calls.

    def forward(self) -> None:
        """Make a pass over one sequence or all, with a resume point inside of it or none."""
        ids = self.chance.choice([[self.any_sequence()], [*range(SEQUENCES)]])
        for sequence in ids[:1]:
            self.cache.schedule(sequence, [self.end(sequence) + self.chance.randrange(4)])
        counts = [self.chance.randint(1, 3) for _ in ids]
        starts = [self.end(sequence) for sequence in ids]
        pairs = zip(ids, starts, counts, strict=True)
        tokens = [(s, p) for s, start, count in pairs for p in range(start, start + count)]
        self.cache.start_forward(Batch([p for _, p in tokens], [s for s, _ in tokens]))
        self._see()
        numbers = [self._new() for _ in ids]
        cuts = {(run.sequence, p): self._new() for run in self.cache.runs for p in run.cuts}
        self.cache.put_states(
            *_states(self.backend, self.dtype, numbers),
            kept={cut: _states(self.backend, self.dtype, [n]) for cut, n in cuts.items()},
        )
        for sequence, start, count, number in zip(ids, starts, counts, numbers, strict=True):
            own = {p: n for (s, p), n in cuts.items() if s == sequence}
            self.held[sequence] |= {**own, start + count: number}
            self._forget_unscheduled(sequence, start)

    def _see(self) -> None:
        """Check the states that the pass begins with."""
        states = self.cache.get_states()
        for row, run in enumerate(self.cache.runs):
            if run.position:
                if states is None:
                    raise AssertionError(f"no states for a sequence of {run.position} tokens")
                number = self.held[run.sequence][run.position]
                _check(self.backend, self.dtype, states, number, row)

    def _forget_unscheduled(self, sequence: int, position: int) -> None:
        """Forget the state at a former end, unless it was scheduled and so is kept."""
        if position and not self.cache.can_resume(sequence, position):
            del self.held[sequence][position]

    def draft(self) -> None:
        """Go back into a draft, to any of its tokens; the states of the others are forgotten."""
        sequence = self.any_sequence()
        self.cache.checkpoint(sequence)
        start = self.end(sequence)
        while self.end(sequence) == start:
            self.forward()
        position = self.chance.randint(start, self.end(sequence))
        self._cut(sequence, sequence, position)
        for drafted in range(start, position):
            self._forget_unscheduled(sequence, drafted)

    def remove(self) -> None:
        sequence = self.any_sequence()
        self._cut(sequence, sequence, self.any_position(sequence))

    def fork(self) -> None:
        source, target = self.any_sequence(), self.any_sequence()
        if self.held[source]:
            self._cut(source, target, self.any_position(source))

    def _cut(self, source: int, target: int, position: int) -> None:
        if source == target:
            self.cache.remove(source, position)
        else:
            self.cache.copy_prefix(source, target, position)
        self.held[target] = {p: n for p, n in self.held[source].items() if p <= position}

    def restore(self) -> None:
        """Carry a sequence to another one by a snapshot, resident or by the host."""
        source, target = self.any_sequence(), self.any_sequence()
        position = self.any_position(source)
        if position:
            with self.cache.snapshot(source, 0, position) as snapshot:
                if self.chance.random() < 0.5:
                    snapshot.to_host()
                self.cache.remove(target, 0)
                self.cache.restore(target, snapshot)
            number = self.held[source][position]
            self.held[target] = {position: number}

    # Looking.

    def check_all(self) -> None:
        """Go on from every state of every sequence, and see which one it is."""
        for sequence, held in enumerate(self.held):
            if self.cache.next_position(sequence) != self.end(sequence):
                raise AssertionError(f"sequence {sequence} should end at {self.end(sequence)}")
            for position, number in held.items():
                with self._probe(sequence, position):
                    states = self.cache.get_states()
                    if states is None:
                        raise AssertionError(f"no state behind {position}")
                    _check(self.backend, self.dtype, states, number)

    @contextmanager
    def _probe(self, sequence: int, position: int) -> Iterator[None]:
        self.cache.copy_prefix(sequence, PROBE, position)
        self.cache.start_forward(Batch([position], [PROBE]))
        yield
        self.cache.abort()
        self.cache.remove(PROBE, 0)


@check
def recurrent_pool_keeps_states_apart(backend: Backend, dtype: str) -> None:
    """Carry states of several sequences: none is handed out at another position, or to another."""
    chance = random.Random(0)  # noqa: S311 - the same calls in every run, no secret
    pool = _Sequences(backend, dtype, chance)
    calls = [pool.forward, pool.forward, pool.draft, pool.fork, pool.remove, pool.restore]
    pool.forward()
    for _ in range(CALLS):
        chance.choice(calls)()
        pool.check_all()


class _Layer:
    """A cache of one layer, and the numbers of the states that it has to have, by position."""

    def __init__(self, backend: Backend, dtype: str, chance: random.Random) -> None:
        self.backend, self.dtype, self.chance = backend, dtype, chance
        self.cache = StateCache(backend)
        self.held: dict[int, int] = {}
        self.last = 0

    def _new(self) -> tuple[int, Arrays]:
        self.last += 1
        return self.last, _states(self.backend, self.dtype, [self.last])

    def advance(self) -> None:
        """Go on by some tokens, with a state recorded wherever one is wanted."""
        tokens = self.chance.randint(1, 4)
        self.cache.schedule([self.cache.offset + self.chance.randrange(5)])
        for position in self.cache.cuts(tokens):
            self.held[position], arrays = self._new()
            self.cache.record(position, *arrays)
        number, arrays = self._new()
        self.cache.advance(tokens, *arrays)
        self.held[self.cache.offset] = number

    def draft(self) -> None:
        """Roll back a draft, to any of its tokens."""
        self.cache.checkpoint()
        mark = self.cache.offset
        self.advance()
        self.cache.rollback(self.chance.randint(0, self.cache.offset - mark))

    def trim(self) -> None:
        self.cache.trim(self.cache.offset - self.chance.choice([0, *self.cache.kept]))

    def copy(self) -> None:
        self.cache = self.cache.copy()

    def restore(self) -> None:
        with self.cache.snapshot() as snapshot:
            self.cache = StateCache(self.backend)
            self.cache.restore(snapshot)

    def check_all(self) -> None:
        """Look at the present state, and at every kept one in a copy that goes back to it."""
        for position in self.cache.kept:
            back = self.cache.copy()
            back.trim(back.offset - position)
            _check(self.backend, self.dtype, back.state, self.held[position])


@check
def recurrent_cache_keeps_states_apart(backend: Backend, dtype: str) -> None:
    """Carry the state of one layer through any calls: none is handed out at another position."""
    chance = random.Random(0)  # noqa: S311 - the same calls in every run, no secret
    layer = _Layer(backend, dtype, chance)
    calls = [layer.advance, layer.advance, layer.draft, layer.trim, layer.copy, layer.restore]
    layer.advance()
    for _ in range(CALLS):
        chance.choice(calls)()
        layer.check_all()
