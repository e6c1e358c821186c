"""Calibration: measurements of a model, for policies, and the file to keep them in."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypedDict, cast

import numpy as np

from kvcache.errors import DamagedFileError, DiffusionCacheError, ForeignFileError, NewerFileError

FORMAT = "kvcache.diffusion.calibration"
VERSION = 1


class _Fields(TypedDict):
    """Fields of a calibration file, beside its format and version."""

    polynomial: list[float]
    ratios: list[float]
    explained: float
    points: int
    signal_range: list[float]
    provenance: dict[str, object]


@dataclass(frozen=True)
class Calibration:
    """A fitted polynomial, measured ratios, and their provenance.

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
    provenance: Mapping[str, object] = field(default_factory=dict)

    def ratios_for(self, steps: int) -> tuple[float, ...]:
        """Return :attr:`ratios` for a run of another number of steps.

        Magnitudes are interpolated, not their ratios: over the whole run they change as much.

        Raises: DiffusionCacheError for less than one step, or if there are no ratios.
        """
        if steps < 1 or not self.ratios:
            raise DiffusionCacheError(
                f"ratios are resampled to >= 1 steps from some; got {steps} from "
                f"{len(self.ratios)}."
            )
        # In logarithms, where a product of ratios is a sum, and ratios stay positive.
        magnitudes = np.cumsum(np.log(self.ratios))
        positions = np.linspace(0, len(self.ratios) - 1, steps)
        resampled = np.interp(positions, np.arange(len(self.ratios)), magnitudes)
        return (1.0, *np.exp(np.diff(resampled)).tolist())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the calibration to `path` as JSON."""
        text = json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)}, indent=1)
        Path(path).write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read a calibration from a file of :meth:`save`.

        Raises: ForeignFileError, NewerFileError, DamagedFileError.
        """
        fields = _read(path)
        try:
            return cls(
                tuple(map(float, fields["polynomial"])),
                tuple(map(float, fields["ratios"])),
                float(fields["explained"]),
                int(fields["points"]),
                (float(fields["signal_range"][0]), float(fields["signal_range"][1])),
                dict(fields["provenance"]),
            )
        # A file of our format may lack a field, or hold something else in it.
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise DamagedFileError(f"{path} is a calibration that lacks {error}.") from error


def _read(path: str | os.PathLike[str]) -> _Fields:
    """Return the fields of the calibration in `path`, as yet unchecked.

    Raises: ForeignFileError for a file of another format; NewerFileError for a later version.
    """
    try:
        contents = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ForeignFileError(f"{path} is not JSON: {error}.") from error
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        raise ForeignFileError(f"{path} is no calibration. Load files that Calibration.save wrote.")
    if not isinstance(contents.get("version"), int) or contents["version"] > VERSION:
        raise NewerFileError(
            f"this kvcache reads calibrations up to version {VERSION}; {path} has "
            f"{contents.get('version')}. Upgrade kvcache."
        )
    return cast(_Fields, contents)
