"""What Whisper hears: the spectrogram against its definition, and sound files of many kinds."""

import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("gguf", reason="needs pip install 'kvcache[demo]'")
pytest.importorskip("tokenizers", reason="needs pip install 'kvcache[demo]'")
pytest.importorskip("soundfile", reason="needs pip install 'kvcache[audio]'")
pytest.importorskip("soxr", reason="needs pip install 'kvcache[audio]'")

import soundfile

from kvcache.errors import AudioFileError
from kvcache.reference.whisper.audio import read_recording
from kvcache.reference.whisper.mel import BINS, FRAMES, SAMPLES, log_mel, mel_filters

NOISE = np.random.default_rng(0).normal(scale=0.1, size=SAMPLES - 5000).astype(np.float32)


def tone(hertz, rate=16000, seconds=1.0):
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)


# The spectrogram.


def frame(samples, index):
    """Mel energies of one frame by the definition of each step."""
    windowed = np.zeros(400)
    for i in range(400):
        at = abs(160 * index - 200 + i)  # mirrored in front of the first sample
        windowed[i] = samples[at] * np.sin(np.pi * i / 400) ** 2 if at < samples.size else 0
    turns = np.outer(np.arange(201), np.arange(400)) / 400
    return (np.abs(np.exp(-2j * np.pi * turns) @ windowed) ** 2) @ mel_filters()


@pytest.mark.parametrize("index", [0, 1, 2, 1000, 2965])
def test_spectrogram_is_what_it_is_defined_to_be(index):
    mel = log_mel(NOISE)
    assert (mel.shape, mel.dtype) == ((FRAMES, BINS), np.float32)
    expected = (np.log10(frame(NOISE, index)) + 4) / 4
    np.testing.assert_allclose(mel[index], expected, atol=1e-5)


def test_only_eight_decades_are_heard():
    mel = log_mel(NOISE)
    assert mel[-1].tolist() == [mel.max() - 2] * BINS  # the silence behind it; 2 is 8 / 4
    assert set(np.unique(log_mel(np.zeros(0, np.float32)))) == {-1.5}  # (log10(1e-10) + 4) / 4


@pytest.mark.parametrize(("hertz", "mel"), [(250, 3.75), (1000, 15), (6400, 42)])
def test_a_tone_sounds_loudest_in_its_band(hertz, mel):
    band = (15 + 27 * np.log(8) / np.log(6.4)) / (BINS + 1)  # mel between one peak and the next
    assert abs(log_mel(tone(hertz))[50].argmax() + 1 - mel / band) <= 1


def test_triangles_have_equal_area():
    # One bin is 40 Hz wide. The narrow ones at the bottom are sampled coarsely.
    np.testing.assert_allclose(mel_filters().sum(axis=0)[50:] * 40, 1, atol=0.03)


def test_against_transformers():
    audio = pytest.importorskip("transformers.audio_utils", reason="transformers is not installed")
    scale = {"norm": "slaney", "mel_scale": "slaney"}
    theirs = audio.mel_filter_bank(201, BINS, 0.0, 8000.0, 16000, **scale)
    np.testing.assert_allclose(mel_filters(), theirs, atol=1e-12)


# Recordings.


@pytest.mark.parametrize("rate", [8000, 16000, 22050, 44100, 48000])
@pytest.mark.parametrize("subtype", ["PCM_U8", "PCM_16", "PCM_24", "FLOAT"])
def test_any_rate_and_width(tmp_path, rate, subtype):
    soundfile.write(tmp_path / "tone.wav", tone(440, rate), rate, subtype)
    found = read_recording(tmp_path / "tone.wav")
    assert (found.dtype, found.shape) == (np.float32, (16000,))
    inner = slice(500, -500)  # a resampler has nothing to look at beyond the ends
    np.testing.assert_allclose(found[inner], tone(440)[inner], atol=0.01)


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
