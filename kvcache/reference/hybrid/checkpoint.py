"""Checkpoints as transformers writes them: a directory of ``config.json`` and safetensors files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path

from kvcache.backends import HOST_DTYPES, HostArray
from kvcache.reference.errors import ModelFileError, UnsupportedModelError
from kvcache.storage.reading import read_regular
from kvcache.storage.tensors import RawTensor, decode_tensors

from .config import HybridConfig, Settings

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class Checkpoint:
    """An open checkpoint directory.

    path: the directory.
    settings: content of ``config.json``.
    config: sizes and constants of the model.
    """

    def __init__(self, path: str | Path) -> None:
        """Read the configuration in `path`; the tensors are read when they are asked for.

        Raises: ModelFileError if it is missing or damaged; UnsupportedModelError for another
            architecture.
        """
        self.path = Path(path)
        self.settings: Settings = self.json("config.json")
        self.config = HybridConfig.from_settings(self.settings)

    def json(self, name: str) -> Mapping[str, object]:
        """Read a JSON object. Raises: ModelFileError."""
        try:
            value = json.loads(self.bytes(name))
        except (ValueError, RecursionError) as error:
            raise self._damaged(name, error) from error
        if not isinstance(value, dict):
            raise self._damaged(name, "it is no JSON object")
        return value

    def has(self, name: str) -> bool:
        """Return whether the directory has something of this name."""
        return (self.path / name).exists()

    def text(self, name: str) -> str:
        """Read a file of UTF-8 text. Raises: ModelFileError."""
        try:
            return self.bytes(name).decode()
        except UnicodeDecodeError as error:
            raise self._damaged(name, error) from error

    def bytes(self, name: str) -> bytes:
        """Read a file of the directory. Raises: ModelFileError."""
        try:
            return read_regular(self.path / name)
        except (OSError, ValueError) as error:
            raise self._damaged(name, error) from error

    @cached_property
    def tensors(self) -> dict[str, RawTensor]:
        """Every tensor by name, as it lies in the files; for the caller to take out.

        Raises: ModelFileError.
        """
        tensors: dict[str, RawTensor] = {}
        for name in self._files():
            try:
                tensors |= decode_tensors(self.bytes(name))[1]
            except ValueError as error:
                raise self._damaged(name, error) from error
        return tensors

    def _files(self) -> list[str]:
        """Return the names of the files with tensors."""
        if not self.has(_INDEX):
            return [_SINGLE]
        places = self.json(_INDEX).get("weight_map")
        if not isinstance(places, dict) or not all(map(_is_file_name, places.values())):
            raise self._damaged(_INDEX, "its weight_map does not name files of the directory")
        return sorted(set(places.values()))

    def take(self, name: str, *shape: int) -> HostArray:
        """Return one tensor as float32, and forget it, so that memory does not hold it twice.

        Raises: ModelFileError if there is none, or one of another shape; UnsupportedModelError if
            it is of a dtype that is not read here.
        """
        tensor = self.tensors.pop(name, None)
        if tensor is None or tensor.shape != shape:
            got = "none" if tensor is None else tensor.shape
            raise ModelFileError(
                f"{self.path}: {name} must have shape {shape}; got {got}. Download it again."
            )
        if tensor.dtype not in {"float32", "float16", "bfloat16"}:
            raise UnsupportedModelError(
                f"weights must be float32, float16 or bfloat16; {name} is {tensor.dtype}. "
                "Use a checkpoint that is not quantised."
            )
        return tensor.to_array(tensor.dtype).astype(HOST_DTYPES["float32"])

    def _damaged(self, name: str, reason: object) -> ModelFileError:
        return ModelFileError(
            f"cannot read {self.path / name} ({reason}): it is missing, damaged, or the directory "
            "is no checkpoint of transformers. Check the path, or download it again."
        )


def _is_file_name(name: object) -> bool:
    # A path would lead out of the directory.
    return isinstance(name, str) and Path(name).name == name
