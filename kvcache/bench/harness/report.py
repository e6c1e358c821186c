"""What every benchmark writes down: plain records that go to JSON and come back."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any, ClassVar, Generic, Protocol, Self, TypeVar

if TYPE_CHECKING:
    from rich.console import RenderableType

_LIBRARIES = ("diffusers", "jax", "mlx", "mlx_lm", "numpy", "torch", "transformers")


class Measured:
    """Microseconds per step in every round."""

    rounds_us: tuple[float, ...]

    @cached_property
    def us(self) -> float:
        """Microseconds per step: the median over the rounds."""
        return median(self.rounds_us)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Microseconds per step of the first and the third quarter of the rounds."""
        if len(self.rounds_us) < 2:
            return self.us, self.us
        low, _, high = quantiles(self.rounds_us, n=4, method="inclusive")
        return low, high


class Placed(Measured):
    """One contestant on one backend and dtype, at one of the places that a contest has."""

    backend: str
    dtype: str
    contestant: str

    @property
    @abstractmethod
    def place(self) -> Any:
        """What is varied within a backend and dtype; places have an order."""


@dataclass(frozen=True)
class Skipped:
    """What did not take part, and why. An empty `contestant` stands for all of them."""

    backend: str
    dtype: str
    contestant: str
    reason: str


class Judged(Protocol):
    """A target and what was measured for it."""

    @property
    def rule(self) -> str:
        """What is bounded."""

    @property
    def heading(self) -> str:
        """What targets are listed under."""

    @property
    def at(self) -> str:
        """Where the figure was measured."""

    @property
    def measured(self) -> float:
        """The figure."""

    @property
    def bound(self) -> str:
        """What it has to keep to."""

    @property
    def passed(self) -> bool:
        """Whether it does."""


@dataclass(frozen=True)
class Judgement:
    """A bound, and what was measured."""

    heading: str
    rule: str
    at: str
    measured: float
    bound: str
    passed: bool


class Report:
    """Timings with the circumstances; a subclass is a frozen dataclass.

    format: name and version of its files. timing: class of its timings.
    """

    format: ClassVar[str]
    timing: ClassVar[type[Any]]
    rounds: int
    machine: str
    versions: dict[str, str]
    timings: tuple[Any, ...]

    @property
    def verdicts(self) -> Sequence[Any]:
        """The project's targets: what was measured, and whether it holds."""
        return ()

    @abstractmethod
    def to_table(self) -> RenderableType:
        """Timings, targets and whoever was skipped, for a rich console."""

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write everything measured, with what follows from it, to a JSON file."""
        Path(path).write_text(json.dumps(self._record(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> Self:
        """The report that :meth:`to_json` wrote.

        Raises: ValueError if `path` holds something else.
        """
        record: Any = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(record, dict) or record.get("format") != cls.format:
            raise ValueError(f"from_json reads reports of the format {cls.format}; got {path}.")
        timings = tuple(
            cls.timing(**{**_given(cls.timing, entry), "rounds_us": tuple(entry["rounds_us"])})
            for entry in record["timings"]
        )
        skipped = {"skipped": tuple(Skipped(**entry) for entry in record.get("skipped", ()))}
        return cls(**{**_given(cls, record), "timings": timings, **_given(cls, skipped)})

    def _record(self) -> dict[str, Any]:
        return {
            "format": self.format,
            **asdict(self),  # type: ignore[call-overload]
            "timings": [self._timing_record(timing) for timing in self.timings],
            "verdicts": [asdict(verdict) for verdict in self.verdicts],
        }

    def _timing_record(self, timing: Any) -> dict[str, Any]:
        """A timing, and what readers would compute from it."""
        return {**asdict(timing), "us": timing.us, "quartiles_us": timing.quartiles}


T = TypeVar("T", bound=Placed)


class Comparison(Report, Generic[T]):
    """Contestants beside each other, by backend, dtype and place."""

    against: ClassVar[tuple[str, ...]]
    """Whom all the others are compared with."""
    timings: tuple[T, ...]

    @cached_property
    def _index(self) -> dict[tuple[Any, ...], T]:
        return {(t.backend, t.dtype, t.place, t.contestant): t for t in self.timings}

    def find(self, backend: str, dtype: str, place: Any, contestant: str) -> T | None:
        """The timing of that contestant, None if it did not take part."""
        return self._index.get((backend, dtype, place, contestant))

    def ratio(self, timing: T, to: str) -> float | None:
        """Median of `timing` over that of the contestant `to` beside it."""
        other = self.find(timing.backend, timing.dtype, timing.place, to)
        return timing.us / other.us if other else None

    @property
    def groups(self) -> list[tuple[str, str]]:
        """Backends and dtypes, in the order of measurement."""
        return list(dict.fromkeys((timing.backend, timing.dtype) for timing in self.timings))

    @property
    def places(self) -> list[Any]:
        """Places measured, ascending."""
        return sorted({timing.place for timing in self.timings})

    def contestants(self, backend: str, dtype: str) -> dict[str, list[T]]:
        """Timings, by ascending place, of everyone who took part there."""
        found: dict[str, list[T]] = {}
        for timing in sorted(self.timings, key=lambda timing: timing.place):
            if (timing.backend, timing.dtype) == (backend, dtype):
                found.setdefault(timing.contestant, []).append(timing)
        return found

    def _timing_record(self, timing: T) -> dict[str, Any]:
        ratios = {f"ratio_to_{other}": self.ratio(timing, other) for other in self.against}
        return {**super()._timing_record(timing), **ratios}


def _given(kind: type[Any], record: dict[str, Any]) -> dict[str, Any]:
    """The entries of `record` that `kind` is made from; the others follow from them."""
    return {spec.name: record[spec.name] for spec in fields(kind) if spec.name in record}


def this_machine() -> str:
    """Where measurements are taken, in words."""
    cores = os.cpu_count()
    return f"{platform.platform()}, {cores} CPUs, Python {platform.python_version()}"


def library_versions() -> dict[str, str]:
    """Versions of the libraries that took part."""
    return {
        name: importlib.metadata.version(name.replace("_", "-"))
        for name in _LIBRARIES
        if name in sys.modules
    }
