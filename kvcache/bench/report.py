"""What a comparison found: a plain record that goes to JSON and comes back."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any, Self

from .contest import MEMMOVE, RAW
from .targets import Verdict, judge

if TYPE_CHECKING:
    from rich.console import RenderableType

FORMAT = "kvcache.bench.append/1"


@dataclass(frozen=True)
class Timing:
    """One contestant on one backend, dtype and capacity.

    rounds_us: microseconds per step in every round. steps: steps of one round.
    """

    backend: str
    dtype: str
    capacity: int
    contestant: str
    steps: int
    rounds_us: tuple[float, ...]

    @cached_property
    def us(self) -> float:
        """Microseconds per step, K and V: the median over the rounds."""
        return median(self.rounds_us)

    @property
    def quartiles(self) -> tuple[float, float]:
        """Microseconds per step of the first and the third quarter of the rounds."""
        if len(self.rounds_us) < 2:
            return self.us, self.us
        low, _, high = quantiles(self.rounds_us, n=4, method="inclusive")
        return low, high


@dataclass(frozen=True)
class Skipped:
    """What did not take part, and why. An empty `contestant` stands for all of them."""

    backend: str
    dtype: str
    contestant: str
    reason: str


@dataclass(frozen=True)
class AppendReport:
    """Cost of appending one token: [batch, heads, 1, head_dim] to K and to V.

    machine: where this was measured. versions: of the libraries that took part.
    """

    batch: int
    heads: int
    head_dim: int
    rounds: int
    machine: str
    versions: dict[str, str]
    timings: tuple[Timing, ...] = ()
    skipped: tuple[Skipped, ...] = ()
    _index: dict[tuple[str, str, int, str], Timing] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        index = {(t.backend, t.dtype, t.capacity, t.contestant): t for t in self.timings}
        object.__setattr__(self, "_index", index)

    def find(self, backend: str, dtype: str, capacity: int, contestant: str) -> Timing | None:
        """The timing of that contestant, None if it did not take part."""
        return self._index.get((backend, dtype, capacity, contestant))

    def ratio(self, timing: Timing, to: str) -> float | None:
        """Median of `timing` over that of the contestant `to` beside it."""
        other = self.find(timing.backend, timing.dtype, timing.capacity, to)
        return timing.us / other.us if other else None

    @property
    def groups(self) -> list[tuple[str, str]]:
        """Backends and dtypes, in the order of measurement."""
        return list(dict.fromkeys((timing.backend, timing.dtype) for timing in self.timings))

    @property
    def capacities(self) -> list[int]:
        """Capacities measured, ascending."""
        return sorted({timing.capacity for timing in self.timings})

    def contestants(self, backend: str, dtype: str) -> dict[str, list[Timing]]:
        """Timings, by ascending capacity, of everyone who took part there."""
        found: dict[str, list[Timing]] = {}
        for timing in sorted(self.timings, key=lambda timing: timing.capacity):
            if (timing.backend, timing.dtype) == (backend, dtype):
                found.setdefault(timing.contestant, []).append(timing)
        return found

    @property
    def verdicts(self) -> list[Verdict]:
        """The project's targets: what was measured, and whether it holds."""
        return judge(self)

    def to_table(self) -> RenderableType:
        """Timings, targets and whoever was skipped, for a rich console."""
        from .present import tables

        return tables(self)

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Write a figure of cost over capacity; the suffix of `path` chooses the format.

        Raises: ImportError without matplotlib; says what installs it.
        """
        from .plot import draw

        draw(self, path)

    def to_json(self, path: str | os.PathLike[str]) -> None:
        """Write everything measured, with ratios and verdicts, to a JSON file."""
        Path(path).write_text(json.dumps(self._record(), indent=1) + "\n", encoding="utf-8")

    @classmethod
    def from_json(cls, path: str | os.PathLike[str]) -> Self:
        """The report that :meth:`to_json` wrote.

        Raises: ValueError if `path` holds something else.
        """
        record: Any = json.loads(Path(path).read_text(encoding="utf-8"))
        if not isinstance(record, dict) or record.get("format") != FORMAT:
            raise ValueError(f"from_json reads reports of the format {FORMAT}; got {path}.")
        timings = tuple(
            Timing(**{**_fields(Timing, entry), "rounds_us": tuple(entry["rounds_us"])})
            for entry in record["timings"]
        )
        skipped = tuple(Skipped(**entry) for entry in record["skipped"])
        return cls(**{**_fields(cls, record), "timings": timings, "skipped": skipped})

    def _record(self) -> dict[str, Any]:
        plain = asdict(self)
        del plain["_index"]
        return {
            "format": FORMAT,
            **plain,
            "timings": list(self._timings()),
            "verdicts": [asdict(verdict) for verdict in self.verdicts],
        }

    def _timings(self) -> Iterator[dict[str, Any]]:
        for timing in self.timings:
            yield {
                **asdict(timing),
                "us": timing.us,
                "quartiles_us": timing.quartiles,
                "ratio_to_raw": self.ratio(timing, RAW),
                "ratio_to_memmove": self.ratio(timing, MEMMOVE),
            }


def _fields(kind: type[Any], record: dict[str, Any]) -> dict[str, Any]:
    """The entries of `record` that `kind` is made from; the others follow from them."""
    names = (name for name, spec in kind.__dataclass_fields__.items() if spec.init)
    return {name: record[name] for name in names}
