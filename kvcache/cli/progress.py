"""Times and tables of ``kvcache generate``."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.table import Table

import kvcache
from kvcache.backends import Backend
from kvcache.layers.base import LayerCache

if TYPE_CHECKING:
    from kvcache.reference.server import Request, Server


class Stopwatch:
    """An iterable of tokens with the times of the first and the last one.

    started, first, last: seconds of :func:`time.perf_counter`. count: tokens so far.
    """

    def __init__(self, tokens: Iterator[int]) -> None:
        self._tokens = tokens
        self.started = time.perf_counter()
        self.first = self.last = self.started
        self.count = 0

    def __iter__(self) -> Iterator[int]:
        for token in self._tokens:
            self.last = time.perf_counter()
            if not self.count:
                self.first = self.last
            self.count += 1
            yield token

    @property
    def rate(self) -> str:
        """Tokens per second after the first one, the time for the prompt left out."""
        if self.count < 2:
            return "-"
        return f"{(self.count - 1) / (self.last - self.first):.1f}"


def generation_table(
    backends: Sequence[Backend],
    kind: str,
    caches: Sequence[LayerCache],
    prompt_tokens: int,
    watch: Stopwatch,
) -> Table:
    """Return times and sizes of one generation through per-layer caches, or through none."""
    table = Table.grid(padding=(0, 2))
    table.add_row("backend", ", ".join(backend.spec for backend in backends))
    # Layers of one kind share a dtype, so each stands there once; without caches, none does.
    table.add_row("cache", ", ".join([kind, *_dtypes(caches)]))
    table.add_row("prompt", f"{prompt_tokens} tokens, {watch.first - watch.started:.2f} s")
    table.add_row("generated", f"{watch.count} tokens, {watch.rate} tokens/s")
    if caches:
        held = f"{_size(sum(cache.nbytes for cache in caches))} for {tokens_held(caches)} tokens"
        growths = sum(cache.growths for cache in _with_tokens(caches))
        table.add_row("held", f"{held}, {growths} growths")
    return table


def tokens_held(caches: Sequence[LayerCache]) -> int:
    """Return how many tokens the layers with keys and values hold; all seen if there is none."""
    return next((cache.len for cache in _with_tokens(caches)), caches[0].offset)


def _with_tokens(caches: Sequence[LayerCache]) -> list[kvcache.KVCache]:
    return [cache for cache in caches if isinstance(cache, kvcache.KVCache)]


def _dtypes(caches: Sequence[LayerCache]) -> list[str]:
    """Return the dtypes of the caches, each once."""
    dtypes = (cache.dtype for cache in caches)
    # A state has a dtype for each of its arrays; an empty cache may have none yet.
    named = (d if isinstance(d, tuple) else (str(d),) for d in dtypes if d is not None)
    return list(dict.fromkeys(dtype for names in named for dtype in names))


def pool_table(
    backend: Backend, server: Server, requests: Sequence[Request], dtype: str, seconds: float
) -> Table:
    """Return times and sizes of the generation of several requests in one pool."""
    generated = sum(len(request.generated) for request in requests)
    table = Table.grid(padding=(0, 2))
    table.add_row("backend", backend.spec)
    table.add_row(
        "cache", f"pool, {dtype}, {_size(server.forward.nbytes)} for {server.cells:,} tokens"
    )
    table.add_row("generated", f"{generated} tokens, {generated / seconds:.1f} tokens/s")
    table.add_row("passes", f"{server.passes} for {len(requests)} prompts")
    ends = [f"{request.number} {request.finish}" for request in requests]
    table.add_row("ended by", ", ".join(ends))
    return table


def _size(count: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"
