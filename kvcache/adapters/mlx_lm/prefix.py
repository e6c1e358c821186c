"""Prefix reuse for the generators of mlx-lm: prompts begin with results of earlier ones."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any, TypeAlias

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module
from mlx_lm.generate import (
    BatchGenerator,
    BatchResponse,
    GenerationResponse,
    stream_generate,
)

from kvcache import PrefixCache
from kvcache.backends import HostArray
from kvcache.prefix import EvictionPolicy
from kvcache.prefix.leaving import end_after
from kvcache.prefix.retention import Retain
from kvcache.stores import Deadline, Store
from kvcache.stores.sealing import Seal

from .making import layer_caches
from .sessions import PromptSession

Prompt: TypeAlias = Sequence[int] | mx.array | HostArray


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
            return PromptSession(self.models, self.prefix, session, ids, salt, keep_on_error)
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


def _encoded(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of a prompt, beginning with one special token, not two."""
    first = tokenizer.bos_token
    special = first is None or not text.startswith(first)
    ids: list[int] = tokenizer.encode(text, add_special_tokens=special)
    return ids
