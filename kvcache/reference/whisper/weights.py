"""From the variables of a converted Whisper model to the weights that are multiplied with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np

from kvcache.backends import Array, HostArray
from kvcache.errors import ModelFileError, UnsupportedModelError

from .ctranslate2 import CTranslate2File
from .mel import BINS, FRAMES

Put: TypeAlias = Callable[[HostArray], Array]

KIND = "WhisperSpec"
_OTHER_MODEL = "Use an English-only Whisper model, converted in float16 or float32."
# What the converter writes for every Whisper model; anything else would compute something else.
_CONSTANTS = {"activation": 3, "alibi": 0, "pre_norm": 1, "scale_embeddings": 0}
_TAPS = 3


class Linear(NamedTuple):
    """``x @ weight + bias``."""

    weight: Array  # [in, out]
    bias: Array  # [out]


class Norm(NamedTuple):
    """What a layer norm scales and shifts by."""

    scale: Array  # [hidden]
    shift: Array  # [hidden]


class SelfAttention(NamedTuple):
    """A sequence looks at itself."""

    norm: Norm
    qkv: Linear  # [hidden, 3 * hidden]
    out: Linear  # [hidden, hidden]


class CrossAttention(NamedTuple):
    """The decoder looks at what the encoder made of the sound."""

    norm: Norm
    query: Linear  # [hidden, hidden]
    key_value: Linear  # [hidden, 2 * hidden]
    out: Linear  # [hidden, hidden]


class FeedForward(NamedTuple):
    """Two linear layers around a GELU."""

    norm: Norm
    up: Linear  # [hidden, wide]
    down: Linear  # [wide, hidden]


class EncoderLayer(NamedTuple):
    """One block of the encoder."""

    attention: SelfAttention
    mlp: FeedForward


class DecoderLayer(NamedTuple):
    """One block of the decoder."""

    attention: SelfAttention
    cross: CrossAttention
    mlp: FeedForward


class Encoder(NamedTuple):
    """From a spectrogram to what the decoder looks at."""

    conv1: Linear  # [3 * BINS, hidden]: the frame before, the frame, the frame after
    conv2: Linear  # [3 * hidden, hidden]
    positions: Array  # [FRAMES / 2, hidden]
    layers: tuple[EncoderLayer, ...]
    norm: Norm


class Decoder(NamedTuple):
    """From tokens, and what the encoder made, to the next token."""

    embedding: Array  # [hidden, vocab], also the last layer
    positions: Array  # [positions, hidden]
    layers: tuple[DecoderLayer, ...]
    norm: Norm


class Weights(NamedTuple):
    """A whole model, float32."""

    encoder: Encoder
    decoder: Decoder


@dataclass(frozen=True)
class WhisperConfig:
    """Sizes of a model. positions: tokens that the decoder can place, its prompt included."""

    hidden_size: int
    heads: int
    vocab_size: int
    positions: int


def load_weights(file: CTranslate2File, put: Put) -> tuple[WhisperConfig, Weights]:
    """Sizes and weights of the model in `file`, every tensor handed to `put` as float32.

    Raises: UnsupportedModelError for another kind of model, or a quantised one; ModelFileError
        if variables are missing or misshapen.
    """
    if file.kind != KIND:
        raise UnsupportedModelError(
            f"the reference encoder-decoder runs models of kind {KIND}; {file.path} holds "
            f"{file.kind}. {_OTHER_MODEL}"
        )
    loader = _Loader(file, put)
    return loader.config, loader.run()


class _Loader:
    def __init__(self, file: CTranslate2File, put: Put) -> None:
        self.file = file
        self.put = put
        vocab, hidden = self._find("decoder/embeddings/weight", 2).shape
        positions, _ = self._find("decoder/position_encodings/encodings", 2).shape
        heads = int(self._find("decoder/num_heads", 0))
        self.config = WhisperConfig(hidden, heads, vocab, positions)

    def run(self) -> Weights:
        for half in ("encoder", "decoder"):
            self._check_constants(half)
        return Weights(self._encoder("encoder/"), self._decoder("decoder/"))

    def _check_constants(self, half: str) -> None:
        for name, needed in (_CONSTANTS | {"num_heads": self.config.heads}).items():
            got = self.file.variables.get(f"{half}/{name}", needed)
            if got != needed:
                raise UnsupportedModelError(
                    f"{half}/{name} of a Whisper model must be {needed}; {self.file.path} has "
                    f"{got}. {_OTHER_MODEL}"
                )

    def _encoder(self, prefix: str) -> Encoder:
        hidden = self.config.hidden_size
        return Encoder(
            self._convolution(prefix + "conv1/", BINS),
            self._convolution(prefix + "conv2/", hidden),
            self.put(self._read(prefix + "position_encodings/encodings", FRAMES // 2, hidden)),
            tuple(self._encoder_layer(layer) for layer in self._layers(prefix)),
            self._norm(prefix),
        )

    def _decoder(self, prefix: str) -> Decoder:
        config = self.config
        embedding = self._read(prefix + "embeddings/weight", config.vocab_size, config.hidden_size)
        places = prefix + "position_encodings/encodings"
        return Decoder(
            self.put(np.ascontiguousarray(embedding.T)),
            self.put(self._read(places, config.positions, config.hidden_size)),
            tuple(self._decoder_layer(layer) for layer in self._layers(prefix)),
            self._norm(prefix),
        )

    def _layers(self, prefix: str) -> list[str]:
        """Prefixes of the layers, as many as there are."""
        count = 0
        while f"{prefix}layer_{count}/ffn/linear_0/weight" in self.file.variables:
            count += 1
        return [f"{prefix}layer_{i}/" for i in range(count)]

    def _encoder_layer(self, prefix: str) -> EncoderLayer:
        return EncoderLayer(self._attention(prefix), self._feed_forward(prefix))

    def _decoder_layer(self, prefix: str) -> DecoderLayer:
        return DecoderLayer(
            self._attention(prefix), self._cross_attention(prefix), self._feed_forward(prefix)
        )

    def _attention(self, prefix: str) -> SelfAttention:
        prefix, hidden = prefix + "self_attention/", self.config.hidden_size
        return SelfAttention(
            self._norm(prefix),
            self._linear(prefix + "linear_0/", hidden, 3 * hidden),
            self._linear(prefix + "linear_1/", hidden, hidden),
        )

    def _cross_attention(self, prefix: str) -> CrossAttention:
        prefix, hidden = prefix + "attention/", self.config.hidden_size
        return CrossAttention(
            self._norm(prefix),
            self._linear(prefix + "linear_0/", hidden, hidden),
            self._linear(prefix + "linear_1/", hidden, 2 * hidden),
            self._linear(prefix + "linear_2/", hidden, hidden),
        )

    def _feed_forward(self, prefix: str) -> FeedForward:
        prefix, hidden = prefix + "ffn/", self.config.hidden_size
        return FeedForward(
            self._norm(prefix),
            self._linear(prefix + "linear_0/", hidden, 4 * hidden),
            self._linear(prefix + "linear_1/", 4 * hidden, hidden),
        )

    def _linear(self, prefix: str, inputs: int, outputs: int) -> Linear:
        weight = self._read(prefix + "weight", outputs, inputs)
        return Linear(
            self.put(np.ascontiguousarray(weight.T)), self.put(self._read(prefix + "bias", outputs))
        )

    def _convolution(self, prefix: str, inputs: int) -> Linear:
        """A convolution over three frames as a linear layer over the three beside each other."""
        hidden = self.config.hidden_size
        weight = self._read(prefix + "weight", hidden, inputs, _TAPS)
        beside = np.ascontiguousarray(weight.transpose(2, 1, 0)).reshape(_TAPS * inputs, hidden)
        return Linear(self.put(beside), self.put(self._read(prefix + "bias", hidden)))

    def _norm(self, prefix: str) -> Norm:
        hidden = self.config.hidden_size
        return Norm(
            self.put(self._read(prefix + "layer_norm/gamma", hidden)),
            self.put(self._read(prefix + "layer_norm/beta", hidden)),
        )

    def _read(self, name: str, *shape: int) -> HostArray:
        array = self._find(name, len(shape))
        if array.shape != shape:
            raise ModelFileError(
                f"{self.file.path}: {name} must have shape {shape}; got {array.shape}. "
                "Download it again."
            )
        if array.dtype.kind == "i":
            raise UnsupportedModelError(
                f"weights must be floats; {self.file.path} holds {name} in {array.dtype}. "
                f"{_OTHER_MODEL}"
            )
        return array.astype(np.float32)

    def _find(self, name: str, rank: int) -> HostArray:
        array = self.file.variables.get(name)
        if array is None or array.ndim != rank:
            raise ModelFileError(
                f"{self.file.path}: {name} must be there, of rank {rank}; got "
                f"{'nothing' if array is None else array.shape}. Download it again."
            )
        return array
