"""A forward pass of the llama reference over a pool of cells: plan on the host, one program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from kvcache import Batch, CausalCache, functional
from kvcache.backends import Array
from kvcache.errors import ShapeError
from kvcache.pool.plan import ForwardPlan, PoolState

from .model import Llama


class Part(NamedTuple):
    """Tokens of one sequence that a pass feeds."""

    sequence: int
    start: int
    """Position of the first."""
    ids: list[int]
    last: bool
    """Whether the token behind them is wanted."""


class PooledPass:
    """A forward pass of the model over a pool."""

    def __init__(self, model: Llama, cache: CausalCache, dtype: str) -> None:
        self.model, self.cache, self._dtype = model, cache, dtype
        config = model.config
        cache.allocate(range(config.layers), config.kv_heads, config.head_dim)
        # Where each shape is a program of its own there are to be few of them.
        self._rounds = model.backend.config.padding > 1
        self._step = model.backend.compile(self._apply, donate=[0])
        weights = model.weights
        self._weights = weights.embedding, weights.layers, weights.norm, weights.head

    def __call__(self, parts: Sequence[Part]) -> list[int]:
        """Feed `parts`; return the next token of each whose `last` is set.

        Raises: CacheFullError; nothing has changed then.
        """
        ids = [token for part in parts for token in part.ids]
        counts = [len(part.ids) for part in parts]
        within = [i for count in counts for i in range(count)]
        positions = np.repeat([part.start for part in parts], counts) + within
        sequences = np.repeat([part.sequence for part in parts], counts)
        ends = np.cumsum(counts) - 1
        rows = [int(end) for end, part in zip(ends, parts, strict=True) if part.last]
        width = self._rounded(len(ids))
        plan = self.cache.plan(Batch(positions, sequences), tokens=width)
        arguments = self._arguments(ids, positions.tolist(), rows, width)
        self.cache.program_state, best = self._step(
            self.cache.program_state, plan, self._weights, *arguments
        )
        found: list[int] = self.model.backend.to_host(best)[: len(rows)].tolist()
        return found

    def _rounded(self, count: int) -> int:
        return 1 << (count - 1).bit_length() if self._rounds else count

    def _arguments(
        self, ids: list[int], positions: list[int], rows: list[int], width: int
    ) -> list[Array]:
        """On the device, the last of each repeated as the plan repeats its last token."""

        def padded(numbers: list[int], length: int) -> Any:
            return np.pad(np.asarray(numbers, np.int32), (0, length - len(numbers)), "edge")

        put = self.model.backend.from_host
        cos, sin = self.model.angles(padded(positions, width))
        wanted = padded(rows or [0], self._rounded(len(rows) or 1))
        return [put(padded(ids, width)[None]), cos, sin, put(wanted)]

    def _apply(
        self,
        state: PoolState,
        plan: ForwardPlan,
        weights: Any,
        ids: Array,
        cos: Array,
        sin: Array,
        rows: Array,
    ) -> tuple[PoolState, Array]:
        """The pure function: new state, and the likeliest tokens after `rows` of the batch."""
        blocks, xp = self.model.blocks, self.model.backend.xp
        embedding, layers, norm, head = weights
        x, bias = blocks.embed(embedding, ids), blocks.bias(plan.mask)
        for i, layer in enumerate(layers):
            q, k, v = blocks.project(layer, x, cos, sin)
            state = functional.put(state, plan, i, *map(self._stored, (k, v)))
            keys, values, _ = functional.get(state, plan, i)
            if values is None:
                raise ShapeError("a Llama attends to values in every layer; this one has none.")
            attended = blocks.attend(q, self._computed(keys), self._computed(values), bias)
            x = blocks.finish(layer, x, attended)
        logits = blocks.logits(norm, head, xp.take(x, rows, axis=1))
        best = xp.argmax(logits[0, :, :], axis=-1)
        return state, xp.astype(best, self.model.backend.dtype("int32"))

    def _stored(self, array: Array) -> Array:
        backend = self.model.backend
        return backend.xp.astype(array[0, :, :, :], backend.dtype(self._dtype))

    def _computed(self, array: Array) -> Array:
        backend = self.model.backend
        return backend.xp.astype(array, backend.dtype("float32"))[None, :, :, :]
