"""MLX, and mlx-lm's caches, evaluated once per step."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import ClassVar

import mlx.core as mx

from kvcache.backends.arrays import NativeArrays
from kvcache.bench.harness.contest import (
    Case,
    Contestant,
    Factories,
    Loop,
    UnavailableError,
)

from .base import Framework

PEER = "mlx-lm KVCache"
ROTATING_PEER = "mlx-lm RotatingKVCache"


class MlxFramework(Framework):
    """Lazy writes. A step is over when its arrays are evaluated, as when attention comes next."""

    lazy: ClassVar[bool] = True

    def finish(self, arrays: tuple[object, ...]) -> None:
        mx.eval(*arrays)

    def others(self) -> Factories[Case]:
        return {PEER: self.peer, ROTATING_PEER: self.rotating_peer}

    def raw(self, case: Case) -> Loop:
        keys, values = case.history()
        k, v = case.token(), case.token()

        def run(steps: int) -> None:
            for p in range(case.tokens - steps, case.tokens):
                keys[:, :, p : p + 1] = k
                values[:, :, p : p + 1] = v
                mx.eval(keys, values)

        return run

    def raw_views(self, case: Case) -> Loop:
        keys, values = case.history()
        k, v = case.token(), case.token()

        def run(steps: int) -> None:
            for p in range(case.tokens - steps, case.tokens):
                keys[:, :, p : p + 1] = k
                values[:, :, p : p + 1] = v
                # Not kept in a variable: a view that is alive makes the next write copy all.
                mx.eval(keys[:, :, : p + 1], values[:, :, : p + 1])

        return run

    def raw_copies(self, layers: int, new: NativeArrays) -> Loop:
        raise UnavailableError("an array of MLX can be kept without a copy")

    def raw_states(
        self, layers: list[NativeArrays], new: NativeArrays, read: list[int], written: list[int]
    ) -> Loop:
        begin: Callable[..., None] = mx.async_eval

        def run(steps: int) -> None:
            nonlocal read, written
            for _ in range(steps):
                source = mx.array(read)
                for buffers in layers:
                    # Not kept: a pending read would make the write copy all of the buffer.
                    mx.eval(*[mx.take(buffer, source, 0) for buffer in buffers])
                    for buffer, rows in zip(buffers, new, strict=True):
                        # Row by row: an assignment by an index array takes ten times as long.
                        for number, slot in enumerate(written):
                            buffer[slot : slot + 1] = rows[number : number + 1]
                    # The next step waits for the writes, as it does in a model.
                    begin(*buffers)
                read, written = written, read

        return run

    def peer(self, case: Case) -> Contestant:
        """Make mlx-lm's growing cache, nearly full."""
        cache = _mlx_lm_caches().KVCache()
        self.finish(cache.update_and_fetch(*case.history()))
        return Contestant(PEER, self.updates(case, cache.update_and_fetch), cache.trim)

    def rotating_peer(self, case: Case) -> Contestant:
        """Make mlx-lm's ring, full."""
        cache = _mlx_lm_caches().RotatingKVCache(max_size=case.tokens)
        self.finish(cache.update_and_fetch(*case.history()))
        return Contestant(ROTATING_PEER, self.updates(case, cache.update_and_fetch))


def _mlx_lm_caches() -> ModuleType:
    try:
        from mlx_lm.models import cache
    except ImportError as error:
        raise UnavailableError(f"{error}. pip install mlx-lm") from error
    return cache


FRAMEWORK = MlxFramework()
