"""The report of lookups and evictions of prefixes, and the promises of this project about them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvcache.bench.harness.report import Judgement, MeasuredTiming, Report

if TYPE_CHECKING:
    from rich.console import RenderableType

MATCH = "RadixTree.match"
INSERT = "RadixTree.insert"
FOLLOW = "SpanIndex.follow, use"
EXTEND = "SpanIndex.extend"
SHORT = "RadixTree.match, leaves early"
LONG = "the same, longer"
SESSION = "PrefixCache.session"
TOLD = "the same, with a subscriber"
PUBLISHED = "the same, over ZeroMQ"
AT_LEAST = {MATCH: 400.0, INSERT: 110.0}
"""Million tokens per second, by operation."""
LONGER_LIMIT = 1.5
"""Times as much that a query may cost if it is ten times as long behind the point of leaving."""
EVENTS_LIMIT = 1.05
"""Times as much that a session may cost if its events are heard."""
PAUSE_LIMIT = 5_000.0
"""Microseconds that a single eviction may take at most."""


@dataclass(frozen=True)
class PrefixTiming(MeasuredTiming):
    """One operation. tokens: of a step, 0 for an eviction. steps: of one round.

    rounds_us: microseconds per step in every round. longest_us: the longest single step of a
    round, median over the rounds; None where steps were not timed one by one.
    """

    name: str
    tokens: int
    steps: int
    rounds_us: tuple[float, ...]
    longest_us: float | None = None

    @property
    def rate(self) -> float:
        """Million tokens per second."""
        return self.tokens / self.us


@dataclass(frozen=True)
class PrefixReport(Report[PrefixTiming]):
    """Costs of a radix tree, of the index of spans on it, and of evictions by every policy.

    machine: on which this was measured. versions: of the libraries that took part.
    """

    format: ClassVar[str] = "kvcache.bench.prefix/1"
    timing: ClassVar[type[PrefixTiming]] = PrefixTiming

    sequences: int
    spans: int
    rounds: int
    machine: str
    versions: dict[str, str]
    timings: tuple[PrefixTiming, ...] = ()

    @property
    def lookups(self) -> list[PrefixTiming]:
        """Timings of operations on tokens."""
        return [timing for timing in self.timings if timing.tokens]

    @property
    def evictions(self) -> list[PrefixTiming]:
        """Timings of evictions, each under the name of its policy."""
        return [timing for timing in self.timings if not timing.tokens]

    @property
    def verdicts(self) -> list[Judgement]:
        of_lookups = [*self._fast(), *self._independent_of_length(), *self._quiet()]
        return [*of_lookups, *self._without_pause()]

    def _fast(self) -> Iterator[Judgement]:
        for timing in self.lookups:
            limit = AT_LEAST.get(timing.name)
            if limit is not None:
                at, bound = f"{timing.tokens:,} tokens", f">= {limit:g}M/s"
                yield Judgement(
                    "tokens per second", timing.name, at, timing.rate, bound, timing.rate >= limit
                )

    def _independent_of_length(self) -> Iterator[Judgement]:
        by_name = {timing.name: timing for timing in self.lookups}
        if SHORT in by_name and LONG in by_name:
            figure = by_name[LONG].us / by_name[SHORT].us
            at, bound = f"{by_name[LONG].tokens:,} tokens", f"<= {LONGER_LIMIT:g}x"
            rule = "a longer query that leaves early"
            yield Judgement("length", rule, at, figure, bound, figure <= LONGER_LIMIT)

    def _quiet(self) -> Iterator[Judgement]:
        by_name = {timing.name: timing for timing in self.lookups}
        for name in (TOLD, PUBLISHED):
            if SESSION in by_name and name in by_name:
                figure = by_name[name].us / by_name[SESSION].us
                at, bound = f"{by_name[name].tokens:,} tokens", f"<= {EVENTS_LIMIT:g}x"
                yield Judgement("events", name, at, figure, bound, figure <= EVENTS_LIMIT)

    def _without_pause(self) -> Iterator[Judgement]:
        for timing in self.evictions:
            longest, bound = timing.longest_us or 0.0, f"<= {PAUSE_LIMIT:,g}us"
            at, passed = f"{self.spans:,} spans", longest <= PAUSE_LIMIT
            yield Judgement("longest eviction", timing.name, at, longest, bound, passed)

    def to_table(self) -> RenderableType:
        from .tables import prefix_tables

        return prefix_tables(self)
