"""What the cache costs in one decode step of a whole model, beside the raw framework calls.

A step plans the pass, then puts keys and values of every layer and gets what attention reads,
mask included. Raw is what one would write for sequences of equal length in arrays of their own:
a slice written and a view taken per layer, nothing planned, no mask.

As a program, a step attends, too, and is compiled where the framework compiles: what the write
adds to that is what a model notices.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np

from kvcache import functional
from kvcache._checks import check_sizes
from kvcache.backends import Array, get_backend
from kvcache.bench.harness.compare import Factories, check_dtypes, compare
from kvcache.bench.harness.contest import RAW, Contestant, Framework
from kvcache.bench.harness.report import Skipped, library_versions, this_machine
from kvcache.bench.harness.timing import Blocks, Progress, ticks
from kvcache.pool.batch import Batch
from kvcache.pool.causal import CausalCache
from kvcache.pool.plan import ForwardPlan, PoolState

from .case import Decoding
from .report import ATTEND, CAUSAL, PROGRAM, StepReport, StepTiming

DTYPES = ("float32", "bfloat16")
BATCHES = (1, 8)
TOKENS = 8192
ROUNDS = 101


def run_step(
    backends: Sequence[str],
    dtypes: Sequence[str] = DTYPES,
    batches: Sequence[int] = BATCHES,
    tokens: int = TOKENS,
    layers: int = 32,
    heads: int = 8,
    head_dim: int = 128,
    rounds: int = ROUNDS,
    progress: Progress | None = None,
    program: bool = False,
) -> StepReport:
    """Measure one decode step of `layers` layers, whatever the model computes aside.

    program: with attention, as one program over the functional API, with and without the write.
    batches: sequences that decode together. tokens: what these hold in all, so that every batch
    needs the same memory. All contestants of one backend, dtype and batch take turns.

    Raises: ValueError, DTypeError, UnknownBackendError, BackendNotAvailableError; nothing was
    measured then.
    """
    shape = {"layers": layers, "heads": heads, "head_dim": head_dim}
    check_sizes(**shape, rounds=rounds)
    check_dtypes(dtypes)
    if min(batches, default=0) < 1 or tokens < 4 * max(batches):
        raise ValueError(
            f"batches are >= 1, with 4 tokens for each sequence; got {list(batches)} and {tokens}."
        )
    factories = _programs if program else _factories
    found = {backend.spec: backend for backend in map(get_backend, backends)}
    contests = list(product(found.values(), dict.fromkeys(dtypes), sorted(set(batches))))
    timings: list[StepTiming] = []
    skipped: list[Skipped] = []
    for done, (backend, dtype, batch) in enumerate(contests):
        scene = Decoding(backend, dtype, batch, tokens // batch, **shape)
        label = f"{backend.spec} {dtype} {batch} x {scene.tokens:,}"
        tick = ticks(progress, done, len(contests), rounds, label)
        measured, missing = compare([scene], factories, _timing, rounds, tick)
        timings += measured
        skipped += missing
    return StepReport(
        **shape,
        rounds=rounds,
        machine=this_machine(),
        versions=library_versions(),
        timings=tuple(timings),
        skipped=tuple(dict.fromkeys(skipped)),
    )


def _factories(framework: Framework) -> Factories[Decoding]:
    """All contestants by name."""
    return {RAW: framework.raw_step, CAUSAL: lambda scene: Causal(framework, scene).contestant()}


def _programs(framework: Framework) -> Factories[Decoding]:
    """With attention: what it costs alone, and with the write."""
    return {
        ATTEND: lambda scene: Program(framework, scene, ATTEND).contestant(),
        PROGRAM: lambda scene: Program(framework, scene, PROGRAM).contestant(),
    }


def _timing(scene: Decoding, name: str, blocks: Blocks) -> StepTiming:
    return StepTiming(
        scene.backend.spec,
        scene.dtype,
        scene.sequences,
        scene.tokens,
        name,
        blocks.steps,
        blocks.rounds_us,
    )


class Causal:
    """A `CausalCache` whose sequences are full when a block of steps ends."""

    def __init__(self, framework: Framework, scene: Decoding) -> None:
        self.framework, self.scene = framework, scene
        self.cache = CausalCache()
        self.cache.init(
            scene.backend,
            scene.dtype,
            max_sequences=scene.sequences,
            capacity=scene.tokens,
            max_batch=scene.tokens,
        )
        self.sequences = list(range(scene.sequences))
        self.position = scene.tokens
        for sequence in self.sequences:
            self.cache.start_forward(Batch(range(scene.tokens), [sequence] * scene.tokens))
        self.k, self.v = scene.row(), scene.row()

    name = CAUSAL

    def contestant(self) -> Contestant:
        """Steps, as a contest wants them."""
        return Contestant(self.name, self.run, self.rewind)

    def run(self, steps: int) -> None:
        """Take so many steps."""
        for _ in range(steps):
            # In a call of its own: a view that is still alive makes MLX copy the buffer.
            self._step()

    def _step(self) -> None:
        cache, k, v = self.cache, self.k, self.v
        cache.start_forward(Batch([self.position] * len(self.sequences), self.sequences))
        self.position += 1
        seen: list[Array | None] = []
        for layer in range(self.scene.layers):
            cache.set_layer(layer)
            cache.put(k, v)
            seen += cache.get()
        self.framework.finish(tuple(seen))

    def rewind(self, steps: int) -> None:
        """Remove the last `steps` tokens of every sequence."""
        self.position -= steps
        for sequence in self.sequences:
            self.cache.remove(sequence, self.position)


class Program(Causal):
    """The same with attention, in one program; `name` says whether it writes."""

    def __init__(self, framework: Framework, scene: Decoding, name: str) -> None:
        super().__init__(framework, scene)
        self.name = name
        self.cache.allocate(range(scene.layers), scene.heads, scene.head_dim)
        self.state = self.cache.program_state
        self.hidden = scene.backend.from_host(np.float32(-np.inf))
        self.program = scene.backend.compile(self._apply, donate=[0])

    def _step(self) -> None:
        plan = self.cache.plan(Batch([self.position] * len(self.sequences), self.sequences))
        self.position += 1
        self.state, out = self.program(self.state, plan, self.k, self.v)
        self.framework.finish((out,))

    def _apply(self, state: PoolState, plan: ForwardPlan, k: Array, v: Array) -> Any:
        xp, backend = self.scene.backend.xp, self.scene.backend
        wide = backend.dtype("float32")
        x = xp.astype(k, wide)
        for layer in range(self.scene.layers):
            if self.name == PROGRAM:
                state = functional.put(state, plan, layer, k, v)
            keys, values, mask = functional.get(state, plan, layer)
            # Scaled so that nothing overflows, without the pass that looks for the largest.
            x = x * self.scene.head_dim**-1
            scores = xp.matmul(x, xp.permute_dims(xp.astype(keys, wide), (0, 2, 1)))
            weights = xp.exp(xp.where(mask, scores, self.hidden))
            weights = weights / xp.sum(weights, axis=-1, keepdims=True)
            x = xp.matmul(weights, xp.astype(values, wide))
        return state, x
