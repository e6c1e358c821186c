"""The contract between models, which put and get, and runners, which start passes."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Self, TypeAlias

from kvcache._checks import check_ids, check_range
from kvcache.backends import Array, Backend, CacheConfig
from kvcache.errors import NotSupportedError
from kvcache.snapshots.snapshot import CacheSpec, Part, Snapshot, check_contiguous

from .batch import Batch

Commit: TypeAlias = Callable[[], None]
"""A change that has been checked and cannot fail any more."""


class Cache(ABC):
    """Keys and values of many sequences, for all layers of a model.

    The model says at construction what it needs and calls :meth:`set_layer`, :meth:`put` and
    :meth:`get` for each layer. The runner calls the rest. Every change happens as a whole or
    raises and changes nothing; a wrapper of several caches can promise that because each first
    checks (the ``prepare_`` methods) and then commits.

    A subclass calls ``super().__init__()``.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()
        """Held while the cache changes: sequences may come and go while a pass runs elsewhere."""

    def share_lock(self, lock: threading.RLock) -> None:
        """Use `lock` instead, that of a cache which this one is a part of."""
        self.lock = lock

    @abstractmethod
    def set_config(self, config: CacheConfig) -> None:
        """Override what the backend would choose. By the model, before :meth:`init`."""

    @abstractmethod
    def init(
        self,
        backend: str | Backend,
        dtype: str = "float32",
        *,
        max_sequences: int = 1,
        capacity: int,
        max_batch: int,
    ) -> None:
        """Size the cache. Memory is allocated when layers are first put.

        capacity: tokens per sequence. max_batch: tokens of one forward pass, at most.
        """

    def start_forward(self, batch: Batch, reserve: bool = False) -> None:
        """Find cells for the tokens of a pass; :meth:`put` and :meth:`get` then serve it.

        reserve: lay out the largest pass instead, to allocate what it needs; stores nothing.

        Raises: CacheFullError, ValueError; nothing has changed then.
        """
        with self.lock:
            self.prepare_forward(batch, reserve)()

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Make `target` hold the first positions of `source`, those below `length`, only.

        Cells are shared, not copied. ``source == target`` truncates.

        Raises: ValueError for a source that holds nothing; nothing has changed then.
        """
        with self.lock:
            self.prepare_copy_prefix(source, target, length)()

    def remove(self, sequence: int, start: int, stop: int | None = None) -> None:
        """Forget positions ``[start, stop)`` of a sequence, to its end if `stop` is None.

        Later positions move down by ``stop - start``, and their keys are shifted.

        Raises: ValueError, NotSupportedError without a shift, SharedCellsError where a cell
            that would move belongs to another sequence too; nothing has changed then.
        """
        with self.lock:
            self.prepare_remove(sequence, start, stop)()

    # Snapshots.

    def snapshot(self, sequence: int, start: int = 0, stop: int | None = None) -> Snapshot:
        """Return what is held of positions ``[start, stop)`` of a sequence, resident if it can be.

        stop: None for the end. Between passes; nothing is copied.

        Raises: ValueError, NotSupportedError for a cache that cannot.
        """
        with self.lock:
            check_ids(self.max_sequences, sequence)
            stop = self.next_position(sequence) if stop is None else stop
            check_range(start, stop)
            return Snapshot(start, stop, self.capture(sequence, start, stop))

    def restore(self, sequence: int, *snapshots: Snapshot) -> None:
        """Let an empty sequence hold `snapshots`, to go on where the last one stops.

        Resident ones of this cache share their cells with it. The snapshots stay as they are.

        Raises: SnapshotMismatchError, CacheFullError, ValueError, KVCacheError where it could not
            go on there; nothing has changed then.
        """
        with self.lock:
            check_ids(self.max_sequences, sequence)
            stop = check_contiguous(snapshots, self.specs)
            self.prepare_restore(sequence, [snapshot.parts for snapshot in snapshots], stop)()

    def schedule(self, sequence: int, positions: Iterable[int]) -> None:
        """Let snapshots of a sequence hold what going on at `positions` needs, too.

        It is retained when the passes that write there are over, even where a sliding window moves
        on then; batches need not end there. Positions that are written already may be too late.
        """
        raise _cannot_snapshot(self)

    @property
    def max_sequences(self) -> int:
        """Number of sequences that the cache was sized for."""
        raise _cannot_snapshot(self)

    @property
    def specs(self) -> list[CacheSpec]:
        """Specs of the parts that this cache contributes to a snapshot."""
        raise _cannot_snapshot(self)

    def next_position(self, sequence: int) -> int:
        """Return the position behind the last one of a sequence, 0 if it is empty."""
        raise _cannot_snapshot(self)

    def capture(self, sequence: int, start: int, stop: int) -> list[Part]:
        """Return the parts of :meth:`snapshot`."""
        raise _cannot_snapshot(self)

    def prepare_restore(
        self, sequence: int, parts: Sequence[Sequence[Part]], position: int
    ) -> Commit:
        """Check :meth:`restore` and return its commit. parts: of each snapshot, in order."""
        raise _cannot_snapshot(self)

    @abstractmethod
    def prepare_forward(self, batch: Batch, reserve: bool) -> Commit:
        """Check :meth:`start_forward` and return its commit."""

    @abstractmethod
    def prepare_copy_prefix(self, source: int, target: int, length: int) -> Commit:
        """Check :meth:`copy_prefix` and return its commit."""

    @abstractmethod
    def prepare_remove(self, sequence: int, start: int, stop: int | None) -> Commit:
        """Check :meth:`remove` and return its commit."""

    @abstractmethod
    def set_layer(self, layer: int) -> None:
        """Choose the layer that :meth:`put` and :meth:`get` apply to."""

    @abstractmethod
    def put(self, keys: Array, values: Array | None = None) -> None:
        """Store the keys and values of the pass's tokens, ``[kv_heads, tokens, head_dim]``."""

    @abstractmethod
    def get(self) -> tuple[Array, Array | None, Array | None]:
        """Return keys, values and mask of the history.

        Keys and values are ``[kv_heads, history, head_dim]`` (layout ``"htd"``), valid until the
        next put; the mask is ``[tokens, history]``.
        """

    def set_causal(self, except_: Sequence[int] = ()) -> None:
        """Let these batch indices see tokens ahead of them (image tokens), for this pass."""
        raise NotSupportedError(f"{type(self).__name__} knows no order of tokens to lift.")

    @abstractmethod
    def can_resume(self, sequence: int, position: int) -> bool:
        """Return whether all that a token at `position` may see is still stored."""

    @abstractmethod
    def to_backend(self, backend: str | Backend) -> Self:
        """Return an independent cache on `backend` with the same options, sequences and tokens.

        Bit for bit, laid out as :meth:`init` would there. This cache stays as it is. A pass does
        not come along: start the next one. Before :meth:`init`, which names the backend, the
        result is as uninitialised as this.

        Raises: DTypeError where `backend` lacks the dtype; UnknownBackendError,
            BackendNotAvailableError.
        """

    @abstractmethod
    def close(self) -> None:
        """Free all memory. The cache is of no further use."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _cannot_snapshot(cache: Cache) -> NotSupportedError:
    return NotSupportedError(f"{type(cache).__name__} offers no snapshots.")
