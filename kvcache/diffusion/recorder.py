"""Recorder: measures, in runs without a cache, the numbers of a calibration."""

from __future__ import annotations

from collections import defaultdict
from datetime import UTC, datetime
from importlib.metadata import version
from typing import NamedTuple

import numpy as np

from kvcache.backends import Array, backend_of
from kvcache.backends.arrays import Namespace
from kvcache.errors import DiffusionCacheError

from .calibration import Calibration
from .history import Compute, Inputs, Outputs, bundle, owned_copy
from .signals import RelativeChange, SignalInput
from .streams import Stream


class _StepArrays(NamedTuple):
    """Arrays of one step of one stream, for comparison with the next step."""

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
        self._latest: dict[Stream, _StepArrays] = {}
        self._changes: list[tuple[float, float]] = []
        """Change of the signal and change of the output, by pair of steps."""
        self._ratios: dict[int, list[float]] = defaultdict(list)
        """Ratios of magnitudes, by step; several runs give several."""

    def run(
        self,
        step: int,
        x: Inputs,
        compute: Compute[Inputs, Outputs],
        *,
        signal: SignalInput = None,
        time: float | None = None,
        stream: Stream = 0,
    ) -> Outputs:
        """Return ``compute(x)``, as :meth:`DiffusionCache.run` without a cache.

        Of several arrays the first is measured.
        """
        given = signal() if callable(signal) else signal
        # Copies before the network runs: it may write to what it is given, and so may the caller.
        given = None if given is None else owned_copy(given)
        entered = owned_copy(bundle(x)[0])
        outputs = compute(x)
        output = owned_copy(bundle(outputs)[0])
        residual = output - entered if output.shape == entered.shape else None
        arrays = _StepArrays(step, given, output, residual)
        before = self._latest.get(stream)
        # A step that does not follow is the first of another run.
        if before is not None and before.step < step:
            self._measure(before, arrays)
        self._latest[stream] = arrays
        return outputs

    def calibrate(self, degree: int = 4, **provenance: object) -> Calibration:
        """Fit a polynomial of `degree` to the changes, and average the ratios of magnitudes.

        provenance: goes into the calibration and its file, beside the date and version.

        Raises: DiffusionCacheError if nothing was recorded, or too little for the degree.
        """
        if not self._changes and not self._ratios:
            raise DiffusionCacheError("a calibration needs a run of at least two steps; got none.")
        origin = {"kvcache": version("kvcache"), "created": _today(), **provenance}
        # Steps that no run has measured, the first one among them, count as unchanged.
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
        unexplained = output - np.polyval(polynomial, signal)
        variance = float(np.var(output))
        return Calibration(
            tuple(polynomial.tolist()),
            ratios,
            1.0 - float(np.mean(unexplained**2)) / variance if variance else 1.0,
            len(signal),
            (float(signal.min()), float(signal.max())),
            origin,
        )

    @property
    def _length(self) -> int:
        return max(self._ratios, default=-1) + 1

    def _measure(self, before: _StepArrays, now: _StepArrays) -> None:
        """Record the differences of two consecutive steps, leaving out numbers not finite."""
        measure = RelativeChange()
        with np.errstate(all="ignore"):
            if before.signal is not None and now.signal is not None:
                pairs = ((now.signal, before.signal), (now.output, before.output))
                changes = [_number(measure.change(_xp(new), new, old)) for new, old in pairs]
                if np.isfinite(changes).all():
                    self._changes.append((changes[0], changes[1]))
            if before.residual is not None and now.residual is not None:
                ratio = _number(_ratio(_xp(now.residual), now.residual, before.residual))
                if np.isfinite(ratio):
                    self._ratios[now.step].append(ratio)


def _ratio(xp: Namespace, new: Array, old: Array) -> Array:
    """Return the ratio of norms, `new` over `old`, averaged over the tokens."""
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
