"""Recordings: sound files of any rate and number of channels, brought to Whisper's input."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from kvcache.backends import HostArray
from kvcache.reference.errors import AudioFileError

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


def read_recording(path: Path) -> HostArray:
    """Read a sound file: float32 [samples], channels averaged, resampled to 16 kHz.

    Raises: AudioFileError if it is missing, damaged, of a format that libsndfile does not read,
        or holds NaN or infinity.
    """
    try:
        samples, rate = soundfile.read(path, dtype="float32", always_2d=True)
    except (OSError, soundfile.LibsndfileError) as error:
        raise AudioFileError(
            f"a recording must be a sound file (WAV, FLAC, Ogg, MP3); cannot read {path}: {error} "
            "Check the path, or convert it to WAV."
        ) from error
    # One NaN would spread over the whole window in the resampler and the spectrogram.
    if not np.isfinite(samples).all():
        raise AudioFileError(
            f"a recording must hold finite samples; {path} holds NaN or infinity. "
            "Export it again, for example as 16-bit WAV."
        )
    mono: HostArray = soxr.resample(samples.mean(axis=1), rate, RATE)
    return mono
