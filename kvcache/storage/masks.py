"""Attention masks on the device."""

from __future__ import annotations

import numpy as np

from kvcache._types import Bools
from kvcache.backends import Array, Backend
from kvcache.backends.nonfinite import largest_power


def device_mask(backend: Backend, mask_dtype: str, visible: Bools) -> Array:
    """Copy `visible` to the device: as bool, or in a float dtype as 0 = attend, -inf = hidden.

    In a float mask, a row that sees nothing holds a large negative number instead: softmax of a
    row of -inf is NaN. Such rows occur in reserve passes.
    """
    if mask_dtype == "bool":
        return backend.from_host(visible, mask_dtype)
    hidden = np.where(visible.any(-1, keepdims=True), -np.inf, -largest_power(mask_dtype))
    return backend.from_host(np.where(visible, 0.0, hidden), mask_dtype)
