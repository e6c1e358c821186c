"""Contestants of an append: memmove, the framework's own calls, our caches, peers."""

from __future__ import annotations

from functools import partial

from kvcache.bench.frameworks.base import Framework
from kvcache.bench.harness.contest import RAW, Contestant, Factories, Loop
from kvcache.layers.growing import KVCache
from kvcache.layers.rotating import RotatingKVCache
from kvcache.storage.layout import TOKENS

from .case import MEMMOVE, RAW_VIEWS, ROTATING, SLICE_UPDATE, UPDATE, AppendCase


def factories(framework: Framework) -> Factories[AppendCase]:
    """Return a factory for every contestant by name, also where it cannot take part."""
    return {
        MEMMOVE: lambda case: Contestant(MEMMOVE, framework.memmove(case)),
        RAW: lambda case: Contestant(RAW, framework.raw(case)),
        RAW_VIEWS: lambda case: Contestant(RAW_VIEWS, framework.raw_views(case)),
        SLICE_UPDATE: lambda case: Contestant(SLICE_UPDATE, _slice_update(framework, case)),
        UPDATE: partial(_update, framework),
        ROTATING: partial(_rotating, framework),
        **framework.others(),
    }


def _slice_update(framework: Framework, case: AppendCase) -> Loop:
    """Return a loop over the backend's checked primitive, called for K and for V."""
    keys, values = case.history()
    k, v = case.token(), case.token()
    write, finish = case.backend.slice_update, framework.finish

    def run(steps: int) -> None:
        nonlocal keys, values
        for p in range(case.tokens - steps, case.tokens):
            keys = write(keys, k, p, TOKENS)
            values = write(values, v, p, TOKENS)

    def run_lazy(steps: int) -> None:
        nonlocal keys, values
        for p in range(case.tokens - steps, case.tokens):
            keys = write(keys, k, p, TOKENS)
            values = write(values, v, p, TOKENS)
            finish((keys, values))

    # Two loops, because a test or an empty call per step would count where a write takes 1 us.
    return run_lazy if framework.lazy else run


def _update(framework: Framework, case: AppendCase) -> Contestant:
    """Make a growing cache, nearly full, with room for the appends of a block."""
    # A step of the whole capacity, so that the buffers never grow: appends alone are measured.
    cache = KVCache(case.backend, step=case.tokens, dtype=case.dtype)
    cache.update(*case.history())
    framework.finish(cache.state)
    return Contestant(UPDATE, framework.updates(case, cache.update), cache.trim)


def _rotating(framework: Framework, case: AppendCase) -> Contestant:
    """Make a full ring: each step displaces one token, so nothing has to be rewound."""
    cache = RotatingKVCache(case.tokens, backend=case.backend, step=case.tokens, dtype=case.dtype)
    cache.update(*case.history())
    framework.finish(cache.state)
    return Contestant(ROTATING, framework.updates(case, cache.update))
