"""JAX: the cached, donated call. JAX itself has no cache of this kind, so there is no peer."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import ClassVar, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kvcache.backends.arrays import NativeArray, NativeArrays
from kvcache.bench.harness.contest import (
    Case,
    Contestant,
    Factories,
    Loop,
    UnavailableError,
)

from .base import Framework, at_last_positions

PLAIN = "raw (plain jit)"
# On CPU, XLA would convert a whole buffer of these dtypes to float32 to write one token.
_NORMALIZED = ("bfloat16", "float8_e4m3fn", "float8_e5m2")
_COPY_ONLY = {
    "xla_disable_hlo_passes": ",".join(
        f"float-normalization-{dtype}" for dtype in ("bf16", "f8e4m3fn", "f8e5m2")
    )
}

Write: TypeAlias = Callable[[jax.Array, jax.Array, np.int32], jax.Array]
"""A buffer, consumed, with a token written at a position."""


class JaxFramework(Framework):
    """Donated writes. A step is over when its arrays are ready, as when attention comes next."""

    lazy: ClassVar[bool] = True
    compiles: ClassVar[bool] = True

    def finish(self, arrays: tuple[object, ...]) -> None:
        jax.block_until_ready(arrays)

    def others(self) -> Factories[Case]:
        return {PLAIN: self.plain}

    def raw(self, case: Case) -> Loop:
        return self._writes(case, _write_for(case))

    def raw_views(self, case: Case) -> Loop:
        raise UnavailableError("a slice is a copy in JAX; what raw returns is attended to whole")

    def raw_step(self, case: Case, layers: list[tuple[NativeArray, NativeArray]]) -> Loop:
        """Write in all layers; whole buffers are attended to, so there are no views to take."""
        write, finish = _write_for(case), self.finish
        k, v = case.token(), case.token()

        def step(p: int) -> None:
            at = np.int32(p)
            for i, (keys, values) in enumerate(layers):
                layers[i] = write(keys, k, at), write(values, v, at)
            finish(tuple(layers))

        return at_last_positions(case, step)

    def raw_copies(self, layers: int, new: NativeArrays) -> Loop:
        raise UnavailableError("an array of JAX never changes, and can be kept without a copy")

    def raw_states(
        self, layers: list[NativeArrays], new: NativeArrays, read: list[int], written: list[int]
    ) -> Loop:
        indices, finish = (np.array(read, np.int32), np.array(written, np.int32)), self.finish
        take, put = _take(), _put()

        def run(steps: int) -> None:
            nonlocal indices
            for _ in range(steps):
                source, target = indices
                for number, buffers in enumerate(layers):
                    finish(take(buffers, source))
                    layers[number] = put(buffers, new, target)
                # The next step waits for the writes, as it does in a model.
                indices = target, source

        return run

    def plain(self, case: Case) -> Contestant:
        """Make the raw call as most code has it, without the compiler option for O(token)."""
        if not _converts(case):
            raise UnavailableError(f"the same as raw for {case.dtype} on {case.backend.device}")
        return Contestant(PLAIN, self._writes(case, _write()))

    def _writes(self, case: Case, write: Write) -> Loop:
        """Return a loop over `write` for K and V, waiting for both in every step."""
        finish = self.finish
        keys, values = case.history()
        k, v = case.token(), case.token()

        def run(steps: int) -> None:
            nonlocal keys, values
            for p in range(case.tokens - steps, case.tokens):
                keys = write(keys, k, np.int32(p))
                values = write(values, v, np.int32(p))
                finish((keys, values))

        return run


def _converts(case: Case) -> bool:
    """Whether XLA, left alone, converts the whole buffer for each write."""
    return case.backend.device.startswith("cpu") and case.dtype in _NORMALIZED


def _write_for(case: Case) -> Write:
    """Return the writer at a cost of O(token), whatever the dtype."""
    return _write(tuple(_COPY_ONLY.items())) if _converts(case) else _write()


# One program for all contestants: each would otherwise compile its own.
@cache
def _write(options: tuple[tuple[str, str], ...] = ()) -> Write:
    def write(buffer: jax.Array, update: jax.Array, position: np.int32) -> jax.Array:
        return lax.dynamic_update_slice(buffer, update, (0, 0, position, 0))

    compiled: Write = jax.jit(write, donate_argnums=0, compiler_options=dict(options) or None)
    return compiled


@cache
def _take() -> Callable[[NativeArrays, np.ndarray], NativeArrays]:
    def take(buffers: NativeArrays, index: jax.Array) -> NativeArrays:
        return tuple(jnp.take(buffer, index, axis=0, mode="clip") for buffer in buffers)

    return jax.jit(take, compiler_options=_COPY_ONLY)


@cache
def _put() -> Callable[[NativeArrays, NativeArrays, np.ndarray], NativeArrays]:
    def put(buffers: NativeArrays, rows: NativeArrays, index: jax.Array) -> NativeArrays:
        return tuple(buffer.at[index].set(own) for buffer, own in zip(buffers, rows, strict=True))

    return jax.jit(put, donate_argnums=0, compiler_options=_COPY_ONLY)


FRAMEWORK = JaxFramework()
