"""Contestants of a decode step: the framework's own calls, our cache, and it in a program."""

from __future__ import annotations

import numpy as np

from kvcache import functional
from kvcache.backends import Array
from kvcache.bench.frameworks.base import Framework
from kvcache.bench.harness.contest import RAW, Contestant, Factories
from kvcache.pool.batch import Batch
from kvcache.pool.causal import CausalCache
from kvcache.pool.plan import ForwardPlan, PoolState

from .case import ATTEND, CAUSAL, PROGRAM, DecodeCase


def eager(framework: Framework) -> Factories[DecodeCase]:
    """Return factories of the contestants outside compiled programs."""
    return {
        RAW: lambda case: Contestant(RAW, framework.raw_step(case, case.histories())),
        CAUSAL: lambda case: CausalSteps(framework, case).contestant(),
    }


def programs(framework: Framework) -> Factories[DecodeCase]:
    """Return factories of decode steps with attention: without the write, and with it."""
    return {
        ATTEND: lambda case: ProgramSteps(framework, case, ATTEND).contestant(),
        PROGRAM: lambda case: ProgramSteps(framework, case, PROGRAM).contestant(),
    }


class CausalSteps:
    """Decode steps of a `CausalCache`; at the end of a block its sequences are full."""

    name = CAUSAL

    def __init__(self, framework: Framework, case: DecodeCase) -> None:
        self.framework, self.case = framework, case
        self.cache = CausalCache()
        self.cache.init(
            case.backend,
            case.dtype,
            max_sequences=case.batch,
            capacity=case.tokens,
            max_batch=case.tokens,  # a whole sequence goes in as one pass
        )
        self.sequences = list(range(case.batch))
        self.position = case.tokens
        self._fill()
        self.k, self.v = case.rows(), case.rows()

    def _fill(self) -> None:
        """Put zeros for all tokens; a pass without any layer would not count."""
        case = self.case
        zeros = case.backend.alloc((case.heads, case.tokens, case.head_dim), case.dtype)
        for sequence in self.sequences:
            self.cache.start_forward(Batch(range(case.tokens), [sequence] * case.tokens))
            for layer in range(case.layers):
                self.cache.set_layer(layer)
                self.cache.put(zeros, zeros)

    def contestant(self) -> Contestant:
        """Return these steps under the name of this contestant."""
        return Contestant(self.name, self.run, self.rewind)

    def run(self, steps: int) -> None:
        """Take as many steps."""
        for _ in range(steps):
            # In a call of its own: a view that is still alive makes MLX copy the buffer.
            self._step()

    def _step(self) -> None:
        cache, k, v = self.cache, self.k, self.v
        cache.start_forward(Batch([self.position] * len(self.sequences), self.sequences))
        self.position += 1
        results: list[Array | None] = []
        for layer in range(self.case.layers):
            cache.set_layer(layer)
            cache.put(k, v)
            results += cache.get()
        self.framework.finish(tuple(results))

    def rewind(self, steps: int) -> None:
        """Remove the last `steps` tokens of every sequence."""
        self.position -= steps
        for sequence in self.sequences:
            self.cache.remove(sequence, self.position)


class ProgramSteps(CausalSteps):
    """Decode steps with attention, each one program; `name` says whether they write."""

    def __init__(self, framework: Framework, case: DecodeCase, name: str) -> None:
        super().__init__(framework, case)
        self.name = name
        self.state = self.cache.program_state
        self.hidden = case.backend.from_host(np.float32(-np.inf))
        # Donated, because a program that must keep its input writes to a copy of all of it.
        self.program = case.backend.compile(self._apply, donate=[0])

    def _step(self) -> None:
        plan = self.cache.plan(Batch([self.position] * len(self.sequences), self.sequences))
        self.position += 1
        self.state, out = self.program(self.state, plan, self.k, self.v)
        self.framework.finish((out,))

    def _apply(
        self, state: PoolState, plan: ForwardPlan, k: Array, v: Array
    ) -> tuple[PoolState, Array]:
        """Attend in all layers, the output of one being the queries of the next."""
        xp, backend = self.case.backend.xp, self.case.backend
        wide = backend.dtype("float32")
        x = xp.astype(k, wide)
        for layer in range(self.case.layers):
            if self.name == PROGRAM:
                state = functional.put(state, plan, layer, k, v)
            keys, values, mask = functional.get(state, plan, layer)
            # Scaled so that nothing overflows, without the pass that looks for the largest.
            x = x * self.case.head_dim**-1
            scores = xp.matmul(x, xp.permute_dims(xp.astype(keys, wide), (0, 2, 1)))
            weights = xp.exp(xp.where(mask, scores, self.hidden))
            weights = weights / xp.sum(weights, axis=-1, keepdims=True)
            x = xp.matmul(weights, xp.astype(values, wide))
        return state, x
