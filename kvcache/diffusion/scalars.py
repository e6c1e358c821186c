"""Scalars of decisions: NumPy scalars on the host, arrays without axes in a program."""

from __future__ import annotations

from typing import TypeAlias, cast

import numpy as np

from kvcache.backends import Array
from kvcache.backends.arrays import Namespace

Scalar: TypeAlias = Array
"""A number of a decision: a NumPy scalar on the host, an array without axes in a program."""

HOST = cast(Namespace, np)
"""The array namespace of decisions on the host."""


def host_scalar(value: np.generic) -> Scalar:
    """Return `value` itself, typed as the scalar of a decision."""
    # NumPy's scalars have the operators of arrays, but their stubs give other result types.
    return cast(Scalar, value)
