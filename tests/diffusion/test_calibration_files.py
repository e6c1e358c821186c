"""Calibration files, damaged or forged: named errors or the same content, in bounded memory."""

import hashlib
import json
import os
import stat
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvcache import (
    CacheFileError,
    DamagedFileError,
    DiffusionCacheError,
    FileAccessError,
    ForeignFileError,
)
from kvcache.diffusion import Calibration

from ..forging import DEEP, damages, forge, forgeries, peak_of

WHOLE = Calibration(
    (0.5, -1.0), (1.0, 0.9, 0.8), 0.75, 12, (0.1, 0.7), {"model": "m", "sizes": [1, {"a": None}]}
)
SPARE = 1 << 20


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("calibration") / "file.json"


def encoded():
    """The JSON of a file of WHOLE, but for its checksum."""
    return {
        "format": "kvcache.diffusion.calibration",
        "version": 2,
        "polynomial": list(WHOLE.polynomial),
        "ratios": list(WHOLE.ratios),
        "explained": WHOLE.explained,
        "points": WHOLE.points,
        "signal_range": list(WHOLE.signal_range),
        "provenance": {"model": "m", "sizes": [1, {"a": None}]},
    }


def sealed(fields):
    """A file with these fields, and a checksum that is right."""
    fields = {name: value for name, value in fields.items() if name != "sha256"}
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    seal = hashlib.sha256(canonical.encode()).hexdigest()
    return json.dumps(fields | {"sha256": seal}).encode()


def load(path, content):
    path.write_bytes(content)
    result, peak = peak_of(lambda: Calibration.load(path))
    assert peak < 40 * len(content) + SPARE
    if isinstance(result, Exception):
        assert isinstance(result, CacheFileError), repr(result)
        return None
    return result


def test_a_file_is_as_documented(path):
    WHOLE.save(path)
    assert json.loads(path.read_text()) == json.loads(sealed(encoded()))
    assert Calibration.load(path) == WHOLE


@given(damages(sealed(encoded())))
def test_damaged(path, content):
    assert load(path, content) in (None, WHOLE)


@given(st.data())
def test_forged(path, data):
    fields = encoded()
    forge(fields, data.draw(forgeries(fields)))
    result = load(path, sealed(fields))
    if result is not None:
        result.save(path)  # so all of it is finite, and JSON
        assert Calibration.load(path) == result
        with suppress(DiffusionCacheError):  # magnitudes may be beyond all floats
            assert np.isfinite(result.ratios_for(3)).all()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"ratios": [1, float("nan")]}, r"ratios\[1\] must be a finite number; got nan"),
        ({"ratios": [1, 10**400]}, r"ratios\[1\] must be a finite number"),
        ({"ratios": [1, -0.5]}, r"ratios\[1\] must be >= 0; got -0.5"),
        ({"polynomial": ["1"]}, "must be a finite number; got '1'"),
        ({"polynomial": 3}, "must be a list; got 3"),
        ({"explained": float("inf")}, "explained must be a finite number"),
        ({"provenance": {"model": [float("nan")]}}, "provenance.model must be JSON with finite"),
        ({"points": 1.5}, "points must be an integer"),
        ({"points": True}, "points must be an integer"),
        ({"signal_range": [1]}, "signal_range must be a list of 2"),
        ({"provenance": []}, "provenance must be an object"),
    ],
)
@pytest.mark.parametrize("version", [1, 2])
def test_forged_fields_are_named(path, change, match, version):
    path.write_bytes(sealed(encoded() | {"version": version} | change))
    with pytest.raises(DamagedFileError, match=match):
        Calibration.load(path)


@pytest.mark.parametrize("content", [DEEP, '{"format":' + DEEP, "[" * 10, "9" * 5000, "\ud800"])
def test_no_json(path, content):
    path.write_bytes(content.encode(errors="surrogatepass"))
    with pytest.raises(ForeignFileError, match="is not JSON"):
        Calibration.load(path)


def test_the_checksum_finds_a_changed_number(path):
    WHOLE.save(path)
    path.write_text(path.read_text().replace("0.75", "0.74"))
    with pytest.raises(DamagedFileError, match="does not match its checksum"):
        Calibration.load(path)
    fields = json.loads(sealed(encoded()))
    del fields["sha256"]
    path.write_text(json.dumps(fields))
    with pytest.raises(DamagedFileError, match="does not match its checksum"):
        Calibration.load(path)


def test_version_1_had_no_checksum(path):
    path.write_text(json.dumps(encoded() | {"version": 1}))
    assert Calibration.load(path) == WHOLE


@pytest.mark.parametrize(
    "calibration",
    [
        Calibration((float("nan"),)),
        Calibration(ratios=(1.0, float("inf"))),
        Calibration(provenance={"seed": float("nan")}),
        Calibration(provenance={"model": object()}),
    ],
)
def test_what_could_not_be_read_again_is_not_saved(path, calibration):
    WHOLE.save(path)
    with pytest.raises(DiffusionCacheError, match="finite numbers, and a provenance of JSON"):
        calibration.save(path)
    assert Calibration.load(path) == WHOLE
    assert list(path.parent.iterdir()) == [path]


def test_saving_is_whole_or_not_at_all(path, monkeypatch):
    WHOLE.save(path)
    path.chmod(0o600)

    def full(*args):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space"):
            Calibration().save(path)
    assert Calibration.load(path) == WHOLE
    Calibration().save(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert list(path.parent.iterdir()) == [path]


def test_what_is_no_file(path):
    for use in (Calibration.load, WHOLE.save):
        with pytest.raises(FileAccessError, match="is a directory"):
            use(path.parent)


@pytest.mark.parametrize(("ratios", "steps"), [((1.0, 0.0, 1.0), 3), ((1.0, 1e308, 1e308), 2)])
def test_ratios_that_cannot_be_resampled(ratios, steps):
    with pytest.raises(DiffusionCacheError, match="through positive, finite magnitudes; got"):
        Calibration(ratios=ratios).ratios_for(steps)
