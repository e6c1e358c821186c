"""Reports of benchmarks: plain records, written to JSON and read back."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, is_dataclass
from functools import cached_property
from inspect import signature
from operator import attrgetter
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, ClassVar, Generic, Protocol, Self, TypeAlias, TypeVar

if TYPE_CHECKING:
    from rich.console import RenderableType

JSON: TypeAlias = dict[str, object]
"""An object of a JSON file."""
Place: TypeAlias = int | tuple[int, int] | tuple[str, int]
"""A point of a comparison within one backend and dtype: a capacity, sequences and tokens, or a load
and its sequences."""

_LIBRARIES = ("diffusers", "jax", "mlx", "mlx_lm", "numpy", "redis", "torch", "transformers")


class MeasuredTiming:
    """Microseconds per step in every round; a subclass is a frozen dataclass."""

    rounds_us: tuple[float, ...]

    @cached_property
    def us(self) -> float:
        """Microseconds per step: the median over the rounds."""
        return median(self.rounds_us)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Microseconds per step of the first and the third quarter of the rounds."""
        # A slow contestant has a turn in every tenth round only: one value has no quantiles.
        if len(self.rounds_us) < 2:
            return self.us, self.us
        low, _, high = quantiles(self.rounds_us, n=4, method="inclusive")
        return low, high


class ComparedTiming(MeasuredTiming):
    """One contestant on one backend and dtype, at one of the places of a comparison."""

    backend: str
    dtype: str
    contestant: str

    @property
    @abstractmethod
    def place(self) -> Place:
        """The quantity varied within a backend and dtype; the places of a report have an order."""


@dataclass(frozen=True)
class Skipped:
    """An absent contestant, and the reason. An empty `contestant` stands for all of them."""

    backend: str
    dtype: str
    contestant: str
    reason: str


class Judged(Protocol):
    """A target and the figure measured for it; a dataclass, because reports write it down."""

    @property
    def heading(self) -> str:
        """Heading of the group in which a table lists the target."""

    @property
    def rule(self) -> str:
        """The bounded quantity, in words."""

    @property
    def at(self) -> str:
        """The circumstances of the measurement, in words."""

    @property
    def measured(self) -> float:
        """The figure."""

    @property
    def bound(self) -> str:
        """The limit, in words."""

    @property
    def passed(self) -> bool:
        """Whether the figure keeps to the limit."""


@dataclass(frozen=True)
class Judgement:
    """A target and the figure measured for it, where nothing else needs to be known."""

    heading: str
    rule: str
    at: str
    measured: float
    bound: str
    passed: bool


AnyTiming_co = TypeVar("AnyTiming_co", bound=MeasuredTiming, covariant=True)


class Report(Generic[AnyTiming_co]):
    """Timings and their circumstances; a subclass is a frozen dataclass.

    format: name and version of its files. timing: class of its timings.
    """

    format: ClassVar[str]
    timing: ClassVar[Callable[..., MeasuredTiming]]
    rounds: int
    machine: str
    versions: dict[str, str]
    timings: tuple[AnyTiming_co, ...]

    @property
    def verdicts(self) -> Sequence[Judged]:
        """Targets of the project with the figures measured, and whether these keep to them."""
        return ()

    @abstractmethod
    def to_table(self) -> RenderableType:
        """Return timings, targets and absent contestants, for a rich console."""

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write everything measured, and the figures derived from it, to a JSON file."""
        Path(path).write_text(json.dumps(self._record(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> Self:
        """Read a report written by :meth:`to_json`.

        Raises: ValueError if `path` holds something else.
        """
        record = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(record, dict) or record.get("format") != cls.format:
            raise ValueError(f"from_json reads reports of the format {cls.format}; got {path}.")
        # JSON turns tuples to lists, which would make two equal reports differ.
        timings = tuple(
            _built(cls.timing, {**entry, "rounds_us": tuple(entry["rounds_us"])})
            for entry in record["timings"]
        )
        skipped = tuple(Skipped(**entry) for entry in record.get("skipped", ()))
        return _built(cls, {**record, "timings": timings, "skipped": skipped})

    def _record(self) -> JSON:
        return {
            "format": self.format,
            **as_record(self),
            "timings": self._timing_records(),
            "verdicts": [as_record(verdict) for verdict in self.verdicts],
        }

    def _timing_records(self) -> list[JSON]:
        """Return each timing, and the figures derived from it."""
        return [
            {**as_record(timing), "us": timing.us, "quartiles_us": timing.quartiles}
            for timing in self.timings
        ]


T = TypeVar("T")
AnyCompared_co = TypeVar("AnyCompared_co", bound=ComparedTiming, covariant=True)


class Comparison(Report[AnyCompared_co], Generic[AnyCompared_co]):
    """Contestants beside each other, by backend, dtype and place."""

    against: ClassVar[tuple[str, ...]]
    """Contestants with which all the others are compared."""

    @cached_property
    def _index(self) -> dict[tuple[str, str, Place, str], AnyCompared_co]:
        return {(t.backend, t.dtype, t.place, t.contestant): t for t in self.timings}

    def find(
        self, backend: str, dtype: str, place: Place, contestant: str
    ) -> AnyCompared_co | None:
        """Return the timing of one contestant; None if it did not take part."""
        return self._index.get((backend, dtype, place, contestant))

    def ratio(self, timing: ComparedTiming, to: str) -> float | None:
        """Divide the median of `timing` by the median of contestant `to` at the same place."""
        other = self.find(timing.backend, timing.dtype, timing.place, to)
        return timing.us / other.us if other else None

    @property
    def groups(self) -> list[tuple[str, str]]:
        """Backends and dtypes, in the order of measurement."""
        return list(dict.fromkeys((timing.backend, timing.dtype) for timing in self.timings))

    def contestants(self, backend: str, dtype: str) -> dict[str, list[AnyCompared_co]]:
        """Return by contestant its timings on one backend and dtype, places ascending."""
        by_name: dict[str, list[AnyCompared_co]] = {}
        for timing in sorted(self.timings, key=attrgetter("place")):
            if (timing.backend, timing.dtype) == (backend, dtype):
                by_name.setdefault(timing.contestant, []).append(timing)
        return by_name

    def _timing_records(self) -> list[JSON]:
        ratios = [
            {f"ratio_to_{other}": self.ratio(timing, other) for other in self.against}
            for timing in self.timings
        ]
        return [
            {**record, **more}
            for record, more in zip(super()._timing_records(), ratios, strict=True)
        ]


def as_record(entry: object) -> JSON:
    """Return the fields of a dataclass instance by name."""
    # The types above cannot say "dataclass": a Protocol is none, and typeshed's name is private.
    if not is_dataclass(entry) or isinstance(entry, type):
        raise TypeError(f"a record is made of a dataclass instance; got {entry!r}.")
    return asdict(entry)


def _built(make: Callable[..., T], record: Mapping[str, object]) -> T:
    """Call `make` with its parameters out of `record`; files hold derived entries as well."""
    return make(**{name: record[name] for name in signature(make).parameters if name in record})


def this_machine() -> str:
    """Describe the machine, for the record of a measurement."""
    cores = os.cpu_count()
    return f"{platform.platform()}, {cores} CPUs, Python {platform.python_version()}"


def library_versions() -> dict[str, str]:
    """Return the versions of all libraries imported by now, by name of their module."""
    # A library that was not imported took no part, installed or not.
    return {
        name: importlib.metadata.version(name.replace("_", "-"))
        for name in _LIBRARIES
        if name in sys.modules
    }
