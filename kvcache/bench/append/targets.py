"""Promises of this project about the cost of an append, and whether a report keeps them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from kvcache.bench.harness.contest import RAW

from .case import OURS, ROTATING, SLICE_UPDATE, UPDATE

if TYPE_CHECKING:
    from .report import AppendReport

Kind = Literal["at most", "at least", "above"]


@dataclass(frozen=True)
class Target:
    """A bound on `contestant`, compared with `against` at the same capacity.

    "at most": limit of their ratio. "above": limit of their difference in microseconds.
    "at least": how many times `against` costs more. framework, capacity: for which it holds;
    None: for all.
    """

    contestant: str
    against: str
    kind: Kind
    limit: float
    framework: str | None = None
    capacity: int | None = None

    def measure(self, ours: float, theirs: float) -> float:
        """Return the figure to be limited, from microseconds per step."""
        if self.kind == "above":
            return ours - theirs
        return theirs / ours if self.kind == "at least" else ours / theirs

    @property
    def rule(self) -> str:
        """The target in words."""
        if self.kind == "at least":
            return f"{self.against} / {self.contestant}"
        return f"{self.contestant} {'-' if self.kind == 'above' else '/'} {self.against}"


TARGETS = (
    Target(SLICE_UPDATE, RAW, "at most", 1.3),
    # Checks and views cost a fixed time, whatever the write costs: no ratio could bound them.
    Target(UPDATE, RAW, "above", 5.0),
    Target(UPDATE, "transformers StaticCache", "at most", 1.2, "torch"),
    # It concatenates, O(tokens) per step: the more tokens, the wider the gap must be.
    Target(UPDATE, "transformers DynamicCache", "at least", 25.0, "torch", 8192),
    Target(UPDATE, "mlx-lm KVCache", "at most", 1.1, "mlx"),
    Target(ROTATING, "mlx-lm RotatingKVCache", "at most", 1.1, "mlx"),
)
FLAT_LIMIT = 1.5
"""Times the cost at the smallest capacity that an append may cost at the largest."""


@dataclass(frozen=True)
class Verdict:
    """A target and the worst figure measured for it on one backend and dtype, at `capacity`."""

    rule: str
    backend: str
    dtype: str
    capacity: int
    measured: float
    bound: str
    passed: bool

    @property
    def heading(self) -> str:
        """Backend and dtype."""
        return f"{self.backend} {self.dtype}"

    @property
    def at(self) -> str:
        """The capacity."""
        return f"{self.capacity:,}"


def judge(report: AppendReport) -> list[Verdict]:
    """Judge every target with figures in the report, backend by backend."""
    return [
        verdict
        for backend, dtype in report.groups
        for verdict in (*_compared(report, backend, dtype), *_flat(report, backend, dtype))
    ]


def _compared(report: AppendReport, backend: str, dtype: str) -> Iterator[Verdict]:
    """Judge each target by its worst capacity."""
    name = backend.partition(":")[0]
    for target in TARGETS:
        figures = _figures(report, backend, dtype, target)
        if target.framework in {None, name} and figures:
            worst = min if target.kind == "at least" else max
            capacity, figure = worst(figures, key=lambda pair: pair[1])
            yield _verdict(target, backend, dtype, capacity, figure)


def _figures(
    report: AppendReport, backend: str, dtype: str, target: Target
) -> list[tuple[int, float]]:
    """Return capacities, and the figure of `target` at each."""
    figures = []
    for capacity in report.capacities if target.capacity is None else [target.capacity]:
        ours = report.find(backend, dtype, capacity, target.contestant)
        theirs = report.find(backend, dtype, capacity, target.against)
        if ours and theirs:
            figures.append((capacity, target.measure(ours.us, theirs.us)))
    return figures


def _verdict(target: Target, backend: str, dtype: str, capacity: int, figure: float) -> Verdict:
    unit = "us" if target.kind == "above" else "x"
    if target.kind == "at least":
        bound, passed = f">= {target.limit:g}{unit}", figure >= target.limit
    else:
        bound, passed = f"<= {target.limit:g}{unit}", figure <= target.limit
    return Verdict(target.rule, backend, dtype, capacity, figure, bound, passed)


def _flat(report: AppendReport, backend: str, dtype: str) -> Iterator[Verdict]:
    """Judge the contestant of ours with the steepest cost, from least to largest capacity."""
    small, large = report.capacities[0], report.capacities[-1]
    ends = {
        name: (report.find(backend, dtype, small, name), report.find(backend, dtype, large, name))
        for name in OURS
    }
    figures = [(b.us / a.us, name) for name, (a, b) in ends.items() if a and b]
    if small < large and figures:
        figure, name = max(figures)
        rule, bound = f"{name}, {large:,} / {small:,}", f"<= {FLAT_LIMIT:g}x"
        yield Verdict(rule, backend, dtype, large, figure, bound, figure <= FLAT_LIMIT)
