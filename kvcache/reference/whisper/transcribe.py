"""Recordings to English text with Whisper, through one cache for all windows.

    kvcache transcribe --backend jax a.wav b.wav

It shows :class:`kvcache.WrapperCache` at work: in each layer of the decoder the tokens attend to
each other through a :class:`kvcache.CausalCache` and to the sound through a
:class:`kvcache.EncoderCache`, which is filled once per window of 30 seconds.

Decoding is greedy, window after window. The rest of the published program (times, fallbacks,
conditioning on the text so far) is left out, so a word on the border of two windows may be lost.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kvcache import Batch, CausalCache, EncoderCache, WrapperCache
from kvcache.backends import HostArray
from kvcache.errors import ShapeError
from kvcache.reference._progress import Progress

from .blocks import Encoded
from .mel import SAMPLES, log_mel
from .model import Whisper
from .vocabulary import Vocabulary

__all__ = ["transcribe"]


def transcribe(
    model: Whisper,
    vocabulary: Vocabulary,
    recordings: Sequence[HostArray],
    *,
    together: int = 4,
    progress: Progress | None = None,
) -> list[str]:
    """Return the text of each recording.

    recordings: mono sound at 16 kHz, float32 [samples], of any length. Each is cut into windows of
        30 seconds; a window is one sequence of the cache, and one run of the encoder.
    together: windows that are decoded at once. When one ends, the next takes its place.
    progress: called with ``(windows done, windows in all)`` after each.

    Raises: ValueError unless `together` is at least 1; ShapeError for sound that is not mono.
    """
    if together < 1:
        raise ValueError(f"together must be >= 1 window; got {together}.")
    windows = _windows(recordings, vocabulary.prompt)
    if windows:
        _WindowPool(model, vocabulary, min(together, len(windows))).run(windows, progress)
    texts: list[list[str]] = [[] for _ in recordings]
    for window in windows:
        texts[window.recording].append(vocabulary.text(window.ids))
    return [" ".join(filter(None, parts)) for parts in texts]


@dataclass
class _Window:
    """Up to 30 seconds of a recording, and the tokens of their text so far.

    recording: its index. samples: float32 [samples]. ids: the prompt and the tokens after it.
    seen: how many of `ids` the decoder has been given.
    """

    recording: int
    samples: HostArray
    ids: list[int]
    seen: int = 0


def _windows(recordings: Sequence[HostArray], prompt: Sequence[int]) -> list[_Window]:
    """Cut every recording into windows, in order. Raise ShapeError unless all are mono."""
    for recording in recordings:
        if recording.ndim != 1:
            raise ShapeError(
                f"a recording is mono, [samples]; got {recording.shape}. Average its channels."
            )
    return [
        _Window(index, recording[start : start + SAMPLES], [*prompt])
        for index, recording in enumerate(recordings)
        for start in range(0, recording.size, SAMPLES)
    ]


class _WindowPool:
    """Windows decoded together: the sequences of one cache, by their number."""

    def __init__(self, model: Whisper, vocabulary: Vocabulary, size: int) -> None:
        self.model = model
        self.end = vocabulary.end
        self.size = size
        self.bias = model.backend.from_host(vocabulary.bias)
        self.active: dict[int, _Window] = {}
        self.encoder = EncoderCache()
        self.cache = WrapperCache(self.encoder, CausalCache())
        self.cache.init(
            model.backend,
            max_sequences=size,
            capacity=model.config.positions,
            # All windows may begin in the same pass, with the whole prompt each.
            max_batch=size * len(vocabulary.prompt),
        )

    def run(self, windows: Sequence[_Window], progress: Progress | None) -> None:
        """Fill in the ids of all `windows`."""
        waiting = deque(windows)
        with self.cache:
            while waiting or self.active:
                while waiting and len(self.active) < self.size:
                    free = min(set(range(self.size)) - self.active.keys())
                    self.active[free] = waiting.popleft()
                if self._step() and progress:
                    progress(len(windows) - len(waiting) - len(self.active), len(windows))

    def _step(self) -> bool:
        """Add one token to every active window. Return whether some have ended."""
        ended = []
        for (sequence, window), token in zip(self.active.items(), self._pass(), strict=True):
            window.seen = len(window.ids)
            window.ids.append(token)
            if token == self.end or len(window.ids) == self.model.config.positions:
                ended.append(sequence)
        # After the loop: a dict must not shrink while it is walked through.
        for sequence in ended:
            self.cache.remove(sequence, 0)
            del self.active[sequence]
        return bool(ended)

    def _pass(self) -> list[int]:
        """Feed all unseen tokens in one pass; return the next token of each window."""
        windows = self.active.values()
        counts = np.array([len(window.ids) - window.seen for window in windows])
        batch = self._batch(counts)
        self.cache.start_forward(batch)
        arriving: list[Encoded] = []
        # False in the pass that names new windows as multimodal; later passes find them cached.
        if not self.encoder.encoder_cached:
            new = [window for window in windows if not window.seen]
            arriving = [self.model.encode(log_mel(window.samples)) for window in new]
        ids = np.concatenate([window.ids[window.seen :] for window in windows]).astype(np.int32)
        x = self.model.decode(ids, batch.positions, self.cache, arriving)
        rows = np.cumsum(counts) - 1
        # Row 0 of the bias is for the first token of a text, row 1 for later ones.
        bias_rows = np.array([window.seen > 0 for window in windows])
        return self.model.choose(x, rows.astype(np.int32), self.bias, bias_rows.astype(np.int32))

    def _batch(self, counts: HostArray) -> Batch:
        """Return the batch of a pass; the first token of a new window brings its sound."""
        windows = self.active.values()
        positions = [i for window in windows for i in range(window.seen, len(window.ids))]
        starts = np.cumsum(counts) - counts
        new = [start for start, window in zip(starts, windows, strict=True) if not window.seen]
        return Batch(positions, np.repeat(list(self.active), counts), multimodal=new)
