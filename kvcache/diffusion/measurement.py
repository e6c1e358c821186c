"""Measurement of signals: the one number of the device in a decision on the host."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import numpy as np

from kvcache.backends import Array, Backend, backend_of
from kvcache.errors import ShapeError

from .history import check_unchanged, shapes
from .scalars import HOST, Scalar, host_scalar
from .signals import Signal


def change_on_host(measure: Signal, value: Array, reference: Array | None) -> Scalar:
    """Return how far `value` is from `reference`, as a float32 scalar of NumPy.

    NaN where there is no reference, before the first step.

    Raises: ShapeError for an array without axes, or of another shape than the reference.
    """
    if measure.array and not value.shape:
        raise ShapeError("a signal has at least one axis, such as [B, tokens, width]; got none.")
    if reference is None:
        return host_scalar(np.float32(np.nan))
    with np.errstate(all="ignore"):
        if not measure.array:
            return measure.change(HOST, value, reference)
        check_unchanged("a signal", shapes([reference]), shapes([value]))
        backend = backend_of(value)
        change = backend.to_host(_measurement(backend, measure)(value, reference))
        return host_scalar(np.float32(change))


# Cached, because frameworks compile per function object, and every cache needs the same one.
@lru_cache(maxsize=64)
def _measurement(backend: Backend, measure: Signal) -> Callable[[Array, Array], Array]:
    """Return ``measure.change`` as `backend` runs it fastest."""
    return backend.compile(partial(measure.change, backend.xp))
