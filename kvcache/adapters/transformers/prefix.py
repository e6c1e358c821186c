"""Reuse of results of earlier prompts around ``generate``."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any, Self, TypedDict, Unpack, cast

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel

from kvcache._checks import as_sizes
from kvcache.errors import KVCacheError, NotSupportedError
from kvcache.layers.base import LayerCache
from kvcache.layers.stack import LayerCaches
from kvcache.prefix import EvictionPolicy, PrefixCache, Session
from kvcache.prefix.leaving import end_after
from kvcache.prefix.media import Media
from kvcache.prefix.retention import Retain
from kvcache.stores import Deadline, Store
from kvcache.stores.sealing import Seal

from .make import layer_caches
from .plan import layer_plans
from .prefill import compute
from .prompts import PromptCache, Prompts, as_prompts, check_joined

_BY_COLUMN = ("input_ids", "position_ids", "token_type_ids", "mm_token_type_ids")
"""Arguments of a model with a column for each token of the pass."""


class PrefixOptions(TypedDict, total=False):
    """Options of :class:`kvcache.PrefixCache`."""

    budget: int | None
    index_budget: int | None
    policy: str | EvictionPolicy
    namespace: str
    clock: Callable[[], float]
    resume_every: int | None
    store: str | Store | None
    page_tokens: int
    seal: Seal | Callable[[str], Seal | None] | None


def prefix_cache(model: PreTrainedModel, **options: Unpack[PrefixOptions]) -> ModelPrefixCache:
    """Return a prefix cache for the prompts of ``model.generate``.

    options: of :class:`kvcache.PrefixCache`, as ``budget``, in bytes.

    Raises: NotSupportedError for a model with an encoder, on several devices, or with a layer that
        kvcache has no cache for; otherwise as :class:`kvcache.PrefixCache`.
    """
    if model.config.is_encoder_decoder:
        raise NotSupportedError(
            "prefixes of prompts are reused in decoders; got a model with an encoder, on whose "
            "output every token depends. Reuse that output."
        )
    devices = set(getattr(model, "hf_device_map", {}).values())
    if len(devices) > 1:
        raise NotSupportedError(
            "prefixes are restored to one device; got a model whose layers are on "
            f"{', '.join(map(str, devices))}. Load it with device_map='cuda:0', say."
        )
    return ModelPrefixCache(model, PrefixCache(layer_caches(model), **options))


class ModelPrefixCache:
    """Reuse of results of earlier prompts by one model; comes from :func:`prefix_cache`.

    ::

        prefix = prefix_cache(model, budget=1 << 30)
        with prefix.session(input_ids) as s:
            ids = model.generate(input_ids, cache=s.cache)     # past_key_values= before 5.24

    prefix: the :class:`kvcache.PrefixCache` that stores: its ``stats``, ``events``, ``clear()``,
        ``render()``, and with a store its ``flush()`` and ``close()``.

    While it lives, a hook of the model notes the tokens of passes over caches of its sessions.
    """

    def __init__(self, model: PreTrainedModel, prefix: PrefixCache) -> None:
        self.prefix = prefix
        self._model = model
        hook = model.register_forward_pre_hook(_note_pass, with_kwargs=True)
        weakref.finalize(self, hook.remove).atexit = False

    def session(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        rows: int = 1,
        salt: str = "",
        media: Media | None = None,
        resume_points: Iterable[int] = (),
        deadline: Deadline | None = None,
        keep_on_error: bool = True,
        retain: Retain | None = None,
    ) -> ModelSession:
        """Begin a request for one prompt or a batch of several. Return it as a context manager.

        input_ids: ids ``[B, columns]``, padded on the left; the same that ``generate`` gets.
        attention_mask: ``[B, columns]``, 0 in padding; needed where there is any.
        rows: rows that ``generate`` makes of each prompt: ``num_beams``, say.
        salt: prompts of different salts share nothing.
        media: of a single prompt; see :meth:`kvcache.PrefixCache.session`. Leave the pixels or
            sounds of those that are matched out of ``generate``.
        resume_points: positions in each prompt, padding not counted, where later ones shall be able
            to resume in spite of windows and recurrent layers.
        deadline, keep_on_error, retain: as for :meth:`kvcache.PrefixCache.session`.

        The model runs here where ``generate`` would leave no state to resume at: each prompt of a
        batch, and one prompt if the model has recurrent layers, or `rows` is not 1, is computed
        alone and stored, but for its last token.

        Raises: as :meth:`kvcache.PrefixCache.session`, and for other than prompts padded on the
            left; NotSupportedError for media in such prompts. What was computed of prompts by then
            is stored, as far as `keep_on_error` says so, and prompts of a batch that were complete.
        """
        prompts = as_prompts(input_ids, attention_mask, self._model.generation_config)
        points = list(resume_points)
        [rows] = as_sizes(rows=rows)
        joined = rows > 1 or len(prompts.ids) > 1
        if joined:
            check_joined(prompts, media)
        recurrent = any(plan.state for plan in layer_plans(self._model.config))
        sessions: list[Session] = []
        try:
            for number in range(len(prompts.ids)):
                ids = prompts.row(number)
                session = self.prefix.session(
                    ids.tolist(),
                    salt=salt,
                    media=media,
                    resume_points=points,
                    deadline=deadline,
                    keep_on_error=keep_on_error,
                    retain=retain,
                )
                sessions.append(session)
                if joined or (recurrent and not media):
                    compute(self._model, session.caches, ids[:-1])
                if joined:
                    session.commit()
            return ModelSession(self._model, prompts, sessions, rows, keep_on_error)
        except BaseException as error:
            end_after(error, partial(_close, sessions, keep_on_error))
            raise

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        salt: str = "",
        resume_points: Iterable[int] = (),
        **options: Any,
    ) -> Any:
        """Return what ``model.generate`` returns, in a session of its own.

        options: of ``generate``. A cache in its output is of a session that has ended.

        Raises: ValueError for another cache; otherwise as :meth:`session` and ``generate``.
        """
        if given := {"cache", "past_key_values"} & options.keys():
            raise ValueError(f"the session brings the cache; got {given.pop()}. Leave it out.")
        config = options.get("generation_config") or self._model.generation_config
        multiples = ("num_beams", "num_return_sequences")
        rows = max(options.get(name) or getattr(config, name) or 1 for name in multiples)
        with self.session(
            input_ids, attention_mask, rows=rows, salt=salt, resume_points=resume_points
        ) as session:
            options["cache"] = session.cache
            if attention_mask is not None:
                options["attention_mask"] = attention_mask
            return cast(GenerationMixin, self._model).generate(input_ids, **options)


class ModelSession:
    """One call of ``generate`` or several, from their prompts to their last tokens.

    Comes from :meth:`ModelPrefixCache.session`. Leaving it stores the prompts and the answers as
    far as they are computed: all but the token sampled last, of each prompt the first row. Leaving
    it by an exception stores what was complete by then, unless ``keep_on_error=False`` was given.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        prompts: Prompts,
        sessions: list[Session],
        rows: int,
        keep_on_error: bool,
    ) -> None:
        self._keep_on_error = keep_on_error
        self.sessions = tuple(sessions)
        """The session of each prompt."""
        self._open, self._padding = True, model.generation_config.pad_token_id
        origins = [number for number in range(len(sessions)) for _ in range(rows)]
        caches: LayerCaches[LayerCache] = sessions[0].caches
        if len(origins) > 1:
            caches = LayerCaches.concat([session.caches for session in sessions])
            caches.select(origins)
            # The batch has their tokens; its rows come back in the end.
            for session in sessions:
                session.adopt(layer_caches(model))
        self._cache = PromptCache(model.config, caches, prompts, origins)

    @property
    def cache(self) -> PromptCache:
        """The cache for ``generate``, whatever the name of its argument.

        Raises: KVCacheError after the end.
        """
        if not self._open:
            raise KVCacheError("a session has a cache until it ends. Begin another.")
        return self._cache

    @property
    def matched(self) -> tuple[int, ...]:
        """Tokens of each prompt that were stored, and needed no computing."""
        return tuple(session.matched for session in self.sessions)

    def close(self, store: bool = True) -> None:
        """End the session, and store what was computed unless `store` is False.

        Ending it again does nothing.
        """
        if not self._open:
            return
        self._open = False
        try:
            if store:
                self._hand_over()
        except BaseException:
            store = False
            raise
        finally:
            _close(self.sessions, store)

    def _hand_over(self) -> None:
        """Give each session the caches of its first row, and the names of the tokens in it."""
        cache, several = self._cache, len(self.sessions) > 1
        first = {origin: row for row, origin in reversed([*enumerate(cache.origins)])}
        cache.batch_select_indices(torch.tensor([*first.values()], dtype=torch.long))
        rows = cache.caches.split() if several else [cache.caches]
        for row, (origin, caches) in enumerate(zip(first, rows, strict=True)):
            ids = cache.generated(row)
            # A row of a batch that ends early gets padding until the others have ended, too.
            while several and ids and ids[-1] == self._padding:
                ids.pop()
            self.sessions[origin].adopt(caches)
            self.sessions[origin].extend(ids)

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
            end_after(error, partial(self.close, self._keep_on_error))


def _close(sessions: Iterable[Session], store: bool) -> None:
    """Close all of `sessions`, also if one raises."""
    with ExitStack() as stack:
        for session in sessions:
            stack.callback(session.close, store)


def _note_pass(
    _: torch.nn.Module, args: tuple[Any, ...], options: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Tell the cache of a session which tokens come. Return arguments without those it holds."""
    cache = options.get("cache", options.get("past_key_values"))
    if not isinstance(cache, PromptCache):
        return None
    ids = args[0] if args else options.get("input_ids")
    repeated = 0 if args else cache.repeated(ids)
    if repeated:
        by_column = {name: options[name] for name in _BY_COLUMN if options.get(name) is not None}
        options |= {name: array[..., repeated:] for name, array in by_column.items()}
        ids = options["input_ids"]
    cache.note(ids, options.get("attention_mask"))
    return args, options
