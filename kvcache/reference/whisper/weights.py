"""The weights of Whisper, made of the variables of a converted model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from kvcache.backends import Array, HostArray
from kvcache.reference._progress import Put
from kvcache.reference.errors import ModelFileError, UnsupportedModelError

from .ctranslate2 import CTranslate2File
from .mel import BINS, FRAMES

KIND = "WhisperSpec"
_OTHER_MODEL = "Use an English-only Whisper model, converted in float16 or float32."
# The converter writes these for every Whisper model; other values ask for another computation.
_CONSTANTS = {"activation": 3, "alibi": 0, "pre_norm": 1, "scale_embeddings": 0}
_TAPS = 3


class Linear(NamedTuple):
    """A linear layer: ``x @ weight + bias``."""

    weight: Array  # [in, out]
    bias: Array  # [out]


class Norm(NamedTuple):
    """Scale and shift of a layer norm."""

    scale: Array  # [hidden]
    shift: Array  # [hidden]


class SelfAttention(NamedTuple):
    """Attention of a sequence to itself."""

    norm: Norm
    qkv: Linear  # [hidden, 3 * hidden]
    out: Linear  # [hidden, hidden]


class CrossAttention(NamedTuple):
    """Attention of the decoder to the output of the encoder."""

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
    """The encoder: from a spectrogram to hidden states of the sound."""

    conv1: Linear  # [3 * BINS, hidden]: the frame before, the frame, the frame after
    conv2: Linear  # [3 * hidden, hidden]
    positions: Array  # [FRAMES / 2, hidden]
    layers: tuple[EncoderLayer, ...]
    norm: Norm


class Decoder(NamedTuple):
    """The decoder: from tokens and the output of the encoder to the next token."""

    embedding: Array  # [hidden, vocab], also the last layer
    positions: Array  # [positions, hidden]
    layers: tuple[DecoderLayer, ...]
    norm: Norm


class Weights(NamedTuple):
    """Weights of a whole model, float32."""

    encoder: Encoder
    decoder: Decoder


@dataclass(frozen=True)
class WhisperConfig:
    """Sizes of a model.

    positions: tokens of a text at most, its prompt included. There is an embedding for each.
    """

    hidden_size: int
    heads: int
    vocab_size: int
    positions: int


def load_weights(file: CTranslate2File, put: Put) -> tuple[WhisperConfig, Weights]:
    """Return sizes and weights of the model in `file`, every tensor put as float32.

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
    """Sizes and weights out of one file."""

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
        """Raise UnsupportedModelError unless a half has the constants of Whisper."""
        for name, needed in (_CONSTANTS | {"num_heads": self.config.heads}).items():
            got = self.file.variables.get(f"{half}/{name}", needed)
            if got != needed:
                raise UnsupportedModelError(
                    f"{half}/{name} of a Whisper model must be {needed}; {self.file.path} has "
                    f"{got}. {_OTHER_MODEL}"
                )

    def _encoder(self, prefix: str) -> Encoder:
        """Read the encoder: variables under `prefix`."""
        hidden = self.config.hidden_size
        return Encoder(
            self._convolution(prefix + "conv1/", BINS),
            self._convolution(prefix + "conv2/", hidden),
            self.put(self._read(prefix + "position_encodings/encodings", FRAMES // 2, hidden)),
            tuple(self._encoder_layer(layer) for layer in self._layers(prefix)),
            self._norm(prefix),
        )

    def _decoder(self, prefix: str) -> Decoder:
        """Read the decoder: variables under `prefix`."""
        config = self.config
        embedding = self._read(prefix + "embeddings/weight", config.vocab_size, config.hidden_size)
        encodings = prefix + "position_encodings/encodings"
        return Decoder(
            self.put(np.ascontiguousarray(embedding.T)),
            self.put(self._read(encodings, config.positions, config.hidden_size)),
            tuple(self._decoder_layer(layer) for layer in self._layers(prefix)),
            self._norm(prefix),
        )

    def _layers(self, prefix: str) -> list[str]:
        """Return the prefixes of all layers under `prefix`."""
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
        """Read a convolution over three frames as a linear layer over the frames, joined."""
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
        """Return a variable as float32. Raise unless it has this shape and holds floats."""
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
        """Return a variable as it is in the file. Raise unless it is there, of this rank."""
        array = self.file.variables.get(name)
        if array is None or array.ndim != rank:
            raise ModelFileError(
                f"{self.file.path}: {name} must be there, of rank {rank}; got "
                f"{'nothing' if array is None else array.shape}. Download it again."
            )
        return array
