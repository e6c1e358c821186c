"""The contract of multi-sequence caches, between a model and its runner."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Sequence
from types import TracebackType
from typing import Self, TypeVar

from kvcache._checks import as_index, check_ids, check_range
from kvcache._locks import Lock
from kvcache.backends import Array, Backend, CacheConfig, get_backend, portable_spec
from kvcache.errors import NotSupportedError
from kvcache.snapshots.resuming import check_contiguous
from kvcache.snapshots.rows import exchange
from kvcache.snapshots.snapshot import CacheSpec, Part, Snapshot

from .ahead import TokensAhead
from .attention_calls import AttentionCalls
from .batch import Batch
from .latest import UNFINISHED
from .owned import Commit, OwnedCache
from .owners import Owners
from .state_calls import StateCalls

C = TypeVar("C", bound="Cache")


class Cache(AttentionCalls, StateCalls, OwnedCache):
    """Keys and values of many sequences, for all layers of a model.

    The model chooses the cache and calls :meth:`set_layer`, :meth:`put` and :meth:`attend` (or
    :meth:`get`) for each layer; the runner calls everything else. Every change happens as a whole,
    or raises and changes nothing. Changes have two halves for that: a ``prepare_`` method checks
    and may raise, the commit that it returns cannot fail. A wrapper prepares all its caches, then
    commits.

    A subclass calls ``super().__init__()``.
    """

    @property
    def backend(self) -> Backend | None:
        """Backend of the memory; None before :meth:`init`."""
        raise NotSupportedError(f"{type(self).__name__} does not say which backend it is on.")

    @abstractmethod
    def set_config(self, config: CacheConfig) -> None:
        """Override the layout chosen by the backend. Called by the model, before :meth:`init`."""

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
        """Size the cache. Each layer's memory is allocated by its first put.

        dtype: of keys and values, a name in ``HOST_DTYPES``.
        max_sequences: sequence ids are 0 to ``max_sequences - 1``.
        capacity: tokens per sequence on average: together they size the pool, and one sequence may
            use more while others use less.
        max_batch: tokens of a pass that a pool with a window has room for, however full it is.

        Raises: ValueError for sizes below 1, DTypeError where the backend lacks the dtype,
            UnknownBackendError, BackendNotAvailableError.
        """

    def start_forward(self, batch: Batch, reserve: bool = False) -> None:
        """Begin a pass: find cells for its tokens, for :meth:`put` and :meth:`get` to use.

        Its tokens become history when the pass is complete: every layer allocated when it began
        has been put, one at least. A pass that was not completed is taken back first.

        reserve: begin the largest possible pass instead, to allocate its memory; puts then store
            nothing.

        Raises: CacheFullError, ValueError; nothing has changed then.
        """
        with self.lock:
            if self._enclosing is not None or self.pass_progress() in UNFINISHED:
                self.take_back_unfinished()
            self.begin_pass(batch, reserve)

    def begin_pass(self, batch: Batch, reserve: bool) -> None:
        """Begin a pass, whatever has become of the one before; undo it if it is interrupted."""
        commit = self.prepare_forward(batch, reserve)
        try:
            commit()
        except BaseException:  # Ctrl-C: a commit does not fail by itself
            self.revert_forward()
            raise

    def abort(self) -> None:
        """Take back a pass that will not be finished, in all its sequences.

        They are as before the pass, but for tokens that a window dropped for it and that were
        overwritten already. :meth:`start_forward` does the same to a pass that is not complete,
        and until then nobody sees its tokens.

        A complete pass that put layers for the first time is taken back as well, until another
        one begins or a session names the next token: it may have been cut short, as nothing tells
        how many layers a model has. After any other complete pass, nothing happens.
        """
        with self.lock:
            if self._enclosing is not None:
                self._enclosing.abort()
            elif self.is_unfinished() or self.latest_pass(0).grew:
                self._take_back()

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """Make `target` hold just the positions of `source` below `length`.

        Cells are shared, not copied. ``source == target`` truncates. The target can resume
        wherever the source can, up to `length`. Tokens of an unfinished pass are not shared, and
        those of `target` are dropped.

        Raises: ValueError for a source that holds nothing; nothing has changed then.
        """
        source, target = as_index(source, "source"), as_index(target, "target")
        length = as_index(length, "length")
        with self.lock:
            commit = self.prepare_copy_prefix(source, target, length)
            self.check_source(source)
            self._commit(commit, self.owners.of_copy(self, source, target, length))

    def check_source(self, source: int) -> None:
        """Raise ValueError if :meth:`copy_prefix` finds nothing to copy in `source`."""
        if not self.holds_tokens(source):
            raise ValueError(f"copy_prefix needs a source that holds tokens; {source} is empty.")

    def holds_tokens(self, sequence: int) -> bool:
        """Return whether a sequence holds anything; of a wrapper, in any of its caches."""
        return True

    def remove(self, sequence: int, start: int, stop: int | None = None) -> None:
        """Forget positions ``[start, stop)`` of a sequence, to its end if `stop` is None.

        Later positions move down by ``stop - start``, and their keys are shifted. In the middle of
        a pass with tokens of this sequence, these are dropped, and the pass goes on without it.

        Raises: ValueError, NotSupportedError without a shift, SharedCellsError where a cell
            that would move belongs to another sequence too; nothing has changed then.
        """
        sequence, start = as_index(sequence, "sequence"), as_index(start, "start")
        stop = None if stop is None else as_index(stop, "stop")
        with self.lock:
            commit = self.prepare_remove(sequence, start, stop)
            self._commit(commit, self.owners.of_removal(self, sequence, start, stop))

    # Snapshots.

    def snapshot(self, sequence: int, start: int = 0, stop: int | None = None) -> Snapshot:
        """Return a snapshot of positions ``[start, stop)`` of a sequence, as far as held.

        stop: None for the end.

        Tokens of an unfinished pass are not part of it. Rows stay in their cells, uncopied, where
        the cache can pin these (not :class:`EncoderCache`). The caller closes the snapshot.

        Raises: ValueError, NotSupportedError for a cache without snapshots.
        """
        sequence, start = as_index(sequence, "sequence"), as_index(start, "start")
        stop = None if stop is None else as_index(stop, "stop")
        with self.lock:
            check_ids(self.max_sequences, sequence)
            stop = self.next_position(sequence) if stop is None else stop
            check_range(start, stop)
            specs = self.specs
            return exchange(
                (),
                lambda: (part.rows for part in self.capture(sequence, start, stop)),
                lambda rows: Snapshot(start, stop, list(map(Part, specs, rows))),
            )

    def restore(self, sequence: int, *snapshots: Snapshot, stop: int | None = None) -> None:
        """Fill an empty sequence from `snapshots`, to resume where the last one stops.

        snapshots: in order and without gaps, the first from position 0. They stay as they are;
            resident ones of this cache share their cells with the sequence.
        stop: position inside the last one to resume at instead.

        Raises: SnapshotMismatchError, CacheFullError, ValueError, KVCacheError if the position is
            no resume point; nothing has changed then.
        """
        sequence = as_index(sequence, "sequence")
        with self.lock:
            check_ids(self.max_sequences, sequence)
            stop = check_contiguous(snapshots, self.specs, stop)
            parts = [snapshot.parts for snapshot in snapshots]
            commit = self.prepare_restore(sequence, parts, stop)
            self._commit(commit, self.owners.of_restore(sequence))

    def schedule(self, sequence: int, positions: Iterable[int]) -> None:
        """Make `positions` resume points of a sequence for its later snapshots.

        Rows needed to resume there are retained once written, before a sliding window drops
        them; batches need not end at these positions. For a position written already it may be
        too late. A removal forgets those behind it, unless a session named them.
        """
        raise _cannot_snapshot(self)

    @property
    def max_sequences(self) -> int:
        """Number of sequences given to :meth:`init`."""
        raise _cannot_snapshot(self)

    @property
    def specs(self) -> list[CacheSpec]:
        """Specs of the parts of this cache in a snapshot, in order."""
        raise _cannot_snapshot(self)

    def next_position(self, sequence: int) -> int:
        """Return the position after the last one of a sequence; 0 for an empty one.

        Tokens of an unfinished pass do not count.
        """
        raise _cannot_snapshot(self)

    def capture(self, sequence: int, start: int, stop: int) -> list[Part]:
        """Return the parts of :meth:`snapshot`, whose arguments are checked; all of them or none.

        Interrupts are held back during this call.
        """
        raise _cannot_snapshot(self)

    def prepare_restore(
        self, sequence: int, parts: Sequence[Sequence[Part]], position: int
    ) -> Commit:
        """Check :meth:`restore` and return its commit. parts: those of each snapshot, in order."""
        raise _cannot_snapshot(self)

    @abstractmethod
    def prepare_forward(self, batch: Batch, reserve: bool) -> Commit:
        """Check :meth:`start_forward` and return its commit."""

    def revert_forward(self) -> None:
        """Undo the commit of :meth:`prepare_forward`, interrupted or not begun."""

    def note_whole(self) -> None:
        """Count the layers that the last pass has put, a complete one, as all of the model."""

    def drop_pass(self) -> None:
        """Take back the last pass, complete or not: see :meth:`abort`."""

    @abstractmethod
    def prepare_copy_prefix(self, source: int, target: int, length: int) -> Commit:
        """Check :meth:`copy_prefix` and return its commit."""

    @abstractmethod
    def prepare_remove(self, sequence: int, start: int, stop: int | None) -> Commit:
        """Check :meth:`remove` and return its commit."""

    @abstractmethod
    def set_layer(self, layer: int) -> None:
        """Choose the layer for :meth:`put` and :meth:`get`."""

    @abstractmethod
    def put(
        self, keys: Array, values: Array | None = None, frames: Sequence[int] | None = None
    ) -> None:
        """Store the keys and values of the pass's tokens, ``[kv_heads, tokens, head_dim]``.

        Axes are in the layout of the cache, ``"htd"`` by default. values: None for a layer of keys
        only. frames: for :meth:`EncoderCache.put` alone. The arrays are copied, and stay the
        caller's.

        Raises: ShapeError, DTypeError, KVCacheError without a pass; nothing is stored then.
        """

    @abstractmethod
    def get(self) -> tuple[Array, Array | None, Array | None]:
        """Return keys, values and mask of the history.

        Keys and values are ``[kv_heads, history, head_dim]`` (layout ``"htd"``), valid until the
        next put; the mask is ``[tokens, history]`` in the ``mask_dtype`` of the cache, None where
        every token sees everything. Values are None for a layer of keys only.

        Raises: KVCacheError without a pass, or for a layer that was never put.
        """

    def set_causal(self, except_: TokensAhead = ()) -> None:
        """Let some tokens see others ahead of them (images), for this pass.

        except_: batch indices, or one bool per token of the batch, in any list or array: these
            tokens see all of their sequence that is in the cache by then. Or groups of indices,
            one for each image: its tokens see each other and what comes before them, but no later
            image or text.

        Raises: ValueError for indices outside the batch, or a group of several sequences.
        """
        raise NotSupportedError(f"{type(self).__name__} knows no order of tokens to lift.")

    @abstractmethod
    def can_resume(self, sequence: int, position: int) -> bool:
        """Return whether every earlier token visible from `position` is still stored.

        Tokens of an unfinished pass do not count.
        """

    @abstractmethod
    def to_backend(self, backend: str | Backend) -> Self:
        """Return an independent cache on `backend` with the same options, sequences and tokens.

        Equal bit for bit, in the layout that :meth:`init` would choose there. This cache stays as
        it is. The current pass is not copied: start the next one. A cache that is not
        initialised yet gives another such cache.

        Raises: DTypeError where `backend` lacks the dtype; UnknownBackendError,
            BackendNotAvailableError.
        """

    def copy(self) -> Self:
        """Return an independent cache on the same backend, as :meth:`to_backend` does.

        ``copy.copy`` and ``copy.deepcopy`` do the same. Snapshots and scheduled resume points stay
        with this cache. Takes the lock, so it may be called from any thread between passes.

        Raises: NotSupportedError for a cache that does not say which backend it is on.
        """
        with self.lock:
            # Before init there is nothing to copy, so any backend serves.
            return self.to_backend(self.backend or "numpy")

    def __copy__(self) -> Self:
        return self.copy()

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        return self.copy()

    def __reduce__(self) -> tuple[Callable[..., Cache], tuple[object, ...]]:
        """Pickle the options, sequences and tokens, through the host, and the name of the backend.

        Raises: NotSupportedError for a backend that has no name.
        """
        with self.lock:
            spec = None if self.backend is None else portable_spec(self.backend)
            host = self.to_backend("numpy")
        return _unpickled, (type(self), host.__dict__, spec)

    def _shallow_copy(self) -> Self:
        """Return a cache that shares all with this one but the lock, for :meth:`to_backend`."""
        clone = object.__new__(type(self))
        clone.__dict__.update(self.__dict__)
        clone.lock, clone._enclosing, clone._owners = Lock(), None, Owners()
        return clone

    def close(self) -> None:
        """Free all memory. The cache is of no further use.

        Snapshots outlive it: their rows are copied to the host. If that fails, nothing has changed.
        """
        with self.lock:
            self._commit(self.prepare_close(), self.owners.all_gone)

    @abstractmethod
    def prepare_close(self) -> Commit:
        """Copy what outlives the cache, and return the commit of :meth:`close`."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _unpickled(kind: type[C], state: dict[str, object], spec: str | None) -> C:
    """Return a cache from its state on the host, moved to the backend called `spec`.

    Raises: UnknownBackendError, BackendNotAvailableError if that backend is not there.
    """
    target = None if spec is None else get_backend(spec)
    cache = object.__new__(kind)
    cache.__dict__.update(state)
    if target is not None:
        cache = cache.to_backend(target)
    cache.share_lock(Lock())  # one for all that it wraps, each of which was pickled with its own
    return cache


def _cannot_snapshot(cache: Cache) -> NotSupportedError:
    return NotSupportedError(f"{type(cache).__name__} offers no snapshots.")
