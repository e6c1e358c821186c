"""The report of the throughput of stores, and the promises of this project about it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from kvcache.bench.harness.report import Judgement, MeasuredTiming, Report, Skipped

from .case import (
    BASES,
    FILE_STORE,
    FRESH,
    GET,
    MEMORY_STORE,
    OPERATIONS,
)

if TYPE_CHECKING:
    from rich.console import RenderableType

AT_LEAST = {FILE_STORE: 0.7, **dict.fromkeys([*FRESH, *FRESH.values()], 0.6)}
"""Share of the throughput of its ceiling that a store reaches, by store."""
JUDGED_NBYTES = 32 << 20
"""Bytes of a value from which on stores are judged: below, the cost of a call counts."""


@dataclass(frozen=True)
class StoreTiming(MeasuredTiming):
    """One contestant with values of one size.

    operation: put or get. steps: values of one round. rounds_us: microseconds per value in every
    round.
    """

    operation: str
    nbytes: int
    contestant: str
    steps: int
    rounds_us: tuple[float, ...]

    @property
    def gigabytes_per_second(self) -> float:
        """Throughput, in units of 1e9 bytes."""
        return self.nbytes / self.us / 1e3


@dataclass(frozen=True)
class StoreReport(Report[StoreTiming]):
    """Throughput of stores, and of their ceilings in the same run.

    machine: on which this was measured. versions: of the libraries that took part.
    """

    format: ClassVar[str] = "kvcache.bench.store/1"
    timing: ClassVar[type[StoreTiming]] = StoreTiming

    rounds: int
    machine: str
    versions: dict[str, str]
    timings: tuple[StoreTiming, ...] = ()
    skipped: tuple[Skipped, ...] = ()

    @property
    def sizes(self) -> list[int]:
        """Bytes of values as they were measured, ascending."""
        return sorted({timing.nbytes for timing in self.timings})

    @property
    def contestants(self) -> list[str]:
        """Names, in the order of measurement."""
        return list(dict.fromkeys(timing.contestant for timing in self.timings))

    def find(self, operation: str, nbytes: int, contestant: str) -> StoreTiming | None:
        """Return the timing of a contestant; None if it did not take part."""
        wanted = operation, nbytes, contestant
        return next(
            (t for t in self.timings if (t.operation, t.nbytes, t.contestant) == wanted), None
        )

    def share(self, operation: str, nbytes: int, store: str) -> float | None:
        """Return the throughput of a store as a share of that of its ceiling; None without one."""
        if (operation, store) == (GET, MEMORY_STORE):  # its reads copy nothing
            return None
        own = self.find(operation, nbytes, store)
        ceiling = self.find(operation, nbytes, BASES[store])
        return ceiling.us / own.us if own and ceiling else None

    @property
    def verdicts(self) -> list[Judgement]:
        return [verdict for nbytes in self.sizes for verdict in self._judged(nbytes)]

    def _judged(self, nbytes: int) -> Iterator[Judgement]:
        if nbytes < JUDGED_NBYTES:
            return
        for store, least in AT_LEAST.items():
            for operation in OPERATIONS:
                share = self.share(operation, nbytes, store)
                if share is not None:
                    rule, at = f"{store} {operation} / {BASES[store]}", f"{nbytes >> 20} MiB"
                    bound, passed = f">= {least:g}x", share >= least
                    yield Judgement("throughput", rule, at, share, bound, passed)

    def to_table(self) -> RenderableType:
        from .tables import store_tables

        return store_tables(self)
