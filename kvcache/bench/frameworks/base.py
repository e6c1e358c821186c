"""The raw calls of frameworks with in-place, immediate writes to slices, such as NumPy.

Every loop here is as short as a good engineer would write it: a call or a test more per step would
be charged to the framework, and flatter the caches beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar, TypeAlias

import numpy as np

from kvcache.backends import nbytes
from kvcache.backends.arrays import HostArray, NativeArray, NativeArrays
from kvcache.bench.harness.contest import Case, Factories, Loop, UnavailableError

Kernel: TypeAlias = Callable[
    [NativeArray, NativeArray, NativeArray, NativeArray | None], NativeArray
]
"""Attention of queries ``[query_heads, tokens, head_dim]`` over keys and values ``[heads, columns,
head_dim]`` with a mask, bool ``[tokens, columns]``, or None: like the queries."""

Batched: TypeAlias = Callable[[Case, HostArray, list[HostArray]], Callable[[], NativeArray]]
"""Function that makes the pass of a peer of many sequences in a case, from its queries,
``[query_heads, sequences, head_dim]``, and rows of each sequence, ``[heads, tokens, head_dim]``,
its keys as well as its values. It raises UnavailableError where the peer cannot take part."""


class Framework:
    """Raw calls as loops, written for NumPy; subclasses rewrite them for their framework.

    A loop writes the last tokens of a history of ``case.tokens``. A method raises UnavailableError
    where its framework has no such call.
    """

    lazy: ClassVar[bool] = False
    """Whether a step is over only when :meth:`finish` returns."""
    compiles: ClassVar[bool] = False
    """Whether :meth:`Backend.compile` compiles."""

    def finish(self, arrays: tuple[object, ...]) -> None:
        """Wait until all arrays have been computed and written; nothing unless `lazy`."""

    def scope(self) -> AbstractContextManager[object]:
        """Return the context in which all contestants are made and run."""
        return nullcontext()

    def others(self) -> Factories[Case]:
        """Return factories of further contestants, peers above all; none unless overridden."""
        return {}

    def memmove(self, case: Case) -> Loop:
        """Move the bytes of K and V on the host: the lower bound of any cache's cost."""
        if case.backend.device.partition(":")[0] not in {"cpu", "numpy"}:
            raise UnavailableError(
                f"memmove is for host memory; these are on {case.backend.device}"
            )
        size = nbytes((case.batch, case.heads, case.head_dim), case.dtype)
        # Assigning to a slice of a memoryview is Python's cheapest way to memmove.
        keys, values = (memoryview(bytearray(size * case.tokens)) for _ in range(2))
        k, v = (memoryview(bytes(size)) for _ in range(2))

        def run(steps: int) -> None:
            end = case.tokens * size
            for at in range(end - steps * size, end, size):
                keys[at : at + size] = k
                values[at : at + size] = v

        return run

    def raw(self, case: Case) -> Loop:
        """Write a token of K and of V, as a good engineer would without a cache."""
        keys, values = case.history()
        k, v = case.token(), case.token()

        def run(steps: int) -> None:
            for p in range(case.tokens - steps, case.tokens):
                keys[:, :, p : p + 1] = k
                values[:, :, p : p + 1] = v

        return run

    def raw_views(self, case: Case) -> Loop:
        """Write likewise and take the views to attend to: exactly the work of a cache's update."""
        keys, values = case.history()
        k, v = case.token(), case.token()

        def run(steps: int) -> None:
            for p in range(case.tokens - steps, case.tokens):
                keys[:, :, p : p + 1] = k
                values[:, :, p : p + 1] = v
                _ = keys[:, :, : p + 1], values[:, :, : p + 1]

        return run

    def raw_step(self, case: Case, layers: list[tuple[NativeArray, NativeArray]]) -> Loop:
        """Write and take views in all layers of a model, with nothing to plan for.

        layers: keys and values of each, as ``case.history()`` makes them; holds the written ones
        after every step.
        """
        finish = self.finish
        k, v = case.token(), case.token()

        def step(p: int) -> None:
            views: list[NativeArray] = []
            for keys, values in layers:
                keys[:, :, p : p + 1] = k
                values[:, :, p : p + 1] = v
                views += keys[:, :, : p + 1], values[:, :, : p + 1]
            finish(tuple(views))

        return at_last_positions(case, step)

    def attention(self, case: Case) -> Kernel:
        """Return the framework's own attention kernel; here two products and a softmax.

        Compiled, that serves JAX, too: its `dot_product_attention` takes three times as long on a
        processor.
        """
        xp, wide = case.backend.xp, case.backend.dtype("float32")
        scale = case.head_dim**-0.5

        def attend(
            q: NativeArray, keys: NativeArray, values: NativeArray, mask: NativeArray | None
        ) -> NativeArray:
            rows = xp.reshape(xp.astype(q, wide) * scale, (keys.shape[0], -1, q.shape[2]))
            scores = xp.matmul(rows, xp.permute_dims(xp.astype(keys, wide), (0, 2, 1)))
            if mask is not None:
                by_query = xp.reshape(scores, (-1, *mask.shape))
                scores = xp.reshape(xp.where(mask, by_query, -math.inf), scores.shape)
            weights = xp.exp(scores - xp.max(scores, axis=-1, keepdims=True))
            weights = weights / xp.sum(weights, axis=-1, keepdims=True)
            out = xp.matmul(weights, xp.astype(values, wide))
            return xp.astype(xp.reshape(out, q.shape), q.dtype)

        return attend

    def batched(self) -> dict[str, Batched]:
        """Return by name the peers that hold many sequences; none unless overridden."""
        return {}

    def raw_copies(self, layers: int, new: NativeArrays) -> Loop:
        """Copy the arrays of a recurrent state, `new`, once for each layer, keeping the copies."""
        held = [new] * layers

        def run(steps: int) -> None:
            for _ in range(steps):
                for layer in range(layers):
                    held[layer] = tuple([array.copy() for array in new])

        return run

    def raw_states(
        self, layers: list[NativeArrays], new: NativeArrays, read: list[int], written: list[int]
    ) -> Loop:
        """Gather the rows `read` of every array, and scatter `new` to the rows `written`, in turn.

        layers: buffers of each, of states.
        """
        indices, finish = (np.array(read), np.array(written)), self.finish

        def run(steps: int) -> None:
            nonlocal indices
            for _ in range(steps):
                source, target = indices
                for buffers in layers:
                    finish(tuple([buffer.take(source, 0) for buffer in buffers]))
                    for buffer, rows in zip(buffers, new, strict=True):
                        buffer[target] = rows
                indices = target, source

        return run

    def updates(
        self, case: Case, update: Callable[[NativeArray, NativeArray], tuple[object, ...]]
    ) -> Loop:
        """Return a loop over the whole update of a cache, waiting for its results if `lazy`."""
        k, v = case.token(), case.token()
        finish = self.finish

        def run(steps: int) -> None:
            for _ in range(steps):
                update(k, v)

        def run_lazy(steps: int) -> None:
            for _ in range(steps):
                finish(update(k, v))

        return run_lazy if self.lazy else run


def at_last_positions(case: Case, step: Callable[[int], None]) -> Loop:
    """Return a loop over the last positions of the history; `step` is called at each."""

    def run(steps: int) -> None:
        for p in range(case.tokens - steps, case.tokens):
            step(p)

    return run
