"""Contestants: the framework's own copies, gathers and scatters, and our caches of states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from kvcache.bench.frameworks.base import Framework
from kvcache.bench.harness.contest import RAW, Contestant, Factories, Loop
from kvcache.layers.recurrent import StateCache
from kvcache.pool.batch import Batch
from kvcache.pool.recurrent import RecurrentCache

from .case import ADVANCE, FORK, POOL, RAW_COPIES, RAW_HOST, RESTORE, StateCase


def factories(framework: Framework) -> Factories[StateCase]:
    """Return a factory for every contestant by name, also where it cannot take part."""
    makers: dict[str, Callable[[Framework, StateCase], Loop]] = {
        RAW_COPIES: lambda own, case: own.raw_copies(case.layers, case.states()),
        ADVANCE: _advances,
        RAW: _raw,
        POOL: lambda own, case: PoolSteps(own, case).run,
        FORK: _forks,
        RAW_HOST: _raw_by_host,
        RESTORE: _restores,
    }
    return {name: partial(_contestant, name, make, framework) for name, make in makers.items()}


def _contestant(
    name: str, make: Callable[[Framework, StateCase], Loop], framework: Framework, case: StateCase
) -> Contestant:
    return Contestant(name, make(framework, case))


def _advances(framework: Framework, case: StateCase) -> Loop:
    """Replace the state of a `StateCache` per layer."""
    caches = [StateCache(case.backend) for _ in range(case.layers)]
    new, finish = case.states(), framework.finish

    def run(steps: int) -> None:
        for _ in range(steps):
            for cache in caches:
                cache.advance(1, *new)
                finish(cache.state)

    return run


def _raw(framework: Framework, case: StateCase) -> Loop:
    """Gather and scatter the rows of all sequences, from one half of the buffers to the other."""
    layers = [case.buffers(2 * case.batch) for _ in range(case.layers)]
    halves = [*range(case.batch)], [*range(case.batch, 2 * case.batch)]
    return framework.raw_states(layers, case.states(), *halves)


class PoolSteps:
    """Decode steps of a `RecurrentCache`: start_forward, then get_states and put_states."""

    def __init__(self, framework: Framework, case: StateCase) -> None:
        self.framework, self.case, self.new = framework, case, case.states()
        self.cache = RecurrentCache(resume_points=0)
        self.cache.init(case.backend, max_sequences=case.batch, max_batch=case.batch)
        self.sequences, self.position = [*range(case.batch)], 0

    def run(self, steps: int) -> None:
        """Take as many steps."""
        for _ in range(steps):
            self.cache.start_forward(Batch([self.position] * self.case.batch, self.sequences))
            self.position += 1
            for layer in range(self.case.layers):
                self.cache.set_layer(layer)
                # Not kept: as for raw, the memory of one read serves the next.
                self.framework.finish(self.cache.get_states() or ())
                self.cache.put_states(*self.new)
            # A lazy framework is waited for by the next step, which reads what was put.


def _filled(case: StateCase) -> RecurrentCache:
    """Return a pool with a state for each sequence, and room for one sequence more."""
    cache, new = RecurrentCache(resume_points=1), replace(case, batch=1).states()
    cache.init(case.backend, max_sequences=case.batch + 1, max_batch=1)
    for sequence in range(case.batch):
        cache.start_forward(Batch([0], [sequence]))
        for layer in range(case.layers):
            cache.set_layer(layer)
            cache.put_states(*new)
    return cache


def _forks(_: Framework, case: StateCase) -> Loop:
    """Let another sequence go on from the state of the first."""
    cache, fresh = _filled(case), case.batch

    def run(steps: int) -> None:
        for _ in range(steps):
            cache.copy_prefix(0, fresh, 1)

    return run


def _raw_by_host(framework: Framework, case: StateCase) -> Loop:
    """Copy the state of one sequence to the host, and back to another place."""
    backend, layers = case.backend, [case.buffers(2) for _ in range(case.layers)]

    def run(steps: int) -> None:
        for _ in range(steps):
            for number, buffers in enumerate(layers):
                rows = [backend.to_host(backend.slice(buffer, 0, 1, 0)) for buffer in buffers]
                layers[number] = tuple(
                    backend.slice_update(buffer, backend.from_host(host), 1, 0)
                    for buffer, host in zip(buffers, rows, strict=True)
                )
            framework.finish(tuple(array for buffers in layers for array in buffers))

    return run


def _restores(_: Framework, case: StateCase) -> Loop:
    """Take a snapshot of one sequence, copy it to the host, and restore another from it."""
    cache, fresh = _filled(case), case.batch

    def run(steps: int) -> None:
        for _ in range(steps):
            with cache.snapshot(0) as snapshot:
                cache.restore(fresh, snapshot.to_host())
            cache.remove(fresh, 0)

    return run
