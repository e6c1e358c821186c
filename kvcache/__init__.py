"""kvcache: one key/value cache for every array framework."""

from kvcache.backends import (
    Backend,
    BackendInfo,
    CacheConfig,
    available_backends,
    backend_of,
    get_backend,
    register_backend,
)
from kvcache.errors import (
    BackendNotAvailableError,
    BoundsError,
    CacheFileError,
    DamagedFileError,
    DTypeError,
    ForeignFileError,
    KVCacheError,
    ModelFileError,
    NewerFileError,
    ShapeError,
    TrimError,
    UnknownBackendError,
    UnsupportedModelError,
)
from kvcache.rotating import RotatingKVCache
from kvcache.stream import KVCache, load, save, trim

__all__ = [
    "Backend",
    "BackendInfo",
    "BackendNotAvailableError",
    "BoundsError",
    "CacheConfig",
    "CacheFileError",
    "DTypeError",
    "DamagedFileError",
    "ForeignFileError",
    "KVCache",
    "KVCacheError",
    "ModelFileError",
    "NewerFileError",
    "RotatingKVCache",
    "ShapeError",
    "TrimError",
    "UnknownBackendError",
    "UnsupportedModelError",
    "available_backends",
    "backend_of",
    "get_backend",
    "load",
    "register_backend",
    "save",
    "trim",
]
