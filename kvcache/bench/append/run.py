"""Measure the cost of appending one token: our caches, the raw framework call, peers, memmove."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product

from kvcache._checks import check_sizes
from kvcache.backends import available_backends, get_backend
from kvcache.bench.frameworks import framework_of
from kvcache.bench.harness.compare import check_dtypes, compare
from kvcache.bench.harness.report import Skipped, library_versions, this_machine
from kvcache.bench.harness.timing import Progress, TimedBlocks, ticks

from .case import AppendCase
from .contestants import factories
from .report import AppendReport, Timing

DTYPES = ("float32", "bfloat16")
CAPACITIES = (1024, 8192, 32768)
ROUNDS = 101
MIN_CAPACITY = 4


def installed_backends() -> list[str]:
    """Return the names of all backends usable here. Imports their frameworks."""
    infos = available_backends()
    # array_api needs a library to go with it, which only its user can name.
    return [name for name, info in infos.items() if info.installed and name != "array_api"]


def run_append(
    backends: Sequence[str],
    dtypes: Sequence[str] = DTYPES,
    capacities: Sequence[int] = CAPACITIES,
    batch: int = 1,
    heads: int = 8,
    head_dim: int = 128,
    rounds: int = ROUNDS,
    progress: Progress | None = None,
) -> AppendReport:
    """Measure one-token appends to keys and values ``[batch, heads, capacity, head_dim]``.

    backends: names, with a device if need be: ``"numpy"``, ``"torch:cuda"``. capacities: tokens
    held, 4 or more. rounds: blocks of steps per contestant, whose median counts. All contestants
    of one backend and dtype, at all capacities, take turns in every round.

    Raises: ValueError, DTypeError, UnknownBackendError, BackendNotAvailableError; nothing was
    measured then.
    """
    shape = {"batch": batch, "heads": heads, "head_dim": head_dim}
    check_sizes(**shape, rounds=rounds)
    check_dtypes(dtypes)
    if min(capacities, default=0) < MIN_CAPACITY:
        raise ValueError(f"capacities must be >= {MIN_CAPACITY} tokens; got {list(capacities)}.")
    # By spec: "numpy" and "numpy:cpu" are one backend, and are measured once.
    by_spec = {backend.spec: backend for backend in map(get_backend, backends)}
    contests = list(product(by_spec.values(), dict.fromkeys(dtypes)))
    timings: list[Timing] = []
    skipped: list[Skipped] = []
    for done, (backend, dtype) in enumerate(contests):
        cases = [AppendCase(backend, dtype, tokens, **shape) for tokens in sorted(set(capacities))]
        framework = framework_of(backend)
        tick = ticks(progress, done, len(contests), rounds, f"{backend.spec} {dtype}")
        measured, missing = compare(
            cases, factories(framework), framework.scope(), _timing, rounds, tick
        )
        timings += measured
        skipped += missing
    return AppendReport(
        **shape,
        rounds=rounds,
        machine=this_machine(),
        versions=library_versions(),
        timings=tuple(timings),
        skipped=tuple(skipped),
    )


def _timing(case: AppendCase, name: str, blocks: TimedBlocks) -> Timing:
    return Timing(case.backend.spec, case.dtype, case.tokens, name, blocks.steps, blocks.rounds_us)
