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
from kvcache.diffusion import DiffusionCache
from kvcache.errors import (
    BackendNotAvailableError,
    BoundsError,
    CacheFileError,
    CacheFullError,
    DamagedFileError,
    DiffusionCacheError,
    DTypeError,
    EndpointError,
    ExportedError,
    FileAccessError,
    ForeignFileError,
    KVCacheError,
    NewerFileError,
    NotSupportedError,
    PageError,
    ShapeError,
    SharedCellsError,
    SnapshotMismatchError,
    StateError,
    StepOrderError,
    StoreError,
    TracedArrayError,
    TrimError,
    UnknownBackendError,
    UnknownStreamError,
)
from kvcache.layers.growing import KVCache
from kvcache.layers.recurrent import StateCache
from kvcache.layers.rotating import RotatingKVCache
from kvcache.layers.stack import LayerCaches
from kvcache.pool.base import Cache
from kvcache.pool.batch import Batch
from kvcache.pool.causal import CausalCache
from kvcache.pool.encoder import EncoderCache
from kvcache.pool.recurrent import RecurrentCache
from kvcache.pool.rope import RoPEShift
from kvcache.pool.wrapper import WrapperCache
from kvcache.prefix import PrefixCache
from kvcache.snapshots.snapshot import Snapshot

__all__ = [
    "Backend",
    "BackendInfo",
    "BackendNotAvailableError",
    "Batch",
    "BoundsError",
    "Cache",
    "CacheConfig",
    "CacheFileError",
    "CacheFullError",
    "CausalCache",
    "DTypeError",
    "DamagedFileError",
    "DiffusionCache",
    "DiffusionCacheError",
    "EncoderCache",
    "EndpointError",
    "ExportedError",
    "FileAccessError",
    "ForeignFileError",
    "KVCache",
    "KVCacheError",
    "LayerCaches",
    "NewerFileError",
    "NotSupportedError",
    "PageError",
    "PrefixCache",
    "RecurrentCache",
    "RoPEShift",
    "RotatingKVCache",
    "ShapeError",
    "SharedCellsError",
    "Snapshot",
    "SnapshotMismatchError",
    "StateCache",
    "StateError",
    "StepOrderError",
    "StoreError",
    "TracedArrayError",
    "TrimError",
    "UnknownBackendError",
    "UnknownStreamError",
    "WrapperCache",
    "available_backends",
    "backend_of",
    "get_backend",
    "register_backend",
]
