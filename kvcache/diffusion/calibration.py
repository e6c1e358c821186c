"""Calibration: measurements of a model, for policies, and the file to keep them in."""

from __future__ import annotations

import hashlib
import json
import os
import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TypedDict, cast

import numpy as np

from kvcache.errors import DamagedFileError, DiffusionCacheError, ForeignFileError, NewerFileError
from kvcache.storage import schema
from kvcache.storage.reading import read_regular
from kvcache.storage.writing import replace_file

FORMAT = "kvcache.diffusion.calibration"
VERSION = 2
_SEAL = "sha256"


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

        Raises: DiffusionCacheError for less than one step, if there are no ratios, or for a
            magnitude in between that is 0 or too large for a float.
        """
        if steps < 1 or not self.ratios:
            raise DiffusionCacheError(
                f"ratios are resampled to >= 1 steps from some; got {steps} from "
                f"{len(self.ratios)}."
            )
        # In logarithms, where a product of ratios is a sum, and ratios stay positive.
        with np.errstate(all="ignore"):
            magnitudes = np.cumsum(np.log(self.ratios))
            positions = np.linspace(0, len(self.ratios) - 1, steps)
            resampled = np.interp(positions, np.arange(len(self.ratios)), magnitudes)
            ratios = np.exp(np.diff(resampled))
        if not np.isfinite(ratios).all():
            raise DiffusionCacheError(
                f"ratios are resampled through positive, finite magnitudes; got "
                f"{reprlib.repr(self.ratios)}. Measure the model again."
            )
        return (1.0, *ratios.tolist())

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the calibration to `path` as JSON with a checksum, whole or not at all.

        An existing file keeps its permissions; a symbolic link is followed.

        Raises: DiffusionCacheError unless all numbers are finite, and the provenance is JSON;
            FileAccessError, OSError. The file is as it was then.
        """
        try:
            encoded = json.dumps({"format": FORMAT, "version": VERSION, **asdict(self)})
            contents = json.loads(encoded)  # with lists for tuples, as it will be read
            _FIELDS(contents, "calibration")
            text = json.dumps(contents | {_SEAL: _digest(contents)}, indent=1, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise DiffusionCacheError(
                f"a calibration is saved with finite numbers, and a provenance of JSON: {error}."
            ) from error
        replace_file(path, [f"{text}\n".encode()])

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Calibration:
        """Read a calibration from a file of :meth:`save`.

        The checksum finds damage; it does not say who wrote the file. Files of version 1 have
        none, and are read without.

        Raises: FileNotFoundError, FileAccessError, ForeignFileError, NewerFileError,
            DamagedFileError.
        """
        fields = _read(path)
        lowest, highest = fields["signal_range"]
        return cls(
            tuple(map(float, fields["polynomial"])),
            tuple(map(float, fields["ratios"])),
            float(fields["explained"]),
            fields["points"],
            (float(lowest), float(highest)),
            fields["provenance"],
        )


def _read(path: str | os.PathLike[str]) -> _Fields:
    """Return the checked fields of the calibration in `path`.

    Raises: as :meth:`Calibration.load`.
    """
    try:
        contents = schema.parse_json(read_regular(path))
    except schema.SchemaError as error:
        raise ForeignFileError(f"{path} is not JSON: {error}.") from error
    if not isinstance(contents, dict) or contents.get("format") != FORMAT:
        raise ForeignFileError(f"{path} is no calibration. Load files that Calibration.save wrote.")
    version = contents.get("version")
    if type(version) is not int or version > VERSION:
        raise NewerFileError(
            f"this kvcache reads calibrations up to version {VERSION}; {path} has "
            f"{reprlib.repr(version)}. Upgrade kvcache."
        )
    if version > 1 and contents.pop(_SEAL, None) != _digest(contents):
        raise DamagedFileError(f"{path} is damaged: it does not match its checksum.")
    try:
        _FIELDS(contents, "calibration")
    except schema.SchemaError as error:
        raise DamagedFileError(f"{path} is damaged: {error}.") from error
    return cast(_Fields, contents)


def _digest(contents: Mapping[str, object]) -> str:
    """Return the SHA-256 of JSON values, whatever their order and spacing in a file."""
    canonical = json.dumps(contents, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _not_negative(value: object, name: str) -> None:
    schema.finite(value, name)
    if cast(float, value) < 0:
        raise schema.SchemaError(f"{name} must be >= 0; got {value}")


def _json_value(value: object, name: str) -> None:
    """Check that a value has no NaN or infinity, which JSON of Python knows."""
    try:
        json.dumps(value, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise schema.SchemaError(f"{name} must be JSON with finite numbers") from error


_FIELDS = schema.record(
    {
        "polynomial": schema.list_of(schema.finite),
        "ratios": schema.list_of(_not_negative),
        "explained": schema.finite,
        "points": schema.integer(0, 2**63 - 1),
        "signal_range": schema.tuple_of(schema.finite, schema.finite),
        "provenance": schema.mapping_of(_json_value),
    }
)
