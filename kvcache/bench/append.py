"""What it costs to append one token: our caches, the raw framework call, peers, memmove."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable, Sequence
from itertools import product

from kvcache.backends import Backend, available_backends, get_backend
from kvcache.backends.base import HOST_DTYPES
from kvcache.errors import DTypeError

from .contest import Cell, Contestant, Framework, UnavailableError, framework_of
from .report import AppendReport, Skipped, Timing
from .timing import Blocks, interleave

DTYPES = ("float32", "bfloat16")
CAPACITIES = (1024, 8192, 32768)
ROUNDS = 101
MIN_CAPACITY = 4
_LIBRARIES = ("jax", "mlx", "mlx_lm", "numpy", "torch", "transformers")

Progress = Callable[[int, int, str], None]
"""Called with the work done, all work, and what is being measured."""


def installed_backends() -> list[str]:
    """Names of the backends that can be measured here. Imports every framework installed."""
    found = available_backends()
    return [name for name, info in found.items() if info.installed and name != "array_api"]


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
    _check(dtypes, capacities, {**shape, "rounds": rounds})
    found = {backend.spec: backend for backend in map(get_backend, backends)}
    contests = list(product(found.values(), dict.fromkeys(dtypes)))
    timings: list[Timing] = []
    skipped: list[Skipped] = []
    for done, (backend, dtype) in enumerate(contests):
        cells = [Cell(backend, dtype, capacity, **shape) for capacity in sorted(set(capacities))]
        tick = _ticks(progress, done, len(contests), rounds + 1, f"{backend.spec} {dtype}")
        measured, missing = _contest(backend, cells, rounds, tick)
        timings += measured
        skipped += missing
    return AppendReport(
        **shape,
        rounds=rounds,
        machine=_machine(),
        versions=_versions(),
        timings=tuple(timings),
        skipped=tuple(skipped),
    )


def _check(dtypes: Sequence[str], capacities: Sequence[int], numbers: dict[str, int]) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} must be >= 1; got {number}.")
    if min(capacities, default=0) < MIN_CAPACITY:
        raise ValueError(f"capacities must be >= {MIN_CAPACITY} tokens; got {list(capacities)}.")
    for dtype in dtypes:
        if dtype not in HOST_DTYPES:
            raise DTypeError(f"a dtype is one of {', '.join(HOST_DTYPES)}; got {dtype!r}.")


def _ticks(
    progress: Progress | None, done: int, contests: int, each: int, label: str
) -> Callable[[], None]:
    """What :func:`interleave` calls `each` times, told to whoever wants to know."""
    count = done * each

    def tick() -> None:
        nonlocal count
        count += 1
        if progress is not None:
            progress(count, contests * each, label)

    return tick


def _contest(
    backend: Backend, cells: Sequence[Cell], rounds: int, tick: Callable[[], None]
) -> tuple[list[Timing], list[Skipped]]:
    """Everyone on one backend and dtype, at every capacity."""
    framework, dtype = framework_of(backend), cells[0].dtype
    if dtype not in backend.dtypes:
        for _ in range(rounds + 1):
            tick()
        return [], [Skipped(backend.spec, dtype, "", f"{backend.name} has no {dtype}")]
    with framework.scope():
        entries, missing = _entries(framework, cells)
        contestants = [(entry, cell.max_steps) for cell, entry in entries]
        found = interleave(contestants, rounds, backend.sync, tick)
    timings = [
        _timing(cell, entry, blocks) for (cell, entry), blocks in zip(entries, found, strict=True)
    ]
    skipped = [Skipped(backend.spec, dtype, name, reason) for name, reason in missing.items()]
    return timings, skipped


def _entries(
    framework: Framework, cells: Sequence[Cell]
) -> tuple[list[tuple[Cell, Contestant]], dict[str, str]]:
    """Those who take part at every capacity, and the reasons of the others."""
    entries: list[tuple[Cell, Contestant]] = []
    missing: dict[str, str] = {}
    for cell, (name, make) in product(cells, framework.factories().items()):
        try:
            entries.append((cell, make(cell)))
        except UnavailableError as error:
            missing[name] = str(error)
    return entries, missing


def _timing(cell: Cell, entry: Contestant, blocks: Blocks) -> Timing:
    return Timing(
        cell.backend.spec,
        cell.dtype,
        cell.capacity,
        entry.name,
        blocks.steps,
        tuple(float(f"{us:.4g}") for us in blocks.us),
    )


def _machine() -> str:
    cores = os.cpu_count()
    return f"{platform.platform()}, {cores} CPUs, Python {platform.python_version()}"


def _versions() -> dict[str, str]:
    """Versions of the libraries that took part."""
    return {
        name: importlib.metadata.version(name.replace("_", "-"))
        for name in _LIBRARIES
        if name in sys.modules
    }
