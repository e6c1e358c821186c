"""Recordings: sound files of many kinds, and those that are refused."""

import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("gguf", reason="needs pip install 'kvcache[demo]'")
pytest.importorskip("tokenizers", reason="needs pip install 'kvcache[demo]'")
pytest.importorskip("soundfile", reason="needs pip install 'kvcache[audio]'")
pytest.importorskip("soxr", reason="needs pip install 'kvcache[audio]'")

import soundfile

from kvcache.reference.errors import AudioFileError
from kvcache.reference.whisper.audio import read_recording


def tone(hertz, rate=16000, seconds=1.0):
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000])
@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "FLOAT"])
def test_any_rate_and_width(tmp_path, rate, subtype):
    soundfile.write(tmp_path / "tone.wav", tone(440, rate), rate, subtype)
    sound = read_recording(tmp_path / "tone.wav")
    assert (sound.dtype, sound.shape) == (np.float32, (16000,))
    inner = slice(500, -500)  # a resampler has nothing to look at beyond the ends
    np.testing.assert_allclose(sound[inner], tone(440)[inner], atol=0.01)


def test_channels_are_averaged(tmp_path):
    left = tone(440)
    soundfile.write(tmp_path / "stereo.wav", np.stack([left, 0 * left], axis=1), 16000)
    np.testing.assert_allclose(read_recording(tmp_path / "stereo.wav"), left / 2, atol=1e-3)


def test_what_is_too_high_for_the_rate_is_filtered(tmp_path):
    soundfile.write(tmp_path / "high.wav", tone(12000, 48000), 48000)
    assert np.abs(read_recording(tmp_path / "high.wav")[500:-500]).max() < 1e-3


def test_flac_and_silence(tmp_path):
    soundfile.write(tmp_path / "a.flac", tone(440), 16000)
    np.testing.assert_allclose(read_recording(tmp_path / "a.flac"), tone(440), atol=1e-3)
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 44100)
    assert read_recording(tmp_path / "empty.wav").shape == (0,)


def test_what_is_no_recording(tmp_path):
    (tmp_path / "text.wav").write_text("RIFF, it says, but this is a letter.")
    says = r"must be a sound file.*cannot read .*{}.*Check the path, or convert it to WAV"
    for name in ("text.wav", "missing.wav", ""):
        with pytest.raises(AudioFileError, match=says.format(name)):
            read_recording(tmp_path / name)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_no_sound(tmp_path, bad):
    soundfile.write(tmp_path / "bad.wav", np.array([0.0, bad]), 16000, "FLOAT")
    with pytest.raises(AudioFileError, match=r"finite samples; .*bad\.wav .*Export it again"):
        read_recording(tmp_path / "bad.wav")


@pytest.mark.parametrize("name", ["soundfile", "soxr"])
def test_a_missing_library_is_named_with_what_installs_it(name):
    program = f"import sys; sys.modules[{name!r}] = None; import kvcache.reference.whisper.audio"
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert f"needs {name}; it is not installed. pip install 'kvcache[audio]'" in result.stderr
