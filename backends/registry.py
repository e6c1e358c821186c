"""The registry of backends: which there are, how each is found, and what installs it.

Each adapter, and the framework behind it, is imported when its backend is first asked for.
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

from kvcache.errors import BackendNotAvailableError, UnknownBackendError

from .arrays import Array
from .base import Backend, root_modules


@dataclass(frozen=True)
class _Entry:
    """Where a backend lives, the framework it needs, and what installs that framework."""

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
# JAX defines its arrays elsewhere.
_ALIASES = {"jax": "jaxlib"}
# "auto": the framework that its machine is best at. MLX only where it was made for.
_PREFERENCE = ("mlx", "torch", "jax") if sys.platform == "darwin" else ("torch", "jax", "mlx")


@dataclass(frozen=True)
class BackendInfo:
    """What :func:`available_backends` found out about one backend.

    installed: whether it can be used. version: of its framework.
    devices: what it can allocate on, default first. reason: why it cannot be used, or ``""``.
    remedy: the command that installs it.
    """

    installed: bool
    version: str
    devices: tuple[str, ...]
    reason: str
    remedy: str


def get_backend(spec: str | Backend = "auto", device: str | None = None) -> Backend:
    """The backend called `spec`: ``"numpy"``, ``"torch:cuda:1"``, ``"array_api:cupy"``, ...

    ``"auto"`` takes ``$KVCACHE_BACKEND`` if set, else the best one installed. `device` may be
    given apart from the name. A backend passed in is returned as it is.

    Raises:
        UnknownBackendError: no backend has that name.
        BackendNotAvailableError: its framework or device is missing; says what installs it.
    """
    if isinstance(spec, Backend):
        return spec
    if not isinstance(spec, str):
        raise UnknownBackendError(f"a backend is named by a string; got {type(spec).__name__}.")
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


def backend_of(array: Array) -> Backend:
    """The backend, device included, that owns `array`; imports nothing new to find out.

    Raises:
        UnknownBackendError: the array is of no known framework.
    """
    name = _name_of(type(array))
    if name is not None:
        return _backend(name, _load(name).device_of(array))
    if hasattr(array, "__array_namespace__"):
        try:
            return _backend("array_api", type(array).__module__.partition(".")[0])
        except BackendNotAvailableError:
            pass
    raise UnknownBackendError(
        f"keys and values must be arrays of a framework that has a backend "
        f"({', '.join(sorted(_entries()))}); got {type(array).__module__}.{type(array).__name__}. "
        "register_backend adds others."
    )


def backend_type(array: Array) -> type[Backend]:
    """The class of the backend of `array`, which may be a tracer and have no device yet."""
    found = _types.get(type(array))  # all that torch.compile can follow
    if found is None:
        found = _types[type(array)] = _load(_name_of(type(array)) or "array_api")
    return found


def _name_of(kind: type) -> str | None:
    """The backend for arrays of a type; None where only the array API may help."""
    modules = root_modules(kind)
    for name, entry in _entries().items():
        if entry.framework in modules or _ALIASES.get(entry.framework) in modules:
            return name
    return None


def available_backends() -> Mapping[str, BackendInfo]:
    """What there is on this machine, by name. Imports every framework that is installed."""
    return {name: _inspect(name) for name in sorted(_entries())}


def register_backend(name: str, target: str, framework: str, remedy: str) -> None:
    """Add a backend from code; packages do it with the entry-point group ``kvcache.backends``.

    name: what :func:`get_backend` will know it by. target: ``"module:Class"``, imported when
    first used. framework: the module whose arrays it owns. remedy: the command to install it.
    """
    if name in _entries():
        raise UnknownBackendError(f"a backend named {name!r} exists already. Choose another name.")
    _REGISTRY[name] = _Entry(target, framework, remedy)


@cache
def _plugins() -> dict[str, _Entry]:
    """Backends of other packages, each named after the module of the arrays it owns."""
    found = importlib.metadata.entry_points(group="kvcache.backends")
    return {
        point.name: _Entry(
            point.value, point.name, f"pip install {point.dist.name if point.dist else point.name}"
        )
        for point in found
    }


def _entries() -> dict[str, _Entry]:
    return {**_plugins(), **_REGISTRY}


def _best(device: str | None) -> Backend:
    """The first choice that works: an installed framework may be broken, or a mere folder."""
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
    entries = _entries()
    if name not in entries:
        raise UnknownBackendError(
            f"no backend is called {name!r}; there are {', '.join(sorted(entries))}. "
            "register_backend adds others."
        )
    module, _, attribute = entries[name].target.partition(":")
    try:
        backend: type[Backend] = getattr(importlib.import_module(module), attribute)
        backend.devices()
    except Exception as error:  # a broken installation raises whatever it likes
        raise BackendNotAvailableError(
            f"backend {name!r} needs {entries[name].framework}, which cannot be imported or "
            f"used here ({type(error).__name__}: {error}). Install it: {entries[name].remedy}"
        ) from error
    _types.update(dict.fromkeys(backend.array_types, backend))
    return backend


# A device may be named or left to the framework; either way it is one backend.
_instances: dict[tuple[str, str], Backend] = {}


@cache
def _backend(name: str, device: str | None) -> Backend:
    made = _load(name)(device)
    return _instances.setdefault((name, made.device), made)


def _inspect(name: str) -> BackendInfo:
    entry = _entries()[name]
    try:
        devices = tuple(_load(name).devices())
    except BackendNotAvailableError as error:
        return BackendInfo(False, "", (), str(error), entry.remedy)
    return BackendInfo(True, _version(entry.framework), devices, "", entry.remedy)


def _version(framework: str) -> str:
    """Version of the distribution that the module comes from, or what it says of itself."""
    try:
        found = importlib.metadata.packages_distributions()[framework]
        return importlib.metadata.version(found[0])
    except (KeyError, importlib.metadata.PackageNotFoundError):
        return str(getattr(sys.modules.get(framework), "__version__", ""))
