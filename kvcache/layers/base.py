"""The contract of per-layer caches, as needed to handle all layers of a model together."""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self, SupportsIndex, TypeVar

from kvcache._checks import as_sizes
from kvcache._types import Int32s
from kvcache.backends import Backend, portable_spec
from kvcache.errors import NotSupportedError
from kvcache.snapshots.rows import TokenRows
from kvcache.snapshots.visibility import Visibility
from kvcache.storage.arrays import LayerArrays

from .rewind import Rewind

R = TypeVar("R")
KINDS: dict[str, type[LayerCache]] = {}
"""Every kind of per-layer cache, by its name in files."""


class LayerCache(ABC):
    """State of one layer for one sequence of tokens, or for a batch of sequences, its rows.

    A token has a **position**, counted from the first token ever seen, and a **slot** in the
    buffers, which follows from it. All rows advance together: :attr:`offset`, the next position,
    is one for the batch. Shorter rows begin with padding, which it counts.

    Copies, files and pickles make a cache anew: ``cls.make(backend, cache.options)``. A subclass
    with a constructor of its own overrides :attr:`options`, or :meth:`make`.
    """

    rewound: Rewind | None = None
    """How far the tokens went back, the furthest since an owner that keeps records of them last
    set this to None."""
    kind: ClassVar[str]
    """Name of the class in files and snapshots; a subclass without its own has that of its base."""

    def __init_subclass__(cls) -> None:
        if "kind" in cls.__dict__:  # a subclass made by a user stays of the kind of its base
            KINDS[cls.kind] = cls

    # What is held.

    @property
    @abstractmethod
    def offset(self) -> int:
        """Tokens seen since the last reset, padding included: the position of the next one."""

    @property
    @abstractmethod
    def backend(self) -> Backend | None:
        """Backend of the buffers; None before the first update if none was named."""

    @property
    @abstractmethod
    def dtype(self) -> str | tuple[str, ...] | None:
        """Dtype of all arrays, or of each; None before the first update if none was named."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes allocated, spare capacity included."""

    def check_not_exported(self) -> None:  # noqa: B027 - a kind without exports has nothing to do
        """Raise ExportedError while a program has the state of the cache.

        Only offset, len, sizes, dtype and options can be read then.
        """

    @abstractmethod
    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` more tokens, so that they move nothing.

        Raises: ValueError for less than none; ExportedError; whatever the framework raises if
            memory runs out. The cache is unchanged then.
        """

    # Going back.

    @abstractmethod
    def can_trim(self, tokens: int) -> bool:
        """Return whether :meth:`trim` can take back this many tokens."""

    def last_trimmable(self, limit: int) -> int:
        """Return the last position up to `limit` that :meth:`trim` can go back to; 0 for none."""
        position = min(limit, self.offset)
        return position if self.can_trim(self.offset - position) else 0

    @abstractmethod
    def check_trim(self, tokens: int) -> None:
        """Raise TrimError unless :meth:`trim` can take back this many tokens."""

    @abstractmethod
    def trim(self, tokens: int) -> None:
        """Take back the last `tokens` tokens, as if they had never come. Ends a checkpoint.

        Raises: TrimError; the cache is unchanged then.
        """

    @abstractmethod
    def checkpoint(self) -> None:
        """Open a checkpoint for :meth:`rollback`; replaces an open one."""

    @abstractmethod
    def check_rollback(self, accepted: int) -> None:
        """Raise TrimError unless :meth:`rollback` can keep this many tokens."""

    @abstractmethod
    def rollback(self, accepted: int = 0) -> None:
        """Return to the checkpoint plus the first `accepted` tokens since, and close it.

        For speculative decoding: checkpoint, update with a draft, keep the accepted tokens.
        Exact also where :meth:`trim` would raise. A recurrent state has to have been recorded
        behind the accepted tokens.

        Raises: TrimError without a checkpoint, for more tokens than came since, or where no state
            was recorded.
        """

    @abstractmethod
    def reset(self) -> None:
        """Forget everything: the cache is as it was constructed.

        Its memory is freed with the last array that it returned.
        """

    @abstractmethod
    def savepoint(self) -> Callable[[], None]:
        """Return a function that undoes the next call that changes the cache, failed or not.

        For callers that change several caches, all or none. An :meth:`update` that succeeded is
        not undone: the tokens that it displaced are gone.
        """

    def _atomic(self, change: Callable[[], R]) -> R:
        """Return the result of `change`; if it raises, even by Ctrl-C, undo what it did."""
        undo = self.savepoint()
        try:
            return change()
        except BaseException:
            undo()
            raise

    # Resume points.

    def cuts(self, tokens: SupportsIndex) -> list[int]:
        """Return the positions inside the coming update behind which a state is wanted.

        Ascending, counted as :attr:`offset` is, its first and last position excluded. None where a
        cache needs no state to go back or to resume.

        Raises: ValueError for less than one token, ExportedError.
        """
        self.check_not_exported()
        as_sizes(tokens=tokens)
        return []

    # The batch axis.

    @property
    @abstractmethod
    def padding(self) -> Int32s | None:
        """Tokens that each row of the batch lacks on its left, int32 [B]; None if no row does."""

    @abstractmethod
    def pad(self, padding: Iterable[SupportsIndex]) -> None:
        """Declare that rows of the batch begin with so many tokens of padding.

        Before the first update. :attr:`offset` counts them, positions of a row do not.

        padding: a number for each row.

        Raises: ValueError for a cache with tokens, or a negative number; TypeError for no list of
            integers; ExportedError. ShapeError for other rows than came, or that come first.
        """

    @abstractmethod
    def check_select(self, rows: Iterable[SupportsIndex]) -> None:
        """Raise ValueError or TypeError unless :meth:`select` can take these rows."""

    @abstractmethod
    def select(self, rows: Iterable[SupportsIndex]) -> None:
        """Make row `i` of the batch what row ``rows[i]`` was: reorder, repeat and drop rows.

        Snapshots taken before stay as they are. An open checkpoint stays open, for the rows
        selected. Copies what the cache holds; the same rows in order cost nothing. A cache
        without tokens or declared padding has no rows, and does nothing.

        rows: indices from 0, any number of them, also several times.

        Raises: ValueError for a row that is not there, or for no row; TypeError for no list of
            integers; ExportedError. Nothing has changed then.
        """

    @abstractmethod
    def split(self, rows: Iterable[SupportsIndex] | None = None) -> list[Self]:
        """Return a cache for each row of the batch, without its padding; this one stays as it is.

        Copies; no checkpoints. The cache of a row that is all padding is empty; an empty cache
        has no rows.

        rows: indices from 0 of the rows wanted; None for all.

        Raises: ExportedError; as :meth:`select` for rows that are not there.
        """

    @classmethod
    @abstractmethod
    def concat(cls, caches: Sequence[Self]) -> Self:
        """Return a cache with the rows of all `caches`, which stay as they are.

        Rows end at one position: shorter ones get padding on their left, as little as possible.
        A row that is all padding stays that. Copies; no checkpoints.

        caches: with tokens, of one kind with the same options, on one backend, alike but for their
            number of rows; or all of them empty.

        Raises: ValueError for no cache, for empty ones among others, or for other options;
            ShapeError if they are not alike; ExportedError.
        """

    # Snapshots. A row is the share of one position in all arrays of the layer.

    @property
    @abstractmethod
    def visibility(self) -> Visibility:
        """Rule for the positions to hold when resuming: :meth:`Visibility.needed`."""

    @abstractmethod
    def schedule(self, positions: Iterable[int]) -> None:
        """Make `positions`, not reached yet, resume points of later snapshots.

        Rows needed to resume there are retained before an update displaces them. Updates need
        not end at these positions.
        """

    @abstractmethod
    def capture(self, start: int, stop: int) -> TokenRows:
        """Return the rows of positions ``[start, stop)``, held in slots or retained.

        Rows in slots are pinned, not copied, unless retained rows on the host join them.
        """

    @abstractmethod
    def restore_rows(self, parts: Sequence[TokenRows], offset: int, backend: Backend) -> None:
        """Fill this empty cache with the rows of `parts` needed to resume at `offset`.

        parts: ascending, and complete as :attr:`visibility` demands.
        backend: that of the cache, or one for a cache that names none.
        """

    # Copies and files.

    @property
    @abstractmethod
    def options(self) -> Mapping[str, int | str | None]:
        """Arguments of the constructor, except the backend."""

    @classmethod
    def make(cls, backend: str | Backend | None, options: Mapping[str, Any]) -> Self:
        """Return an empty cache with these :attr:`options`.

        Raises: NotSupportedError for a constructor that does not take them.
        """
        constructor: Callable[..., Self] = cls
        try:
            return constructor(backend=backend, **options)
        except TypeError as error:
            if _accepts(constructor, options):
                raise  # an error within the constructor
            raise NotSupportedError(
                f"a copy of a cache is made by its constructor, with backend and the options "
                f"{', '.join(options)}; that of {cls.__name__} takes "
                f"{inspect.signature(constructor)}. Override the property `options`, or the "
                "classmethod `make`."
            ) from error

    @abstractmethod
    def to_layer(self) -> LayerArrays:
        """Return host copies of the tokens held; no arrays from an empty cache."""

    @abstractmethod
    def from_layer(self, arrays: LayerArrays, offset: int) -> None:
        """Fill this empty cache with `arrays` of :meth:`to_layer`; the next token is at `offset`.

        Raises: KVCacheError for a cache that names no backend.
        """

    @abstractmethod
    def copy(self) -> Self:
        """Return an independent cache with the same tokens; no checkpoint.

        ``copy.copy`` and ``copy.deepcopy`` do the same.

        Raises: NotSupportedError for a subclass that :meth:`make` cannot make.
        """

    @abstractmethod
    def to_backend(self, backend: str | Backend) -> Self:
        """Return an independent copy on `backend`, equal bit for bit; no checkpoint.

        Each token is copied once, directly where the two frameworks can share memory, else
        through the host. This cache stays as it is.

        Raises: DTypeError where `backend` lacks the dtype; UnknownBackendError,
            BackendNotAvailableError.
        """

    def __copy__(self) -> Self:
        return self.copy()

    def __deepcopy__(self, memo: dict[int, object]) -> Self:
        return self.copy()

    def __reduce__(self) -> tuple[Callable[..., LayerCache], tuple[object, ...]]:
        """Pickle options and tokens, through the host, and the name of the backend.

        Raises: NotSupportedError for a backend that has no name.
        """
        spec = None if self.backend is None else portable_spec(self.backend)
        return _unpickled, (type(self), spec, dict(self.options), self.to_layer(), self.offset)


def kind_of(cls: type[LayerCache]) -> str:
    """Return the kind of a class. Raises: NotSupportedError for one without."""
    kind: str | None = getattr(cls, "kind", None)
    if kind is None:
        raise NotSupportedError(
            f"files and snapshots name the kind of a cache; {cls.__name__} has none. "
            "Set the class attribute `kind`."
        )
    return kind


def _accepts(constructor: Callable[..., object], options: Mapping[str, object]) -> bool:
    try:
        inspect.signature(constructor).bind(backend=None, **options)
    except TypeError:
        return False
    return True


def _unpickled(
    kind: type[LayerCache],
    spec: str | None,
    options: Mapping[str, Any],
    arrays: LayerArrays,
    offset: int,
) -> LayerCache:
    """Return a cache with these tokens on the backend called `spec`.

    Raises: UnknownBackendError, BackendNotAvailableError if that backend is not there.
    """
    cache = kind.make(spec, options)
    if offset:
        cache.from_layer(arrays, offset)
    return cache
