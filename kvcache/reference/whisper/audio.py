"""Recordings: sound files of any rate and number of channels, brought to Whisper's input."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from kvcache.backends import HostArray
from kvcache.reference.errors import AudioFileError
from kvcache.storage.reading import open_regular

from .mel import RATE

try:
    import soundfile
    import soxr
except ImportError as missing:
    raise ImportError(
        f"reading recordings needs {missing.name}; it is not installed. "
        "pip install 'kvcache[audio]'",
        name=missing.name,
    ) from missing


SLOWEST, FASTEST = 1000, 768_000
"""Samples per second of recordings: others are no sound, and would be resampled to any length."""
_BLOCK = 1 << 16
_SECONDS, _BYTES_PER_SECOND = 60, 16
"""A recording lasts a minute at most, and a second more for so many bytes of its file: a format
without loss keeps silence in about a hundred a second."""


def read_recording(path: Path) -> HostArray:
    """Read a sound file: float32 [samples], channels averaged, resampled to 16 kHz.

    Memory is bounded by the size of the file, whatever its header says.

    Raises: AudioFileError if it is missing, no regular file, damaged, of a format that libsndfile
        does not read, of a rate out of 1 kHz to 768 kHz, longer than its size warrants, or holds
        NaN or infinity.
    """
    try:
        with open_regular(path) as file:
            limit = _SECONDS + os.fstat(file.fileno()).st_size / _BYTES_PER_SECOND
            # By its descriptor, so that the file that was checked is the one that is read.
            with soundfile.SoundFile(file.fileno(), closefd=False) as sound:
                rate: int = sound.samplerate
                _check_rate(path, rate)
                mono = _mono(path, sound, int(limit * rate))
    except AudioFileError:
        raise
    except (OSError, ValueError, soundfile.SoundFileError) as error:
        raise AudioFileError(
            f"a recording must be a sound file (WAV, FLAC, Ogg, MP3); cannot read {path}: {error} "
            "Check the path, or convert it to WAV."
        ) from error
    # One NaN would spread over the whole window in the resampler and the spectrogram.
    if not np.isfinite(mono).all():
        raise AudioFileError(
            f"a recording must hold finite samples; {path} holds NaN or infinity. "
            "Export it again, for example as 16-bit WAV."
        )
    resampled: HostArray = soxr.resample(mono, rate, RATE)
    return resampled


def _check_rate(path: Path, rate: int) -> None:
    if not SLOWEST <= rate <= FASTEST:
        raise AudioFileError(
            f"a recording has {SLOWEST} to {FASTEST} samples a second; {path} has {rate}. "
            "Export it again."
        )


def _mono(path: Path, sound: soundfile.SoundFile, limit: int) -> HostArray:
    """Return the mean of all channels, float32 [samples]. Raise for more samples than `limit`."""
    # In blocks: the number of samples in the header may be any.
    block_size = max(1, _BLOCK // sound.channels)
    blocks, samples = [np.empty(0, np.float32)], 0
    while (block := sound.read(block_size, dtype="float32", always_2d=True)).size:
        samples += len(block)
        if samples > limit:
            raise AudioFileError(
                f"a recording lasts no longer than its size warrants; {path} has more than "
                f"{limit} samples. Convert it to WAV if you trust it."
            )
        blocks.append(block.mean(axis=1))
    return np.concatenate(blocks)
