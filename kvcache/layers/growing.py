"""Per-layer caches: one stream of tokens (or a batch of equally long ones) per layer.

Two notions, kept apart: the **position** of a token, counted from the first ever seen, and
its **slot** in the buffers. A growing cache keeps position p in slot p; a rotating one in a
slot that follows from p alone. So ``offset``, the next position, is the only counter.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import numpy as np
import numpy.typing as npt

from kvcache.backends import Array, Backend, HostArray, get_backend
from kvcache.errors import BoundsError, ForeignFileError, KVCacheError, TrimError
from kvcache.snapshots.files import read_file, write_file
from kvcache.snapshots.rows import Slots, TokenRows, Visibility
from kvcache.snapshots.snapshot import CacheSpec, Part, Snapshot, check_contiguous
from kvcache.storage.masks import device_mask

from .buffers import GrowingBuffers
from .pinning import LayerPins, place_rows
from .state import LayerState, RingState

Positions = npt.NDArray[np.int32]


@dataclass
class Checkpoint:
    """Offset that a rollback returns to; updates, scheduled: for caches that displace tokens."""

    offset: int
    updates: list[Any] = field(default_factory=list)
    scheduled: set[int] = field(default_factory=set)


# Every kind of per-layer cache by the name that files give it.
_KINDS: dict[str, type[KVCache]] = {}


class KVCache:
    """A growing cache for one layer: every token stays.

    ::

        cache = kvcache.KVCache()
        K, V = cache.update(k, v)      # [B, kv_heads, L, head_dim] -> [B, kv_heads, n, head_dim]
        mask = cache.mask(L)           # [L, n], True = attend; None = everything is visible

    backend: name or :class:`~kvcache.Backend`; None takes that of the first array.
    step: buffers grow to multiples of this many tokens, and by half at least.
    dtype: what keys and values must be; None takes that of the first ones.
    """

    kind: ClassVar[str] = "kv"
    """What files call this class."""

    def __init_subclass__(cls) -> None:
        if "kind" in cls.__dict__:  # a user's subclass of one kind is still that kind
            _KINDS[cls.kind] = cls

    def __init__(
        self, backend: str | Backend | None = None, step: int = 256, dtype: str | None = None
    ) -> None:
        step = operator.index(step)
        self._options: dict[str, Any] = {"backend": backend, "step": step, "dtype": dtype}
        self._start()

    def _start(self) -> None:
        options = self._options
        self._buffers = GrowingBuffers(
            options["backend"], options["dtype"], options["step"], options.get("max_size")
        )
        self._offset = 0
        self._checkpoint: Checkpoint | None = None
        self._pins = LayerPins(self._buffers)

    def __repr__(self) -> str:
        where = self.backend.spec if self.backend else "the backend of its first array"
        return f"<{type(self).__name__} offset={self.offset} len={self.len} on {where}>"

    # What is held.

    @property
    def offset(self) -> int:
        """Tokens seen since the last reset: the position of the next one."""
        return self._offset

    @property
    def len(self) -> int:
        """Tokens held."""
        return self._offset

    @property
    def backend(self) -> Backend | None:
        """Where the buffers held_slice; None before the first update if none was named."""
        backend: Backend | None = self._buffers.backend
        return backend

    @property
    def dtype(self) -> str | None:
        """Dtype of keys and values; None before the first update if none was named."""
        geometry = self._buffers.geometry
        return geometry.dtype if geometry else self._buffers.dtype

    @property
    def nbytes(self) -> int:
        """Bytes allocated, spare capacity included."""
        return self._buffers.nbytes

    @property
    def growths(self) -> int:
        """How often the buffers were moved to larger ones since the last reset."""
        return self._buffers.growths

    @property
    def state(self) -> tuple[Array, ...]:
        """The tokens held, as keys and values ``[B, kv_heads, n, head_dim]``; () when empty.

        Padded, and valid as long, as what :meth:`update` returns for one token.
        """
        return self._buffers.view(self.len) if self._offset else ()

    @property
    def positions(self) -> Positions:
        """Position of every column that the last `update` returned; -1 where it is padding."""
        held = np.arange(self._offset, dtype=np.int32)
        return padded(held, self._buffers.width(self._offset))

    # Writing and reading.

    def update(self, keys: Array, values: Array) -> tuple[Array, Array]:
        """Append L >= 1 tokens; return all keys and values that their queries may see.

        keys, values: ``[B, kv_heads, L, head_dim]``, the two head_dims may differ. They stay
        the caller's. Returns the same with n columns, valid until the next call that changes
        the cache. n is the number of tokens held, or more where the backend pads (JAX hands
        out its whole buffer): :meth:`mask` hides the rest.

        Raises: ShapeError, DTypeError, UnknownBackendError; the cache is unchanged then.
        """
        buffers = self._buffers
        start = self._offset
        stop = start + buffers.validate(keys, values)
        if stop > buffers.capacity:
            buffers.grow(stop)
        buffers.write(keys, values, start, stop)
        self._offset = stop
        return buffers.view(stop)

    def mask(self, tokens: int, window: int | None = None) -> Array | None:
        """What the last `tokens` queries may attend to, over the columns `update` returned.

        Returns ``[tokens, n]`` in the backend's ``mask_dtype`` (``"bool"``: True = attend), or
        None when every column is visible to every query. `window` W lets a token see itself
        and the W - 1 before it. LayerRows with equal histories can share one mask.
        """
        tokens = operator.index(tokens)
        if not 1 <= tokens <= self._maskable():
            raise ValueError(f"mask covers 1 to {self._maskable()} latest tokens; got {tokens}.")
        if window is not None and window < 1:
            raise ValueError(f"window must be >= 1 token; got {window}.")
        queries = np.arange(self._offset - tokens, self._offset, dtype=np.int32)[:, None]
        visible = self._visible(queries, self.positions, window)
        return (
            None
            if visible.all()
            else device_mask(
                self._buffers.backend, self._buffers.backend.config.mask_dtype, visible
            )
        )

    # Going back.

    def can_trim(self, tokens: int) -> bool:
        """Whether :meth:`trim` can take back this many tokens."""
        return 0 <= tokens <= self._offset

    def trim(self, tokens: int) -> None:
        """Take back the last `tokens` tokens: as if they had never come. Ends a checkpoint.

        For the caches of several layers at once see :func:`trim`.

        Raises: TrimError; the cache is unchanged then.
        """
        tokens = operator.index(tokens)
        if not self.can_trim(tokens):
            raise TrimError(self._why_not(tokens))
        self._rewind(self._offset - tokens)

    def checkpoint(self) -> None:
        """Open a checkpoint for :meth:`rollback`; replaces an open one."""
        self._checkpoint = Checkpoint(self._offset, scheduled=set(self._pins.scheduled))

    def rollback(self, accepted: int = 0) -> None:
        """Return to the checkpoint plus the first `accepted` tokens since, and close it.

        For speculative decoding: checkpoint, update with a draft, keep what was accepted.
        Exact on every cache, also where :meth:`trim` cannot be.

        Raises: TrimError without a checkpoint or for more tokens than came since.
        """
        mark = self._checkpoint
        if mark is None:
            raise TrimError("rollback needs an open checkpoint. Call checkpoint() first.")
        accepted = operator.index(accepted)
        since = self._offset - mark.offset
        if not 0 <= accepted <= since:
            raise TrimError(f"accepted must be 0 to {since} tokens, those since; got {accepted}.")
        self._return_to(mark, accepted)

    def reset(self) -> None:
        """Forget everything and free the memory: the cache is as it was constructed."""
        self._pins.spill()
        self._buffers.free()
        self._start()

    # For compiled programs.

    def export_state(self, tokens: int) -> LayerState | RingState:
        """The buffers, with room for `tokens` more, for :func:`kvcache.functional.append`.

        The cache is not to be used until :meth:`import_state`. Ends a checkpoint.

        Raises: KVCacheError for a cache that never held a token: it has no shape yet.
        """
        tokens, buffers = operator.index(tokens), self._buffers
        if buffers.geometry is None:
            raise KVCacheError("a cache has the shape of its first update. Prefill, then lend.")
        if self._slots(self._offset + tokens) > buffers.capacity:
            buffers.grow(self._slots(self._offset + tokens))
        return self._exported(*buffers.export_state(), self._on_device(self._offset))

    def import_state(self, state: LayerState | RingState) -> None:
        """Go on with what programs made of what :meth:`export_state` returned.

        Raises: BoundsError if more tokens came than it had room for, ShapeError if it is that of
            another cache; nothing has changed then.
        """
        offset = int(self._buffers.backend.to_host(state.offset))
        if self._slots(offset) > self._buffers.capacity:
            raise BoundsError(
                f"a program appends as many tokens as were lent room for; {offset} came, "
                f"{self._buffers.capacity} fit, the others were not written. Lend more."
            )
        self._buffers.import_state(state.keys, state.values)
        self._rewind(offset)

    def _slots(self, offset: int) -> int:
        """Slots in use once `offset` tokens were seen."""
        return offset

    def _exported(self, keys: Array, values: Array, offset: Array) -> LayerState | RingState:
        slots = self._on_device(np.arange(self._buffers.capacity))
        return LayerState(keys, values, offset, slots, self._buffers.empty())

    def _on_device(self, numbers: npt.ArrayLike) -> Array:
        backend: Backend = self._buffers.backend
        return backend.from_host(np.asarray(numbers), "int32")

    # Snapshots.

    @property
    def visibility(self) -> Visibility:
        """What it needs of the past to go on somewhere."""
        return Visibility()

    def snapshot(self, start: int = 0, stop: int | None = None) -> Snapshot:
        """What is held of positions ``[start, stop)``; see :func:`snapshot`."""
        return snapshot([self], start, stop)

    def restore(self, *snapshots: Snapshot, backend: str | Backend | None = None) -> None:
        """Hold what `snapshots` do, see :func:`restore`."""
        restore([self], *snapshots, backend=backend)

    def schedule(self, positions: Iterable[int]) -> None:
        """Let snapshots hold what going on at `positions`, not reached yet, needs.

        It is kept when it would be displaced; updates need not end there.
        """

    def _held(self) -> tuple[Positions, Slots]:
        """Positions held, ascending, and their slots."""
        return np.arange(self._offset, dtype=np.int32), np.arange(self._offset)

    def _fill(self, rows: Sequence[TokenRows], offset: int, where: Backend) -> None:
        """Hold what it needs of `rows`, which have all of it, to go on at `offset`."""
        chosen = [np.flatnonzero(self.visibility.needed(each.positions, offset)) for each in rows]
        found = [(each, which) for each, which in zip(rows, chosen, strict=True) if which.size]
        slots = self._places(np.concatenate([each.positions[which] for each, which in found]))
        parts = place_rows([each.read(which) for each, which in found], slots, self._slots(offset))
        self._buffers.fill(*(where.from_host(part) for part in parts))
        self._offset, self._checkpoint = offset, None

    def _places(self, positions: Positions) -> Slots:
        """Slots of `positions` that are held."""
        return positions.astype(np.int64)

    # Copies.

    def copy(self) -> Self:
        """An independent cache with the same tokens and room for them; no checkpoint."""
        twin = type(self)(**self._options)
        if self._offset:
            twin._buffers.fill(*self._buffers.held_slice(self.len))
            twin._offset = self._offset
        return twin

    def to_backend(self, backend: str | Backend) -> Self:
        """An independent cache on `backend` with the same tokens, bit for bit; no checkpoint.

        Each token is copied once, straight from this memory where the two frameworks can share
        it, else through the host. This cache stays as it is.

        Raises: DTypeError where `backend` lacks the dtype; UnknownBackendError,
            BackendNotAvailableError.
        """
        twin = type(self)(**self._options | {"backend": get_backend(backend)})
        if self._offset:
            twin._buffers.fill_from(self._buffers, self.len)
            twin._offset = self._offset
        return twin

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the tokens held to a file that :meth:`load` reads on any backend."""
        save(path, [self])

    @classmethod
    def load(cls, path: str | os.PathLike[str], backend: str | Backend = "numpy") -> Self:
        """The cache saved in `path`, now on `backend`.

        Raises: CacheFileError (damaged, foreign or newer file), FileNotFoundError, DTypeError
        where the backend lacks the dtype.
        """
        caches = load(path, backend)
        if len(caches) != 1 or type(caches[0]) is not cls:
            held = ", ".join(type(cache).__name__ for cache in caches)
            raise ForeignFileError(
                f"{cls.__name__}.load reads one {cls.__name__}; {path} holds {held}. "
                "Use kvcache.load."
            )
        return caches[0]

    # What a rotating cache does otherwise.

    def _maskable(self) -> int:
        return self._offset

    def _visible(
        self, queries: Positions, columns: Positions, window: int | None
    ) -> npt.NDArray[np.bool_]:
        visible = (columns >= 0) & (columns <= queries)
        if window is not None:
            visible &= columns > queries - window
        return visible

    def _why_not(self, tokens: int) -> str:
        return f"trim takes back 0 to {self._offset} tokens, those seen; got {tokens}."

    def _rewind(self, offset: int) -> None:
        if self._pins.rows:
            self._pins.spill(offset)
        self._pins.forget(offset)
        self._offset = offset
        self._checkpoint = None

    def _return_to(self, mark: Checkpoint, accepted: int) -> None:
        self._rewind(mark.offset + accepted)


def trim(caches: Iterable[KVCache], tokens: int) -> None:
    """Take back the last `tokens` tokens of all layers, or of none.

    Raises: TrimError if one of them cannot; all are unchanged then.
    """
    layers = {id(cache): cache for cache in caches}.values()  # a shared one is trimmed once
    for cache in layers:
        if not cache.can_trim(tokens):
            raise TrimError(cache._why_not(tokens))
    for cache in layers:
        cache.trim(tokens)


def save(path: str | os.PathLike[str], caches: Iterable[KVCache]) -> None:
    """Write the caches of several layers to one file: the tokens held and nothing else."""
    records: list[dict[str, Any]] = []
    tensors: dict[str, HostArray] = {}
    for layer, cache in enumerate(caches):
        options = {name: value for name, value in cache._options.items() if name != "backend"}
        records.append({"kind": cache.kind, "offset": cache.offset, "options": options})
        if cache.offset:
            keys, values = cache._buffers.to_host(cache.len)
            tensors |= {f"{layer}.keys": keys, f"{layer}.values": values}
    write_file(path, tensors, {"caches": records})


def load(path: str | os.PathLike[str], backend: str | Backend = "numpy") -> list[KVCache]:
    """The caches saved in `path`, on `backend`, whichever backend they were saved from.

    Raises: CacheFileError (damaged, foreign or newer file), FileNotFoundError, DTypeError
    where the backend lacks the dtype.
    """
    header, tensors = read_file(path)
    if "caches" not in header:
        raise ForeignFileError(f"{path} holds a snapshot, no caches. Use kvcache.Snapshot.load.")
    where = get_backend(backend)
    caches = []
    for layer, record in enumerate(header["caches"]):
        if record["kind"] not in _KINDS:
            raise ForeignFileError(
                f"load reads caches of the kinds {', '.join(sorted(_KINDS))}; "
                f"{path} holds {record['kind']!r}."
            )
        cache = _KINDS[record["kind"]](backend=where, **record["options"])
        if record["offset"]:
            parts = (where.from_host(tensors[f"{layer}.{part}"]) for part in ("keys", "values"))
            cache._buffers.fill(*parts)
            cache._offset = record["offset"]
        caches.append(cache)
    return caches


def padded(positions: Positions, width: int) -> Positions:
    """`positions` with -1 behind them, `width` in all."""
    padding = np.full(width - positions.size, -1, dtype=np.int32)
    return np.concatenate([positions, padding])


def snapshot(caches: Sequence[KVCache], start: int = 0, stop: int | None = None) -> Snapshot:
    """What the caches of all layers hold of positions ``[start, stop)``; stop None: of all.

    Nothing is copied until a cache changes the slots. Raises: ValueError for caches that have
    seen different numbers of tokens, or none.
    """
    offsets = sorted({cache.offset for cache in caches})
    stop = offsets[-1] if stop is None and offsets else stop
    if len(offsets) != 1 or stop is None or not 0 <= start < stop <= offsets[0]:
        raise ValueError(
            "a snapshot is of 0 <= start < stop <= offset, the same in all caches; got "
            f"[{start}, {stop}) of {len(caches)} caches at {offsets}."
        )
    rows = [cache._pins.capture(*cache._held(), start, stop) for cache in caches]
    parts = [
        Part(cache.kind, cache.visibility, each, str(cache.dtype))
        for cache, each in zip(caches, rows, strict=True)
    ]
    return Snapshot(start, stop, parts)


def restore(
    caches: Sequence[KVCache], *snapshots: Snapshot, backend: str | Backend | None = None
) -> None:
    """Let empty caches of all layers hold what `snapshots` do, to go on where the last one stops.

    backend: for caches that name none. The snapshots stay as they are, and may be of any backend.

    Raises: SnapshotMismatchError, ValueError (not empty, no backend, a gap), KVCacheError where
        they could not go on there, DTypeError; nothing has changed then.
    """
    named = None if backend is None else get_backend(backend)
    places = [where for cache in caches if (where := cache.backend or named) is not None]
    if any(cache.offset for cache in caches) or len(places) < len(caches):
        raise ValueError(
            "what is restored goes to empty caches, on a backend that they or the call name; got "
            f"{', '.join(map(repr, caches)) or 'none'}. Use new ones."
        )
    dtypes = [part.dtype for part in snapshots[0].parts] if snapshots else []
    dtypes = dtypes if len(dtypes) == len(caches) else ["" for _ in caches]
    stop = check_contiguous(
        snapshots,
        [
            CacheSpec(c.kind, c.visibility, c.dtype or dtype)
            for c, dtype in zip(caches, dtypes, strict=True)
        ],
    )
    try:
        for layer, (cache, where) in enumerate(zip(caches, places, strict=True)):
            rows = [each.parts[layer].rows for each in snapshots]
            cache._fill(rows, stop, where)
    except BaseException:
        for cache in caches:
            if cache.offset:
                cache.reset()
        raise


_KINDS[KVCache.kind] = KVCache
