"""Who takes part in a comparison: our own caches, and what every framework adds to them.

A contestant is two loops. `run` takes the given number of steps and nothing else, so that a
write of less than a microsecond is not drowned by the clock or by a call to reach it;
`rewind` goes back as many steps, untimed, so that each block of steps starts from the same
history.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar, TypeAlias

import numpy as np

from kvcache.backends import Backend, nbytes
from kvcache.backends.arrays import NativeArray
from kvcache.bench.step.case import Decoding
from kvcache.layers.growing import KVCache
from kvcache.layers.rotating import RotatingKVCache

MEMMOVE = "memmove"
RAW = "raw"
RAW_VIEWS = "raw + views"
SLICE_UPDATE = "slice_update"
UPDATE = "KVCache.update"
ROTATING = "RotatingKVCache.update"
OURS = (SLICE_UPDATE, UPDATE, ROTATING)

TOKENS = 2
"""The token axis of ``[B, kv_heads, tokens, head_dim]``."""
MAX_STEPS = 256
"""Longest block of steps: how far a cache is from full when a block starts."""

Loop: TypeAlias = Callable[[int], None]


class UnavailableError(Exception):
    """A contestant cannot take part; the message says why."""


@dataclass(frozen=True)
class Cell:
    """What all contestants of one comparison have in common: `capacity` tokens of K and of V."""

    backend: Backend
    dtype: str
    capacity: int
    batch: int
    heads: int
    head_dim: int

    @property
    def max_steps(self) -> int:
        """Longest block of steps: a quarter of what a small cache holds."""
        return max(1, min(MAX_STEPS, self.capacity // 4))

    def zeros(self, tokens: int) -> NativeArray:
        """A new array of keys or values, made by the backend."""
        return self.backend.alloc((self.batch, self.heads, tokens, self.head_dim), self.dtype)

    def token(self) -> NativeArray:
        """Keys or values of one token."""
        shape = self.batch, self.heads, 1, self.head_dim
        return self.backend.from_host(np.ones(shape, np.float32), self.dtype)

    def history(self) -> tuple[NativeArray, NativeArray]:
        """Keys and values that fill the capacity; new ones, for a peer may adopt them."""
        return self.zeros(self.capacity), self.zeros(self.capacity)


def _no_rewind(steps: int) -> None:
    """For loops that start from the same slot each time."""


@dataclass(frozen=True)
class Contestant:
    """run: takes that many steps. rewind: goes back as many, before each run, untimed."""

    name: str
    run: Loop
    rewind: Loop = _no_rewind


Factory: TypeAlias = Callable[[Cell], Contestant]


class Framework:
    """Contestants on a framework that writes in place, at once, by assigning to a slice.

    Subclasses replace :meth:`raw` and add peers. A factory raises UnavailableError where
    its contestant cannot take part.
    """

    lazy: ClassVar[bool] = False
    """Whether a step is over only when :meth:`finish` returns."""

    def finish(self, arrays: tuple[NativeArray, ...]) -> None:
        """Wait until all arrays have been computed and written; nothing unless `lazy`."""

    def scope(self) -> AbstractContextManager[object]:
        """What all contestants run inside of."""
        return nullcontext()

    def factories(self) -> dict[str, Factory]:
        """All contestants by name, those that cannot take part among them."""
        return {
            MEMMOVE: self.memmove,
            RAW: self.raw,
            RAW_VIEWS: self.raw_views,
            SLICE_UPDATE: self.slice_update,
            UPDATE: self.update,
            ROTATING: self.rotating,
        }

    def memmove(self, cell: Cell) -> Contestant:
        """The bytes of K and V moved on the host: what no cache can beat."""
        if cell.backend.device.partition(":")[0] not in {"cpu", "numpy"}:
            raise UnavailableError(
                f"memmove is for host memory; these are on {cell.backend.device}"
            )
        size = nbytes((cell.batch, cell.heads, cell.head_dim), cell.dtype)
        # Assigning to a slice of a memoryview is Python's cheapest way to memmove.
        keys, values = (memoryview(bytearray(size * cell.capacity)) for _ in range(2))
        k, v = (memoryview(bytes(size)) for _ in range(2))

        def run(steps: int) -> None:
            end = cell.capacity * size
            for at in range(end - steps * size, end, size):
                keys[at : at + size] = k
                values[at : at + size] = v

        return Contestant(MEMMOVE, run)

    def raw(self, cell: Cell) -> Contestant:
        """What a good engineer writes in place of our cache."""
        keys, values = cell.history()
        k, v = cell.token(), cell.token()

        def run(steps: int) -> None:
            for p in range(cell.capacity - steps, cell.capacity):
                keys[:, :, p : p + 1] = k
                values[:, :, p : p + 1] = v

        return Contestant(RAW, run)

    def raw_views(self, cell: Cell) -> Contestant:
        """The same, and keys and values to attend to: no more and no less than an update does."""
        keys, values = cell.history()
        k, v = cell.token(), cell.token()

        def run(steps: int) -> None:
            for p in range(cell.capacity - steps, cell.capacity):
                keys[:, :, p : p + 1] = k
                values[:, :, p : p + 1] = v
                _ = keys[:, :, : p + 1], values[:, :, : p + 1]

        return Contestant(RAW_VIEWS, run)

    def raw_step(self, scene: Decoding) -> Contestant:
        """The same in all layers of a model, with nothing to plan for."""
        layers, finish = scene.history(), self.finish
        k, v = scene.token(), scene.token()

        def step(p: int) -> None:
            seen: list[NativeArray] = []
            for keys, values in layers:
                keys[:, :, p : p + 1] = k
                values[:, :, p : p + 1] = v
                seen += keys[:, :, : p + 1], values[:, :, : p + 1]
            finish(tuple(seen))

        return stepping(scene, step)

    def slice_update(self, cell: Cell) -> Contestant:
        """The backend's checked primitive, called twice."""
        keys, values = cell.history()
        k, v = cell.token(), cell.token()
        write, finish = cell.backend.slice_update, self.finish

        def run(steps: int) -> None:
            nonlocal keys, values
            for p in range(cell.capacity - steps, cell.capacity):
                keys = write(keys, k, p, TOKENS)
                values = write(values, v, p, TOKENS)

        def run_lazy(steps: int) -> None:
            nonlocal keys, values
            for p in range(cell.capacity - steps, cell.capacity):
                keys = write(keys, k, p, TOKENS)
                values = write(values, v, p, TOKENS)
                finish((keys, values))

        return Contestant(SLICE_UPDATE, run_lazy if self.lazy else run)

    def update(self, cell: Cell) -> Contestant:
        """A growing cache, nearly full, that has room for what a block appends."""
        cache = KVCache(cell.backend, step=cell.capacity, dtype=cell.dtype)
        cache.update(*cell.history())
        self.finish(cache.state)
        return Contestant(UPDATE, self.appending(cell, cache.update), cache.trim)

    def rotating(self, cell: Cell) -> Contestant:
        """A full ring that displaces one token per step."""
        cache = RotatingKVCache(
            cell.capacity, backend=cell.backend, step=cell.capacity, dtype=cell.dtype
        )
        cache.update(*cell.history())
        self.finish(cache.state)
        return Contestant(ROTATING, self.appending(cell, cache.update))

    def appending(self, cell: Cell, update: Callable[[NativeArray, NativeArray], Any]) -> Loop:
        """A loop over a whole update, what it returns included."""
        k, v = cell.token(), cell.token()
        finish = self.finish

        def run(steps: int) -> None:
            for _ in range(steps):
                update(k, v)

        def run_lazy(steps: int) -> None:
            for _ in range(steps):
                finish(update(k, v))

        return run_lazy if self.lazy else run


def stepping(scene: Decoding, step: Callable[[int], None]) -> Contestant:
    """The raw contestant of a decode step that adds the tokens at one position."""

    def run(steps: int) -> None:
        for p in range(scene.tokens - steps, scene.tokens):
            step(p)

    return Contestant(RAW, run)


_MODULES = {
    "array_api": "kvcache.bench.frameworks.array_api",
    "jax": "kvcache.bench.frameworks.jax",
    "mlx": "kvcache.bench.frameworks.mlx",
    "torch": "kvcache.bench.frameworks.torch",
}


def framework_of(backend: Backend) -> Framework:
    """The contestants for `backend`; those of NumPy where we know nothing better."""
    if backend.name not in _MODULES:
        return Framework()
    found: Framework = import_module(_MODULES[backend.name]).FRAMEWORK
    return found
