"""Comparisons on one backend and dtype: contestants are made, timed in turns, or excused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import product
from typing import TypeVar

from kvcache.backends import HOST_DTYPES
from kvcache.errors import DTypeError

from .contest import AnyCase, Contestant, Factories, UnavailableError
from .report import Skipped
from .timing import TimedBlocks, interleave

T = TypeVar("T")


def check_dtypes(dtypes: Sequence[str]) -> None:
    """Raise DTypeError unless kvcache has a name for all of these."""
    for dtype in dtypes:
        if dtype not in HOST_DTYPES:
            raise DTypeError(f"a dtype is one of {', '.join(HOST_DTYPES)}; got {dtype!r}.")


def compare(
    cases: Sequence[AnyCase],
    factories: Factories[AnyCase],
    scope: AbstractContextManager[object],
    record: Callable[[AnyCase, str, TimedBlocks], T],
    rounds: int,
    tick: Callable[[], None],
) -> tuple[list[T], list[Skipped]]:
    """Time every contestant in every case; return the timings, and the absent with reasons.

    cases: of one backend and dtype. scope: is entered while contestants are made and timed.
    record: makes a timing of a case, the name of a contestant and its blocks.
    tick: called as by :func:`interleave`, also where nothing can be timed.
    """
    backend, dtype = cases[0].backend, cases[0].dtype
    if dtype not in backend.dtypes:
        for _ in range(rounds + 1):  # a bar that shows progress must not stand still
            tick()
        return [], [Skipped(backend.spec, dtype, "", f"{backend.name} has no {dtype}")]
    with scope:
        entries, missing = _entries(cases, factories)
        contestants = [(entry, case.max_steps) for case, entry in entries]
        timed = interleave(contestants, rounds, backend.sync, tick)
    timings = [
        record(case, entry.name, blocks)
        for (case, entry), blocks in zip(entries, timed, strict=True)
    ]
    skipped = [Skipped(backend.spec, dtype, name, reason) for name, reason in missing.items()]
    return timings, skipped


def _entries(
    cases: Sequence[AnyCase], factories: Factories[AnyCase]
) -> tuple[list[tuple[AnyCase, Contestant]], dict[str, str]]:
    """Make every contestant in every case; return them, and by name the reasons of the absent."""
    entries: list[tuple[AnyCase, Contestant]] = []
    missing: dict[str, str] = {}
    for case, (name, make) in product(cases, factories.items()):
        try:
            entries.append((case, make(case)))
        except UnavailableError as error:
            missing[name] = str(error)
    return entries, missing
