"""The weights of a decoder, made of the tensors of a GGUF file."""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np

from kvcache.backends import Array, HostArray
from kvcache.reference._progress import Progress, Put
from kvcache.reference.errors import ModelFileError, UnsupportedModelError

from .gguf import GGUFFile

# Every tensor of a plain llama decoder. One more (a bias, an expert) would be left out silently.
_KNOWN = re.compile(
    r"(token_embd|output|output_norm|rope_freqs"
    r"|blk\.\d+\.(attn_(norm|q|k|v|output)|ffn_(norm|gate|up|down)))\.weight"
)


class Layer(NamedTuple):
    """Weights of one block, float32. Linear ones are ``[in, out]``, so ``x @ w`` reads in order."""

    attention_norm: Array  # [hidden]
    qkv: Array  # [hidden, (heads + 2 * kv_heads) * head_dim]
    attention_out: Array  # [heads * head_dim, hidden]
    mlp_norm: Array  # [hidden]
    gate_up: Array  # [hidden, 2 * intermediate]
    down: Array  # [intermediate, hidden]


class Weights(NamedTuple):
    """Weights of a whole decoder, float32."""

    embedding: Array  # [hidden, vocab]
    layers: tuple[Layer, ...]
    norm: Array  # [hidden]
    head: Array  # [hidden, vocab]; the embedding itself where the file has no output.weight
    inverse_frequencies: HostArray  # float64 [head_dim / 2], on the host


def load_weights(file: GGUFFile, put: Put, progress: Progress | None = None) -> Weights:
    """Dequantise every tensor of `file` and hand it to `put`, one after the other.

    put: called with each host array; the result goes into the weights.
    progress: called with ``(bytes done, bytes in all)`` of the file after each tensor.

    Raises: UnsupportedModelError if there are tensors that a llama decoder has no place for
        (biases, experts, adapters); ModelFileError if some are missing or misshapen.
    """
    return _Loader(file, put, progress).run()


class _Loader:
    """One walk through a file, with a count of the bytes done."""

    def __init__(self, file: GGUFFile, put: Put, progress: Progress | None) -> None:
        self.file = file
        self.config = file.config
        self.put = put
        self.progress = progress
        self.done = 0

    def run(self) -> Weights:
        self._refuse_unknown()
        hidden, vocab = self.config.hidden_size, self.config.vocab_size
        embedding = self._linear(self._read("token_embd.weight", vocab, hidden))
        # Tied embeddings: one array on the device serves both ends of the decoder.
        head = embedding
        if "output.weight" in self.file.tensors:
            head = self._linear(self._read("output.weight", vocab, hidden))
        layers = tuple(self._layer(f"blk.{i}.") for i in range(self.config.layers))
        norm = self._norm("output_norm.weight")
        return Weights(embedding, layers, norm, head, self._inverse_frequencies())

    def _layer(self, prefix: str) -> Layer:
        """Read the weights of the block with this prefix, ``blk.0.`` for the first."""
        hidden, wide = self.config.hidden_size, self.config.intermediate_size
        rows = self.config.heads * self.config.head_dim
        return Layer(
            self._norm(prefix + "attn_norm.weight"),
            self._linear(*self._qkv(prefix)),
            self._linear(self._read(prefix + "attn_output.weight", hidden, rows)),
            self._norm(prefix + "ffn_norm.weight"),
            self._linear(
                self._read(prefix + "ffn_gate.weight", wide, hidden),
                self._read(prefix + "ffn_up.weight", wide, hidden),
            ),
            self._linear(self._read(prefix + "ffn_down.weight", hidden, wide)),
        )

    def _qkv(self, prefix: str) -> tuple[HostArray, HostArray, HostArray]:
        """Read rows of queries, keys and values, [heads * head_dim, hidden] each."""
        hidden, dim = self.config.hidden_size, self.config.head_dim
        rows, kv_rows = self.config.heads * dim, self.config.kv_heads * dim
        return (
            _split_halves(self._read(prefix + "attn_q.weight", rows, hidden), dim),
            _split_halves(self._read(prefix + "attn_k.weight", kv_rows, hidden), dim),
            self._read(prefix + "attn_v.weight", kv_rows, hidden),
        )

    def _linear(self, *parts: HostArray) -> Array:
        return self.put(np.ascontiguousarray(np.concatenate(parts).T))

    def _norm(self, name: str) -> Array:
        return self.put(self._read(name, self.config.hidden_size))

    def _inverse_frequencies(self) -> HostArray:
        half = self.config.head_dim // 2
        # float64 on the host: angles are computed from them there, position by position.
        inverse = self.config.rope_theta ** -(np.arange(half, dtype=np.float64) / half)
        if "rope_freqs.weight" in self.file.tensors:  # Llama 3.1: slower rotation of long waves
            inverse = inverse / self._read("rope_freqs.weight", half)
        return inverse

    def _read(self, name: str, *shape: int) -> HostArray:
        """Read a tensor, dequantised, and report progress. Raise unless it has this shape."""
        array = self.file.read(name)
        if array.shape != shape:
            raise ModelFileError(
                f"{self.file.path}: {name} must have shape {shape}; got {array.shape}. "
                "Download it again."
            )
        self.done += int(self.file.tensors[name].n_bytes)
        if self.progress:
            self.progress(self.done, self.file.nbytes)
        return array

    def _refuse_unknown(self) -> None:
        unknown = [name for name in self.file.tensors if not _KNOWN.fullmatch(name)]
        if unknown:
            raise UnsupportedModelError(
                f"the reference decoder runs llama models without biases, experts or adapters; "
                f"{self.file.path} also has {', '.join(unknown[:3])}. Use another GGUF file."
            )


def _split_halves(weight: HostArray, head_dim: int) -> HostArray:
    """Reorder the rows of each head for a rotation of row i with row i + head_dim / 2.

    weight: [heads * head_dim, hidden]. GGUF files of this architecture interleave the pairs,
    row 2i with row 2i + 1. Queries and keys are reordered alike, so their products are the same.
    """
    pairs = weight.reshape(-1, head_dim // 2, 2, weight.shape[-1])
    return pairs.swapaxes(1, 2).reshape(weight.shape)
