"""The registry of backends: names, adapters, frameworks, and how to install these.

An adapter, and the framework behind it, is imported when its backend is first requested.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

from array_api_compat import is_array_api_obj

from kvcache.errors import (
    BackendNotAvailableError,
    KVCacheError,
    NotSupportedError,
    UnknownBackendError,
)

from .arguments import root_modules
from .arrays import Array
from .base import Backend


@dataclass(frozen=True)
class _Entry:
    """A backend: its class as ``"module:Class"``, its framework, and the command to install it."""

    target: str
    framework: str
    remedy: str


_REGISTRY: dict[str, _Entry] = {
    "array_api": _Entry(
        "kvcache.backends.array_api:ArrayApiBackend",
        "array_api_compat",
        "pip install array-api-compat",
    ),
    "jax": _Entry("kvcache.backends._jax:JaxBackend", "jax", "pip install 'kvcache[jax]'"),
    "mlx": _Entry("kvcache.backends._mlx:MlxBackend", "mlx", "pip install 'kvcache[mlx]'"),
    "numpy": _Entry("kvcache.backends._numpy:NumpyBackend", "numpy", "pip install numpy"),
    "torch": _Entry(
        "kvcache.backends._torch:TorchBackend", "torch", "pip install 'kvcache[torch]'"
    ),
}
# Modules of the array types, where these are not defined in the framework itself.
_ALIASES = {"jax": "jaxlib"}
# Adapters for arrays over several devices, by the name of the backend for one.
_SHARDED = {"jax": "kvcache.backends._jax_sharded:ShardedJaxBackend"}
# Order for "auto". MLX comes first only on Apple machines, which it is made for.
_PREFERENCE = ("mlx", "torch", "jax") if sys.platform == "darwin" else ("torch", "jax", "mlx")


_NOT_BUILTINS = (
    "a backend owns the arrays of its framework; it cannot claim the types of builtins, of which "
    "every object is one. Name the framework's module."
)


@dataclass(frozen=True)
class BackendInfo:
    """One backend on this machine, as reported by :func:`available_backends`.

    installed: whether it can be used.
    version: version of its framework.
    devices: devices to allocate on, the default one first.
    reason: why it cannot be used, or ``""``.
    remedy: the command to install it.
    """

    installed: bool
    version: str
    devices: tuple[str, ...]
    reason: str
    remedy: str


def get_backend(
    spec: str | Backend = "auto", device: str | None = None, sharding: object | None = None
) -> Backend:
    """Return the backend called `spec`: ``"numpy"``, ``"torch:cuda:1"``, ``"array_api:cupy"``, ...

    ``"auto"`` stands for ``$KVCACHE_BACKEND`` if set, else for the best one installed. `device`
    may be given apart from the name. A backend passed in is returned as it is.

    sharding: on JAX, the NamedSharding of keys ``[B, kv_heads, tokens, head_dim]``. The backend
        then allocates over the devices of its mesh, divided along kv_heads, batch, or both. Equal
        shardings have one backend.

    A spec is code to run: it imports a framework, an installed package, or with ``array_api:`` any
    module at all. Do not take it from whom you would not let run code.

    Raises:
        UnknownBackendError: no backend has that name, or two devices are named, or what is given
            as a sharding is none.
        BackendNotAvailableError: its framework or device is missing; gives the command to
            install it.
        NotSupportedError: a sharding for another framework, or one that divides tokens or
            head_dim.
    """
    if not isinstance(spec, str | Backend):
        raise UnknownBackendError(f"a backend is named by a string; got {type(spec).__name__}.")
    if sharding is not None:
        return _sharded(spec, device, sharding)
    if isinstance(spec, Backend):
        return spec
    if spec == "auto":
        spec = os.environ.get("KVCACHE_BACKEND") or "auto"
    name, _, suffix = spec.partition(":")
    if device and suffix:
        raise UnknownBackendError(f"name one device; got {spec!r} and device={device!r}.")
    return (
        _best(device or suffix or None)
        if name == "auto"
        else _backend(name, device or suffix or None)
    )


def portable_spec(backend: Backend) -> str:
    """Return the spec of `backend`, by which another process finds it.

    Raises: NotSupportedError for an object that its spec does not lead to.
    """
    try:
        known = type(get_backend(backend.spec)) is type(backend)
    except KVCacheError:
        known = False
    if not known:
        raise NotSupportedError(
            f"a pickled cache names its backend, and {backend.spec!r} does not lead to "
            f"{type(backend).__name__}. Make it known with register_backend, or save the cache to "
            "a file and load it on the backend."
        )
    return backend.spec


def backend_of(array: Array) -> Backend:
    """Return the backend, device included, of `array`.

    Arrays of a framework exist only once it is imported, so this imports no other one.

    Raises:
        UnknownBackendError: the array is of no known framework.
    """
    name = _name_of(type(array))
    if name is not None:
        return _backend(name, _load(name).device_of(array))
    if is_array_api_obj(array):
        try:
            return _backend("array_api", type(array).__module__.partition(".")[0])
        except BackendNotAvailableError:
            pass  # a module without an array namespace: the error below says more
    raise UnknownBackendError(
        f"keys, values and states must be arrays of a framework that has a backend "
        f"({', '.join(sorted(_entries()))}); got {type(array).__module__}.{type(array).__name__}. "
        "register_backend adds others."
    )


def backend_beside(array: Array) -> Backend:
    """Return a backend for what is computed with `array`, whose own arrays are whole everywhere.

    That of :func:`backend_of`, or one over the devices of an array with a sharding.

    Raises: UnknownBackendError, as backend_of.
    """
    kind = backend_type(array)
    sharding = kind.whole_beside(array)
    return backend_of(array) if sharding is None else _sharded(kind.name, None, sharding)


def backend_type(array: Array) -> type[Backend]:
    """Return the backend class for `array`, which may be a tracer without a device.

    Raises: UnknownBackendError for a type of arrays that no cache can hold.
    """
    backend = _types.get(type(array))  # torch.compile can trace no more than such a lookup
    if backend is None:
        backend = _load(_name_of(type(array)) or "array_api")
        backend.check_type(type(array))
        _types[type(array)] = backend
    return backend


def _name_of(kind: type) -> str | None:
    """Return the backend name for a type of arrays; None: only the array API may serve it."""
    modules = root_modules(kind)
    for name, entry in _entries().items():
        if entry.framework in modules or _ALIASES.get(entry.framework) in modules:
            return name
    return None


def available_backends() -> Mapping[str, BackendInfo]:
    """Return all backends by name, usable or not. Imports every framework installed."""
    return {name: _inspect(name) for name in sorted(_entries())}


def register_backend(name: str, target: str, framework: str, remedy: str) -> None:
    """Add a backend from code; packages do it with the entry-point group ``kvcache.backends``.

    name: its name for :func:`get_backend`.
    target: ``"module:Class"``, imported when first used.
    framework: the module whose arrays it owns.
    remedy: the command to install it.

    Raises: UnknownBackendError for a name in use, or a framework that is no framework.
    """
    if framework == "builtins":
        raise UnknownBackendError(_NOT_BUILTINS)
    if name in _entries():
        raise UnknownBackendError(f"a backend named {name!r} exists already. Choose another name.")
    _REGISTRY[name] = _Entry(target, framework, remedy)


@cache
def _plugins() -> dict[str, _Entry]:
    """Return the backends of other packages, each named after the module of its arrays."""
    points = importlib.metadata.entry_points(group="kvcache.backends")
    return {
        point.name: _Entry(
            point.value, point.name, f"pip install {point.dist.name if point.dist else point.name}"
        )
        for point in points
    }


def _entries() -> dict[str, _Entry]:
    return {**_plugins(), **_REGISTRY}  # a package cannot replace a backend of ours


def _best(device: str | None) -> Backend:
    """Return the first usable backend: an installed framework may be broken, or a mere folder."""
    for name in _PREFERENCE:
        if importlib.util.find_spec(_REGISTRY[name].framework):
            try:
                return _backend(name, device)
            except BackendNotAvailableError:
                continue
    return _backend("numpy", device)


# Backends by the type of their arrays, once they are loaded.
_types: dict[type, type[Backend]] = {}


@cache
def _load(name: str) -> type[Backend]:
    """Import the adapter called `name` and return its class.

    Raises: UnknownBackendError, BackendNotAvailableError if anything goes wrong.
    """
    entries = _entries()
    if name not in entries:
        raise UnknownBackendError(
            f"no backend is called {name!r}; there are {', '.join(sorted(entries))}. "
            "register_backend adds others."
        )
    if entries[name].framework == "builtins":
        raise UnknownBackendError(_NOT_BUILTINS)
    module, _, attribute = entries[name].target.partition(":")
    try:
        backend: type[Backend] = getattr(importlib.import_module(module), attribute)
        backend.devices()  # some installations import, and fail at first use (no driver)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a broken installation raises whatever it likes, or exits
        raise BackendNotAvailableError(
            f"backend {name!r} needs {entries[name].framework}, which cannot be imported or "
            f"used here ({type(error).__name__}: {error}). Install it: {entries[name].remedy}"
        ) from error
    owned = {"builtins"} & {*backend.modules, *(kind.__module__ for kind in backend.array_types)}
    if owned:
        raise UnknownBackendError(_NOT_BUILTINS)
    _types.update(dict.fromkeys(backend.array_types, backend))
    return backend


# By resolved device: "torch", "torch:cuda" and "torch:cuda:0" are to be one object.
_instances: dict[tuple[str, str], Backend] = {}
_sharded_instances: dict[object, Backend] = {}  # by sharding


@cache
def _backend(name: str, device: str | None) -> Backend:
    backend = _load(name)(device)
    return _instances.setdefault((name, backend.device), backend)


def _sharded(spec: str | Backend, device: str | None, sharding: object) -> Backend:
    """Return the backend of a sharding. Raises: as :func:`get_backend`."""
    name = spec.name if isinstance(spec, Backend) else spec
    if device or ":" in name:
        raise UnknownBackendError(
            f"a sharding says on which devices a cache is; got {spec!r} and device={device!r} "
            "besides. Name the framework alone."
        )
    if name not in _SHARDED:
        raise NotSupportedError(
            f"caches over several devices are made on {', '.join(_SHARDED)}; got {name!r}. Keep a "
            "cache for each device, of its part of the heads."
        )
    _load(name)  # raises, with the remedy, where the framework is missing
    module, _, attribute = _SHARDED[name].partition(":")
    backend: Backend = getattr(importlib.import_module(module), attribute)(sharding)
    return _sharded_instances.setdefault(sharding, backend)


def _inspect(name: str) -> BackendInfo:
    entry = _entries()[name]
    try:
        devices = tuple(_load(name).devices())
    except (BackendNotAvailableError, UnknownBackendError) as error:
        return BackendInfo(False, "", (), str(error), entry.remedy)
    return BackendInfo(True, _version(entry.framework), devices, "", entry.remedy)


def _version(framework: str) -> str:
    """Return the version of the module's distribution, else its ``__version__``, else ``""``."""
    try:
        distributions = importlib.metadata.packages_distributions()[framework]
        return importlib.metadata.version(distributions[0])
    except (KeyError, importlib.metadata.PackageNotFoundError):
        return str(getattr(sys.modules.get(framework), "__version__", ""))
