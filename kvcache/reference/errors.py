"""Errors of the reference models, added to the tree in :mod:`kvcache.errors`.

::

    KVCacheError
    ├── ModelFileError         (OSError)       a model file that is missing or unreadable
    ├── UnsupportedModelError  (ValueError)    a model that the reference code does not run
    └── AudioFileError         (OSError)       a recording that cannot be read

No cache raises one of these. Each also derives from the builtin that fits, as every error of
kvcache does.
"""

from kvcache.errors import KVCacheError


class ModelFileError(KVCacheError, OSError):
    """A model file is missing or unreadable."""


class UnsupportedModelError(KVCacheError, ValueError):
    """The reference code does not run this kind of model."""


class AudioFileError(KVCacheError, OSError):
    """A recording is missing or unreadable."""
