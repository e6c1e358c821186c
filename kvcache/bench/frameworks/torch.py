"""torch, and the caches of transformers, all in inference mode."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch

from kvcache.bench.harness.contest import (
    MEMMOVE,
    Cell,
    Contestant,
    Factory,
    Framework,
    Loop,
    UnavailableError,
)

DYNAMIC = "transformers DynamicCache"
STATIC = "transformers StaticCache"


class TorchFramework(Framework):
    """Calls return when the write is queued: on an accelerator a block waits once, at its end."""

    def scope(self) -> AbstractContextManager[object]:
        return torch.inference_mode()

    def factories(self) -> dict[str, Factory]:
        return {**super().factories(), STATIC: self.static, DYNAMIC: self.dynamic}

    def memmove(self, cell: Cell) -> Contestant:
        if cell.backend.device == "cpu":
            return super().memmove(cell)
        keys, values = (cell.zeros(cell.capacity).flatten() for _ in range(2))
        k, v = (cell.token().flatten() for _ in range(2))

        def run(steps: int) -> None:
            for p in range(cell.capacity - steps, cell.capacity):
                keys[p * k.numel() : (p + 1) * k.numel()].copy_(k)
                values[p * v.numel() : (p + 1) * v.numel()].copy_(v)

        return Contestant(MEMMOVE, run)

    def static(self, cell: Cell) -> Contestant:
        """transformers' preallocated cache, nearly full, of one layer."""
        transformers = _transformers()
        config = transformers.LlamaConfig(num_hidden_layers=1)
        cache = transformers.StaticCache(config=config, max_cache_len=cell.capacity)
        cache.update(*cell.history(), 0)
        try:
            length = cache.layers[0].cumulative_length
        except AttributeError as error:
            raise UnavailableError(
                f"transformers {transformers.__version__} keeps the position elsewhere. "
                "pip install 'transformers>=5'"
            ) from error
        return Contestant(STATIC, _appending(cell, cache), length.sub_)

    def dynamic(self, cell: Cell) -> Contestant:
        """transformers' default cache, of one layer: it concatenates."""
        transformers = _transformers()
        cache = transformers.DynamicCache()
        cache.update(*cell.history(), 0)

        def rewind(_: int) -> None:
            grown = cache.get_seq_length() - cell.capacity
            if grown > 0:
                # Leaves views; the untimed step that comes first makes whole arrays of them.
                cache.crop(-grown)

        return Contestant(DYNAMIC, _appending(cell, cache), rewind)


def _appending(cell: Cell, cache: Any) -> Loop:
    k, v = cell.token(), cell.token()
    update = cache.update

    def run(steps: int) -> None:
        for _ in range(steps):
            update(k, v, 0)

    return run


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise UnavailableError(f"{error}. pip install transformers") from error
    return transformers


FRAMEWORK = TorchFramework()
