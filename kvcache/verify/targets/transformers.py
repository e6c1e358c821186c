"""Caches of transformers, and of the adapter for it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Self

import numpy as np
import torch
from transformers import Cache, DynamicCache, PreTrainedModel, StaticCache

from kvcache import LayerCaches
from kvcache.adapters.transformers import ModelCache, ModelSession, make_cache, prefix_cache
from kvcache.adapters.transformers.plan import layer_plans
from kvcache.backends import HostArray
from kvcache.errors import TrimError
from kvcache.prefix import PrefixCache
from kvcache.stores import NEVER, MemoryStore
from kvcache.verify.target import Ability, Conversation, Target, Trial

from .kept import KeptConversation, KeptTrial, OwnCacheConversation
from .tiers import MakeStore, TieredTrial

_MOST_TOKENS = 40


class TransformersTarget(Target):
    """A model of transformers with one kind of cache.

    model: on any device. cache: a name in ``CACHES``, or a function that makes an empty cache for
    the model.

    checked: whether to ask ``is_croppable`` before tokens are taken back, as the library's own
    assisted decoding does. ``crop`` itself does not ask in every layer.

    Caches without a prefix cache are reused as the guides of the library show: an earlier cache is
    copied, and cropped to what the prompt has in common with it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: str | Callable[[PreTrainedModel], Cache] = "dynamic",
        *,
        checked: bool = True,
    ) -> None:
        if isinstance(cache, str) and cache not in CACHES:
            raise ValueError(f"caches are {', '.join(CACHES)}, or a function; got {cache!r}.")
        self.model = model
        config = model.config.get_text_config(decoder=True)
        named = cache if isinstance(cache, str) else getattr(cache, "__name__", "cache")
        self.name = f"transformers {config.model_type}, {named}" + ", unchecked" * (not checked)
        self.vocab_size = config.vocab_size
        self.max_tokens = _MOST_TOKENS
        windows = {getattr(config, name, None) for name in _WINDOW_NAMES}
        self.edges = tuple(sorted(size for size in windows if size and size < _MOST_TOKENS))
        self.make = CACHES[cache] if isinstance(cache, str) else cache
        self.sessions, self.checked = self.make is prefix_cache_of, checked
        self.abilities = frozenset({Ability.REUSE, Ability.TRIM, Ability.REFERENCE})
        # With states that cannot go back, the library refuses assisted decoding.
        recurrent = any(plan.state and not plan.conv_only for plan in layer_plans(config))
        if not (checked and recurrent):
            self.abilities |= {Ability.DRAFT}
        self.abilities |= self._more_abilities(cache)
        if _decoder_layers(model):
            self.abilities |= {Ability.LAYERS}
        else:  # nothing to interrupt a pass at
            self.abilities -= {Ability.CANCEL}
        self.tiers = ("host", "store") if self.sessions else ()

    def _more_abilities(self, cache: object) -> set[Ability]:
        if self.sessions:
            return {Ability.TENANTS, Ability.CANCEL}
        more = {Ability.FORK, Ability.BATCH}
        return more | {Ability.CANCEL} if cache == "ours" else more

    def trial(self) -> Trial:
        return _SessionTrial(self) if self.sessions else _CacheTrial(self)

    def cold_trial(self) -> Trial:
        return _SessionTrial(self, None) if self.sessions else self.trial()

    def reference(self, ids: Sequence[int]) -> HostArray:
        with torch.no_grad():
            return _to_host(self.model(self.tensor(ids), use_cache=False).logits)

    def tensor(self, ids: Sequence[int]) -> torch.Tensor:
        """Return `ids` as a batch of one row."""
        return torch.tensor([list(ids)], device=self.model.device)

    def forward(
        self, cache: Cache, rows: Sequence[Sequence[int]], padding: Sequence[int] = (0,)
    ) -> HostArray:
        """Compute equally many tokens for each row of a batch: logits ``[rows, tokens, vocab]``.

        padding: columns on the left of each row, in the cache and the pass, that are no tokens; by
            default those of a single row.
        """
        options: dict[str, torch.Tensor] = {}
        with torch.no_grad():
            start, device = int(cache.get_seq_length()), self.model.device
            columns = torch.arange(start + len(rows[0]), device=device)
            behind = columns - torch.tensor(list(padding), device=device)[:, None]
            if any(padding):
                options["attention_mask"] = (behind >= 0).long()
            # Some models count positions from 0 in every call that names none.
            options["position_ids"] = behind[:, start:].clamp(min=0)
            ids = torch.tensor([list(row) for row in rows], device=device)
            out = self.model(ids, cache=cache, use_cache=True, **options)
        array: HostArray = out.logits.float().cpu().numpy()
        return array

    @contextmanager
    def layers(self) -> Iterator[list[HostArray]]:
        recorded: list[HostArray] = []

        def record(_: object, __: object, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            recorded.append(_to_host(hidden))

        with ExitStack() as stack:
            for layer in _decoder_layers(self.model):
                stack.callback(layer.register_forward_hook(record).remove)
            yield recorded

    @contextmanager
    def interrupted(self, layer: int) -> Iterator[None]:
        """Interrupt the pass in the block in front of a layer."""
        layers = _decoder_layers(self.model)

        def interrupt(*_: object) -> None:
            raise InterruptedError

        handle = layers[min(layer + 1, len(layers) - 1)].register_forward_pre_hook(interrupt)
        try:
            yield
        except InterruptedError:
            return
        finally:
            handle.remove()


_WINDOW_NAMES = ("sliding_window", "attention_chunk_size")


def dynamic_cache(model: PreTrainedModel) -> Cache:
    """Return the library's cache that grows, with windows where the model has them."""
    return DynamicCache(config=model.config)


def static_cache(model: PreTrainedModel) -> Cache:
    """Return the library's cache of a fixed size."""
    return StaticCache(config=model.config, max_cache_len=2 * _MOST_TOKENS)


def fixed_cache(model: PreTrainedModel) -> Cache:
    """Return the adapter's cache of a fixed size."""
    return make_cache(model, capacity=2 * _MOST_TOKENS, compileable=True)


def prefix_cache_of(model: PreTrainedModel) -> Cache:
    """Stand for sessions of the adapter's prefix cache."""
    raise NotImplementedError("sessions bring their caches")


CACHES: dict[str, Callable[[PreTrainedModel], Cache]] = {
    "dynamic": dynamic_cache,
    "static": static_cache,
    "ours": make_cache,
    "ours-static": fixed_cache,
    "ours-prefix": prefix_cache_of,
}
"""Kinds of caches by name: the library's own, and those of the adapter."""


def _decoder_layers(model: PreTrainedModel) -> list[torch.nn.Module]:
    """Return the decoder layers of a model; none where they are not where they usually are."""
    layers = getattr(model.get_decoder(), "layers", None)
    return [*layers] if isinstance(layers, torch.nn.ModuleList) else []


def _to_host(tensor: torch.Tensor) -> HostArray:
    array: HostArray = tensor[0].detach().float().cpu().numpy()
    return array


class _CacheConversation(OwnCacheConversation):
    """One cache."""

    def __init__(self, target: TransformersTarget, cache: Cache, ids: Sequence[int]) -> None:
        super().__init__(ids)
        self.target, self.cache = target, cache

    def forward(self, ids: Sequence[int]) -> HostArray:
        logits: HostArray = self.target.forward(self.cache, [ids])[0]
        self.ids += ids
        return logits

    def can_trim(self, count: int) -> bool:
        return can_crop(self.cache, count, self.target.checked)

    def can_draft(self, count: int) -> bool:
        if isinstance(self.cache, ModelCache) or not self.target.checked:
            return True
        copied = copy.deepcopy(self.cache)
        copied.activate_past_recording()
        self.target.forward(copied, [[0] * count])
        return bool(copied.is_croppable)

    def trim(self, count: int) -> None:
        self.cache.crop(-count)
        del self.ids[len(self.ids) - count :]

    def draft(self, ids: Sequence[int], accepted: int) -> HostArray:
        # As the library's own assisted decoding does.
        self.cache.activate_past_recording()
        logits = self.forward(ids)
        rejected = len(ids) - accepted
        self.cache.crop(-rejected)
        del self.ids[len(self.ids) - rejected :]
        return logits

    def cancel(self, ids: Sequence[int], layer: int) -> None:
        if not isinstance(self.cache, ModelCache):
            super().cancel(ids, layer)
            return
        caches = self.cache.caches
        caches.checkpoint()
        with self.target.interrupted(layer):
            self.target.forward(self.cache, [ids])
        self.cache.caches.rollback(0)


def can_crop(cache: Cache, count: int, checked: bool) -> bool:
    """Return whether a cache takes back so many tokens, by having a copy of it do so."""
    if checked and not cache.is_croppable:
        return False
    try:
        copy.deepcopy(cache).crop(-count)
    except (RuntimeError, TrimError):
        return False
    return True


class _CacheTrial(KeptTrial["_Kept"]):
    """Caches of conversations that ended, to be copied and cropped."""

    def __init__(self, target: TransformersTarget) -> None:
        super().__init__()
        self.target = target

    def new(self) -> _Kept:
        return _Kept(self, self.target.make(self.target.model))

    def together(self, rows: Sequence[tuple[Conversation, Sequence[int]]]) -> list[HostArray]:
        """Compute as many tokens as all rows have in one batch, and the rest of each alone."""
        talks = [row for row, _ in rows if isinstance(row, _Kept)]
        common = min(len(ids) for _, ids in rows)
        compute = self._over_joined if self.target.make is make_cache else self._over_prompts
        first = compute(talks, [ids[:common] for _, ids in rows])
        outputs = []
        for talk, logits, (_, ids) in zip(talks, first, rows, strict=True):
            rest = [talk.forward(ids[common:])] if len(ids) > common else []
            outputs.append(np.concatenate([logits, *rest]))
        return outputs

    def _over_joined(self, talks: Sequence[_Kept], rows: Sequence[Sequence[int]]) -> HostArray:
        """Compute a batch over the caches of conversations, joined; each goes on with its row."""
        caches = [talk.cache.caches for talk in talks if isinstance(talk.cache, ModelCache)]
        batch = ModelCache(self.target.model.config, LayerCaches.concat(caches))
        logits = self.target.forward(batch, rows, _padding_of(talks))
        for talk, ids, own in zip(talks, rows, batch.caches.split(), strict=True):
            talk.cache = ModelCache(batch.config, own)
            talk.ids += ids
        return logits

    def _over_prompts(self, talks: Sequence[_Kept], rows: Sequence[Sequence[int]]) -> HostArray:
        """Compute a batch over a cache of its own, which begins with the tokens of each row.

        The library has no call that joins caches, and some of its layers let no row go. So each
        conversation goes on with the cache that it has, over which it computes its tokens again.
        """
        padding, batch = _padding_of(talks), self.target.make(self.target.model)
        held = zip(padding, talks, strict=True)
        prompts = [[*[0] * columns, *talk.ids] for columns, talk in held]
        self.target.forward(batch, prompts, padding)
        logits = self.target.forward(batch, rows, padding)
        for talk, ids in zip(talks, rows, strict=True):
            talk.forward(ids)
        return logits


def _padding_of(talks: Sequence[_Kept]) -> list[int]:
    """Return the columns on the left of each row that are no tokens, so that all end together."""
    width = max(len(talk.ids) for talk in talks)
    return [width - len(talk.ids) for talk in talks]


class _Kept(_CacheConversation, KeptConversation):
    trial: _CacheTrial

    def __init__(self, trial: _CacheTrial, cache: Cache, ids: Sequence[int] = ()) -> None:
        super().__init__(trial.target, cache, ids)
        self.trial = trial

    def copied(self) -> Self:
        return type(self)(self.trial, copy.deepcopy(self.cache), self.ids)


class _SessionTrial(TieredTrial):
    """Sessions of the adapter's prefix cache."""

    def __init__(self, target: TransformersTarget, store: MakeStore | None = MemoryStore) -> None:
        self.target = target
        super().__init__(self._made, store)

    def _made(self, **options: Any) -> PrefixCache:
        self._sessions = prefix_cache(self.target.model, **options)
        return self._sessions.prefix

    def begin(self, ids: Sequence[int], tenant: int = 0) -> Conversation:
        tensor = self.target.tensor(ids)
        with torch.no_grad():
            session = self._sessions.session(
                tensor, torch.ones_like(tensor), salt=str(tenant), deadline=NEVER
            )
        return _SessionConversation(self, session, ids)


class _SessionConversation(_CacheConversation):
    def __init__(self, trial: _SessionTrial, session: ModelSession, ids: Sequence[int]) -> None:
        super().__init__(trial.target, session.cache, ids[: session.cache.get_seq_length()])
        self._trial = trial
        self._session, self._prompt = session, len(ids)

    @property
    def reused(self) -> int:
        return self._session.matched[0]

    def can_trim(self, count: int) -> bool:
        # A session is for its prompt: no other tokens take the place of any of it.
        return len(self.ids) - count >= self._prompt and super().can_trim(count)

    def end(self, store: bool) -> None:
        self._session.close(store)
        self._trial.settle()
