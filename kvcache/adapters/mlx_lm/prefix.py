"""Prefix reuse for the generators of mlx-lm: prompts begin with results of earlier ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeAlias

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module
from mlx_lm.generate import (
    BatchGenerator,
    BatchResponse,
    GenerationResponse,
    generation_stream,
    stream_generate,
)

from kvcache import LayerCaches, PrefixCache
from kvcache.backends import HostArray
from kvcache.prefix import EvictionPolicy, Session
from kvcache.prefix.leaving import end_after
from kvcache.prefix.retention import Retain
from kvcache.stores import Deadline, Store
from kvcache.stores.sealing import Seal

from .lists import Entry
from .making import PromptCache, caches_of, layer_caches, prompt_cache

Prompt: TypeAlias = Sequence[int] | mx.array | HostArray
_STEP = 2048
"""Tokens of a prompt computed in one go, as by mlx-lm."""


def prefix_cache(
    model: Module,
    draft_model: Module | None = None,
    *,
    max_kv_size: int | None = None,
    keep: int = 0,
    budget: int | None = 1 << 30,
    index_budget: int | None = None,
    policy: str | EvictionPolicy = "lru",
    namespace: str = "",
    clock: Callable[[], float] = time.monotonic,
    resume_every: int | None = None,
    store: str | Store | None = None,
    page_tokens: int = 64,
    seal: Seal | Callable[[str], Seal | None] | None = None,
) -> ModelPrefixCache:
    """Return a prefix cache for a model of mlx-lm.

    draft_model: of speculative decoding, for which prompts are stored as well. max_kv_size, keep:
        as for :func:`~kvcache.adapters.mlx_lm.make_prompt_cache`. The others are those of
        :class:`kvcache.PrefixCache`.
    """
    models = [model] if draft_model is None else [model, draft_model]
    layers = [cache for each in models for cache in layer_caches(each, max_kv_size, keep)]
    prefix = PrefixCache(
        layers,
        budget=budget,
        index_budget=index_budget,
        policy=policy,
        namespace=namespace,
        clock=clock,
        resume_every=resume_every,
        store=store,
        page_tokens=page_tokens,
        seal=seal,
    )
    return ModelPrefixCache(models, prefix)


class ModelPrefixCache:
    """A :class:`kvcache.PrefixCache` for one model of mlx-lm; comes from :func:`prefix_cache`.

    ::

        for response in prefix.stream_generate(tokenizer, prompt):
            ...                                       # as stream_generate(model, tokenizer, prompt)

    prefix: the prefix cache, with its statistics.
    """

    def __init__(self, models: Sequence[Module], prefix: PrefixCache) -> None:
        self.models, self.prefix = models, prefix

    def session(
        self,
        tokens: Prompt,
        *,
        salt: str = "",
        resume_points: Iterable[int] = (),
        deadline: Deadline | None = None,
        keep_on_error: bool = True,
        retain: Retain | None = None,
    ) -> PromptSession:
        """Begin a request. Return it as a context manager, to end it.

        tokens: ids of the prompt. The others are those of :meth:`kvcache.PrefixCache.session`.

        Where a recurrent layer shall keep a state inside of the prompt, the model is run up to
        there, because it gives states only at the end of a pass.
        """
        is_array = isinstance(tokens, mx.array | np.ndarray)
        ids: list[int] = np.asarray(tokens).tolist() if is_array else [*tokens]
        session = self.prefix.session(
            ids,
            salt=salt,
            resume_points=resume_points,
            deadline=deadline,
            keep_on_error=keep_on_error,
            retain=retain,
        )
        try:
            return PromptSession(self, session, ids, salt, keep_on_error)
        except BaseException as error:
            end_after(error, partial(session.close, keep_on_error))
            raise

    def stream_generate(
        self,
        tokenizer: Any,
        prompt: str | Prompt,
        *,
        salt: str = "",
        resume_points: Iterable[int] = (),
        **options: Any,
    ) -> Iterator[GenerationResponse]:
        """Generate as mlx-lm's ``stream_generate`` does, and store the prompt and the answer.

        Of a loop that is left early, all tokens that came are stored, and so are those that were
        complete when the model raised.
        ``prompt_tokens`` in the responses are those that were left to compute.

        options: of mlx-lm's function, `prompt_cache` and `draft_model` aside.
        """
        ids = _encoded(tokenizer, prompt) if isinstance(prompt, str) else prompt
        draft = self.models[1] if self.models[1:] else None
        with self.session(ids, salt=salt, resume_points=resume_points) as session:
            responses = stream_generate(
                self.models[0],
                tokenizer,
                session.remaining,
                prompt_cache=session.cache,
                draft_model=draft,
                **options,
            )
            for response in responses:
                session.extend([response.token])
                try:
                    yield response
                except GeneratorExit:  # the loop of the caller was left
                    responses.close()
                    session.close()
                    raise

    def batch_generate(
        self,
        tokenizer: Any,
        prompts: Sequence[Sequence[int]],
        *,
        max_tokens: int | Sequence[int] = 128,
        salt: str = "",
        **options: Any,
    ) -> BatchResponse:
        """Generate as mlx-lm's ``batch_generate`` does, and store prompts and answers.

        Return its response with the ids of all tokens generated. options: of ``BatchGenerator``.
        """
        limits = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else max_tokens
        stop_tokens = [[token] for token in tokenizer.eos_token_ids]
        generator = BatchGenerator(self.models[0], stop_tokens=stop_tokens, **options)
        with ExitStack() as stack:
            stack.callback(generator.close)
            sessions = [stack.enter_context(self.session(ids, salt=salt)) for ids in prompts]
            for session in sessions:
                session.prefill()
            uids = generator.insert(
                [session.remaining for session in sessions],
                [*limits],
                caches=[session.cache for session in sessions],
                all_tokens=[session.computed for session in sessions],
            )
            by_uid = dict(zip(uids, sessions, strict=True))
            answers: dict[int, list[int]] = {uid: [] for uid in uids}
            with generator.stats() as stats:
                while responses := generator.next_generated():
                    for response in responses:
                        if response.finish_reason != "stop":
                            answers[response.uid].append(response.token)
                        if response.finish_reason is not None:
                            session = by_uid[response.uid]
                            session.finish(response.all_tokens, response.prompt_cache)
        token_ids = [*answers.values()]
        texts = [tokenizer.decode(ids) for ids in token_ids]
        return BatchResponse(texts, stats, None, token_ids)


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
        prefix: ModelPrefixCache,
        session: Session,
        tokens: list[int],
        salt: str,
        keep_on_error: bool,
    ) -> None:
        self._prefix, self._session, self._tokens, self._salt = prefix, session, tokens, salt
        self._keep_on_error = keep_on_error
        self._caches = session.caches
        self._parts = prompt_caches(prefix.models, self._caches)
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
        self._prefix.prefix.insert(tokens, caches_of(prompt_cache), salt=self._salt)

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
                    for model, entries in zip(self._prefix.models, self._parts, strict=True):
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


def _encoded(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of a prompt, beginning with one special token, not two."""
    first = tokenizer.bos_token
    special = first is None or not text.startswith(first)
    ids: list[int] = tokenizer.encode(text, add_special_tokens=special)
    return ids
