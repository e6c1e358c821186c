"""MLX, and mlx-lm's caches, evaluated once per step."""

from __future__ import annotations

from typing import Any, ClassVar

import mlx.core as mx

from kvcache.backends.arrays import NativeArray
from kvcache.bench.harness.contest import (
    RAW,
    RAW_VIEWS,
    Cell,
    Contestant,
    Factory,
    Framework,
    UnavailableError,
)

PEER = "mlx-lm KVCache"
ROTATING_PEER = "mlx-lm RotatingKVCache"


class MlxFramework(Framework):
    """A step is over when its arrays are evaluated, as when attention comes next."""

    lazy: ClassVar[bool] = True

    def finish(self, arrays: tuple[NativeArray, ...]) -> None:
        mx.eval(*arrays)

    def factories(self) -> dict[str, Factory]:
        peers: dict[str, Factory] = {PEER: self.peer, ROTATING_PEER: self.rotating_peer}
        return {**super().factories(), **peers}

    def raw(self, cell: Cell) -> Contestant:
        keys, values = cell.history()
        k, v = cell.token(), cell.token()

        def run(steps: int) -> None:
            for p in range(cell.capacity - steps, cell.capacity):
                keys[:, :, p : p + 1] = k
                values[:, :, p : p + 1] = v
                mx.eval(keys, values)

        return Contestant(RAW, run)

    def raw_views(self, cell: Cell) -> Contestant:
        keys, values = cell.history()
        k, v = cell.token(), cell.token()

        def run(steps: int) -> None:
            for p in range(cell.capacity - steps, cell.capacity):
                keys[:, :, p : p + 1] = k
                values[:, :, p : p + 1] = v
                mx.eval(keys[:, :, : p + 1], values[:, :, : p + 1])

        return Contestant(RAW_VIEWS, run)

    def peer(self, cell: Cell) -> Contestant:
        """mlx-lm's growing cache, nearly full."""
        cache = _mlx_lm().KVCache()
        self.finish(cache.update_and_fetch(*cell.history()))
        return Contestant(PEER, self.appending(cell, cache.update_and_fetch), cache.trim)

    def rotating_peer(self, cell: Cell) -> Contestant:
        """mlx-lm's ring, full."""
        cache = _mlx_lm().RotatingKVCache(max_size=cell.capacity)
        self.finish(cache.update_and_fetch(*cell.history()))
        return Contestant(ROTATING_PEER, self.appending(cell, cache.update_and_fetch))


def _mlx_lm() -> Any:
    try:
        from mlx_lm.models import cache
    except ImportError as error:
        raise UnavailableError(f"{error}. pip install mlx-lm") from error
    return cache


FRAMEWORK = MlxFramework()
