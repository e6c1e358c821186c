"""The spectrogram against its definition."""

import numpy as np
import pytest

pytest.importorskip("gguf", reason="needs pip install 'kvcache[demo]'")
pytest.importorskip("tokenizers", reason="needs pip install 'kvcache[demo]'")

from kvcache.reference.whisper.mel import BINS, FRAMES, SAMPLES, log_mel, mel_filters

NOISE = np.random.default_rng(0).normal(scale=0.1, size=SAMPLES - 5000).astype(np.float32)


def tone(hertz, rate=16000, seconds=1.0):
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(int(rate * seconds)) / rate)


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
