"""Types of host-side NumPy arrays, shared by the whole package."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Int32s: TypeAlias = npt.NDArray[np.int32]
"""Positions, token ids, sequence ids, cells: integers that may be sent to a device."""
Indices: TypeAlias = npt.NDArray[np.int64]
"""Indices used on the host only."""
Bools: TypeAlias = npt.NDArray[np.bool_]
"""A mask: True for elements that are selected, or visible."""
