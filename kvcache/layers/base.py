"""The contract of per-layer caches, as far as the caches of all layers are handled together."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar, Self

from kvcache.backends import Backend
from kvcache.snapshots.rows import TokenRows
from kvcache.snapshots.visibility import Visibility
from kvcache.storage.arrays import LayerArrays

KINDS: dict[str, type[LayerCache]] = {}
"""Every kind of per-layer cache, by the name that files give it."""


class LayerCache(ABC):
    """State of one layer for one stream of tokens, or for a batch of equally long ones.

    Two notions, kept apart: the **position** of a token, counted from the first ever seen, and
    its **slot** in the buffers. The slot follows from the position alone, so that
    :attr:`offset`, the next position, is the only counter.
    """

    kind: ClassVar[str]
    """Name of the class in files."""

    def __init_subclass__(cls) -> None:
        if "kind" in cls.__dict__:  # a user's subclass of one kind is still that kind
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
        """Whether :meth:`trim` can take back this many tokens."""

    @abstractmethod
    def check_trim(self, tokens: int) -> None:
        """Raise TrimError unless :meth:`trim` can take back this many tokens."""

    @abstractmethod
    def trim(self, tokens: int) -> None:
        """Take back the last `tokens` tokens: as if they had never come. Ends a checkpoint.

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

        For speculative decoding: checkpoint, update with a draft, keep what was accepted.
        Exact on every cache, also where :meth:`trim` cannot be.

        Raises: TrimError without a checkpoint or for more tokens than came since.
        """

    @abstractmethod
    def reset(self) -> None:
        """Forget everything and free the memory: the cache is as it was constructed."""

    # Snapshots. Rows are those of the arrays at one position.

    @property
    @abstractmethod
    def visibility(self) -> Visibility:
        """Positions that must be held to go on at one: :meth:`Visibility.needed`."""

    @abstractmethod
    def schedule(self, positions: Iterable[int]) -> None:
        """Let snapshots hold what going on at `positions`, not reached yet, needs.

        It is retained when it would be displaced; updates need not end there.
        """

    @abstractmethod
    def capture(self, start: int, stop: int) -> TokenRows:
        """Return the rows held of positions ``[start, stop)``, and those retained. No copy."""

    @abstractmethod
    def restore_rows(self, parts: Sequence[TokenRows], offset: int, backend: Backend) -> None:
        """Let this empty cache hold what it needs of `parts` to go on at `offset`.

        parts: in order, complete; `backend` is the cache's, or one for a cache that names none.
        """

    # Copies and files.

    @property
    @abstractmethod
    def options(self) -> Mapping[str, int | str | None]:
        """Arguments of the constructor apart from the backend."""

    @classmethod
    def make(cls, backend: str | Backend | None, options: Mapping[str, Any]) -> Self:
        """Return an empty cache with these :attr:`options`."""
        constructor: Callable[..., Self] = cls
        return constructor(backend=backend, **options)

    @abstractmethod
    def to_layer(self) -> LayerArrays:
        """Return host copies of the tokens held; no arrays if there are none."""

    @abstractmethod
    def from_layer(self, arrays: LayerArrays, offset: int) -> None:
        """Let this empty cache, whose backend is named, hold `arrays` of :meth:`to_layer`."""

    @abstractmethod
    def copy(self) -> Self:
        """Return an independent cache with the same tokens and room for them; no checkpoint."""

    @abstractmethod
    def to_backend(self, backend: str | Backend) -> Self:
        """Return an independent cache on `backend`, the same bit for bit; no checkpoint.

        Each token is copied once, straight from this memory where the two frameworks can share
        it, else through the host. This cache stays as it is.

        Raises: DTypeError where `backend` lacks the dtype; UnknownBackendError,
            BackendNotAvailableError.
        """
