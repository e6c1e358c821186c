"""Checks of keys and values, made before a per-layer cache changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, NoReturn

from kvcache.backends import HOST_DTYPES, Array, Backend, backend_of, backend_type, get_backend
from kvcache.backends.arguments import refuse_traced
from kvcache.backends.base import FastKey
from kvcache.errors import DTypeError, ExportedError, KVCacheError, ShapeError

from .layout import LAYER_AXIS, TOKENS


class Geometry(NamedTuple):
    """Sizes and dtypes shared by all updates of one per-layer cache.

    axis: that of the tokens.
    """

    batch: int
    kv_heads: int
    key_dim: int
    value_dim: int
    key_dtype: str
    value_dtype: str
    axis: int = TOKENS

    @property
    def dtypes(self) -> tuple[str, str]:
        """Dtypes of keys and values."""
        return self.key_dtype, self.value_dtype

    @property
    def dtype(self) -> str | tuple[str, str]:
        """Dtype of both, or of each where they differ."""
        return self.key_dtype if self.key_dtype == self.value_dtype else self.dtypes

    @property
    def axes(self) -> str:
        """Layout of keys and values, by the letters of :meth:`Backend.alloc_axes`."""
        return "bhtd" if self.axis == TOKENS else "bthd"

    def shapes(self, tokens: int) -> tuple[tuple[int, ...], ...]:
        """Return the shapes of keys and values of so many tokens, in the layout of the cache."""
        heads = self.kv_heads
        lead = (self.batch, heads, tokens) if self.axis == TOKENS else (self.batch, tokens, heads)
        return (*lead, self.key_dim), (*lead, self.value_dim)

    def with_batch(self, batch: int) -> Geometry:
        """Return the geometry of another number of rows."""
        return self._replace(batch=batch)


class Admission:
    """Checks of the updates of one cache: the first fixes the geometry of all later ones.

    backend, dtype: as requested when the cache was made; None takes that of the first update.
        From then on :attr:`backend` and :attr:`geometry` hold the result.
    layout: of keys and values.
    requires_grad: whether gradients are to flow to the latest update.
    exported: whether a program has the state of the cache.

    Raises: DTypeError for an unknown dtype, or one that `backend` lacks; ValueError for an
        unknown layout.
    """

    def __init__(
        self, backend: str | Backend | None, dtype: str | None, layout: str = "bhtd"
    ) -> None:
        if layout not in tuple(LAYER_AXIS):  # compared, not hashed: it may be anything
            raise ValueError(f"layout is one of {', '.join(LAYER_AXIS)}; got {layout!r}.")
        self.layout = layout
        self.axis = LAYER_AXIS[layout]
        if dtype is not None and dtype not in HOST_DTYPES:
            raise DTypeError(f"dtype is one of {', '.join(HOST_DTYPES)}; got {dtype!r}.")
        self._asked = None if backend is None else get_backend(backend)
        self._dtype = dtype
        self.forget()
        if self._asked is not None and dtype is not None:
            self._asked.dtype(dtype)  # raises here rather than at the first update

    def forget(self) -> None:
        """Return to the state after construction: the next update counts as the first."""
        self.backend: Backend | None = self._asked
        self.geometry: Geometry | None = None
        self.requires_grad = False
        self.exported = False
        self._fast_key: Callable[[Array], FastKey] | None = None
        self._latest: tuple[FastKey, FastKey] | None = None

    def savepoint(self) -> Callable[[], None]:
        """Return a function that undoes what updates fix, and :meth:`forget`, from now on."""
        fixed = self.backend, self.geometry, self._fast_key, self._latest
        now = self.requires_grad, self.exported

        def undo() -> None:
            self.backend, self.geometry, self._fast_key, self._latest = fixed
            self.requires_grad, self.exported = now

        return undo

    def bound(self) -> tuple[Backend, Geometry]:
        """Return the backend and geometry fixed by the first update.

        Raises: KVCacheError before it.
        """
        if self.backend is None or self.geometry is None:
            raise KVCacheError("a cache has the shape of its first update. Update it first.")
        return self.backend, self.geometry

    def adopt(self, other: Admission) -> None:
        """Take what the updates of another cache fixed."""
        self.backend, self.geometry = other.backend, other.geometry
        self._fast_key, self._latest = other._fast_key, None

    def resize(self, batch: int) -> None:
        """Take updates of another number of rows from now on."""
        if self.geometry is not None:
            self.geometry, self._latest = self.geometry.with_batch(batch), None

    def suspend(self) -> None:
        """Refuse updates while :attr:`exported`: a program has the state of the cache."""
        self.exported = True
        self._latest = None  # so that the fast path of an update needs no check of its own

    def check_not_exported(self) -> None:
        """Raise ExportedError after :meth:`suspend`, until :attr:`exported` is False again."""
        if self.exported:
            refuse_exported()

    @property
    def dtype(self) -> str | tuple[str, str] | None:
        """Dtype of keys and values, or of each where they differ; None until it is fixed."""
        return self.geometry.dtype if self.geometry is not None else self._dtype

    def validate(self, keys: Array, values: Array) -> int:
        """Check an update against the earlier ones; return its number of tokens.

        Raises: ShapeError, DTypeError, UnknownBackendError, TracedArrayError, ExportedError;
            nothing has changed then.
        """
        fast_key, key_pair = self._fast_key, None
        if fast_key is not None:
            try:  # noqa: SIM105 - a context manager costs more than the comparison
                key_pair = fast_key(keys), fast_key(values)
            except AttributeError:  # not an array: the full check below says so
                pass
        # An update just like the last one needs no full check: the usual decode step.
        if key_pair is None or key_pair != self._latest:
            backend = self._validate_new(keys, values)
            self._fast_key = backend.fast_key
            key_pair = backend.fast_key(keys), backend.fast_key(values)
            self.requires_grad = backend.requires_grad(keys) or backend.requires_grad(values)
            self._latest = key_pair
        return key_pair[0][1][self.axis]

    def _validate_new(self, keys: Array, values: Array) -> Backend:
        """Check an update in full, fix backend and geometry, and return the backend."""
        self.check_not_exported()
        backend = self.backend or backend_of(keys)
        _check_framework(backend, keys, values)
        for array in (keys, values):
            if backend.is_traced(array):
                refuse_traced(array)
        _check_shapes(tuple(keys.shape), tuple(values.shape), self.layout)
        geometry = _geometry(backend, keys, values, self.axis)
        if self._dtype is not None and geometry.dtype != self._dtype:
            raise DTypeError(
                f"this cache holds {self._dtype}; got {_named(geometry.dtype)}. Cast keys and "
                "values first."
            )
        if self.geometry is not None and geometry != self.geometry:
            _refuse_change(self.geometry, geometry)
        self.backend, self.geometry = backend, geometry
        return backend


def _check_framework(backend: Backend, keys: Array, values: Array | None) -> None:
    """Raise DTypeError unless `backend` owns both arrays; UnknownBackendError for non-arrays."""
    if values is None:
        raise DTypeError(
            "a per-layer cache holds keys and values; got values None. A CausalCache takes layers "
            "of keys only."
        )
    for name, array in (("keys", keys), ("values", values)):
        check_owner(backend, name, array)


def check_owner(backend: Backend, name: str, array: Array) -> None:
    """Raise DTypeError unless `backend` owns an array; UnknownBackendError for a non-array.

    name: of the array, for the error.
    """
    if not backend.owns(array):
        if not hasattr(array, "dtype"):
            backend_of(array)  # raises, and names the frameworks whose arrays are accepted
        refuse_several_devices(backend, array)
        raise DTypeError(
            f"{name} must be an array of {backend.spec}, where this cache lives; got "
            f"{type(array).__module__}.{type(array).__name__}"
            f"{' on ' + str(array.device) if hasattr(array, 'device') else ''}. {backend.moved_by}"
        )


def refuse_exported() -> NoReturn:
    """Raise ExportedError."""
    raise ExportedError(
        "a cache is not used while a program has its state. Call import_state(state) with "
        "the last state of the program, or reset() to give the tokens up."
    )


def described(array: Array) -> str:
    """Return type and dtype of what was given as an array, for an error."""
    name = type(array).__name__
    return f"{name} of {array.dtype}" if hasattr(array, "dtype") else f"{name}, which is no array"


def refuse_several_devices(backend: Backend, array: Array) -> None:
    """Raise UnknownBackendError if `array` is of the framework of `backend`, on several devices."""
    if hasattr(array, "dtype") and backend_type(array) is type(backend):
        backend.device_of(array)


_AXIS_NAMES = {"b": "B", "h": "kv_heads", "t": "tokens", "d": "head_dim"}


def _check_shapes(keys: tuple[int, ...], values: tuple[int, ...], layout: str) -> None:
    """Raise ShapeError unless both have 4 axes, agree in the first 3, and are not empty."""
    if len(keys) != 4 or len(values) != 4:
        axes = ", ".join(_AXIS_NAMES[axis] for axis in layout)
        raise ShapeError(f"keys and values must be [{axes}]; got {keys} and {values}.")
    if keys[:3] != values[:3]:
        raise ShapeError(
            f"keys and values must agree in batch, kv_heads and tokens; got {keys} and {values}."
        )
    if not keys[LAYER_AXIS[layout]]:
        raise ShapeError(f"an update has at least one token; got {keys} and {values}. Skip it.")
    if not all(keys) or not all(values):
        raise ShapeError(f"batch, kv_heads and head_dim are at least 1; got {keys} and {values}.")


def _geometry(backend: Backend, keys: Array, values: Array, axis: int) -> Geometry:
    dtypes = backend.dtype_name(keys), backend.dtype_name(values)
    kv_heads = keys.shape[1 if axis == TOKENS else 2]
    return Geometry(keys.shape[0], kv_heads, keys.shape[3], values.shape[3], *dtypes, axis)


def _named(dtype: str | tuple[str, ...]) -> str:
    return dtype if isinstance(dtype, str) else " and ".join(dtype)


def _refuse_change(fixed: Geometry, given: Geometry) -> None:
    """Raise ShapeError, or DTypeError if only the dtype differs, naming each difference."""
    names = ["batch", "kv_heads", "key_dim", "value_dim", "key_dtype", "value_dtype"]
    changed = [name for name in names if getattr(fixed, name) != getattr(given, name)]
    if isinstance(fixed.dtype, str) and isinstance(given.dtype, str):  # of both at once
        changed = [name for name in changed if "dtype" not in name]
        changed += ["dtype"] * (fixed.dtype != given.dtype)
    kind = DTypeError if all("dtype" in name for name in changed) else ShapeError
    changes = ", ".join(f"{n} {getattr(fixed, n)}, not {getattr(given, n)}" for n in changed)
    raise kind(f"every update of a cache has the same geometry: {changes}. reset() starts anew.")
