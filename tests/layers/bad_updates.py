"""Updates that a cache must refuse: what is wrong, the arrays, the error and what it says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from kvcache import DTypeError, KVCacheError, ShapeError, UnknownBackendError

Host = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Bad:
    """An update to refuse. wrong: makes keys and values, on the host, from good ones.

    always: wrong for a new cache too, not only after other updates.
    """

    wrong: Callable[[Host, Host], tuple[Host, Host]]
    error: type[KVCacheError]
    match: str
    always: bool = False


GEOMETRY = "every update of a cache has the same geometry: {}, not .*reset\\(\\) starts anew"
RANK = r"must be \[B, kv_heads, tokens, head_dim\]; got \("
AGREE = "must agree in batch, kv_heads and tokens; got"
SIZES = "batch, kv_heads and head_dim are at least 1; got"
EMPTY = "at least one token; got .* Skip it"


def _also(array, axis):
    return np.concatenate([array, array], axis)


BAD = {
    "rank 3": Bad(lambda k, v: (k[0], v[0]), ShapeError, RANK, always=True),
    "rank 5": Bad(lambda k, v: (k[None], v[None]), ShapeError, RANK, always=True),
    "rank 0": Bad(lambda k, v: (k[0, 0, 0, 0], v[0, 0, 0, 0]), ShapeError, RANK, always=True),
    "values of rank 3": Bad(lambda k, v: (k, v[0]), ShapeError, RANK, always=True),
    "batches differ": Bad(lambda k, v: (_also(k, 0), v), ShapeError, AGREE, always=True),
    "heads differ": Bad(lambda k, v: (k, _also(v, 1)), ShapeError, AGREE, always=True),
    "tokens differ": Bad(lambda k, v: (_also(k, 2), v), ShapeError, AGREE, always=True),
    "no tokens": Bad(lambda k, v: (k[:, :, :0], v[:, :, :0]), ShapeError, EMPTY, always=True),
    "no heads": Bad(lambda k, v: (k[:, :0], v[:, :0]), ShapeError, SIZES, always=True),
    "no key dim": Bad(lambda k, v: (k[..., :0], v), ShapeError, SIZES, always=True),
    "no value dim": Bad(lambda k, v: (k, v[..., :0]), ShapeError, SIZES, always=True),
    "no batch": Bad(lambda k, v: (k[:0], v[:0]), ShapeError, SIZES, always=True),
    "batch": Bad(
        lambda k, v: (_also(k, 0), _also(v, 0)), ShapeError, GEOMETRY.format("batch \\d+")
    ),
    "kv_heads": Bad(
        lambda k, v: (_also(k, 1), _also(v, 1)), ShapeError, GEOMETRY.format("kv_heads \\d+")
    ),
    "key dim": Bad(lambda k, v: (_also(k, 3), v), ShapeError, GEOMETRY.format("key_dim \\d+")),
    "value dim": Bad(lambda k, v: (k, _also(v, 3)), ShapeError, GEOMETRY.format("value_dim \\d+")),
    "dtype": Bad(
        lambda k, v: (_other(k), _other(v)),
        DTypeError,
        r"this cache holds \w+; got|" + GEOMETRY.format(r"dtype \w+"),
    ),
    "dtypes differ": Bad(
        lambda k, v: (k, _other(v)),
        DTypeError,
        r"this cache holds \w+; got \w+ and \w+|" + GEOMETRY.format(r"value_dtype \w+"),
    ),
}
"""What can be said on every backend, once `on` has brought it there."""


def _other(array):
    return np.zeros(array.shape, np.uint8 if array.dtype != np.uint8 else np.int32)


def arrays(backend, shape, name, tokens=1):
    """The bad update `name` on `backend`, for a cache that was updated with `shape`."""
    keys, values = BAD[name].wrong(shape.keys(tokens, 900), shape.values(tokens, 900))
    return backend.from_host(keys), backend.from_host(values)


STRANGERS = (
    "lists",
    "keys None",
    "values a list",
    "keys of another framework",
    "values of another framework",
)
"""What is no array of the backend at all."""


def stranger(backend, shape, name):
    """Keys and values that are no arrays of `backend`, the error and what it says."""
    keys, values = shape.keys(1, 900), shape.values(1, 900)
    k, v = backend.from_host(keys), backend.from_host(values)
    other = np.zeros(keys.shape, np.float32)
    foreign = other
    if backend.name == "numpy":
        foreign = pytest.importorskip("array_api_strict").asarray(other)
    elsewhere = f"must be an array of {backend.name}.* where this cache lives; got .*Convert it"
    unknown = "must be arrays of a framework that has a backend .*got builtins.{}"
    updates = {
        "lists": (keys.tolist(), values.tolist(), UnknownBackendError, unknown.format("list")),
        "keys None": (None, v, UnknownBackendError, unknown.format("NoneType")),
        "values a list": (k, values.tolist(), UnknownBackendError, unknown.format("list")),
        "keys of another framework": (foreign, v, DTypeError, elsewhere),
        "values of another framework": (k, foreign, DTypeError, elsewhere),
    }
    return updates[name]
