"""Measure the cost of recurrent states, beside the framework's own copies, gathers and scatters.

Raw copies are what an update of a layer must cost where its arrays stay the model's (NumPy, torch);
elsewhere nothing is copied, so there is nothing to compare with. In a pool, raw is a gather of the
states of all sequences and a scatter of the new ones to other rows, in every array of every layer.
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

from .case import StateCase
from .contestants import factories
from .report import StateReport, StateTiming

BATCHES = (1, 8, 32)
ROUNDS = 101


def run_state(
    backends: Sequence[str],
    dtypes: Sequence[str] = ("float32",),
    batches: Sequence[int] = BATCHES,
    layers: int = 12,
    heads: int = 32,
    head_dim: int = 128,
    channels: int = 8192,
    kernel: int = 4,
    rounds: int = ROUNDS,
    progress: Progress | None = None,
) -> StateReport:
    """Measure one decode step of `layers` recurrent layers, without the computations of the model.

    dtypes: of matrices ``[heads, head_dim, head_dim]``. batches: sequences that decode together.
    channels, kernel: of the convolution. The defaults are those of a layer of Qwen3-Next.

    Raises: ValueError, DTypeError, UnknownBackendError, BackendNotAvailableError; nothing was
    measured then.
    """
    shape = {"layers": layers, "heads": heads, "head_dim": head_dim, "channels": channels}
    check_sizes(**shape, rounds=rounds)
    check_dtypes(dtypes)
    if kernel < 2:
        raise ValueError(f"kernel must be >= 2: it holds one input fewer; got {kernel}.")
    if min(batches, default=0) < 1:
        raise ValueError(f"batches are >= 1; got {list(batches)}.")
    # By spec: "numpy" and "numpy:cpu" are one backend, and are measured once.
    by_spec = {backend.spec: backend for backend in map(get_backend, backends)}
    contests = list(product(by_spec.values(), dict.fromkeys(dtypes), sorted(set(batches))))
    timings: list[StateTiming] = []
    skipped: list[Skipped] = []
    for done, (backend, dtype, batch) in enumerate(contests):
        # One case per contest: the contestants of one batch hold gigabytes.
        case = StateCase(backend, dtype, tokens=64, batch=batch, kernel=kernel, **shape)
        framework = framework_of(backend)
        tick = ticks(progress, done, len(contests), rounds, f"{backend.spec} {dtype} {batch}")
        measured, missing = compare(
            [case], factories(framework), framework.scope(), _timing, rounds, tick
        )
        timings += measured
        skipped += missing
    return StateReport(
        **shape,
        kernel=kernel,
        rounds=rounds,
        machine=this_machine(),
        versions=library_versions(),
        timings=tuple(timings),
        skipped=tuple(dict.fromkeys(skipped)),
    )


def _timing(case: StateCase, name: str, blocks: TimedBlocks) -> StateTiming:
    return StateTiming(
        case.backend.spec, case.dtype, case.batch, name, blocks.steps, blocks.rounds_us
    )
