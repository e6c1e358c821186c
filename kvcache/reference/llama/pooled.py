"""A forward pass of the llama reference over a pool of cells: planned, then run layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from kvcache import Batch, CausalCache, functional
from kvcache.backends import Array, HostArray, nbytes
from kvcache.errors import ShapeError
from kvcache.functional import ForwardPlan, PoolState
from kvcache.reference.decoder import PassPart

from .weights import Layer

if TYPE_CHECKING:
    from .model import Llama

DeviceWeights: TypeAlias = tuple[Array, tuple[Layer, ...], Array, Array]
"""Embedding, layers, norm and head: the arguments of a program that are the same in each pass."""
Attend: TypeAlias = Callable[[int, Array, Array, Array], Array]
"""Function of the number of a layer, queries, keys and values ``[1, heads, L, head_dim]``, which
stores the keys and values and returns attention over all that is stored, ``[1, L, hidden]``."""


class PooledPass:
    """A forward pass of the model over a pool."""

    any_length = True  # where each length is compiled by itself, passes are padded to few

    def __init__(self, model: Llama, cache: CausalCache, dtype: str) -> None:
        """Allocate the layers of `cache`, initialised with `dtype` before."""
        self.model, self.cache, self._dtype = model, cache, dtype
        config = model.config
        # A program works on buffers that exist; put() alone would allocate them in the first pass.
        cache.allocate(range(config.layers), config.kv_heads, config.head_dim)
        # A backend that compiles each shape separately gets few of them: powers of two.
        self._pads = model.backend.config.padding > 1
        # Where calls are not compiled, attention reads by the pass, which a program cannot.
        self._eager = model.backend.slices_are_views
        self._step = model.backend.compile(self._apply, donate=[0])
        weights = model.weights
        self._weights = weights.embedding, weights.layers, weights.norm, weights.head

    @property
    def cells(self) -> int:
        return self.cache.cells

    @property
    def nbytes(self) -> int:
        config = self.model.config
        shape = (config.layers, 2, self.cells, config.kv_heads, config.head_dim)
        return nbytes(shape, self._dtype)

    def __call__(self, parts: Sequence[PassPart]) -> list[int]:
        """Feed `parts`; return the next token of each part with `last` set.

        Raises: CacheFullError; nothing has changed then.
        """
        ids = [token for part in parts for token in part.ids]
        counts = [len(part.ids) for part in parts]
        within = [i for count in counts for i in range(count)]
        positions = np.repeat([part.start for part in parts], counts) + within
        sequences = np.repeat([part.sequence for part in parts], counts)
        ends = np.cumsum(counts) - 1
        rows = [int(end) for end, part in zip(ends, parts, strict=True) if part.last]
        width = self._padded_length(len(ids))
        batch = Batch(positions, sequences)
        arguments = self._arguments(ids, positions.tolist(), rows, width)
        if self._eager:
            self.cache.start_forward(batch)
            best = self._likeliest(self._attend, self._weights, *arguments)
        else:
            plan = self.cache.plan(batch, tokens=width)
            self.cache.program_state, best = self._step(
                self.cache.program_state, plan, self._weights, *arguments
            )
        tokens: list[int] = self.model.backend.to_host(best)[: len(rows)].tolist()
        return tokens

    def _padded_length(self, count: int) -> int:
        return 1 << (count - 1).bit_length() if self._pads else count

    def _arguments(
        self, ids: list[int], positions: list[int], rows: list[int], width: int
    ) -> tuple[Array, Array, Array, Array]:
        """Move ids, angles and rows to the device, padded to the shapes of a program.

        The last element is repeated, as the plan repeats its last token: computing the same token
        twice writes the same cell twice.
        """

        def padded(numbers: list[int], length: int) -> HostArray:
            return np.pad(np.asarray(numbers, np.int32), (0, length - len(numbers)), "edge")

        put = self.model.backend.from_host
        cos, sin = self.model.angles(padded(positions, width))
        # A pass in the middle of a prompt wants no token, but a program has to take some row.
        wanted = padded(rows or [0], self._padded_length(len(rows) or 1))
        return put(padded(ids, width)[None]), cos, sin, put(wanted)

    def _apply(
        self,
        state: PoolState,
        plan: ForwardPlan,
        weights: DeviceWeights,
        ids: Array,
        cos: Array,
        sin: Array,
        rows: Array,
    ) -> tuple[PoolState, Array]:
        """Return the new state, and the likeliest tokens after `rows` of the batch, int32 [rows].

        A pure function, compiled where the backend does that. Consumes `state`.
        """
        blocks, bias = self.model.blocks, self.model.blocks.bias(plan.mask)

        def attend(number: int, q: Array, k: Array, v: Array) -> Array:
            nonlocal state
            state = functional.put(state, plan, number, self._stored(k), self._stored(v))
            keys, values, _ = functional.get(state, plan, number)
            if values is None:
                raise ShapeError("a Llama attends to values in every layer; this one has none.")
            return blocks.attend(q, self._computed(keys), self._computed(values), bias)

        best = self._likeliest(attend, weights, ids, cos, sin, rows)
        return state, best

    def _attend(self, number: int, q: Array, k: Array, v: Array) -> Array:
        """Attend to what the tokens of the pass see in the cache."""
        self.cache.set_layer(number)
        self.cache.put(self._stored(k), self._stored(v))
        attended = self.cache.attend(self._stored(q))
        return self.model.blocks.beside(self._computed(attended))

    def _likeliest(
        self,
        attend: Attend,
        weights: DeviceWeights,
        ids: Array,
        cos: Array,
        sin: Array,
        rows: Array,
    ) -> Array:
        """Return the likeliest tokens after `rows` of the batch, int32 [rows]."""
        blocks, xp = self.model.blocks, self.model.backend.xp
        embedding, layers, norm, head = weights
        x = blocks.embed(embedding, ids)
        for number, layer in enumerate(layers):
            q, k, v = blocks.project(layer, x, cos, sin)
            x = blocks.finish(layer, x, attend(number, q, k, v))
        logits = blocks.logits(norm, head, xp.take(x, rows, axis=1))
        best = xp.argmax(logits[0, :, :], axis=-1)
        return xp.astype(best, self.model.backend.dtype("int32"))

    def _stored(self, array: Array) -> Array:
        """Drop the batch axis and cast to the dtype of the cache."""
        backend = self.model.backend
        return backend.xp.astype(array[0, :, :, :], backend.dtype(self._dtype))

    def _computed(self, array: Array) -> Array:
        """Cast to float32 and add a batch axis."""
        backend = self.model.backend
        return backend.xp.astype(array, backend.dtype("float32"))[None, :, :, :]
