"""Types of host-side arrays that several parts share."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Int32s: TypeAlias = npt.NDArray[np.int32]
"""Positions, token ids, sequence ids, cells: all that a device may be given."""
Indices: TypeAlias = npt.NDArray[np.int64]
"""Indices that stay on the host."""
Bools: TypeAlias = npt.NDArray[np.bool_]
"""A choice among elements, or a mask: True = chosen, visible."""
