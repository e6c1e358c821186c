"""A forward pass of the hybrid over one cache of many sequences."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise, takewhile
from typing import NamedTuple

import numpy as np

from kvcache import Batch, CausalCache, RecurrentCache, WrapperCache
from kvcache.backends import Array, nbytes
from kvcache.pool.state_calls import Run
from kvcache.reference._tokens import checked_ids
from kvcache.reference.decoder import PassPart
from kvcache.reference.generate import likeliest

from .stages import Stages, State
from .weights import Attention, DeltaNet, Weights


class _Group(NamedTuple):
    """Runs of a pass that are computed together; adjacent in its batch and equally long.

    numbers, tokens: of the runs among all, and of their tokens in the batch: int32 arrays of the
        backend; None for all of them.
    """

    runs: Sequence[Run]
    numbers: Array | None
    tokens: Array | None


class HybridPass:
    """A forward pass of the model over a cache of many sequences."""

    def __init__(self, stages: Stages, weights: Weights, cache: WrapperCache, dtype: str) -> None:
        """Take `cache`, initialised with `dtype` before.

        Its parts are a CausalCache for attention layers and a RecurrentCache for the others; where
        a model has layers of one kind only, one of them alone.
        """
        self.cache, self._dtype = cache, dtype
        self._stages, self._weights, self.backend = stages, weights, stages.backend
        kinds = [isinstance(part, RecurrentCache) for part in cache.caches]
        self._types = [kinds.index(recurrent) for recurrent in stages.config.recurrent]
        # Elsewhere slices are programs, and every stage is compiled for each length.
        self.any_length = stages.backend.slices_are_views

    @property
    def cells(self) -> int:
        return sum(part.cells for part in self.cache.caches if isinstance(part, CausalCache))

    @property
    def nbytes(self) -> int:
        config = self._stages.config
        layers = config.recurrent.count(False)
        shape = (layers, 2, self.cells, config.kv_heads, config.head_dim)
        states = (part.nbytes for part in self.cache.caches if isinstance(part, RecurrentCache))
        return nbytes(shape, self._dtype) + sum(states)

    def __call__(self, parts: Sequence[PassPart]) -> list[int]:
        """Feed `parts`; return the likeliest next token of each part with `last` set.

        Raises: CacheFullError, ShapeError, BoundsError; nothing has changed then.
        """
        return likeliest(self.backend, self.logits(parts))[: sum(part.last for part in parts)]

    def logits(self, parts: Sequence[PassPart], *, last_only: bool = True) -> Array:
        """Feed `parts`; return logits, float32 [rows, vocab], in the order of the parts.

        last_only: True returns those after the last token of each part with `last` set; if there
            is none, those after some token, to wait for. False returns those after every token.

        Raises: as calling it.
        """
        # Decode steps in front: they are adjacent then, and computed together.
        order = sorted(range(len(parts)), key=lambda number: len(parts[number].ids) > 1)
        counts = [len(parts[number].ids) for number in order]
        rows_of = dict(
            zip(order, np.split(np.arange(sum(counts)), np.cumsum(counts)), strict=False)
        )
        if last_only:
            rows = [rows_of[i][-1] for i, part in enumerate(parts) if part.last] or [0]
        else:
            rows = [row for i in range(len(parts)) for row in rows_of[i]]
        x = self._take(self._run([parts[number] for number in order]), self._indices(rows), 1)
        return self._stages.logits(self._weights.norm, self._weights.head, x)[0, :, :]

    def _run(self, parts: Sequence[PassPart]) -> Array:
        """Return hidden states after the last block: [1, tokens, hidden]."""
        stages, counts = self._stages, [len(part.ids) for part in parts]
        tokens = [token for part in parts for token in part.ids]
        ids = checked_ids([tokens], stages.config.vocab_size)
        within = np.concatenate([np.arange(count) for count in counts])
        positions = np.repeat([part.start for part in parts], counts) + within
        sequences = np.repeat([part.sequence for part in parts], counts)
        self.cache.start_forward(Batch(positions, sequences))
        x = stages.embed(self._weights.embedding, self.backend.from_host(ids))
        cos, sin = stages.angles(positions)
        groups = self._groups()
        for number, layer in enumerate(self._weights.layers):
            self.cache.set_layer_type(self._types[number])
            self.cache.set_layer(number)
            if isinstance(layer.mixer, DeltaNet):
                x = x + self._recur(layer.mixer_norm, layer.mixer, x, groups)
            else:
                x = x + self._attention(layer.mixer_norm, layer.mixer, x, cos, sin)
            x = x + stages.mlp(layer.mlp_norm, layer.mlp, x)
        return x

    def _attention(self, norm: Array, layer: Attention, x: Array, cos: Array, sin: Array) -> Array:
        """Return what an attention layer adds: [1, tokens, hidden]."""
        given = self._stages.project(norm, layer, x, cos, sin)
        self.cache.put(self._stored(given.keys), self._stored(given.values))
        attended = self._computed(self.cache.attend(self._stored(given.queries)))
        return self._stages.finish_attention(layer, self._stages.beside(attended), given.gates)

    def _recur(self, norm: Array, layer: DeltaNet, x: Array, groups: Sequence[_Group]) -> Array:
        """Return what a gated delta net adds: [1, tokens, hidden]."""
        xp, states = self.backend.xp, self.cache.get_states()
        outputs, behind = [], []
        kept: dict[tuple[int, int], State] = {}
        for runs, numbers, tokens in groups:
            before: State = ()
            if states is not None:
                before = tuple(self._take(array, numbers, 0) for array in states)
            own = xp.reshape(self._take(x, tokens, 1), (len(runs), -1, x.shape[-1]))
            # Runs of several tokens stand alone: a cut ends a piece of one, and not of others.
            run = runs[0]
            cuts = [position - run.position for position in run.cuts]
            output, state, at_cuts = self._stages.recur(norm, layer, own, before, cuts)
            outputs.append(xp.reshape(output, (1, -1, x.shape[-1])))
            behind.append(state)
            kept |= {(run.sequence, run.position + cut): at_cuts[cut] for cut in at_cuts}
        arrays = [xp.concat(list(parts), axis=0) for parts in zip(*behind, strict=True)]
        self.cache.put_states(*arrays, kept=kept)
        return xp.concat(outputs, axis=1)

    def _groups(self) -> list[_Group]:
        """Return the runs of the pass in groups: those of one token together, others alone."""
        runs = self._runs()
        steps = len(list(takewhile(lambda run: run.stop - run.start == 1, runs)))
        bounds = [0, *range(steps or 1, len(runs) + 1)]
        if len(bounds) == 2:
            return [_Group(runs, None, None)]
        return [
            _Group(
                runs[first:stop],
                self._indices(range(first, stop)),
                self._indices(range(runs[first].start, runs[stop - 1].stop)),
            )
            for first, stop in pairwise(bounds)
        ]

    def _runs(self) -> tuple[Run, ...]:
        """Return the runs of the pass; none for a model without recurrent layers."""
        states = [part for part in self.cache.caches if isinstance(part, RecurrentCache)]
        return states[0].runs if states else ()

    def _indices(self, numbers: Sequence[int]) -> Array:
        return self.backend.from_host(np.asarray(numbers, np.int32))

    def _take(self, array: Array, indices: Array | None, axis: int) -> Array:
        # By an array of indices, not by a slice: where slices are programs, each is one of its own.
        return array if indices is None else self.backend.xp.take(array, indices, axis=axis)

    def _stored(self, array: Array) -> Array:
        """Drop the batch axis and cast to the dtype of the cache."""
        backend = self.backend
        return backend.xp.astype(array[0, :, :, :], backend.dtype(self._dtype))

    def _computed(self, array: Array) -> Array:
        """Cast to float32 and add a batch axis."""
        backend = self.backend
        return backend.xp.astype(array, backend.dtype("float32"))[None, :, :, :]
