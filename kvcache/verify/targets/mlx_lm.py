"""Prompt caches of mlx-lm, and of the adapter for it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Self, TypeAlias

import mlx.core as mx
import numpy as np
from mlx.nn.layers.base import Module
from mlx_lm.models.cache import LRUPromptCache, can_trim_prompt_cache, trim_prompt_cache
from mlx_lm.models.cache import make_prompt_cache as library_prompt_cache

from kvcache.adapters.mlx_lm import PromptSession, caches_of, make_prompt_cache, prefix_cache
from kvcache.adapters.mlx_lm.making import PromptCache
from kvcache.backends import HostArray
from kvcache.prefix import PrefixCache
from kvcache.stores import NEVER, MemoryStore
from kvcache.verify.target import Ability, Conversation, Target, Trial

from .kept import KeptConversation, KeptTrial, OwnCacheConversation
from .tiers import MakeStore, TieredTrial

Layer: TypeAlias = Any
"""A block of a model, whose calls have no types."""
Output: TypeAlias = Any
"""Returned by a block: its hidden states, or a tuple that begins with them."""
_MOST_TOKENS = 40


class MlxLmTarget(Target):
    """A model of mlx-lm with one kind of prompt cache.

    cache: a name in ``CACHES``, or a function that makes an empty prompt cache for the model.
    max_kv_size: tokens that a layer with keys and values holds; None for what the model says.
        Such a model is compared with its own run one token at a time, as it knows no other window
        without a cache than its own.
    checked: whether to ask ``can_trim_prompt_cache`` behind every draft. The library's speculative
        decoding asks once, in front of the first.

    Kinds without a prefix cache are kept, copied, and trimmed to what a prompt has in common.
    """

    def __init__(
        self,
        model: Module,
        cache: str | Callable[[Module, int | None], PromptCache] = "library",
        *,
        max_kv_size: int | None = None,
        checked: bool = True,
    ) -> None:
        if isinstance(cache, str) and cache not in CACHES:
            raise ValueError(f"caches are {', '.join(CACHES)}, or a function; got {cache!r}.")
        self.model, self.max_kv_size, self.checked = model, max_kv_size, checked
        self.kind = cache if isinstance(cache, str) else getattr(cache, "__name__", "cache")
        self.make = CACHES[cache] if isinstance(cache, str) else cache
        named = f"{self.kind}" if max_kv_size is None else f"{self.kind} of {max_kv_size}"
        arguments: Any = model.args
        self.name = f"mlx-lm {arguments.model_type}, {named}" + ", unchecked" * (not checked)
        self.vocab_size = arguments.vocab_size
        self.max_tokens = _MOST_TOKENS
        sizes = {getattr(arguments, "sliding_window", None), max_kv_size}
        self.edges = tuple(sorted(size for size in sizes if size and size < _MOST_TOKENS))
        self.abilities = frozenset({Ability.REUSE, Ability.TRIM, Ability.REFERENCE, Ability.LAYERS})
        self.abilities |= _MORE.get(self.kind, {Ability.FORK})
        # With states that cannot go back, the library refuses drafts.
        if can_trim_prompt_cache(self.new_cache()):
            self.abilities |= {Ability.DRAFT}
        self.tiers = _TIERS.get(self.kind, ())

    def trial(self) -> Trial:
        kinds: dict[str, Callable[[MlxLmTarget], Trial]] = {
            "library-lru": _LruTrial,
            "ours-prefix": _SessionTrial,
        }
        return kinds.get(self.kind, _CacheTrial)(self)

    def cold_trial(self) -> Trial:
        return _SessionTrial(self, None) if self.kind == "ours-prefix" else self.trial()

    def new_cache(self) -> PromptCache:
        """Return an empty prompt cache."""
        return self.make(self.model, self.max_kv_size)

    def reference(self, ids: Sequence[int]) -> HostArray:
        if self.max_kv_size is None:
            return self.forward(None, ids)
        cache = self.new_cache()
        return np.concatenate([self.forward(cache, [token]) for token in ids])

    def forward(self, cache: PromptCache | None, ids: Sequence[int]) -> HostArray:
        """Compute `ids` over a prompt cache; return logits behind each."""
        logits: HostArray = self.forward_rows(cache, [ids])[0]
        return logits

    def forward_rows(self, cache: PromptCache | None, rows: Sequence[Sequence[int]]) -> HostArray:
        """Compute a batch of equally many tokens in each row: logits [rows, tokens, vocab]."""
        logits = self.model(mx.array([list(ids) for ids in rows]), cache=cache)
        mx.eval(logits, [entry.state for entry in cache or () if not entry.empty()])
        return np.array(logits.astype(mx.float32))

    @contextmanager
    def layers(self) -> Iterator[list[HostArray]]:
        recorded: list[HostArray] = []
        blocks: list[Layer] = list(self.model.layers)

        def record(layer: Layer, output: Output) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if any(layer is block for block in blocks):
                recorded.append(np.array(hidden[0].astype(mx.float32)))

        with _calls_watched(blocks, lambda *_: None, record):
            yield recorded

    @contextmanager
    def interrupted(self, layer: int) -> Iterator[None]:
        """Interrupt the pass in the block in front of a layer."""
        blocks: list[Layer] = list(self.model.layers)
        last = blocks[min(layer + 1, len(blocks) - 1)]

        def interrupt(block: Layer) -> None:
            if block is last:
                raise InterruptedError

        with _calls_watched(blocks, interrupt, lambda *_: None):
            try:
                yield
            except InterruptedError:
                return


@contextmanager
def _calls_watched(
    blocks: Sequence[Layer],
    before: Callable[[Layer], None],
    after: Callable[[Layer, Output], None],
) -> Iterator[None]:
    """Have `before` and `after` called around each call of a block."""
    classes = {type(block) for block in blocks}
    originals = {kind: kind.__call__ for kind in classes}

    def watched(kind: type) -> Callable[..., Output]:
        def call(block: Layer, *args: object, **options: object) -> Output:
            before(block)
            output = originals[kind](block, *args, **options)
            after(block, output)
            return output

        return call

    # On the classes: Python looks up __call__ there, and modules of mlx have no hooks.
    for kind in classes:
        kind.__call__ = watched(kind)
    try:
        yield
    finally:
        for kind, original in originals.items():
            kind.__call__ = original


def _own(model: Module, max_kv_size: int | None) -> PromptCache:
    return make_prompt_cache(model, max_kv_size)


def _library(model: Module, max_kv_size: int | None) -> PromptCache:
    cache: PromptCache = library_prompt_cache(model, max_kv_size)
    return cache


CACHES: dict[str, Callable[[Module, int | None], PromptCache]] = {
    "library": _library,
    "library-lru": _library,
    "ours": _own,
    "ours-prefix": _own,
}
"""Kinds of prompt caches by name: the library's own, alone and in its LRUPromptCache, and ours."""
_MORE: dict[str, set[Ability]] = {
    "library": {Ability.FORK, Ability.BATCH},
    "library-lru": {Ability.FORK, Ability.TENANTS, Ability.BATCH},
    "ours": {Ability.FORK, Ability.CANCEL, Ability.BATCH},
    "ours-prefix": {Ability.CANCEL, Ability.TENANTS},
}
_TIERS = {"library-lru": ("host",), "ours-prefix": ("host", "store")}


class _CacheConversation(OwnCacheConversation):
    """One prompt cache."""

    def __init__(self, target: MlxLmTarget, cache: PromptCache, ids: Sequence[int]) -> None:
        super().__init__(ids)
        self.target, self.cache = target, cache
        self._drafts = False

    def forward(self, ids: Sequence[int]) -> HostArray:
        logits = self.target.forward(self.cache, ids)
        self.ids += ids
        return logits

    def can_trim(self, count: int) -> bool:
        if self.target.kind.startswith("ours"):
            return caches_of(self.cache).can_trim(count)
        return bool(can_trim_prompt_cache(self.cache))

    def can_draft(self, count: int) -> bool:
        if self.target.kind.startswith("ours"):
            return True
        if self.target.checked:
            copied = copy.deepcopy(self.cache)
            self.target.forward(copied, [0] * count)
            return bool(can_trim_prompt_cache(copied))
        self._drafts = self._drafts or bool(can_trim_prompt_cache(self.cache))
        return self._drafts

    def trim(self, count: int) -> None:
        self.take_back(count)
        del self.ids[len(self.ids) - count :]

    def take_back(self, count: int) -> None:
        """Have the prompt cache take back tokens."""
        taken: Any = trim_prompt_cache(self.cache, count)
        if self.target.checked and taken != count:
            raise AssertionError(f"the prompt cache took back {taken} tokens of {count}.")

    def draft(self, ids: Sequence[int], accepted: int) -> HostArray:
        logits = self.forward(ids)
        if len(ids) > accepted:
            self.trim(len(ids) - accepted)
        return logits

    def cancel(self, ids: Sequence[int], layer: int) -> None:
        caches = caches_of(self.cache)
        caches.checkpoint()
        with self.target.interrupted(layer):
            self.target.forward(self.cache, ids)
        caches.rollback(0)


def _compute_together(
    target: MlxLmTarget, rows: Sequence[tuple[Conversation, Sequence[int]]]
) -> list[HostArray]:
    """Compute a batch as the generators of the library do: joined, and padded on both sides.

    Rows of the joined cache are padded on their left where they hold fewer tokens than others, and
    passes on their right where fewer tokens come.
    """
    talks = [(row, ids) for row, ids in rows if isinstance(row, _CacheConversation)]
    lengths = [len(ids) for _, ids in talks]
    width = max(lengths)
    padding = [width - length for length in lengths]
    batch = [each[0].merge(each) for each in zip(*(talk.cache for talk, _ in talks), strict=True)]
    if any(padding):
        for entry in batch:
            entry.prepare(lengths=lengths, right_padding=padding)
    logits = target.forward_rows(batch, [[*ids, *[0] * (width - len(ids))] for _, ids in talks])
    if any(padding):
        for entry in batch:
            entry.finalize()
    for row, (talk, ids) in enumerate(talks):
        talk.cache = [entry.extract(row) for entry in batch]
        talk.ids += ids
    return [logits[row, :length] for row, length in enumerate(lengths)]


class _CacheTrial(KeptTrial["_Kept"]):
    """Prompt caches of conversations that ended, to be copied and trimmed."""

    def __init__(self, target: MlxLmTarget) -> None:
        super().__init__()
        self.target = target

    def new(self) -> _Kept:
        return _Kept(self, self.target.new_cache())

    def together(self, rows: Sequence[tuple[Conversation, Sequence[int]]]) -> list[HostArray]:
        return _compute_together(self.target, rows)


class _Kept(_CacheConversation, KeptConversation):
    trial: _CacheTrial

    def __init__(self, trial: _CacheTrial, cache: PromptCache, ids: Sequence[int] = ()) -> None:
        super().__init__(trial.target, cache, ids)
        self.trial = trial

    def copied(self) -> Self:
        return type(self)(self.trial, copy.deepcopy(self.cache), self.ids)


class _LruTrial(Trial):
    """The library's cache of prompt caches, as its server uses it."""

    def __init__(self, target: MlxLmTarget) -> None:
        self.target, self.prompts = target, LRUPromptCache(max_size=64)

    def begin(self, ids: Sequence[int], tenant: int = 0) -> Conversation:
        cache, rest = self.prompts.fetch_nearest_cache(tenant, list(ids))
        if cache is None or not rest:
            # Of a prompt that is held whole, its last token has to be computed again; the library
            # leaves it to the caller to find room for that.
            cache, rest = self.target.new_cache(), list(ids)
        return _LruConversation(self, cache, list(ids[: len(ids) - len(rest)]), tenant)

    def together(self, rows: Sequence[tuple[Conversation, Sequence[int]]]) -> list[HostArray]:
        return _compute_together(self.target, rows)

    def evict(self, tier: str) -> None:
        self.prompts.trim_to(n_sequences=0)


class _LruConversation(_CacheConversation):
    def __init__(
        self, trial: _LruTrial, cache: PromptCache, ids: Sequence[int], tenant: int
    ) -> None:
        super().__init__(trial.target, cache, ids)
        self._trial, self._tenant = trial, tenant

    def fork(self) -> Conversation:
        return _LruConversation(self._trial, copy.deepcopy(self.cache), self.ids, self._tenant)

    def end(self, store: bool) -> None:
        if store:
            self._trial.prompts.insert_cache(self._tenant, list(self.ids), self.cache)


class _SessionTrial(TieredTrial):
    """Sessions of the adapter's prefix cache."""

    def __init__(self, target: MlxLmTarget, store: MakeStore | None = MemoryStore) -> None:
        self.target = target
        super().__init__(self._made, store)

    def _made(self, **options: Any) -> PrefixCache:
        target = self.target
        self._sessions = prefix_cache(target.model, max_kv_size=target.max_kv_size, **options)
        return self._sessions.prefix

    def begin(self, ids: Sequence[int], tenant: int = 0) -> Conversation:
        session = self._sessions.session(list(ids), salt=str(tenant), deadline=NEVER)
        return _SessionConversation(self, session, ids)


class _SessionConversation(_CacheConversation):
    def __init__(self, trial: _SessionTrial, session: PromptSession, ids: Sequence[int]) -> None:
        super().__init__(trial.target, session.cache, session.computed)
        self._trial = trial
        self._session, self._named = session, len(ids)

    @property
    def reused(self) -> int:
        return self._session.matched

    def forward(self, ids: Sequence[int]) -> HostArray:
        logits = super().forward(ids)
        self._session.extend(self.ids[self._named :])
        self._named = max(self._named, len(self.ids))
        return logits

    def take_back(self, count: int) -> None:
        self._named = len(self.ids) - count
        self._session.truncate(self._named)

    def end(self, store: bool) -> None:
        self._session.close(store)
        self._trial.settle()
