"""Prefix reuse in the server of mlx-lm.

::

    python -m kvcache.adapters.mlx_lm.server --model ...         # options of mlx_lm.server
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any, Protocol, TypeAlias

from mlx.nn.layers.base import Module
from mlx_lm import server

from kvcache import NotSupportedError, PrefixCache
from kvcache._checks import as_budget
from kvcache.prefix import EvictionPolicy

from .making import PromptCache, caches_of
from .prefix import prefix_cache
from .sessions import prompt_caches

ModelKey: TypeAlias = tuple[str | None, ...]
Media: TypeAlias = dict[tuple[int, int], str]


def use_in_server(
    *, budget: int | None = 1 << 30, policy: str | EvictionPolicy = "lru", namespace: str = ""
) -> None:
    """Let servers of mlx-lm that start from here on reuse prefixes by a prefix cache.

    ::

        use_in_server(budget=8 << 30)
        mlx_lm.server.main()

    Calling it again replaces the options. ``--prompt-cache-bytes`` of the server applies beside
    `budget`; ``--prompt-cache-size``, a number of entries, does not.

    budget: bytes stored at most, of all models together. policy, namespace: as for
        :class:`kvcache.PrefixCache`.
    """

    class Generator(PrefixResponseGenerator):
        def __init__(self, model_provider: Any, prompt_cache: object) -> None:
            own: Any = ServerPrefixCache(model_provider, budget, policy, namespace)
            super().__init__(model_provider, own)

    # By this name the server makes it.
    vars(server)["ResponseGenerator"] = Generator


class PrefixResponseGenerator(server.ResponseGenerator):
    """The server's generator, with a pass that ends where a prompt departs from earlier ones."""

    def _tokenize(self, tokenizer: Any, request: Any, args: Any) -> tuple[Any, ...]:
        # Behind each segment the server stores what was computed. So a window or a state is kept
        # there, for the next request that departs at the same place.
        tokenize: Any = super()._tokenize
        prompt, segments, kinds, *others = tokenize(tokenizer, request, args)
        prefixes: Any = self.prompt_cache
        place = prefixes.departure(self.model_provider.model_key, prompt)
        return prompt, *_divided(segments, kinds, place), *others


class Provider(Protocol):
    """The models that a server has loaded; draft_model: None without one."""

    model: Any
    draft_model: Any


class ServerPrefixCache:
    """Prefix caches in the place of the server's ``LRUPromptCache``, one for each model.

    The server calls it in one thread, that of its generator.

    provider: has the model that prompt caches are made for. The others are those of
        :func:`use_in_server`.
    """

    def __init__(
        self,
        provider: Provider,
        budget: int | None = 1 << 30,
        policy: str | EvictionPolicy = "lru",
        namespace: str = "",
    ) -> None:
        self._provider = provider
        self._budget, self._policy, self._namespace = as_budget(budget, "bytes"), policy, namespace
        # The one used last comes last.
        self._prefixes: dict[ModelKey, PrefixCache] = {}

    # The protocol of LRUPromptCache.

    def __len__(self) -> int:
        """Return the number of spans stored."""
        return sum(prefix.stats.spans for prefix in self._prefixes.values())

    @property
    def nbytes(self) -> int:
        """Bytes stored."""
        return sum(prefix.stats.nbytes for prefix in self._prefixes.values())

    def stats_by_type(self) -> dict[str, dict[str, int]]:
        """Return the number of spans and their bytes, for the log of the server."""
        return {"spans": {"n_sequences": len(self), "n_bytes": self.nbytes}}

    def fetch_nearest_cache(
        self, model: ModelKey, tokens: list[int]
    ) -> tuple[PromptCache, list[int]]:
        """Return a prompt cache with the beginning of `tokens`, and the other tokens.

        At least one token is left. Where nothing is stored the prompt cache is empty.
        """
        ids, media = _without_images(tokens)
        session = self._prefix_of(model).session(ids, media=media)
        matched, caches = session.matched, session.detach()
        parts = prompt_caches(self._models, caches)
        return [entry for part in parts for entry in part], tokens[matched:]

    def insert_cache(
        self,
        model: ModelKey,
        tokens: list[int],
        prompt_cache: PromptCache,
        *,
        cache_type: str = "assistant",
    ) -> None:
        """Store what `prompt_cache`, which is taken over, holds of `tokens`."""
        caches = caches_of(prompt_cache)
        held = min(cache.offset for cache in caches)
        for cache in caches:  # a draft model may be ahead
            cache.trim(cache.offset - held)
        ids, media = _without_images(tokens[:held])
        self._prefix_of(model).insert(ids, caches, media=media)
        if self._budget is not None:
            self.trim_to(n_bytes=self._budget)

    def trim_to(self, *, n_sequences: int | None = None, n_bytes: int | None = None) -> None:
        """Evict until no more than `n_bytes` are stored, of the model used longest ago first.

        Raises: NotSupportedError for `n_sequences`, because sequences share what they have in
            common.
        """
        if n_sequences is not None:
            raise NotSupportedError(
                "a prefix cache is bounded by bytes, because sequences share what they have in "
                f"common; got n_sequences={n_sequences}. Give n_bytes."
            )
        for prefix in self._prefixes.values():
            excess = self.nbytes - n_bytes if n_bytes is not None else 0
            if excess > 0:
                prefix.trim(max(0, prefix.stats.nbytes - excess))

    # Beside it.

    def departure(self, model: ModelKey, tokens: list[int]) -> int:
        """Return the position behind what is stored of `tokens`, if no request can resume there.

        0 if one can, or nothing is stored.
        """
        ids, media = _without_images(tokens)
        hit = self._prefix_of(model).lookup(ids, media=media)
        return hit.stored if hit.matched < min(hit.stored, len(ids) - 1) else 0

    @property
    def _models(self) -> list[Module]:
        models = [self._provider.model, self._provider.draft_model]
        return [model for model in models if model is not None]

    def _prefix_of(self, model: ModelKey) -> PrefixCache:
        prefix = self._prefixes.pop(model, None)
        if prefix is None:
            prefix = prefix_cache(
                *self._models,
                budget=self._budget,
                policy=self._policy,
                namespace=self._namespace,
            ).prefix
        self._prefixes[model] = prefix
        return prefix


def _divided(
    segments: list[list[int]], kinds: list[str], place: int
) -> tuple[list[list[int]], list[str]]:
    """Return segments of a prompt, and their kinds, with a further end at position `place`."""
    start = 0
    for index, segment in enumerate(segments):
        if start < place < start + len(segment):
            halves = [segment[: place - start], segment[place - start :]]
            return (
                [*segments[:index], *halves, *segments[index + 1 :]],
                [*kinds[:index], "user", *kinds[index:]],
            )
        start += len(segment)
    return segments, kinds


def _without_images(tokens: Sequence[int]) -> tuple[list[int], Media]:
    """Return `tokens` with 0 for the negative ids that mlx-lm gives images, and where these are."""
    ids: list[int] = []
    media: Media = {}
    for token, run in groupby(tokens, lambda token: min(token, 0)):
        start, own = len(ids), [*run]
        ids += own if token == 0 else [0] * len(own)
        if token < 0:
            media[start, len(ids)] = str(token)
    return ids, media


if __name__ == "__main__":
    use_in_server()
    server.main()
