"""Every error kvcache raises on purpose.

::

    KVCacheError
    ├── BackendNotAvailableError   (ImportError)   framework or device is missing
    ├── UnknownBackendError        (ValueError)    no backend of that name, or for that array
    ├── BoundsError                (IndexError)    a write or read outside a buffer
    ├── UnknownStreamError         (LookupError)   a stream that a step cache does not have
    ├── DiffusionCacheError        (ValueError)    a step or setting that makes no sense: interval 0
    │   └── StepOrderError                         a denoising step, or a part of it, a second time
    ├── ShapeError                 (ValueError)    wrong rank, batch, heads, tokens or head_dim
    ├── DTypeError                 (TypeError)     wrong dtype, or one the framework lacks
    ├── TracedArrayError           (TypeError)     an array inside of a transform, without values
    ├── ExportedError              (RuntimeError)  a cache is used while a program has its state
    ├── StateError                 (ValueError)    a state that this cache cannot take
    ├── TrimError                  (ValueError)    tokens that cannot be taken back exactly
    ├── CacheFullError             (RuntimeError)  not enough free cells for a pass
    ├── NotSupportedError          (NotImplementedError)  not what this cache was made for
    ├── SharedCellsError           (RuntimeError)  cells to be changed belong to others too
    ├── SnapshotMismatchError      (ValueError)    a snapshot of other caches, tokens or model
    ├── PageError                  (ValueError)    bytes of a store that are not the page asked for
    ├── StoreError                 (OSError)       a store that cannot be opened, listed or used
    ├── EndpointError              (OSError)       an address where nothing can be published
    └── CacheFileError             (OSError)
        ├── DamagedFileError                       truncated, or a checksum does not match
        ├── ForeignFileError                       not written by kvcache
        ├── NewerFileError                         written by a later format version
        └── FileAccessError                        no regular file, or not for this process

Each also derives from the matching builtin exception, so that code without any knowledge of
kvcache can catch it. A call that raises one of these has changed nothing.
"""


class KVCacheError(Exception):
    """Base class of every error raised by kvcache on purpose."""


class BackendNotAvailableError(KVCacheError, ImportError):
    """The framework, or the requested device, is not available on this machine."""


class UnknownBackendError(KVCacheError, ValueError):
    """No backend has this name, or none owns arrays of this type."""


class BoundsError(KVCacheError, IndexError):
    """A read or write reaches outside its buffer."""


class UnknownStreamError(KVCacheError, LookupError):
    """A step cache has no stream of this name or number."""


class DiffusionCacheError(KVCacheError, ValueError):
    """A step, time or setting makes no sense to a cache across denoising steps."""


class StepOrderError(DiffusionCacheError):
    """A denoising step, or a site within one, comes a second time."""


class ShapeError(KVCacheError, ValueError):
    """An array has the wrong rank, batch, heads, token count or head_dim."""


class DTypeError(KVCacheError, TypeError):
    """An array has the wrong dtype, or the framework lacks the dtype."""


class TracedArrayError(KVCacheError, TypeError):
    """An array is traced by a transform of its framework, and has no values yet."""


class ExportedError(KVCacheError, RuntimeError):
    """A program has the state of the cache: only offset, len, sizes and options can be read."""


class StateError(KVCacheError, ValueError):
    """A state is another cache's, of an earlier export, consumed by a program, or not asked for."""


class TrimError(KVCacheError, ValueError):
    """The last tokens cannot be taken back exactly."""


class CacheFullError(KVCacheError, RuntimeError):
    """There are not enough free cells for a pass."""


class NotSupportedError(KVCacheError, NotImplementedError):
    """The operation is not supported by a cache made with these options."""


class SharedCellsError(KVCacheError, RuntimeError):
    """Cells to be changed belong to several sequences."""


class SnapshotMismatchError(KVCacheError, ValueError):
    """A snapshot belongs to caches of another kind, to other tokens or to another model."""


class PageError(KVCacheError, ValueError):
    """Bytes from a store are not the page that was asked for: damaged, foreign or swapped."""


class StoreError(KVCacheError, OSError):
    """A store cannot be opened, listed or used."""


class EndpointError(KVCacheError, OSError):
    """An address cannot be bound or connected to: in use, malformed, or of another machine."""


class CacheFileError(KVCacheError, OSError):
    """A file cannot be read, or not be saved."""


class DamagedFileError(CacheFileError):
    """The file is truncated, or a tensor does not match its checksum."""


class ForeignFileError(CacheFileError):
    """The file was not written by kvcache, or holds another kind of cache."""


class NewerFileError(CacheFileError):
    """The file was written by a later version of the format."""


class FileAccessError(CacheFileError):
    """A path leads to no regular file, or to one that this process may not open or replace."""
