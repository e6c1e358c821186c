"""Contestants of a decode pass: our attention, the range of the pool with a mask, the ideal."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

from kvcache import functional
from kvcache.backends.arrays import NativeArray, NativeArrays
from kvcache.bench.frameworks.base import Batched, Framework
from kvcache.bench.harness.contest import Contestant, Factories, Loop, UnavailableError
from kvcache.pool.batch import Batch
from kvcache.pool.causal import CausalCache

from .case import ATTEND, IDEAL, PROGRAM, RANGE, AttendCase

_PIECE = 16
"""Cells in a row of a fragmented pool."""
_MOST_SCORES = 1 << 21
"""Scores of a query head over the range of a pool, beyond which a step takes seconds."""


def factories(framework: Framework) -> Factories[AttendCase]:
    """Return factories of all contestants."""
    pass_of = cache(lambda case: DecodePass(framework, case))  # ours and the range: one pool

    def program(case: AttendCase) -> Contestant:
        return Contestant(PROGRAM, repeated(framework, DecodePass(framework, case).by_program()))

    return {
        IDEAL: lambda case: Contestant(IDEAL, repeated(framework, ideal(framework, case))),
        ATTEND: lambda case: Contestant(ATTEND, repeated(framework, pass_of(case).attend)),
        **({PROGRAM: program} if framework.compiles else {}),
        RANGE: lambda case: Contestant(RANGE, repeated(framework, pass_of(case).by_range())),
        **{name: _peer(framework, name, make) for name, make in framework.batched().items()},
    }


def _peer(framework: Framework, name: str, make: Batched) -> Callable[[AttendCase], Contestant]:
    """Return the factory of a peer that holds all tokens of many sequences."""

    def peer(case: AttendCase) -> Contestant:
        if case.window is not None:
            raise UnavailableError("it has no window")
        rows = [case.rows(number, 0, length) for number, length in enumerate(case.lengths)]
        return Contestant(name, repeated(framework, make(case, case.queries(), rows)))

    return peer


def repeated(framework: Framework, attend: Callable[[], NativeArray]) -> Loop:
    """Return a loop over `attend`, waiting for its result where the framework is lazy."""

    def run(steps: int) -> None:
        for _ in range(steps):
            framework.finish((attend(),))

    return run


def ideal(framework: Framework, case: AttendCase) -> Callable[[], NativeArray]:
    """Return attention of every sequence over keys and values in arrays of its own."""
    backend, xp, kernel = case.backend, case.backend.xp, framework.attention(case)
    queries = [
        backend.from_host(case.queries()[:, number : number + 1], case.dtype)
        for number in range(case.batch)
    ]
    histories = [(case.seen(number), case.seen(number)) for number in range(case.batch)]

    def attend(queries: list[NativeArray], histories: list[NativeArrays]) -> NativeArray:
        outputs = [
            kernel(q, keys, values, None)
            for q, (keys, values) in zip(queries, histories, strict=True)
        ]
        return xp.concat(outputs, axis=1)

    program = backend.compile(attend)
    return lambda: program(queries, histories)


class DecodePass:
    """A pass of one token of every sequence over a pool, begun and put."""

    def __init__(self, framework: Framework, case: AttendCase) -> None:
        self.framework, self.case = framework, case
        self.cache = CausalCache(window=case.window)
        own = sum(length - case.shared for length in case.lengths)
        # As many cells as are needed, and room for the tokens that leave a window meanwhile.
        sequences, cells = case.batch, own + case.shared
        if case.load == "fragmented":  # a sequence of few cells soon meets the next one
            sequences = -(-cells // _PIECE)
        capacity = max(case.lengths) if case.window else -(-cells // sequences)
        self.cache.init(
            case.backend,
            case.dtype,
            max_sequences=sequences,
            capacity=capacity,
            max_batch=max(case.lengths),
        )
        self._fill()
        self.q = case.backend.from_host(case.queries(), case.dtype)

    def attend(self) -> NativeArray:
        """Return our attention."""
        return self.cache.attend(self.q)

    def by_program(self) -> Callable[[], NativeArray]:
        """Return our attention in a compiled program; the pool is then in the form for programs."""
        plan, state = self.cache.plan(reads=True), self.cache.program_state
        program = self.case.backend.compile(
            lambda state, plan, q: functional.attend(state, plan, 0, q)
        )
        return lambda: program(state, plan, self.q)

    def by_range(self) -> Callable[[], NativeArray]:
        """Return attention over the range of the pool that holds all sequences, with a mask.

        Raises: UnavailableError where one step would take seconds.
        """
        keys, values, mask = self.cache.get()
        if mask.shape[0] * mask.shape[1] > _MOST_SCORES:
            raise UnavailableError(
                f"{mask.shape[0]:,} tokens x {mask.shape[1]:,} cells take seconds"
            )
        program = self.case.backend.compile(self.framework.attention(self.case))
        return lambda: program(self.q, keys, values, mask)

    def _fill(self) -> None:
        case, cache = self.case, self.cache
        last = [length - 1 for length in case.lengths]
        if case.shared:
            self._put([(0, 0, case.shared)])
            for sequence in range(1, case.batch):
                cache.copy_prefix(0, sequence, case.shared)
        piece = _PIECE if case.load == "fragmented" else max(case.lengths)
        for start in range(case.shared, max(last), piece):
            for sequence, stop in enumerate(last):
                self._put([(sequence, start, min(stop, start + piece))])
        self._put([(sequence, stop, stop + 1) for sequence, stop in enumerate(last)])

    def _put(self, spans: list[tuple[int, int, int]]) -> None:
        """Store the positions ``[start, stop)`` of some sequences in one pass."""
        spans = [span for span in spans if span[1] < span[2]]
        if not spans:
            return
        positions = np.concatenate([np.arange(start, stop) for _, start, stop in spans])
        sequences = np.repeat(
            [span[0] for span in spans], [stop - start for _, start, stop in spans]
        )
        rows = np.concatenate([self.case.rows(*span) for span in spans], axis=1)
        self.cache.start_forward(Batch(positions, sequences))
        keys, values = (self.case.backend.from_host(rows, self.case.dtype) for _ in range(2))
        self.cache.put(keys, values)
