"""Calibration: what a policy has to know about a model, measured in runs without a cache."""

from __future__ import annotations

import json
import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kvcache.backends import Array, backend_of
from kvcache.backends.arrays import Namespace
from kvcache.errors import DamagedFileError, DiffusionCacheError, ForeignFileError, NewerFileError

from .history import Compute, bundle
from .signals import Measured, RelativeChange
from .step import copied
from .streams import Stream

FORMAT = "kvcache.diffusion.calibration"
VERSION = 1


@dataclass(frozen=True)
class Calibration:
    """What was fitted, and to what.

    polynomial: coefficients, the highest power first, that turn the relative change of the signal
        into that of the output: ``Accumulated(rescale=...)``. Empty if no signal was recorded.
    ratios: mean magnitude of a step's residual over that of the step before, one per step, the
        first one 1: ``Magnitude(ratios)``. Empty if outputs are not shaped as inputs.
    explained: share of the variance of the output's change that the polynomial explains, to 1.
    points: pairs of changes that it was fitted to.
    signal_range: smallest and largest change of the signal among them; beyond it nothing is known.
    provenance: where this comes from: model, sampler, guidance, number of steps, ...
    """

    polynomial: tuple[float, ...] = ()
    ratios: tuple[float, ...] = ()
    explained: float = 0.0
    points: int = 0
    signal_range: tuple[float, float] = (0.0, 0.0)
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def ratios_for(self, steps: int) -> tuple[float, ...]:
        """:attr:`ratios` for a run of another number of steps.

        Magnitudes are interpolated, not their ratios: over the whole run they change as much.

        Raises: DiffusionCacheError for less than one step, or if there are no ratios.
        """
        if steps < 1 or not self.ratios:
            raise DiffusionCacheError(
                f"ratios are resampled to >= 1 steps from some; got {steps} from "
                f"{len(self.ratios)}."
            )
        magnitudes = np.cumsum(np.log(self.ratios))
        where = np.linspace(0, len(self.ratios) - 1, steps)
        resampled = np.interp(where, np.arange(len(self.ratios)), magnitudes)
        return (1.0, *np.exp(np.diff(resampled)).tolist())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to `path` as JSON."""
        text = json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1)
        Path(path).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """What :meth:`save` wrote.

        Raises: ForeignFileError, NewerFileError, DamagedFileError.
        """
        found = _read(path)
        try:
            return cls(
                tuple(map(float, found["polynomial"])),
                tuple(map(float, found["ratios"])),
                float(found["explained"]),
                int(found["points"]),
                (float(found["signal_range"][0]), float(found["signal_range"][1])),
                dict(found["provenance"]),
            )
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise DamagedFileError(f"{path} is a calibration that lacks {error}.") from error


class _Seen(NamedTuple):
    """What the step before left, of one stream."""

    step: int
    signal: Array | None
    output: Array
    residual: Array | None


class Recorder:
    """Stands where a cache will stand, computes every step, and measures.

    ::

        recorder = Recorder()
        for step, time in enumerate(times):
            velocity = recorder.run(step, x, network, signal=modulated(x, time), time=time)
        calibration = recorder.calibrate(model="my-dit", sampler="euler", steps=28)
        calibration.save("my-dit.json")

    Several runs and streams may follow one another: what they give is averaged.
    """

    def __init__(self) -> None:
        self._seen: dict[Stream, _Seen] = {}
        self._changes: list[tuple[float, float]] = []
        self._ratios: dict[int, list[float]] = defaultdict(list)

    def run(
        self,
        step: int,
        x: Any,
        compute: Compute,
        *,
        signal: Measured = None,
        time: float | None = None,
        stream: Stream = 0,
    ) -> Any:
        """``compute(x)``, as :meth:`DiffusionCache.run` without a cache.

        Of several arrays the first is measured.
        """
        outputs = compute(x)
        given = signal() if callable(signal) else signal
        given = None if given is None else copied(given)  # the caller may write to it
        entered, output = bundle(x)[0], copied(bundle(outputs)[0])
        residual = output - entered if output.shape == entered.shape else None
        now = _Seen(step, given, output, residual)
        before = self._seen.get(stream)
        if before is not None and before.step < step:
            self._measure(before, now)
        self._seen[stream] = now
        return outputs

    def calibrate(self, degree: int = 4, **provenance: Any) -> Calibration:
        """Fit a polynomial of `degree` to the changes, and average the ratios of magnitudes.

        provenance: goes into the calibration and its file, beside the date and version.

        Raises: DiffusionCacheError if nothing was recorded, or too little for the degree.
        """
        if not self._changes and not self._ratios:
            raise DiffusionCacheError("a calibration needs a run of at least two steps; got none.")
        origin = {"kvcache": version("kvcache"), "created": _today(), **provenance}
        ratios = tuple(float(np.mean(self._ratios.get(i, [1.0]))) for i in range(self._length))
        if not self._changes:
            return Calibration(ratios=ratios, provenance=origin)
        signal, output = np.array(self._changes, np.float64).T
        if degree < 0 or len(signal) <= degree:
            raise DiffusionCacheError(
                f"a polynomial of degree {degree} is fitted to more than {max(degree, 0)} changes; "
                f"got {len(signal)}. Record more steps, or fit a lower degree."
            )
        polynomial = np.polyfit(signal, output, degree)
        rest = output - np.polyval(polynomial, signal)
        spread = float(np.var(output))
        return Calibration(
            tuple(polynomial.tolist()),
            ratios,
            1.0 - float(np.mean(rest**2)) / spread if spread else 1.0,
            len(signal),
            (float(signal.min()), float(signal.max())),
            origin,
        )

    @property
    def _length(self) -> int:
        return max(self._ratios, default=-1) + 1

    def _measure(self, before: _Seen, now: _Seen) -> None:
        measure = RelativeChange()
        with np.errstate(all="ignore"):
            if before.signal is not None and now.signal is not None:
                pair = ((now.signal, before.signal), (now.output, before.output))
                changes = [_number(measure.change(_xp(a), a, b)) for a, b in pair]
                if np.isfinite(changes).all():
                    self._changes.append((changes[0], changes[1]))
            if before.residual is not None and now.residual is not None:
                ratio = _number(_ratio(_xp(now.residual), now.residual, before.residual))
                if np.isfinite(ratio):
                    self._ratios[now.step].append(ratio)


def _ratio(xp: Namespace, new: Array, old: Array) -> Array:
    """Mean over the tokens of the norm of `new` over that of `old`."""
    lengths = [
        xp.sqrt(xp.sum(wide * wide, axis=-1))
        for wide in (xp.astype(array, xp.float32) for array in (new, old))
    ]
    return xp.mean(lengths[0] / lengths[1])


def _xp(array: Array) -> Namespace:
    return backend_of(array).xp


def _number(scalar: Array) -> float:
    return float(backend_of(scalar).to_host(scalar))


def _today() -> str:
    return datetime.now(UTC).date().isoformat()


def _read(path: str | os.PathLike[str]) -> dict[str, Any]:
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ForeignFileError(f"{path} is not JSON: {error}.") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ForeignFileError(f"{path} is no calibration. Load files that Calibration.save wrote.")
    if not isinstance(found.get("version"), int) or found["version"] > VERSION:
        raise NewerFileError(
            f"this kvcache reads calibrations up to version {VERSION}; {path} has "
            f"{found.get('version')}. Upgrade kvcache."
        )
    return found
