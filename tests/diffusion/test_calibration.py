"""What a recorder measures, fits and keeps is checked against numbers that are known beforehand."""

import json
import re

import numpy as np
import pytest

from kvcache import DamagedFileError, ForeignFileError, NewerFileError
from kvcache.diffusion import (
    Accumulated,
    Calibration,
    DiffusionCache,
    HoldResidual,
    Magnitude,
    Recipe,
    Recorder,
)

SHRINK = 0.9
"""The residual of a step over that of the step before."""


def signal_at(step):
    """Changes by 1, 2, 3, ... percent from step to step."""
    return np.full((2, 3, 4), np.prod([1 + 0.01 * (i + 1) for i in range(step)]), np.float32)


def output_change(change):
    return 2 * change**2 + 0.5 * change


def record(recorder, backend, steps=9, stream=0):
    """A run whose outputs change by a polynomial of what the signal changes by."""
    output = 1.0
    for step in range(steps):
        if step:
            output *= 1 + output_change(0.01 * step)
        y = backend.from_host(np.full((2, 3, 4), output, np.float32))
        x = y - backend.from_host(np.full((2, 3, 4), SHRINK**step, np.float32))
        signal = backend.from_host(signal_at(step))
        found = recorder.run(step, x, lambda _, y=y: y, signal=signal, stream=stream)
        assert found is y  # computed, whatever is measured


@pytest.fixture
def calibration(backend):
    recorder = Recorder()
    record(recorder, backend)
    record(recorder, backend)  # a second run, which must not be compared with the first
    return recorder.calibrate(degree=2, model="known", steps=9)


def test_polynomial_and_ratios_are_found(calibration):
    assert calibration.points == 16
    assert np.allclose(calibration.polynomial, (2, 0.5, 0), atol=2e-2)
    assert calibration.explained > 0.9999
    assert calibration.signal_range == pytest.approx((0.01, 0.08), rel=1e-3)
    assert calibration.ratios == pytest.approx([1] + [SHRINK] * 8, rel=1e-4)


def test_provenance_is_kept(calibration):
    given = {"model": "known", "steps": 9}
    assert calibration.provenance.items() >= given.items()
    assert calibration.provenance["kvcache"]
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", calibration.provenance["created"])


def test_streams_are_not_compared_with_each_other(backend):
    apart, together = Recorder(), Recorder()
    record(apart, backend, stream="cond")
    record(apart, backend, stream="uncond")
    record(together, backend)
    assert np.allclose(apart.calibrate(2).polynomial, together.calibrate(2).polynomial)
    assert apart.calibrate(2).points == 2 * together.calibrate(2).points


def test_fit_is_what_policies_take(calibration):
    """Skips while the output, not the signal, has changed by less than the threshold."""
    cache = DiffusionCache(Recipe(Accumulated(0.03, calibration.polynomial), HoldResidual()))
    x = np.ones((2, 3, 4), np.float32)
    for step in range(9):
        cache.run(step, x, lambda x: x + 1, signal=signal_at(step))
    drift, expected = 0.0, ""
    for step in range(9):
        drift += output_change(0.01 * step)
        expected += "C" if step == 0 or drift >= 0.03 else "-"
        drift = 0.0 if expected[-1] == "C" else drift
    assert "".join("C" if s.computed else "-" for s in cache.stats.steps) == expected
    assert Magnitude(calibration.ratios).ratios == calibration.ratios


def test_caller_may_write_to_what_was_recorded():
    recorder = Recorder()
    x, y, signal = (np.zeros((2, 4), np.float32) for _ in range(3))
    for step in range(4):
        signal[:] = y[:] = 1 + step
        recorder.run(step, x, lambda _: y, signal=signal)
        y[:] = signal[:] = 100
    calibration = recorder.calibrate(1)
    assert calibration.signal_range == pytest.approx((1 / 3, 1))
    assert calibration.polynomial == pytest.approx((1, 0), abs=1e-6)
    assert calibration.ratios == pytest.approx((1, 2, 3 / 2, 4 / 3))


def test_networks_may_write_to_what_they_are_given(backend):
    """And to what the signal is made of."""
    calibrations = []
    for writes in (False, True):
        recorder = Recorder()

        def net(x, factor, writes=writes):
            if not writes:
                return x * factor
            x *= factor
            return x

        for step in range(5):
            x = backend.from_host(np.full((1, 2, 3), 1.0 + step, np.float32))
            recorder.run(step, x, lambda x, step=step: net(x, 2 + step), signal=lambda x=x: x + 1)
        calibrations.append(recorder.calibrate(degree=1))
    one, other = calibrations
    assert one.ratios == other.ratios
    assert one.polynomial == other.polynomial


def test_ratios_are_means_over_tokens():
    recorder = Recorder()
    residuals = ([[3, 4], [1, 0]], [[6, 8], [3, 0]])  # [tokens, width]: twice and three times
    for step, residual in enumerate(np.array(residuals, np.float32)):
        recorder.run(step, np.zeros((2, 2), np.float32), lambda x, r=residual: x + r)
    assert recorder.calibrate().ratios == (1, 2.5)


def test_other_lengths_shrink_as_much(calibration):
    whole = np.prod(calibration.ratios)
    for steps in (2, 5, 9, 40):
        resampled = calibration.ratios_for(steps)
        assert len(resampled) == steps
        assert np.prod(resampled) == pytest.approx(whole, rel=1e-5)
    assert calibration.ratios_for(9) == pytest.approx(calibration.ratios)
    assert calibration.ratios_for(5)[1] == pytest.approx(SHRINK**2, rel=1e-4)
    assert calibration.ratios_for(1) == (1.0,)
    with pytest.raises(ValueError, match="to >= 1 steps"):
        calibration.ratios_for(0)
    with pytest.raises(ValueError, match="from 0"):
        Calibration().ratios_for(3)


def test_files_round_trip(calibration, tmp_path):
    path = tmp_path / "it.json"
    calibration.save(path)
    assert Calibration.load(path) == calibration
    assert json.loads(path.read_text())["provenance"]["model"] == "known"


@pytest.mark.parametrize(
    ("text", "error", "match"),
    [
        ("\x00", ForeignFileError, "is not JSON"),
        ("[1]", ForeignFileError, "is no calibration"),
        ('{"format": "other"}', ForeignFileError, "Calibration.save wrote"),
        ('{"format": "kvcache.diffusion.calibration", "version": 3}', NewerFileError, "has 3"),
        ('{"format": "kvcache.diffusion.calibration"}', NewerFileError, "has None"),
        ('{"format": "kvcache.diffusion.calibration", "version": 1}', DamagedFileError, "lacks"),
    ],
)
def test_other_files_are_refused(text, error, match, tmp_path):
    path = tmp_path / "it.json"
    path.write_text(text)
    with pytest.raises(error, match=match):
        Calibration.load(path)


def test_too_little_is_refused():
    recorder = Recorder()
    with pytest.raises(ValueError, match="at least two steps; got none"):
        recorder.calibrate()
    x = np.ones((2, 4), np.float32)
    for step in range(3):
        recorder.run(step, x * (step + 1), lambda x: x * x, signal=x * (step + 1))
    with pytest.raises(ValueError, match="degree 2 is fitted to more than 2 changes; got 2"):
        recorder.calibrate(2)
    assert recorder.calibrate(1).points == 2


def test_without_a_signal_there_are_ratios_only():
    recorder = Recorder()
    for step in range(3):
        x = np.full((2, 4), 2.0**step, np.float32)
        recorder.run(step, x, lambda x: 2 * x)
    found = recorder.calibrate()
    assert found.polynomial == ()
    assert found.ratios == (1, 2, 2)


def test_outputs_of_another_shape_have_no_ratios():
    recorder = Recorder()
    for step in range(3):
        x = np.full((2, 4), 2.0**step, np.float32)
        recorder.run(step, x, lambda x: x[:, :1], signal=x)
    found = recorder.calibrate(0)
    assert found.ratios == ()
    assert found.polynomial == pytest.approx((1.0,))


def test_what_is_no_number_is_left_out():
    recorder = Recorder()
    for step in range(4):
        x = np.full((2, 4), 0.0 if step < 2 else step, np.float32)
        recorder.run(step, x, lambda x: x + x, signal=x)
    found = recorder.calibrate(0)  # nothing over nothing, then something over nothing
    assert found.points == 1
    assert found.ratios == pytest.approx((1, 1, 1, 1.5))
