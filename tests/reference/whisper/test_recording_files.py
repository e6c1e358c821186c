"""Recordings of strangers: named errors or sound, in memory that the size of the file warrants."""

import io
import os
import struct

import numpy as np
import pytest
from hypothesis import given

pytest.importorskip("gguf", reason="needs pip install 'kvcache[demo]'")
pytest.importorskip("tokenizers", reason="needs pip install 'kvcache[demo]'")
pytest.importorskip("soundfile", reason="needs pip install 'kvcache[audio]'")
pytest.importorskip("soxr", reason="needs pip install 'kvcache[audio]'")

import soundfile

from kvcache.reference.errors import AudioFileError
from kvcache.reference.whisper.audio import read_recording

from ...forging import damages, peak_of

SPARE = 16 << 20
"""Bytes of a minute, the shortest limit, at 16 kHz, and of the resampler."""


def wav(rate=16000, samples=400, channels=1):
    file = io.BytesIO()
    tone = 0.5 * np.sin(np.arange(samples * channels).reshape(samples, channels))
    soundfile.write(file, tone, 16000, "PCM_16", format="WAV")
    content = bytearray(file.getvalue())
    content[24:28] = struct.pack("<I", rate)
    return bytes(content)


def flac(samples=4096):
    file = io.BytesIO()
    soundfile.write(file, np.sin(np.arange(samples)) / 2, 16000, "PCM_16", format="FLAC")
    return file.getvalue()


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tmp_path_factory.mktemp("recordings") / "sound"


def read(path, content):
    path.write_bytes(content)
    result, peak = peak_of(lambda: read_recording(path))
    assert peak < 5000 * len(content) + SPARE, f"{peak} bytes for a file of {len(content)}"
    if isinstance(result, Exception):
        assert isinstance(result, AudioFileError), repr(result)
    else:
        assert result.dtype == np.float32
    return result


@given(damages(wav()))
def test_damaged_wav(path, content):
    read(path, content)


@given(damages(flac()))
def test_damaged_flac(path, content):
    read(path, content)


@pytest.mark.parametrize("rate", [1, 999, 768_001, 2**31 - 1])
def test_absurd_rates(path, rate):
    result = read(path, wav(rate))
    assert isinstance(result, AudioFileError)
    assert "1000 to 768000 samples a second" in str(result)


def test_giant_counts_in_a_header(path):
    """In the chunks of a WAV file, and in the description of a FLAC file."""
    content = bytearray(wav())
    content[4:8] = content[40:44] = b"\xff\xff\xff\xff"
    assert not isinstance(read(path, bytes(content)), MemoryError)
    content = bytearray(flac())
    content[21] |= 0x0F  # the upper bits of 36
    content[22:26] = b"\xff\xff\xff\xff"
    read(path, bytes(content))


def test_silence_that_unpacks_to_hours_is_given_up(path):
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", 1000, 1, "PCM_16", format="FLAC") as sound:
        for _ in range(60):
            sound.write(np.zeros(60_000, np.int16))
    result = read(path, file.getvalue())
    assert isinstance(result, AudioFileError)
    assert "lasts no longer than its size warrants" in str(result)


def test_many_channels(path):
    result = read(path, wav(samples=50, channels=200))
    assert result.shape == (50,)


def test_what_is_no_file(path):
    os.mkfifo(path.parent / "fifo")
    for odd, match in ((path.parent / "fifo", "a FIFO"), (path.parent, "a directory")):
        with pytest.raises(AudioFileError, match=match):
            read_recording(odd)
