"""Promises of this project about attention over a pool, and whether a report keeps them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from kvcache.bench.harness.report import Judgement

from .case import ATTEND, IDEAL, PROGRAM

if TYPE_CHECKING:
    from .report import AttendReport

_ALONE = {
    ("numpy", ATTEND): 1.25,
    ("torch", ATTEND): 1.25,
    ("mlx", ATTEND): 1.25,
    ("jax", PROGRAM): 1.4,
}
"""Times the ideal that attention may cost at most, of sequences of their own: by framework and
contestant."""
_SHARED = {("numpy", ATTEND): 2.5, ("torch", ATTEND): 3.0, ("jax", PROGRAM): 2.0}
"""Times faster than the ideal that attention is at least, over a shared prefix."""
_MANY = 32
"""Sequences from which on sharing has to pay so much."""


def judge(report: AttendReport) -> list[Judgement]:
    """Judge every target with figures in the report by its worst number of sequences."""
    return [
        judgement
        for backend, dtype in report.groups
        for contestant in (ATTEND, PROGRAM)
        for judgement in (
            *_alone(report, backend, dtype, contestant),
            *_shared(report, backend, dtype, contestant),
        )
    ]


def _alone(report: AttendReport, backend: str, dtype: str, contestant: str) -> Iterator[Judgement]:
    limit = _ALONE.get((_framework(backend), contestant))
    for load in ("even", "uneven"):
        ratios = _ratios(report, backend, dtype, contestant, load)
        if limit is not None and ratios:
            worst, sequences = max(ratios)
            rule, bound = f"{contestant} / {IDEAL}", f"<= {limit:g}x"
            at = f"{load}, {sequences}"
            yield Judgement(f"{backend} {dtype}", rule, at, worst, bound, worst <= limit)


def _shared(report: AttendReport, backend: str, dtype: str, contestant: str) -> Iterator[Judgement]:
    limit = _SHARED.get((_framework(backend), contestant))
    ratios = [
        (1 / ratio, sequences)
        for ratio, sequences in _ratios(report, backend, dtype, contestant, "shared")
        if sequences >= _MANY
    ]
    if limit is not None and ratios:
        worst, sequences = min(ratios)
        rule, bound = f"{IDEAL} / {contestant}", f">= {limit:g}x"
        at = f"shared, {sequences}"
        yield Judgement(f"{backend} {dtype}", rule, at, worst, bound, worst >= limit)


def _framework(backend: str) -> str:
    return backend.partition(":")[0]


def _ratios(
    report: AttendReport, backend: str, dtype: str, contestant: str, load: str
) -> list[tuple[float, int]]:
    """Return the multiple of the ideal and the number of sequences, wherever both were timed."""
    timings = report.contestants(backend, dtype).get(contestant, [])
    ratios = [(report.ratio(timing, IDEAL), timing) for timing in timings if timing.load == load]
    return [(ratio, timing.sequences) for ratio, timing in ratios if ratio is not None]
