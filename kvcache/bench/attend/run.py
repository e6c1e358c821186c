"""Measure attention of a decode pass over a pool, beside the ideal and a range with a mask.

A pass has one token of every sequence, and was planned and put before: a step is the attention of
one layer, as every layer of a model has it. The ideal is the framework's own kernel, sequence by
sequence, over keys and values that lie in arrays of their own.
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

from .case import LOADS, AttendCase
from .contestants import factories
from .report import AttendReport, AttendTiming

DTYPES = ("float32",)
SEQUENCES = (1, 8, 32)
TOKENS = 1024
ROUNDS = 51


def run_attend(
    backends: Sequence[str],
    dtypes: Sequence[str] = DTYPES,
    loads: Sequence[str] = LOADS,
    sequences: Sequence[int] = SEQUENCES,
    tokens: int = TOKENS,
    heads: int = 8,
    query_heads: int = 32,
    head_dim: int = 128,
    rounds: int = ROUNDS,
    progress: Progress | None = None,
) -> AttendReport:
    """Measure attention of one token of each sequence, in one layer.

    loads: how the sequences lie; see :class:`AttendCase`. sequences: numbers of them. tokens: of
    each; other loads derive their lengths from it. All contestants of one backend, dtype, load and
    number of sequences take turns.

    Raises: ValueError, DTypeError, UnknownBackendError, BackendNotAvailableError; nothing was
    measured then.
    """
    shape = {"heads": heads, "head_dim": head_dim, "query_heads": query_heads}
    check_sizes(**shape, rounds=rounds)
    check_dtypes(dtypes)
    if query_heads % heads:
        raise ValueError(f"query_heads are a multiple of {heads} heads; got {query_heads}.")
    if min(sequences, default=0) < 1 or tokens < 8:
        raise ValueError(
            f"sequences are >= 1, with 8 tokens or more; got {list(sequences)} and {tokens}."
        )
    if not loads or not set(loads) <= set(LOADS):
        raise ValueError(f"loads are some of {', '.join(LOADS)}; got {list(loads)}.")
    # By spec: "numpy" and "numpy:cpu" are one backend, and are measured once.
    by_spec = {backend.spec: backend for backend in map(get_backend, backends)}
    contests = list(
        product(
            by_spec.values(),
            dict.fromkeys(dtypes),
            dict.fromkeys(loads),
            sorted(set(sequences)),
        )
    )
    timings: list[AttendTiming] = []
    skipped: list[Skipped] = []
    for done, (backend, dtype, load, batch) in enumerate(contests):
        # One case per contest: the contestants of many sequences hold gigabytes.
        case = AttendCase(backend, dtype, tokens, batch, load=load, **shape)
        framework = framework_of(backend)
        tick = ticks(
            progress, done, len(contests), rounds, f"{backend.spec} {dtype} {load} {batch}"
        )
        measured, missing = compare(
            [case], factories(framework), framework.scope(), _timing, rounds, tick
        )
        timings += measured
        skipped += missing
    return AttendReport(
        tokens,
        **shape,
        rounds=rounds,
        machine=this_machine(),
        versions=library_versions(),
        timings=tuple(timings),
        skipped=tuple(dict.fromkeys(skipped)),
    )


def _timing(case: AttendCase, name: str, blocks: TimedBlocks) -> AttendTiming:
    return AttendTiming(
        case.backend.spec,
        case.dtype,
        case.load,
        case.batch,
        name,
        blocks.steps,
        blocks.rounds_us,
    )
