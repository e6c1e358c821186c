"""The input of Whisper: the log-mel spectrogram of a window of 30 seconds, in NumPy."""

from __future__ import annotations

from functools import cache

import numpy as np

from kvcache.backends import HostArray

RATE = 16000
"""Samples per second."""
SAMPLES = 30 * RATE
"""Samples of a window."""
BINS = 80
"""Mel bands of a frame."""
HOP = 160
"""Samples from one frame to the next: 10 ms."""
FRAMES = SAMPLES // HOP
"""Frames of a window."""

_FFT = 400  # samples of a frame: 25 ms
_FLOOR = 1e-10  # the logarithm of silence is finite
_DECADES = 8.0


def log_mel(samples: HostArray) -> HostArray:
    """Return the spectrogram of up to 30 seconds of sound, then silence: float32 [FRAMES, BINS].

    samples: mono, 16 kHz, at most :data:`SAMPLES` of them.
    """
    power = _power(np.pad(samples.astype(np.float64), (0, SAMPLES - samples.size)))
    log = np.log10(np.maximum(power @ mel_filters(), _FLOOR))
    # The eight decades below the loudest are kept, and brought to about [-1, 1], as in training.
    scaled: HostArray = (np.maximum(log, log.max() - _DECADES) + 4) / 4
    return scaled.astype(np.float32)


def _power(samples: HostArray) -> HostArray:
    """Return power spectra [FRAMES, _FFT / 2 + 1] around every HOP-th sample, the ends mirrored."""
    mirrored = np.pad(samples, _FFT // 2, mode="reflect")
    frames = np.lib.stride_tricks.sliding_window_view(mirrored, _FFT)[::HOP][:FRAMES]
    hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(_FFT) / _FFT)
    power: HostArray = np.abs(np.fft.rfft(frames * hann)) ** 2
    return power


@cache
def mel_filters() -> HostArray:
    """Return overlapping triangles of equal area, equally spaced in mel: [_FFT / 2 + 1, BINS]."""
    frequencies = np.linspace(0, RATE / 2, _FFT // 2 + 1)[:, None]
    corners = _hertz(np.linspace(0, _mel(RATE / 2), BINS + 2))
    low, peak, high = corners[:-2], corners[1:-1], corners[2:]
    rising = (frequencies - low) / (peak - low)
    falling = (high - frequencies) / (high - peak)
    triangles: HostArray = np.maximum(0, np.minimum(rising, falling)) * 2 / (high - low)
    return triangles


# The mel scale of Slaney's Auditory Toolbox (1998), with which Whisper was trained: linear to
# 1 kHz, which is mel 15, then 27 mel for every factor of 6.4.


def _mel(hertz: float) -> float:
    return float(15 + 27 * np.log(hertz / 1000) / np.log(6.4))


def _hertz(mel: HostArray) -> HostArray:
    return np.where(mel < 15, mel * 200 / 3, 1000 * 6.4 ** ((mel - 15) / 27))
