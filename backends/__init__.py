"""Backends: one small adapter per array framework, behind one contract.

A backend is chosen when a cache is made. Several can be in use in one process; there is no
"current" one. Importing this package imports no framework but NumPy.
"""

# A checkout keeps this package outside of kvcache. Imported from there as `backends`, it would be
# a second copy with classes of its own, and isinstance checks between the two would fail.
if __name__ != "kvcache.backends":
    raise ImportError(f"import this package as kvcache.backends, not as {__name__}.")

from .arrays import Array, HostArray
from .base import Backend
from .config import CacheConfig, Layout
from .dtypes import HOST_DTYPES, nbytes
from .registry import (
    BackendInfo,
    available_backends,
    backend_beside,
    backend_of,
    backend_type,
    get_backend,
    portable_spec,
    register_backend,
)
from .transfer import transfer

__all__ = [
    "HOST_DTYPES",
    "Array",
    "Backend",
    "BackendInfo",
    "CacheConfig",
    "HostArray",
    "Layout",
    "available_backends",
    "backend_beside",
    "backend_of",
    "backend_type",
    "get_backend",
    "nbytes",
    "portable_spec",
    "register_backend",
    "transfer",
]
