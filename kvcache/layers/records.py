"""Per-layer caches as they stand in a file."""

from __future__ import annotations

import os
from typing import NamedTuple, TypeVar

from kvcache._checks import NO_LIMIT
from kvcache.backends import HOST_DTYPES, Backend
from kvcache.errors import DamagedFileError, ForeignFileError, KVCacheError, NotSupportedError
from kvcache.snapshots.files import naming_damage, read_file
from kvcache.storage import schema
from kvcache.storage.arrays import LayerArrays, NamedArray

from .base import LayerCache

C = TypeVar("C", bound=LayerCache)

_CACHES = schema.record(
    {
        "caches": schema.list_of(
            schema.record(
                {
                    "kind": schema.text,
                    "offset": schema.integer(0, NO_LIMIT),
                    "options": schema.mapping_of(
                        schema.either(
                            schema.one_of(None), schema.text, schema.integer(-NO_LIMIT, NO_LIMIT)
                        )
                    ),
                    "arrays": schema.mapping_of(
                        schema.either(schema.one_of(None), schema.integer(-64, 63))
                    ),
                }
            )
        )
    }
)


class Record(NamedTuple):
    """One cache, as stored in a file."""

    kind: str
    offset: int
    options: dict[str, int | str | None]
    arrays: LayerArrays

    def to_cache(self, kind: type[C], backend: Backend, path: str | os.PathLike[str]) -> C:
        """Return the cache, of class `kind`, on `backend`.

        Raises: DTypeError where the backend lacks the dtype; NotSupportedError if the constructor
            of `kind` does not take the options; DamagedFileError if it refuses them, or the arrays
            are not those of such a cache.
        """
        for dtype in self._dtypes():
            backend.dtype(dtype)
        try:
            cache = kind.make(backend, self.options)
            if self.offset:
                cache.from_layer(self.arrays, self.offset)
        except NotSupportedError:  # of a class whose constructor takes other options
            raise
        except (KVCacheError, TypeError, ValueError) as error:
            raise DamagedFileError(
                f"{path} is damaged: there is no {kind.__name__} as its header says: {error}"
            ) from error
        return cache

    def _dtypes(self) -> list[str]:
        """Return the names of all dtypes of the cache that are ones."""
        named = [self.options.get("dtype"), *(array.data.dtype.name for array in self.arrays)]
        return [name for name in named if isinstance(name, str) and name in HOST_DTYPES]


def read_records(path: str | os.PathLike[str]) -> list[Record]:
    """Return the caches in a file. Raises: CacheFileError, FileNotFoundError."""
    header, tensors = read_file(path)
    if header.get("kind") == "snapshot":
        raise ForeignFileError(f"{path} holds a snapshot, no caches. Use kvcache.Snapshot.load.")
    with naming_damage(path):
        _CACHES(header, "its header")
        described = header["caches"]
        # Of an empty cache the file may list arrays, but holds none.
        axes = [cache["arrays"] if cache["offset"] else {} for cache in described]
        names = [f"{layer}.{name}" for layer, arrays in enumerate(axes) for name in arrays]
        schema.check_names(list(tensors), names, "its tensors")
    return [
        Record(
            cache["kind"],
            cache["offset"],
            cache["options"],
            tuple(
                NamedArray(name, tensors[f"{layer}.{name}"], axis)
                for name, axis in axes[layer].items()
            ),
        )
        for layer, cache in enumerate(described)
    ]
