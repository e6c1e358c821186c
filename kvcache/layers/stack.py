"""The caches of all layers of one model, handled together: all change, or none."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Generic, Self, SupportsIndex, TypeVar, overload

from kvcache._checks import as_index, as_indices
from kvcache.backends import Backend, HostArray, get_backend
from kvcache.errors import ForeignFileError
from kvcache.snapshots.files import write_file
from kvcache.snapshots.resuming import check_contiguous
from kvcache.snapshots.rows import exchange
from kvcache.snapshots.snapshot import CacheSpec, Part, Snapshot

from .alike import as_caches
from .base import KINDS, LayerCache, kind_of
from .records import read_records

C = TypeVar("C", bound=LayerCache)


class LayerCaches(Sequence[C], Generic[C]):
    """The caches of all layers of one model, in the order of the layers.

    ::

        caches = kvcache.LayerCaches(kvcache.KVCache() for _ in range(layers))
        for layer, cache in zip(model.layers, caches):
            ...                                  # K, V = cache.update(k, v)
        caches.trim(3)                           # in all layers, or in none

    Layers may share a cache: list it once per layer. Each operation changes it once.
    """

    def __init__(self, caches: Iterable[C]) -> None:
        self._caches = tuple(caches)

    def __repr__(self) -> str:
        kinds = ", ".join(dict.fromkeys(type(cache).__name__ for cache in self._caches))
        offsets = ", ".join(map(str, self._offsets))
        return f"<LayerCaches {len(self)} of {kinds or 'none'}, offset={offsets or 0}>"

    @overload
    def __getitem__(self, index: int) -> C: ...
    @overload
    def __getitem__(self, index: slice) -> LayerCaches[C]: ...
    def __getitem__(self, index: int | slice) -> C | LayerCaches[C]:
        if isinstance(index, slice):
            return LayerCaches(self._caches[index])
        return self._caches[index]

    def __len__(self) -> int:
        return len(self._caches)

    def __iter__(self) -> Iterator[C]:
        return iter(self._caches)

    @property
    def _distinct(self) -> list[C]:
        """Caches without repetitions, in order."""
        return list({id(cache): cache for cache in self._caches}.values())

    @property
    def _offsets(self) -> list[int]:
        return sorted({cache.offset for cache in self._caches})

    # What is held.

    @property
    def offset(self) -> int:
        """Tokens seen by every layer, 0 without layers: the position of the next token.

        Raises: ValueError while the layers have seen different numbers of tokens.
        """
        if len(self._offsets) > 1:
            raise ValueError(
                f"layers that are handled together have seen the same tokens; got {len(self)} "
                f"caches at {self._offsets}."
            )
        return self._offsets[0] if self._offsets else 0

    @property
    def nbytes(self) -> int:
        """Bytes allocated in all layers, spare capacity included."""
        return sum(cache.nbytes for cache in self._distinct)

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` more tokens in all layers; see :meth:`LayerCache.reserve`."""
        self._all_or_none(lambda cache: cache.reserve(tokens))

    # Going back.

    def can_trim(self, tokens: int) -> bool:
        """Return whether :meth:`trim` can take back this many tokens in all layers."""
        return all(cache.can_trim(tokens) for cache in self._distinct)

    def last_trimmable(self, limit: int) -> int:
        """Return the last position up to `limit` that all layers can go back to; 0 for none."""
        before = limit + 1
        while limit != before:
            before = limit
            for cache in self._distinct:
                limit = cache.last_trimmable(limit)
        return limit

    def trim(self, tokens: int) -> None:
        """Take back the last `tokens` tokens of all layers, or of none. Ends checkpoints.

        Raises: TrimError if one layer cannot; all are unchanged then.
        """
        # All checks before the first change: no layer can then refuse after another has changed.
        for cache in self._distinct:
            cache.check_trim(tokens)
        self._all_or_none(lambda cache: cache.trim(tokens))

    def checkpoint(self) -> None:
        """Open a checkpoint in every layer; replaces open ones."""
        self._all_or_none(lambda cache: cache.checkpoint())

    def rollback(self, accepted: int = 0) -> None:
        """Return to the checkpoint plus the first `accepted` tokens since, in all layers or none.

        Raises: TrimError if one layer cannot; all are unchanged then.
        """
        for cache in self._distinct:
            cache.check_rollback(accepted)
        self._all_or_none(lambda cache: cache.rollback(accepted))

    def reset(self) -> None:
        """Forget everything; the memory is freed with the last array that was returned."""
        self._all_or_none(lambda cache: cache.reset())

    def _all_or_none(self, change: Callable[[C], None]) -> None:
        """Call `change` for every cache; if one raises, undo it in all."""
        undos: list[Callable[[], None]] = []
        try:
            for cache in self._distinct:
                undos.append(cache.savepoint())
                change(cache)
        except BaseException:  # out of memory, or Ctrl-C
            for undo in reversed(undos):
                undo()
            raise

    # The batch axis.

    def pad(self, padding: Iterable[SupportsIndex]) -> None:
        """Declare padding on the left of rows in all layers; see :meth:`LayerCache.pad`."""
        numbers = as_indices(padding, "padding")  # an iterator serves the first cache only
        self._all_or_none(lambda cache: cache.pad(numbers))

    def select(self, rows: Iterable[SupportsIndex]) -> None:
        """Reorder, repeat and drop rows of the batch in all layers, or in none.

        Raises: as :meth:`LayerCache.select`; all are unchanged then.
        """
        numbers = as_indices(rows, "rows")
        for cache in self._distinct:
            cache.check_select(numbers)
        self._all_or_none(lambda cache: cache.select(numbers))

    def split(self, rows: Iterable[SupportsIndex] | None = None) -> list[Self]:
        """Return the caches of each row of the batch, or of these rows, without padding.

        See :meth:`LayerCache.split`. Raises: ValueError for layers of different numbers of rows;
        otherwise as there.
        """
        wanted = None if rows is None else as_indices(rows, "rows")
        split = {id(cache): cache.split(wanted) for cache in self._distinct}
        numbers = {len(caches) for caches in split.values()}
        if len(numbers) > 1:
            raise ValueError(
                f"layers that are split together have the same rows; got {sorted(numbers)}. Finish "
                "the forward pass first."
            )
        number = max(numbers, default=0)
        return [type(self)(split[id(cache)][row] for cache in self) for row in range(number)]

    @classmethod
    def concat(cls, stacks: Sequence[Self]) -> Self:
        """Return caches with the rows of all `stacks`, layer by layer, which stay as they are.

        Raises: ValueError for no stack, or for other numbers of layers; otherwise as
            :meth:`LayerCache.concat`.
        """
        stacks = as_caches(stacks, LayerCaches)
        if len({len(stack) for stack in stacks}) != 1:
            raise ValueError(
                "concat joins stacks of as many layers each, one or more; got "
                f"{[len(stack) for stack in stacks]}."
            )
        # By identity: layers that share a cache in all stacks share the joined one.
        joined: dict[tuple[int, ...], C] = {}
        layers = [*zip(*stacks, strict=True)]
        keys = [tuple(map(id, caches)) for caches in layers]
        for key, caches in zip(keys, layers, strict=True):
            if key not in joined:
                joined[key] = type(caches[0]).concat(caches)
        return cls(joined[key] for key in keys)

    # Resume points, and snapshots.

    def cuts(self, tokens: SupportsIndex) -> list[int]:
        """Return the positions inside the coming update behind which a layer wants a state.

        Ascending; see :meth:`StateCache.cuts`. For a model that gives no state from inside of an
        update: computed in pieces that end there, each an update of its own, its caches can resume
        at all of them.

        Raises: ValueError for less than one token, ExportedError.
        """
        return sorted({position for cache in self._distinct for position in cache.cuts(tokens)})

    def schedule(self, positions: Iterable[int]) -> None:
        """Make `positions`, not reached yet, resume points of later snapshots."""
        points = as_indices(positions, "positions")  # an iterator serves the first cache only
        self._all_or_none(lambda cache: cache.schedule(points))

    def snapshot(self, start: int = 0, stop: int | None = None) -> Snapshot:
        """Return a snapshot of positions ``[start, stop)`` in all layers; stop None: to the end.

        Rows stay in their slots, uncopied, until a cache changes these. The caller closes it.

        Raises: ValueError for an empty range, one beyond what every cache has seen, or None where
            they have seen different numbers of tokens.
        """
        for cache in self._distinct:
            cache.check_not_exported()
        start = as_index(start, "start")
        offsets = self._offsets
        # Past the end of some cache if they have several ends: refused.
        furthest = offsets[-1] if offsets else None
        stop = furthest if stop is None else as_index(stop, "stop")
        if stop is None or not 0 <= start < stop <= offsets[0]:
            raise ValueError(
                "a snapshot is of 0 <= start < stop <= offset, the same in all caches; got "
                f"[{start}, {stop}) of {len(self)} caches at {offsets}."
            )
        specs = [
            CacheSpec(kind_of(type(cache)), cache.visibility, cache.dtype or "") for cache in self
        ]
        return exchange(
            (),
            lambda: (cache.capture(start, stop) for cache in self),
            lambda rows: Snapshot(start, stop, list(map(Part, specs, rows))),
        )

    def restore(
        self,
        *snapshots: Snapshot,
        stop: int | None = None,
        backend: str | Backend | None = None,
    ) -> None:
        """Fill empty caches of all layers from `snapshots`, to resume where the last one stops.

        snapshots: in order and without gaps, the first from position 0. They stay as they are,
            and may come from any backend.
        stop: position inside the last one to resume at instead.
        backend: for caches that name none.

        Raises: SnapshotMismatchError, ValueError (not empty, no backend, a gap), KVCacheError
            if the position is no resume point, DTypeError; nothing has changed then.
        """
        named = None if backend is None else get_backend(backend)
        if any(cache.offset or (cache.backend or named) is None for cache in self):
            raise ValueError(
                "what is restored goes to empty caches, on a backend that they or the call name; "
                f"got {', '.join(map(repr, self))}. Use new ones."
            )
        position = check_contiguous(snapshots, self._specs_for(snapshots), stop)

        def restore_rows(cache: C) -> None:
            layer = self._caches.index(cache)  # the first, where several layers share it
            parts = [snapshot.parts[layer].rows for snapshot in snapshots]
            backend = cache.backend or named
            if backend is not None:  # checked above
                cache.restore_rows(parts, position, backend)

        self._all_or_none(restore_rows)

    def _specs_for(self, snapshots: Sequence[Snapshot]) -> list[CacheSpec]:
        """Return the specs of these caches; one without a dtype takes that of the snapshots."""
        dtypes = [spec.dtype for spec in snapshots[0].specs] if snapshots else []
        dtypes = dtypes if len(dtypes) == len(self) else [""] * len(self)
        return [
            CacheSpec(kind_of(type(cache)), cache.visibility, cache.dtype or dtype)
            for cache, dtype in zip(self, dtypes, strict=True)
        ]

    # Copies and files.

    def copy(self) -> Self:
        """Return independent caches with the same tokens; no checkpoints."""
        # By identity: layers that share a cache share its copy.
        copies = {id(cache): cache.copy() for cache in self._distinct}
        return type(self)(copies[id(cache)] for cache in self)

    def __copy__(self) -> Self:
        return self.copy()

    def to_backend(self, backend: str | Backend) -> Self:
        """Return independent copies on `backend`, equal bit for bit; no checkpoints.

        Raises: DTypeError where `backend` lacks the dtype; UnknownBackendError,
            BackendNotAvailableError.
        """
        target = get_backend(backend)
        copies = {id(cache): cache.to_backend(target) for cache in self._distinct}
        return type(self)(copies[id(cache)] for cache in self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the tokens held, and nothing else, to a file for :meth:`load` on any backend.

        The file replaces an existing one, and keeps its permissions, only when complete and on the
        disk; a symbolic link is followed. A cache shared by several layers is written for each.

        Raises: FileAccessError if `path` leads to no regular file, or may not be written;
            FileNotFoundError without its directory; OSError, such as for a full disk.
        """
        records: list[dict[str, object]] = []
        tensors: dict[str, HostArray] = {}
        for layer, cache in enumerate(self):
            kind, arrays = kind_of(type(cache)), cache.to_layer()
            records.append(
                {
                    "kind": kind,
                    "offset": cache.offset,
                    "options": dict(cache.options),
                    "arrays": {array.name: array.token_axis for array in arrays},
                }
            )
            tensors |= {f"{layer}.{array.name}": array.data for array in arrays}
        write_file(path, tensors, {"caches": records})

    @classmethod
    def load(cls, path: str | os.PathLike[str], backend: str | Backend = "numpy") -> Self:
        """Return the caches saved in `path`, on `backend`; they may come from any other.

        Layers that shared a cache get one each.

        Raises: CacheFileError (damaged, foreign or newer file, or no file that can be opened),
            FileNotFoundError, DTypeError where the backend lacks the dtype.
        """
        target = get_backend(backend)
        caches: list[Any] = []  # of the kinds that the file names
        for record in read_records(path):
            if record.kind not in KINDS:
                raise ForeignFileError(
                    f"load reads caches of the kinds {', '.join(sorted(KINDS))}; "
                    f"{path} holds {record.kind!r}."
                )
            caches.append(record.to_cache(KINDS[record.kind], target, path))
        return cls(caches)


def _class_name(kind: str) -> str:
    return KINDS[kind].__name__ if kind in KINDS else repr(kind)


class StandaloneCache(LayerCache):
    """A per-layer cache with its own snapshots and files: a stack of one layer."""

    def snapshot(self, start: int = 0, stop: int | None = None) -> Snapshot:
        """Return a snapshot of positions ``[start, stop)``; see :meth:`LayerCaches.snapshot`."""
        return LayerCaches([self]).snapshot(start, stop)

    def restore(
        self,
        *snapshots: Snapshot,
        stop: int | None = None,
        backend: str | Backend | None = None,
    ) -> None:
        """Fill an empty cache from `snapshots`; see :meth:`LayerCaches.restore`."""
        LayerCaches([self]).restore(*snapshots, stop=stop, backend=backend)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the tokens held to a file for :meth:`load` on any backend."""
        LayerCaches([self]).save(path)

    @classmethod
    def load(cls, path: str | os.PathLike[str], backend: str | Backend = "numpy") -> Self:
        """Return the cache saved in `path`, on `backend`.

        Raises: CacheFileError (damaged, foreign or newer file, or no file that can be opened),
            FileNotFoundError, DTypeError where the backend lacks the dtype.
        """
        records, kind = read_records(path), kind_of(cls)
        # By kind, not by class: a subclass without a kind of its own reads files of its base.
        if [record.kind for record in records] != [kind]:
            kinds = ", ".join(_class_name(record.kind) for record in records)
            raise ForeignFileError(
                f"{cls.__name__}.load reads one {_class_name(kind)}; {path} holds {kinds}. "
                "Use kvcache.LayerCaches.load."
            )
        return records[0].to_cache(cls, get_backend(backend), path)
