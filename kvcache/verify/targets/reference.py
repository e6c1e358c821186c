"""Caches of kvcache, in sessions of a prefix cache, under tiny reference models."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np

from kvcache import (
    Batch,
    CacheFullError,
    CausalCache,
    KVCache,
    LayerCaches,
    RecurrentCache,
    RotatingKVCache,
    WrapperCache,
)
from kvcache.backends import Backend, HostArray, get_backend
from kvcache.layers.base import LayerCache
from kvcache.pool.base import Cache
from kvcache.prefix import PrefixCache, Session
from kvcache.snapshots.visibility import Visibility
from kvcache.stores import NEVER, MemoryStore
from kvcache.verify.target import Ability, Conversation, Target, Trial

from .nets import VOCAB, HybridNet, InterruptedPassError, LlamaNet, Net
from .tiers import MakeStore, TieredTrial

_WINDOW, _CHUNK, _SINKS = 6, 8, 2
_SEQUENCES, _CAPACITY = 9, 48  # the last sequence is for pushing others out
_SEEN = Visibility(window=_WINDOW - 1)
RULES: dict[str, list[Visibility]] = {
    "full": [Visibility(), Visibility()],
    "window": [_SEEN, _SEEN],
    "sinks": [_SEEN._replace(sinks=_SINKS)] * 2,
    "chunk": [Visibility(chunk=_CHUNK)] * 2,
    "mixed": [_SEEN, Visibility()],
}
"""Rules of attention of both layers, by kind. The kind "hybrid" has recurrent layers."""
POOLS: dict[str, Callable[[], Cache]] = {
    "full": CausalCache,
    "window": lambda: CausalCache(window=_WINDOW),
    "chunk": lambda: CausalCache(chunk=_CHUNK),
    "mixed": lambda: WrapperCache(CausalCache(window=_WINDOW), CausalCache()),
    "hybrid": lambda: WrapperCache(CausalCache(), RecurrentCache()),
}
LAYERS = ("full", "window", "sinks", "mixed", "hybrid")
"""Kinds for which there are per-layer caches."""


class _Target(Target):
    """A reference model of some kind on some backend."""

    vocab_size = VOCAB
    max_tokens = 36

    def __init__(
        self, kind: str, backend: str | Backend, form: str, store: MakeStore | None
    ) -> None:
        named = get_backend(backend)
        self.kind, self.store = kind, store
        self.net: Net = HybridNet(named) if kind == "hybrid" else LlamaNet(named, RULES[kind])
        self.name = f"kvcache {form}, {kind}, {named.spec}"
        self.abilities = frozenset(Ability)
        if store is None:
            self.tiers = tuple(tier for tier in self.tiers if tier != "store")
        edges = {"full": (), "hybrid": (), "chunk": (_CHUNK,)}
        self.edges = edges.get(kind, (_WINDOW,))

    def reference(self, ids: Sequence[int]) -> HostArray:
        return self.net.alone(ids)

    @contextmanager
    def layers(self) -> Iterator[list[HostArray]]:
        recorded: list[HostArray] = []
        self.net.recorded = recorded
        try:
            yield recorded
        finally:
            self.net.recorded = None

    @contextmanager
    def interrupted(self, layer: int) -> Iterator[None]:
        """Interrupt the pass in the block behind `layer`, and before the last one."""
        self.net.interrupt = min(layer, self.net.layers - 2)
        try:
            yield
        except InterruptedPassError:
            return
        finally:
            self.net.interrupt = None


class LayersTarget(_Target):
    """Per-layer caches: :class:`~kvcache.KVCache` and its kin.

    kind: one of ``LAYERS``. store: makes the store behind the prefix cache of each trial; None for
    no store.
    """

    tiers = ("host", "store")

    def __init__(
        self,
        kind: str = "full",
        backend: str | Backend = "numpy",
        *,
        store: MakeStore | None = MemoryStore,
    ) -> None:
        super().__init__(kind, backend, "layers", store)
        if kind == "hybrid":  # padding would reach the states of its recurrent layers
            self.abilities -= {Ability.BATCH}

    def trial(self) -> Trial:
        return _LayersTrial(self, self.store)

    def cold_trial(self) -> Trial:
        return _LayersTrial(self, None)

    def caches(self) -> LayerCaches[Any]:
        """Return the empty caches of all layers."""
        backend = self.net.backend
        if isinstance(self.net, HybridNet):
            return self.net.model.make_caches()
        return LayerCaches(_cache_for(rule, backend) for rule in RULES[self.kind])


def _cache_for(rule: Visibility, backend: Backend) -> LayerCache:
    if rule.window is None:
        return KVCache(backend)
    return RotatingKVCache(rule.window + 1 + rule.sinks, rule.sinks, backend)


class PoolTarget(_Target):
    """One multi-sequence cache: :class:`~kvcache.CausalCache` and its kin.

    kind: a key of ``POOLS``. store: makes the store behind the prefix cache of each trial; None for
    no store.
    """

    tiers = ("device", "host", "store")

    def __init__(
        self,
        kind: str = "full",
        backend: str | Backend = "numpy",
        *,
        store: MakeStore | None = MemoryStore,
    ) -> None:
        super().__init__(kind, backend, "pool", store)

    def trial(self) -> Trial:
        return _PoolTrial(self, self.store)

    def cold_trial(self) -> Trial:
        return _PoolTrial(self, None)

    def pool(self) -> Cache:
        """Return the empty cache."""
        cache = POOLS[self.kind]()
        cache.init(
            self.net.backend, max_sequences=_SEQUENCES, capacity=_CAPACITY, max_batch=_CAPACITY
        )
        return cache


class _Trial(TieredTrial):
    @abstractmethod
    def begin(self, ids: Sequence[int], tenant: int = 0) -> _SessionConversation: ...

    def session(self, ids: Sequence[int], tenant: int) -> Session:
        """Begin a session, which waits for its store, however long that takes."""
        return self.prefix.session(list(ids), salt=str(tenant), deadline=NEVER)


class _SessionConversation(Conversation):
    """One session."""

    def __init__(
        self,
        target: _Target,
        trial: _Trial,
        session: Session,
        ids: Sequence[int],
        tenant: int,
    ) -> None:
        self._target, self._trial, self._tenant = target, trial, tenant
        self.session = session
        self.ids = list(ids[: session.matched])
        self._named = len(ids)  # the prompt is named already

    @property
    def held(self) -> int:
        return self.session.matched

    def forward(self, ids: Sequence[int]) -> HostArray:
        logits = self.compute(ids)
        self.advance(ids)
        return logits

    @abstractmethod
    def compute(self, ids: Sequence[int]) -> HostArray:
        """Compute `ids` behind what the caches hold."""

    def advance(self, ids: Sequence[int]) -> None:
        """Take note of computed tokens, and name those that the prompt did not."""
        self.ids += ids
        self.session.extend(self.ids[self._named :])
        self._named = max(self._named, len(self.ids))

    def can_trim(self, count: int) -> bool:
        return True

    def trim(self, count: int) -> None:
        self.cut(len(self.ids) - count)
        self.session.truncate(len(self.ids))

    def cut(self, length: int) -> None:
        """Take note that only `length` tokens are left."""
        del self.ids[length:]
        self._named = length

    def fork(self) -> Conversation:
        fork = self._trial.begin(self.ids, self._tenant)
        self.copy_to(fork.session)
        fork.ids = list(self.ids)
        return fork

    @abstractmethod
    def copy_to(self, session: Session) -> None:
        """Give `session` a copy of what the caches hold, in place of what it has."""

    def end(self, store: bool) -> None:
        self.session.close(store)
        self._trial.settle()


class _LayersTrial(_Trial):
    def __init__(self, target: LayersTarget, store: MakeStore | None) -> None:
        super().__init__(partial(PrefixCache, target.caches()), store)
        self.target = target

    def begin(self, ids: Sequence[int], tenant: int = 0) -> _LayersConversation:
        return _LayersConversation(self.target, self, self.session(ids, tenant), ids, tenant)

    def together(self, rows: Sequence[tuple[Conversation, Sequence[int]]]) -> list[HostArray]:
        """Compute as many tokens as all rows have in one batch, and the rest of each alone."""
        talks = [row for row, _ in rows if isinstance(row, _LayersConversation)]
        common = min(len(ids) for _, ids in rows)
        joined = LayerCaches.concat([talk.session.caches for talk in talks])
        first = self.target.net.over_layers(np.array([ids[:common] for _, ids in rows]), joined)
        outputs = []
        for talk, caches, logits, (_, ids) in zip(talks, joined.split(), first, rows, strict=True):
            talk.session.adopt(caches)
            talk.advance(ids[:common])
            rest = [talk.forward(ids[common:])] if len(ids) > common else []
            outputs.append(np.concatenate([logits, *rest]))
        return outputs


class _LayersConversation(_SessionConversation):
    def compute(self, ids: Sequence[int]) -> HostArray:
        rows: HostArray = self._target.net.over_layers(np.array([ids]), self.session.caches)[0]
        return rows

    def can_trim(self, count: int) -> bool:
        return self.session.caches.can_trim(count)

    def draft(self, ids: Sequence[int], accepted: int) -> HostArray:
        caches, before = self.session.caches, len(self.ids)
        caches.checkpoint()
        # A recurrent layer goes back to where a state was recorded.
        caches.schedule([before + accepted])
        logits = self.compute(ids)
        caches.rollback(accepted)
        self.cut(before)
        self.advance(ids[:accepted])
        return logits

    def copy_to(self, session: Session) -> None:
        session.adopt(self.session.caches.copy())

    def cancel(self, ids: Sequence[int], layer: int) -> None:
        caches = self.session.caches
        caches.checkpoint()
        with self._target.interrupted(layer):
            self.compute(ids)
        caches.rollback(0)


class _PoolTrial(_Trial):
    def __init__(self, target: PoolTarget, store: MakeStore | None) -> None:
        self.target, self.pool = target, target.pool()
        super().__init__(partial(PrefixCache, self.pool, sequences=range(_SEQUENCES - 1)), store)

    def begin(self, ids: Sequence[int], tenant: int = 0) -> _PoolConversation:
        return _PoolConversation(self, self.session(ids, tenant), ids, tenant)

    def together(self, rows: Sequence[tuple[Conversation, Sequence[int]]]) -> list[HostArray]:
        talks = [(row, ids) for row, ids in rows if isinstance(row, _PoolConversation)]
        parts = [(talk.session.sequence, len(talk.ids), list(ids)) for talk, ids in talks]
        logits = self.target.net.over_pool(parts, self.pool)
        for talk, ids in talks:
            talk.advance(ids)
        return np.split(logits, np.cumsum([len(ids) for _, ids in talks])[:-1])

    def evict(self, tier: str) -> None:
        if tier == "device":
            self.push_out()
        else:
            super().evict(tier)

    def push_out(self) -> None:
        """Push what is stored out of the pool, into host memory."""
        spare, count = _SEQUENCES - 1, _SEQUENCES * _CAPACITY
        while count:
            try:
                self.pool.start_forward(Batch(range(count), [spare] * count))
            except CacheFullError:
                count = count * 7 // 8
            else:
                self.pool.abort()
                return

    def close(self) -> None:
        super().close()
        self.pool.close()


class _PoolConversation(_SessionConversation):
    def __init__(
        self, trial: _PoolTrial, session: Session, ids: Sequence[int], tenant: int
    ) -> None:
        super().__init__(trial.target, trial, session, ids, tenant)
        self._pool = trial.pool

    def compute(self, ids: Sequence[int]) -> HostArray:
        part = self.session.sequence, len(self.ids), list(ids)
        return self._target.net.over_pool([part], self._pool)

    def can_trim(self, count: int) -> bool:
        return self._pool.can_resume(self.session.sequence, len(self.ids) - count)

    def draft(self, ids: Sequence[int], accepted: int) -> HostArray:
        before = len(self.ids)
        self._pool.checkpoint(self.session.sequence)
        logits = self.forward(ids)
        self.cut(before + accepted)
        self.session.truncate(before + accepted)
        return logits

    def copy_to(self, session: Session) -> None:
        self._pool.copy_prefix(self.session.sequence, session.sequence, len(self.ids))

    def cancel(self, ids: Sequence[int], layer: int) -> None:
        with self._target.interrupted(layer):
            self.compute(ids)
        self._pool.abort()
