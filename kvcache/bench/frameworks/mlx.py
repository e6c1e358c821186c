"""MLX, and mlx-lm's caches, evaluated once per step."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import ClassVar

import mlx.core as mx
import numpy as np

from kvcache.backends.arrays import HostArray, NativeArray, NativeArrays
from kvcache.bench.harness.contest import (
    Case,
    Contestant,
    Factories,
    Loop,
    UnavailableError,
)

from .base import Batched, Framework, Kernel

PEER = "mlx-lm KVCache"
BATCH_PEER = "mlx-lm BatchKVCache"
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

    def attention(self, case: Case) -> Kernel:
        kernel, scale = mx.fast.scaled_dot_product_attention, case.head_dim**-0.5

        def attend(
            q: mx.array, keys: mx.array, values: mx.array, mask: mx.array | None
        ) -> mx.array:
            return kernel(q[None], keys[None], values[None], scale=scale, mask=mask)[0]

        return attend

    def batched(self) -> dict[str, Batched]:
        return {BATCH_PEER: self.batch_peer}

    def batch_peer(
        self, case: Case, queries: HostArray, rows: list[HostArray]
    ) -> Callable[[], NativeArray]:
        """Read mlx-lm's cache of several sequences, padded on the left to the longest one."""
        longest, put = max(row.shape[1] for row in rows), case.backend.from_host
        padding = [longest - row.shape[1] for row in rows]
        padded = np.stack(
            [
                np.pad(row, ((0, 0), (left, 0), (0, 0)))
                for row, left in zip(rows, padding, strict=True)
            ]
        )
        cache = _mlx_lm_caches().BatchKVCache(padding)
        cache.update_and_fetch(*(put(padded[:, :, :-1], case.dtype) for _ in range(2)))
        mask = cache.make_mask(1)
        last = (put(padded[:, :, -1:], case.dtype) for _ in range(2))
        keys, values = cache.update_and_fetch(*last)
        q: NativeArray = put(queries.transpose(1, 0, 2)[:, :, None], case.dtype)
        self.finish((keys, values, mask, q))
        kernel, scale = mx.fast.scaled_dot_product_attention, case.head_dim**-0.5
        return lambda: kernel(q, keys, values, scale=scale, mask=mask)

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
