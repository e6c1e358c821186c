"""Attention masks on the device."""

from __future__ import annotations

import numpy as np

from kvcache._types import Bools
from kvcache.backends import Array, Backend


def device_mask(backend: Backend, mask_dtype: str, visible: Bools) -> Array:
    """Copy `visible` to the device: as bool, or in a float dtype as 0 = attend, -inf = hidden."""
    if mask_dtype == "bool":
        return backend.from_host(visible)
    return backend.from_host(np.where(visible, 0.0, -np.inf), mask_dtype)
