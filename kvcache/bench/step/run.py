"""Measure the cost of the cache in one decode step of a model, beside the raw framework calls.

A step plans the pass, then puts keys and values of every layer and gets the keys, values and mask
that attention reads. Raw is the code one would write for sequences of equal length in arrays of
their own: a slice written and a view taken per layer, nothing planned, no mask.

As a program, a step attends, too, and is compiled where the framework compiles: a model notices as
much of the write as it adds to that.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from kvcache._checks import check_sizes
from kvcache.backends import get_backend
from kvcache.bench.frameworks import framework_of
from kvcache.bench.harness.compare import check_dtypes, compare
from kvcache.bench.harness.report import Skipped, library_versions, this_machine
from kvcache.bench.harness.timing import Progress, TimedBlocks, ticks

from .case import DecodeCase
from .contestants import eager, programs
from .report import StepReport, StepTiming

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
    """Measure one decode step of `layers` layers, without the computations of the model itself.

    program: with attention, as one program over the functional API, with and without the write.
    batches: sequences that decode together. tokens: held by all of a batch together, so that every
    batch needs the same memory. All contestants of one backend, dtype and batch take turns.

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
    factories = programs if program else eager
    # By spec: "numpy" and "numpy:cpu" are one backend, and are measured once.
    by_spec = {backend.spec: backend for backend in map(get_backend, backends)}
    contests = list(product(by_spec.values(), dict.fromkeys(dtypes), sorted(set(batches))))
    timings: list[StepTiming] = []
    skipped: list[Skipped] = []
    for done, (backend, dtype, batch) in enumerate(contests):
        # One case per contest, unlike appends: the contestants of one batch hold gigabytes.
        case = DecodeCase(backend, dtype, tokens // batch, batch, **shape)
        framework = framework_of(backend)
        label = f"{backend.spec} {dtype} {batch} x {case.tokens:,}"
        tick = ticks(progress, done, len(contests), rounds, label)
        measured, missing = compare(
            [case], factories(framework), framework.scope(), _timing, rounds, tick
        )
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


def _timing(case: DecodeCase, name: str, blocks: TimedBlocks) -> StepTiming:
    return StepTiming(
        case.backend.spec,
        case.dtype,
        case.batch,
        case.tokens,
        name,
        blocks.steps,
        blocks.rounds_us,
    )
