"""The dtypes of kvcache, by name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import ml_dtypes
import numpy as np

HOST_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float8_e4m3fn": np.dtype(ml_dtypes.float8_e4m3fn),
    "float8_e5m2": np.dtype(ml_dtypes.float8_e5m2),
    "int8": np.dtype(np.int8),
    "uint8": np.dtype(np.uint8),
    "int32": np.dtype(np.int32),
    "bool": np.dtype(np.bool_),
}
"""NumPy dtype of every dtype name; bfloat16 and float8 are from ``ml_dtypes``."""


def nbytes(shape: Sequence[int], dtype: str) -> int:
    """Return the size in bytes of an array of this shape and dtype name."""
    return math.prod(shape) * HOST_DTYPES[dtype].itemsize
