"""Sessions: one request each, from its prompt to its last token."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import NoReturn, Self

from kvcache.errors import KVCacheError, NotSupportedError
from kvcache.layers.growing import KVCache
from kvcache.layers.stack import LayerCaches

from .media import Placement, check_token_ids
from .radix import Tokens, as_tokens
from .sequences import SequenceHandle
from .stored import StoredSpan


@dataclass(eq=False)  # two requests of equal content are still two
class Request:
    """State of one request, shared by its session and the prefix cache.

    handle: its sequence. ids: token ids of the prompt, with stand-ins for media, then those of
    each extension. media: where the stand-ins are. salt: that of its tree. matched: prompt tokens
    restored from storage. pinned: the last span in use by it, None if nothing was restored.
    ended: whether its sequence was given back.
    """

    handle: SequenceHandle
    ids: list[Tokens]
    media: tuple[Placement, ...] = ()
    salt: str = ""
    matched: int = 0
    pinned: StoredSpan | None = None
    ended: bool = False


class Session:
    """One request: the part of its prompt computed already, and the rest to compute.

    Comes from :meth:`PrefixCache.session`. A context manager: leaving it stores the tokens
    computed, leaving it with an exception stores nothing.
    """

    def __init__(
        self,
        request: Request,
        prompt: Tokens,
        lock: threading.RLock,
        end: Callable[[Request, bool], None],
    ) -> None:
        self._request, self._prompt, self._lock, self._end = request, prompt, lock, end

    def __reduce__(self) -> NoReturn:
        raise NotSupportedError(
            "a Session is not copied or pickled: it owns its sequence. Begin another one with "
            "PrefixCache.session, or copy its caches."
        )

    @property
    def matched(self) -> int:
        """Tokens of the prompt the sequence held from the beginning of the session."""
        return self._request.matched

    @property
    def remaining(self) -> Tokens:
        """Tokens of the prompt to compute, int32, at least one."""
        return self._prompt[self.matched :]

    @property
    def sequence(self) -> int:
        """Id of its sequence in the pool.

        Raises: KVCacheError over per-layer caches, which have no ids, and after the end of the
            session, when the sequence may be another one's.
        """
        if self._request.ended:
            raise KVCacheError("the session has ended, and its sequence with it. Begin another.")
        return self._request.handle.sequence

    @property
    def caches(self) -> LayerCaches[KVCache]:
        """Caches of this session alone, one per layer.

        Raises: KVCacheError over a pool, whose one cache all sessions share.
        """
        return self._request.handle.caches

    def extend(self, tokens: Sequence[int] | Tokens) -> None:
        """Name the tokens after the prompt; at the end, all computed of them are stored."""
        ids = as_tokens(tokens)
        check_token_ids(ids, {})
        self._request.ids.append(ids)

    def schedule(self, positions: Iterable[int]) -> None:
        """Make `positions` resume points: keep their rows where a window or ring would drop any."""
        with self._lock:
            self._request.handle.schedule(positions)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._end(self._request, kind is None)
