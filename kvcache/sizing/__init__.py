"""Sizes of caches: bytes per token and per state of a model, from its config alone."""

from .config import read_config
from .families import model_shape
from .shape import ModelShape, RecurrentLayers, Sizes, TokenLayers, bytes_at, sizes_of

__all__ = [
    "ModelShape",
    "RecurrentLayers",
    "Sizes",
    "TokenLayers",
    "bytes_at",
    "model_shape",
    "read_config",
    "sizes_of",
]
