"""Promises of this project about attention over a pool, and whether a report keeps them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from kvcache.bench.harness.report import Judgement

from .case import ATTEND, IDEAL

if TYPE_CHECKING:
    from .report import AttendReport

_ALONE = {"numpy": 1.25, "torch": 1.25, "mlx": 1.25}
"""By framework: times the ideal that attention may cost at most, of sequences of their own."""
_SHARED = {"numpy": 2.5, "torch": 3.0}
"""By framework: times faster than the ideal that attention is at least, over a shared prefix."""
_MANY = 32
"""Sequences from which on sharing has to pay so much."""


def judge(report: AttendReport) -> list[Judgement]:
    """Judge every target with figures in the report by its worst number of sequences."""
    return [
        judgement
        for backend, dtype in report.groups
        for judgement in (
            *_alone(report, backend, dtype),
            *_shared(report, backend, dtype),
        )
    ]


def _alone(report: AttendReport, backend: str, dtype: str) -> Iterator[Judgement]:
    limit = _ALONE.get(_framework(backend))
    for load in ("even", "uneven"):
        ratios = _ratios(report, backend, dtype, load)
        if limit is not None and ratios:
            worst, sequences = max(ratios)
            rule, bound = f"{ATTEND} / {IDEAL}", f"<= {limit:g}x"
            at = f"{load}, {sequences}"
            yield Judgement(f"{backend} {dtype}", rule, at, worst, bound, worst <= limit)


def _shared(report: AttendReport, backend: str, dtype: str) -> Iterator[Judgement]:
    limit = _SHARED.get(_framework(backend))
    ratios = [
        (1 / ratio, sequences)
        for ratio, sequences in _ratios(report, backend, dtype, "shared")
        if sequences >= _MANY
    ]
    if limit is not None and ratios:
        worst, sequences = min(ratios)
        rule, bound = f"{IDEAL} / {ATTEND}", f">= {limit:g}x"
        at = f"shared, {sequences}"
        yield Judgement(f"{backend} {dtype}", rule, at, worst, bound, worst >= limit)


def _framework(backend: str) -> str:
    return backend.partition(":")[0]


def _ratios(report: AttendReport, backend: str, dtype: str, load: str) -> list[tuple[float, int]]:
    """Return the multiple of the ideal and the number of sequences, wherever both were timed."""
    timings = report.contestants(backend, dtype).get(ATTEND, [])
    ratios = [(report.ratio(timing, IDEAL), timing) for timing in timings if timing.load == load]
    return [(ratio, timing.sequences) for ratio, timing in ratios if ratio is not None]
