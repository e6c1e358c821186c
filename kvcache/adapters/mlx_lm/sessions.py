"""Sessions of requests under mlx-lm: a prompt cache, and what is stored of it at the end."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self

import mlx.core as mx
from mlx.nn.layers.base import Module
from mlx_lm.generate import generation_stream

from kvcache import LayerCaches, PrefixCache
from kvcache.prefix import Session
from kvcache.prefix.leaving import end_after

from .lists import Entry
from .making import PromptCache, caches_of, layer_caches, prompt_cache

_STEP = 2048
"""Tokens of a prompt computed in one go, as by mlx-lm."""


class PromptSession:
    """One request: a prompt cache that begins with stored results, and the rest of the prompt.

    ::

        with prefix.session(tokens) as s:
            for response in stream_generate(model, tokenizer, s.remaining, prompt_cache=s.cache):
                s.extend([response.token])

    Leaving it stores the tokens that were named and computed, by an exception as well unless
    ``keep_on_error=False`` was given; beside a draft model, an exception leaves those of the
    prompt. After that its prompt cache is empty.

    cache: the prompt cache: for the model, and behind that for the draft model if there is one.
    """

    def __init__(
        self,
        models: Sequence[Module],
        prefix: PrefixCache,
        session: Session,
        tokens: list[int],
        salt: str,
        keep_on_error: bool,
    ) -> None:
        self._models, self._prefix, self._session = models, prefix, session
        self._tokens, self._salt, self._keep_on_error = tokens, salt, keep_on_error
        self._caches = session.caches
        self._parts = prompt_caches(models, self._caches)
        self.cache: PromptCache = [entry for part in self._parts for entry in part]
        self._named: list[int] = []
        # Not up to the last of them: mlx-lm itself ends a pass one token before the end.
        self._run_to(self._cuts(len(self.remaining) - 1))

    @property
    def matched(self) -> int:
        """Tokens of the prompt that were reused."""
        return self._session.matched

    @property
    def stored(self) -> int:
        """Tokens at the beginning of the prompt that are stored, and were matched if possible."""
        return self._session.stored

    @property
    def limited_by(self) -> tuple[int, ...]:
        """Indices of the caches that kept the hit from going deeper, () if none did."""
        return self._session.limited_by

    @property
    def computed(self) -> list[int]:
        """Tokens of the prompt that the prompt cache holds."""
        return self._tokens[: self._caches.offset]

    @property
    def remaining(self) -> list[int]:
        """Tokens of the prompt to compute, at least one."""
        return self._tokens[self._caches.offset :]

    def extend(self, tokens: Iterable[int]) -> None:
        """Name tokens that were generated, behind those named before."""
        self._named += tokens
        # A draft model takes back what was rejected once the token in its place came, which would
        # lose its name.
        if len(self._parts) == 1:
            self._name()

    def truncate(self, length: int) -> None:
        """Keep the first `length` tokens only; see :meth:`kvcache.prefix.Session.truncate`."""
        self._name()
        self._session.truncate(length)

    def prefill(self) -> None:
        """Compute the prompt but for its last token here, if a batch would lose resume points.

        A batch has caches of its own, joined of those of its rows. What windows and recurrent
        layers keep for later requests stays here. Without such layers nothing is computed.
        """
        if all(cache.visibility.resumable_anywhere for cache in self._caches):
            return
        last = len(self._tokens) - 1
        self._run_to([*self._cuts(len(self.remaining)), last])

    def finish(self, tokens: Sequence[int], prompt_cache: Iterable[Entry]) -> None:
        """End the session, and store what a batch computed for its request.

        tokens: all that `prompt_cache` holds, those of the prompt first. The generators of mlx-lm
            give both with the last response of a request. prompt_cache: taken over.
        """
        self._session.close()
        self._prefix.insert(tokens, caches_of(prompt_cache), salt=self._salt)

    def close(self, store: bool = True) -> None:
        """End the session, and store the tokens computed unless `store` is False.

        Ending it again does nothing.
        """
        if store and self._named:
            self._name()
        self._session.close(store)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            return self.close()
        if len(self._parts) > 1:  # drafts that were rejected may still be in the caches
            self._named = []
        end_after(error, partial(self.close, self._keep_on_error))
        return None

    def _name(self) -> None:
        named, self._named = self._named, []
        self._session.extend(named)

    def _cuts(self, tokens: int) -> list[int]:
        """Return the positions inside of the next `tokens` tokens that want a state."""
        return self._caches.cuts(tokens) if tokens > 0 else []

    def _run_to(self, stops: Iterable[int]) -> None:
        """Run the models over the prompt, in pieces that end at `stops`, ascending."""
        for stop in stops:
            while (start := self._caches.offset) < stop:
                piece = mx.array([self._tokens[start : min(stop, start + _STEP)]])
                with mx.stream(generation_stream):
                    for model, entries in zip(self._models, self._parts, strict=True):
                        model(piece, cache=entries)
                        mx.eval([entry.state for entry in entries])


def prompt_caches(models: Sequence[Module], caches: LayerCaches[Any]) -> list[PromptCache]:
    """Return a prompt cache for each model, of `caches` for the layers of all of them."""
    parts, start = [], 0
    for model in models:
        stop = start + len(layer_caches(model))
        parts.append(prompt_cache(model, caches[start:stop]))
        start = stop
    # Restored tokens may still be on their way: an update before they have come copies them again.
    mx.eval([entry.state for part in parts for entry in part])
    return parts
