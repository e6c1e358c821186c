"""Sessions: one request each, from its prompt to its last token."""

from __future__ import annotations

import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from types import TracebackType
from typing import Any, NoReturn, Self

from kvcache._checks import as_room
from kvcache._interrupts import uninterrupted
from kvcache.errors import KVCacheError, NotSupportedError
from kvcache.layers.stack import LayerCaches

from .arguments import as_positions
from .explain import Noted, explain
from .known import KnownTokens, own_tokens
from .leaving import end_after
from .media import check_token_ids
from .policies import EndedRequest, EvictionPolicy
from .radix import Tokens
from .reasons import Explanation, Why
from .retention import RetainedRange
from .sequences import SequenceHandle
from .stored import NO_HIT, Hit, StoredSpan
from .usage import Usage


@dataclass(eq=False)  # two requests of equal content are still two
class Request:
    """State of one request, shared by its session and the prefix cache.

    handle: its sequence. known: token ids of its rows, those of the prompt first. hit: the part of
    the prompt that was restored from storage. pinned: the last span in use by it, None if nothing
    was restored. ended: whether the sequence was given back. detached: whether the caller keeps it.
    points: positions for later requests to resume at. prompt: its tokens, 0 for caches that were
    inserted. created: those of them that it stored, and nobody before it. asked: times at which it
    used spans, by the clock of the prefix cache. begun, answered: times at which it began (None
    once it was counted), and at which its first token behind the prompt was named (None before), in
    seconds. noted: of its beginning, to explain it. lacks: why tokens did not come from a store.
    explained: whether its reasons were counted. retain: to be retained of what it stores. dropped:
    position from which on nothing of it is to be stored, None for everything.
    """

    handle: SequenceHandle
    known: KnownTokens
    hit: Hit = NO_HIT
    pinned: StoredSpan | None = None
    ended: bool = False
    detached: bool = False
    points: set[int] = field(default_factory=set)
    prompt: int = 0
    created: int = 0
    asked: set[float] = field(default_factory=set)
    begun: float | None = field(default_factory=time.monotonic)
    answered: float | None = None
    noted: Noted = field(init=False, repr=False)  # by the beginning of a session
    lacks: dict[int, Why] = field(default_factory=dict)
    explained: bool = False
    retain: tuple[RetainedRange, ...] = ()
    dropped: int | None = None

    def prompt_tokens_in(self, span: StoredSpan) -> int:
        """Return the number of tokens of the prompt in `span`, one of its sequence."""
        return max(0, min(span.stop, self.prompt) - span.start)

    def tell_end(self, policy: EvictionPolicy, spans: Sequence[StoredSpan], now: float) -> None:
        """Tell `policy` of its end. spans: of its tokens.

        A detached one goes on elsewhere, nobody knows until when.
        """
        if not self.detached:
            answered = max(0, len(self.known) - self.prompt)
            policy.ended(EndedRequest(spans, self.prompt, answered, self.asked), now)


class Session:
    """One request: the part of its prompt computed already, and the rest to compute.

    Comes from :meth:`PrefixCache.session`. A context manager: leaving it stores the tokens
    computed, as :meth:`close` does. Leaving it by an exception (an error, Ctrl-C, the cancel of a
    task) stores what passes had completed by then, unless ``keep_on_error=False`` was given. The
    exception goes on in any case: if nothing could be stored, it has a note of that. A session that
    is dropped instead stores nothing, and gives its sequence back with the next call of the prefix
    cache.

    The tokens stored are those that were named, by the prompt or :meth:`extend`, and computed, as
    far as their keys and values are those of a run of just these tokens. The session follows what
    is done to its sequence. Tokens that are taken back (``remove``, ``trim``, ``rollback``,
    ``functional.trim``) are forgotten, and their successors are named by :meth:`extend`. Behind a
    change of any other kind (removal from the middle, ``copy_prefix`` from elsewhere, ``restore``,
    ``set_causal`` across the bounds of a medium, a token computed where the window before it was
    lost) nothing is stored.
    """

    def __init__(
        self,
        request: Request,
        prompt: Tokens,
        lock: threading.RLock,
        store: Callable[[Request], None],
        end: Callable[[Request, bool, bool], None],
        drop_branch: Callable[[Request, int], None],
        dropped: deque[Request],
        *,
        keep_on_error: bool,
    ) -> None:
        self._request, self._prompt, self._lock = request, prompt, lock
        self._store, self._end, self._keep_on_error = store, end, keep_on_error
        self._drop_branch = drop_branch
        # It may run in any thread at any line, also within a change of the prefix cache, so it
        # makes a note only. It must not keep this session alive, nor the prefix cache.
        self._finalizer = weakref.finalize(self, dropped.append, request)
        self._finalizer.atexit = False

    def __reduce__(self) -> NoReturn:
        raise NotSupportedError(
            "a Session is not copied or pickled: it owns its sequence. Begin another one with "
            "PrefixCache.session, or copy its caches."
        )

    @property
    def matched(self) -> int:
        """Tokens of the prompt the sequence held from the beginning of the session."""
        return self._request.hit.matched

    @property
    def stored(self) -> int:
        """Tokens at the beginning of the prompt that are stored, and were matched if possible."""
        return self._request.hit.stored

    @property
    def limited_by(self) -> tuple[int, ...]:
        """Indices of the caches that kept the hit from going deeper, () if none did.

        Of per-layer caches these are layers; over a pool, indices of the ``caches`` of a
        :class:`~kvcache.WrapperCache`. Each of them alone could go on no later than at the least
        position of all; a window had dropped tokens behind it, say, or no state was kept.
        """
        return self._request.hit.limited_by

    @property
    def remaining(self) -> Tokens:
        """Tokens of the prompt to compute, at least one: int32, read-only."""
        return self._prompt[self.matched :]

    @property
    def usage(self) -> Usage:
        """Tokens of the prompt, reused and stored, for APIs: complete when the session has ended.

        After :meth:`commit`, those stored by then are counted.
        """
        # What was stored, evicted and stored again counts once.
        created = min(self._request.created, self._prompt.size - self.matched)
        return Usage(self._prompt.size, self.matched, created)

    def explain(
        self, *, decode: Callable[[list[int]], str] | None = None, other_salts: bool = False
    ) -> Explanation:
        """Return why tokens of the prompt were not reused: one reason for each of them.

        As of the beginning of the session, whenever it is asked for, also after the end.

        decode: makes text of token ids, to show where the prompt left a stored sequence.
        other_salts: look for the tokens under other salts, as of now. It tells that another tenant
            has sent them: for operators, not to be shown to tenants.

        Raises: TypeError unless `decode` is a function that returns text, and `other_salts` a
            bool; what `decode` raises. Nothing is counted then.
        """
        return explain(self._request, self._lock, decode, other_salts=other_salts)

    @property
    def sequence(self) -> int:
        """Id of its sequence in the pool.

        Raises: KVCacheError over per-layer caches, which have no ids, or after the end.
        """
        return self._handle.sequence

    @property
    def caches(self) -> LayerCaches[Any]:
        """Caches of this session alone, one per layer, of the kinds that were given.

        Raises: KVCacheError over a pool, whose one cache all sessions share, or after the end.
        """
        return self._handle.caches

    @property
    def _handle(self) -> SequenceHandle:
        if self._request.ended:
            raise KVCacheError(
                "a session has a sequence until it ends, and this one has ended. Begin another."
            )
        return self._request.handle

    def extend(self, tokens: Sequence[int] | Tokens) -> None:
        """Name the tokens behind those known, computed or not; an array is copied.

        At the end, all that are computed by then are stored. Tokens computed and never named are
        not, nor is anything behind them. Take tokens back before others are named in their place.

        Raises: ValueError for no list of ids, KVCacheError after the end.
        """
        ids = own_tokens(tokens)
        check_token_ids(ids, {})
        with self._lock:
            self._handle.update_known()
            known, handle = self._request.known, self._request.handle
            # Whoever names the next token has seen the whole model compute those before.
            if not handle.settled and handle.held(len(known)) == len(known):
                handle.settle()
            known.append(ids)
            if self._request.answered is None:
                self._request.answered = time.monotonic()

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens only, of those named and of those computed.

        For a draft that was rejected, say. Taking tokens back in the caches does the same to their
        names; this also takes back names of tokens not computed yet. Resume points behind are ahead
        again.

        Raises: TrimError where a ring cannot go back (use ``caches.rollback``), ValueError for a
            negative length, KVCacheError after the end; nothing has changed then.
        """
        length = as_room(length, "length")
        with self._lock, uninterrupted():
            self._handle.truncate(length)
            self._request.known.cut(length)

    def schedule(self, positions: Iterable[int]) -> None:
        """Make `positions` resume points: keep their rows where a window or ring would drop any.

        Raises: KVCacheError after the end; TypeError, ValueError for anything but positions >= 0;
            nothing has changed then.
        """
        points = as_positions(positions, "resume points")
        with self._lock:
            self._handle.schedule(points)
            self._request.points.update(points)

    def drop_branch(self, position: int) -> None:
        """Declare the tokens of this session from `position` on dead: nobody will ask for them.

        For reasoning that the next prompt will not have, or a turn that is about to be edited. They
        are not stored, whatever is computed there later, and what is stored of them is evicted at
        once, save what other sessions use, or sequences that part from them later; what this
        session itself began with goes when it ends. Pages in a store stay.

        To go on at `position` later, where a window or ring drops tokens, :meth:`schedule` it in
        time; the end of the prompt always is scheduled.

        Raises: KVCacheError after the end; TypeError, ValueError for anything but a position >= 0;
            nothing has changed then.
        """
        start = as_room(position, "position")
        with self._lock:
            self._handle.update_known()
            self._drop_branch(self._request, start)

    def adopt(self, caches: LayerCaches[Any]) -> None:
        """Go on with `caches` in place of its own, which are left to the caller.

        For a request that goes on in a batch: join the caches of several sessions, and give each
        its row of :meth:`LayerCaches.split` in the end. They hold what a run of the tokens named
        leaves, as far as they go; the session owns them from here on, and follows what is done to
        them. Resume points scheduled in its own caches are not theirs.

        Raises: KVCacheError over a pool, after the end, or for caches of another open session;
            TypeError, ValueError for caches of other kinds, options or rows; nothing has changed
            then.
        """
        with self._lock, uninterrupted():
            self._handle.adopt(caches)

    def commit(self) -> None:
        """Store the tokens named and computed so far, for other sessions, and go on.

        Raises: KVCacheError after the end; the prefix cache is unchanged then, and if a framework
            fails.
        """
        with self._lock:
            self._handle.update_known()
            self._store(self._request)

    def close(self, store: bool = True) -> None:
        """End the session, and store the tokens computed unless `store` is False.

        Ending it again does nothing.
        """
        self._finish(store)

    def _finish(self, store: bool, cut: bool = False) -> None:
        """End the session. cut: whether its last pass may have been cut short."""
        self._end(self._request, store, cut)
        self._finalizer.detach()

    def detach(self) -> LayerCaches[Any]:
        """End the session, storing nothing, and return its caches, which stay as they are.

        For a program that goes on with them for longer than it keeps a session: a server, say.
        :meth:`PrefixCache.insert` stores their tokens later.

        Raises: KVCacheError over a pool, or after the end.
        """
        with self._lock, uninterrupted():
            caches = self._handle.caches
            self._request.detached = True
            self.close(store=False)
        return caches

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            self.close()
        else:
            end_after(error, partial(self._finish, self._keep_on_error, cut=True))
