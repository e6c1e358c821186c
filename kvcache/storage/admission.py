"""Checks of keys and values before anything of a per-layer cache changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from kvcache.backends import HOST_DTYPES, Array, Backend, backend_of, get_backend
from kvcache.backends.base import FastKey
from kvcache.errors import DTypeError, KVCacheError, ShapeError

from .layout import TOKENS


class Geometry(NamedTuple):
    """What all updates of one per-layer cache have in common."""

    batch: int
    kv_heads: int
    key_dim: int
    value_dim: int
    dtype: str

    def shapes(self, tokens: int) -> tuple[tuple[int, ...], ...]:
        """Return the shape of each array of a layer for so many tokens."""
        lead = self.batch, self.kv_heads, tokens
        return (*lead, self.key_dim), (*lead, self.value_dim)


class Admission:
    """The checks of one cache: the first update decides what all later ones must look like.

    backend, dtype: what was asked for when the cache was made; None takes that of the first
        update, which :attr:`backend` and :attr:`geometry` then hold.
    """

    def __init__(self, backend: str | Backend | None, dtype: str | None) -> None:
        if dtype is not None and dtype not in HOST_DTYPES:
            raise DTypeError(f"dtype is one of {', '.join(HOST_DTYPES)}; got {dtype!r}.")
        self._asked = None if backend is None else get_backend(backend)
        self._dtype = dtype
        self.forget()
        if self._asked is not None and dtype is not None:
            self._asked.dtype(dtype)

    def forget(self) -> None:
        """Be as constructed: whatever the first update was, the next one is the first."""
        self.backend: Backend | None = self._asked
        self.geometry: Geometry | None = None
        self._fast_key: Callable[[Array], FastKey] | None = None
        self._latest: tuple[FastKey, FastKey] | None = None

    def bound(self) -> tuple[Backend, Geometry]:
        """Return the backend and geometry that the first update decided.

        Raises: KVCacheError before it.
        """
        if self.backend is None or self.geometry is None:
            raise KVCacheError("a cache has the shape of its first update. Update it first.")
        return self.backend, self.geometry

    @property
    def dtype(self) -> str | None:
        """Dtype of keys and values, None as long as nothing decides it."""
        return self.geometry.dtype if self.geometry is not None else self._dtype

    def validate(self, keys: Array, values: Array) -> int:
        """Check an update against everything before it; return its number of tokens.

        Raises ShapeError, DTypeError or UnknownBackendError, and has changed nothing then.
        """
        fast_key, key_pair = self._fast_key, None
        if fast_key is not None:
            try:  # noqa: SIM105 - a context manager costs more than the comparison
                key_pair = fast_key(keys), fast_key(values)
            except AttributeError:  # no array at all, which is found out below
                pass
        # An update that looks like the last one is as good as it: the usual decode step.
        if key_pair is None or key_pair != self._latest:
            backend = self._validate_new(keys, values)
            self._fast_key = backend.fast_key
            self._latest = key_pair = backend.fast_key(keys), backend.fast_key(values)
        return key_pair[0][1][TOKENS]

    def _validate_new(self, keys: Array, values: Array) -> Backend:
        backend = self.backend or backend_of(keys)
        _check_framework(backend, keys, values)
        _check_shapes(tuple(keys.shape), tuple(values.shape))
        geometry = _geometry(backend, keys, values)
        if self._dtype is not None and geometry.dtype != self._dtype:
            raise DTypeError(
                f"this cache holds {self._dtype}; got {geometry.dtype}. Cast keys and values first."
            )
        if self.geometry is not None and geometry != self.geometry:
            _refuse_change(self.geometry, geometry)
        self.backend, self.geometry = backend, geometry
        return backend


def _check_framework(backend: Backend, keys: Array, values: Array) -> None:
    for name, array in (("keys", keys), ("values", values)):
        if not backend.owns(array):
            if not hasattr(array, "dtype"):
                backend_of(array)  # says what to bring instead of something that is no array
            raise DTypeError(
                f"{name} must be an array of {backend.spec}, where this cache lives; got "
                f"{type(array).__module__}.{type(array).__name__}"
                f"{' on ' + str(array.device) if hasattr(array, 'device') else ''}. "
                "Convert it with backend.from_dlpack, or through the host."
            )


def _check_shapes(keys: tuple[int, ...], values: tuple[int, ...]) -> None:
    if len(keys) != 4 or len(values) != 4:
        raise ShapeError(
            f"keys and values must be [B, kv_heads, tokens, head_dim]; got {keys} and {values}."
        )
    if keys[:3] != values[:3]:
        raise ShapeError(
            f"keys and values must agree in batch, kv_heads and tokens; got {keys} and {values}."
        )
    if not all(keys) or not all(values):
        raise ShapeError(f"an update has at least one token; got {keys} and {values}. Skip it.")


def _geometry(backend: Backend, keys: Array, values: Array) -> Geometry:
    dtype = backend.dtype_name(keys)
    if backend.dtype_name(values) != dtype:
        raise DTypeError(
            f"keys and values must have one dtype; got {dtype} and {backend.dtype_name(values)}."
        )
    batch, kv_heads, _, key_dim = keys.shape
    return Geometry(batch, kv_heads, key_dim, values.shape[3], dtype)


def _refuse_change(have: Geometry, got: Geometry) -> None:
    changed = [name for name in have._fields if getattr(have, name) != getattr(got, name)]
    kind = DTypeError if changed == ["dtype"] else ShapeError
    changes = ", ".join(f"{n} {getattr(have, n)}, not {getattr(got, n)}" for n in changed)
    raise kind(f"every update of a cache has the same geometry: {changes}. reset() starts anew.")
