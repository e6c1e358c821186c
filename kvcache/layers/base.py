"""The contract of per-layer caches, as needed to handle all layers of a model together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self

from kvcache.backends import Backend
from kvcache.snapshots.rows import TokenRows
from kvcache.snapshots.visibility import Visibility
from kvcache.storage.arrays import LayerArrays

KINDS: dict[str, type[LayerCache]] = {}
"""Every kind of per-layer cache, by its name in files."""


class LayerCache(ABC):
    """State of one layer for one sequence of tokens, or for a batch of equally long ones.

    A token has a **position**, counted from the first token ever seen, and a **slot** in the
    buffers. The slot follows from the position alone, so :attr:`offset`, the next position, is
    the only counter.
    """

    kind: ClassVar[str]
    """Name of the class in files."""

    def __init_subclass__(cls) -> None:
        if "kind" in cls.__dict__:  # a subclass made by a user stays of the kind of its base
            KINDS[cls.kind] = cls

    # What is held.

    @property
    @abstractmethod
    def offset(self) -> int:
        """Tokens seen since the last reset: the position of the next one."""

    @property
    @abstractmethod
    def backend(self) -> Backend | None:
        """Backend of the buffers; None before the first update if none was named."""

    @property
    @abstractmethod
    def dtype(self) -> str | None:
        """Dtype of the arrays; None before the first update if none was named."""

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Bytes allocated, spare capacity included."""

    # Going back.

    @abstractmethod
    def can_trim(self, tokens: int) -> bool:
        """Return whether :meth:`trim` can take back this many tokens."""

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
        Exact on every cache, even one whose :meth:`trim` would raise.

        Raises: TrimError without a checkpoint or for more tokens than came since.
        """

    @abstractmethod
    def reset(self) -> None:
        """Forget everything and free the memory: the cache is as it was constructed."""

    @abstractmethod
    def savepoint(self) -> Callable[[], None]:
        """Return a function that undoes a failed call of this cache, or one that succeeded.

        For callers that change several caches, all or none. It undoes the last call that changes
        the cache, except :meth:`update`; call it before any other.
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
        """Return an empty cache with these :attr:`options`."""
        constructor: Callable[..., Self] = cls
        return constructor(backend=backend, **options)

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
        """Return an independent cache with the same tokens; no checkpoint."""

    @abstractmethod
    def to_backend(self, backend: str | Backend) -> Self:
        """Return an independent copy on `backend`, equal bit for bit; no checkpoint.

        Each token is copied once, directly where the two frameworks can share memory, else
        through the host. This cache stays as it is.

        Raises: DTypeError where `backend` lacks the dtype; UnknownBackendError,
            BackendNotAvailableError.
        """
