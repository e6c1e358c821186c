"""torch, and the caches of transformers, all in inference mode."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import ModuleType

import torch
from torch import Tensor

from kvcache.backends.arrays import NativeArrays
from kvcache.bench.harness.contest import (
    Case,
    Contestant,
    Factories,
    Loop,
    UnavailableError,
)

from .base import Batched, Framework, Kernel
from .continuous import CONTINUOUS, paged_pass

DYNAMIC = "transformers DynamicCache"
STATIC = "transformers StaticCache"


class TorchFramework(Framework):
    """Calls return when the write is queued: on an accelerator a block waits once, at its end."""

    def scope(self) -> AbstractContextManager[object]:
        return torch.inference_mode()

    def others(self) -> Factories[Case]:
        return {STATIC: self.static, DYNAMIC: self.dynamic}

    def memmove(self, case: Case) -> Loop:
        if case.backend.device == "cpu":
            return super().memmove(case)
        # On a device: copies between flat buffers there.
        keys, values = (array.flatten() for array in case.history())
        k, v = (case.token().flatten() for _ in range(2))

        def run(steps: int) -> None:
            for p in range(case.tokens - steps, case.tokens):
                keys[p * k.numel() : (p + 1) * k.numel()].copy_(k)
                values[p * v.numel() : (p + 1) * v.numel()].copy_(v)

        return run

    def attention(self, case: Case) -> Kernel:
        kernel, scale = torch.nn.functional.scaled_dot_product_attention, case.head_dim**-0.5

        def attend(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
            (query_heads, tokens, dim), (heads, columns, _) = q.shape, keys.shape
            if mask is None:  # the queries of a key head are rows: its keys are read once
                rows = q.reshape(1, heads, -1, dim)
                return kernel(rows, keys[None], values[None], scale=scale).reshape(q.shape)
            shape = heads, query_heads // heads, columns, dim
            by_head = q.reshape(heads, -1, tokens, dim)
            by_keys, by_values = (array[:, None].expand(shape) for array in (keys, values))
            return kernel(by_head, by_keys, by_values, mask, scale=scale).reshape(q.shape)

        return attend

    def batched(self) -> dict[str, Batched]:
        return {CONTINUOUS: paged_pass}

    def raw_copies(self, layers: int, new: NativeArrays) -> Loop:
        held = [new] * layers

        def run(steps: int) -> None:
            for _ in range(steps):
                for layer in range(layers):
                    held[layer] = tuple([array.clone() for array in new])

        return run

    def raw_states(
        self, layers: list[NativeArrays], new: NativeArrays, read: list[int], written: list[int]
    ) -> Loop:
        device, finish = new[0].device, self.finish

        def run(steps: int) -> None:
            nonlocal read, written
            for _ in range(steps):
                # From the host, once for all layers: a step has its own.
                source, target = (torch.tensor(index, device=device) for index in (read, written))
                for buffers in layers:
                    finish(tuple([buffer.index_select(0, source) for buffer in buffers]))
                    for buffer, rows in zip(buffers, new, strict=True):
                        buffer.index_copy_(0, target, rows)
                read, written = written, read

        return run

    def static(self, case: Case) -> Contestant:
        """Make transformers' preallocated cache, nearly full, of one layer."""
        transformers = _transformers()
        config = transformers.LlamaConfig(num_hidden_layers=1)
        cache = transformers.StaticCache(config=config, max_cache_len=case.tokens)
        cache.update(*case.history(), 0)
        try:
            length = cache.layers[0].cumulative_length
        except AttributeError as error:
            raise UnavailableError(
                f"transformers {transformers.__version__} keeps the position elsewhere. "
                "pip install 'transformers>=5'"
            ) from error
        # The cache cannot be trimmed; but its next position is a tensor, which can be counted back.
        return Contestant(STATIC, _updates(case, cache.update), length.sub_)

    def dynamic(self, case: Case) -> Contestant:
        """Make transformers' default cache, of one layer: it concatenates."""
        transformers = _transformers()
        cache = transformers.DynamicCache()
        cache.update(*case.history(), 0)

        def rewind(_: int) -> None:
            grown = cache.get_seq_length() - case.tokens
            if grown > 0:
                # Leaves views; the untimed step that comes first makes whole arrays of them.
                cache.crop(-grown)

        return Contestant(DYNAMIC, _updates(case, cache.update), rewind)


def _updates(case: Case, update: Callable[[Tensor, Tensor, int], object]) -> Loop:
    """Return a loop over the update of a cache of transformers, in its only layer."""
    k, v = case.token(), case.token()

    def run(steps: int) -> None:
        for _ in range(steps):
            update(k, v, 0)

    return run


def _transformers() -> ModuleType:
    try:
        import transformers
    except ImportError as error:
        raise UnavailableError(f"{error}. pip install transformers") from error
    return transformers


FRAMEWORK = TorchFramework()
