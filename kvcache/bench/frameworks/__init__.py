"""The raw calls of each framework, and caches of other libraries for its arrays.

A framework is imported when its backend is measured.
"""

from __future__ import annotations

from importlib import import_module

from kvcache.backends import Backend

from .base import Framework

_MODULES = ("array_api", "jax", "mlx", "torch")


def framework_of(backend: Backend) -> Framework:
    """Return the raw calls for the arrays of `backend`; NumPy's where no better ones are known."""
    if backend.name not in _MODULES:
        return Framework()
    framework: Framework = import_module(f"{__name__}.{backend.name}").FRAMEWORK
    return framework
