"""Continuous batching: many prompts decoded together, in one pool of cells.

Sequences join and leave while others go on. A pass holds the next token of each, and pieces of
the prompts that join. It is one program: compiled on JAX, once per padded length.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from kvcache import Batch, CacheFullError, CausalCache, RoPEShift, functional
from kvcache.backends.base import Array
from kvcache.plan import ForwardPlan, PoolState

from .llama import Llama

__all__ = ["Request", "Server"]


@dataclass
class Request:
    """A prompt and what becomes of it."""

    number: int
    """Counted from 1, in the order of submission."""
    max_tokens: int
    tokens: list[int]
    """What its sequence consists of: the prompt and what was generated, less what was dropped."""
    generated: list[int] = field(default_factory=list)
    finish: Literal["", "end token", "max tokens", "capacity"] = ""
    """Why it is over, empty before."""
    sequence: int | None = None
    """Its sequence in the pool; None while it waits and when it is over."""
    held: int = 0
    """How many of `tokens` the cache holds."""

    @property
    def place(self) -> int:
        """Its sequence, while it has one."""
        if self.sequence is None:
            raise ValueError(f"request {self.number} has no sequence: it waits or is over.")
        return self.sequence

    @property
    def pending(self) -> int:
        """Tokens that the cache does not hold yet."""
        return len(self.tokens) - self.held


class Server:
    """Decodes requests greedily, as many at once as there is room for.

    max_sequences: how many at once. capacity: tokens of one sequence. cells: tokens of all of them
    together, `max_sequences * capacity` by default; when they are used up, the newest waits until
    others have left, and is computed again. max_batch: tokens of one pass.
    window: sliding window; the pool is sized by it then. dtype: what the cache holds.
    context_shift: a sequence that reaches its capacity drops its middle, but for the first `keep`
    tokens, and goes on; else it ends. note: told what happens to a request, in one line.

    Raises: ValueError for sizes below 1, and for `cells` or `context_shift` with a window.
    """

    def __init__(
        self,
        model: Llama,
        max_sequences: int = 8,
        capacity: int = 1024,
        *,
        cells: int | None = None,
        max_batch: int = 256,
        window: int | None = None,
        dtype: str = "float32",
        context_shift: bool = False,
        keep: int = 4,
        eos_id: int | None = None,
        note: Callable[[str], None] | None = None,
    ) -> None:
        if window is not None and (cells is not None or context_shift):
            raise ValueError(
                "a sliding window bounds what a sequence holds: leave out cells and context_shift."
            )
        if not 0 <= keep < capacity - 1:
            raise ValueError(f"keep must leave room in the capacity of {capacity}; got {keep}.")
        per_sequence = capacity if cells is None else -(-cells // max_sequences)
        shift = RoPEShift(model.weights.inverse_frequencies) if context_shift else None
        self.cache = CausalCache(window=window, shift=shift)
        self.cache.init(
            model.backend,
            dtype,
            max_sequences=max_sequences,
            capacity=per_sequence,
            max_batch=max_batch,
        )
        self.capacity = min(capacity, max_sequences * per_sequence)
        self.cells = self.cache.cells
        self.passes = 0
        self._bounded = window is not None and window < per_sequence
        self._pass = _Pass(model, self.cache, dtype)
        self._max_batch, self._keep, self._eos = max_batch, keep, eos_id
        self._context_shift, self._note = context_shift, note or (lambda _: None)
        self._places = list(range(max_sequences))
        self._running: list[Request] = []
        self._waiting: deque[Request] = deque()
        self._full = False
        self._count = 0

    def submit(self, prompt_ids: Sequence[int], max_tokens: int = 64) -> Request:
        """Let a prompt join as soon as there is room.

        Raises: ValueError for an empty prompt, one that no sequence has room for, max_tokens < 1.
        """
        if not prompt_ids or (len(prompt_ids) > self.capacity and not self._bounded):
            raise ValueError(
                f"a prompt has 1 to {self.capacity} tokens, the capacity; got {len(prompt_ids)}."
            )
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be >= 1; got {max_tokens}.")
        self._count += 1
        request = Request(self._count, max_tokens, list(prompt_ids))
        self._waiting.append(request)
        if len(self._waiting) > len(self._places):
            places = len(self._places) + len(self._running)
            self._note(f"Prompt {request.number} waits: all of {places} sequences are in use.")
        return request

    def run(self) -> Iterator[tuple[Request, int]]:
        """Yield tokens and whose they are until all requests are over."""
        while self._running or self._waiting:
            yield from self.step()

    def step(self) -> list[tuple[Request, int]]:
        """One pass: the next token of every sequence whose prompt has been fed."""
        self._admit()
        for request in list(self._running):
            self._limit(request)
        if not self._running:
            return []
        parts, found = self._forward()
        self.passes += 1
        for request, count in parts:
            request.held += count
        ready = [request for request, _ in parts if not request.pending]
        return [pair for pair in zip(ready, found, strict=True) if self._accept(*pair)]

    def _admit(self) -> None:
        while self._waiting and self._places and not self._full:
            request = self._waiting.popleft()
            request.sequence = self._places.pop(0)
            self._running.append(request)

    def _limit(self, request: Request) -> None:
        """What happens to a sequence that has grown beyond its capacity."""
        if self._bounded or len(request.tokens) <= self.capacity:
            return
        if not self._context_shift:
            self._leave(request, "capacity")
            return
        start = min(self._keep, self.capacity // 2)
        stop = start + (self.capacity - start + 1) // 2
        if request.held:
            self.cache.remove(request.place, start, stop)
            request.held -= stop - start
        del request.tokens[start:stop]
        self._full = False
        self._note(
            f"Prompt {request.number} reached its capacity of {self.capacity} tokens: "
            f"positions {start} to {stop - 1} were dropped, those behind them moved up."
        )

    def _forward(self) -> tuple[list[tuple[Request, int]], list[int]]:
        while True:
            parts = self._compose()
            try:
                return parts, self._pass(parts)
            except CacheFullError:
                if len(self._running) == 1:
                    raise
                self._push_back(self._running[-1])

    def _compose(self) -> list[tuple[Request, int]]:
        """Who is in the next pass, with how many tokens: those first that need just one."""
        left, parts = self._max_batch, []
        for request in sorted(self._running, key=lambda request: request.pending > 1):
            count = min(left, request.pending)
            if count:
                parts.append((request, count))
                left -= count
        return parts

    def _push_back(self, request: Request) -> None:
        self.cache.remove(request.place, 0)
        self._running.remove(request)
        self._places.append(request.place)
        request.sequence, request.held = None, 0
        self._waiting.appendleft(request)
        self._full = True
        self._note(
            f"The pool is full: prompt {request.number}, the newest, waits. Its "
            f"{len(request.tokens)} tokens will be computed again, nothing is lost."
        )

    def _accept(self, request: Request, token: int) -> bool:
        """Take a token; whether it is one to show."""
        if token == self._eos:
            self._leave(request, "end token")
            return False
        request.tokens.append(token)
        request.generated.append(token)
        if len(request.generated) == request.max_tokens:
            self._leave(request, "max tokens")
        return True

    def _leave(self, request: Request, why: Literal["end token", "max tokens", "capacity"]) -> None:
        self.cache.remove(request.place, 0)
        self._running.remove(request)
        self._places.append(request.place)
        request.sequence, request.held, request.finish = None, 0, why
        self._full = False


class _Pass:
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

    def __call__(self, parts: Sequence[tuple[Request, int]]) -> list[int]:
        """Feed tokens of requests; return the next token of those with none left to feed.

        Raises: CacheFullError; nothing has changed then.
        """
        ids: list[int] = []
        positions: list[int] = []
        sequences: list[int] = []
        for request, count in parts:
            span = range(request.held, request.held + count)
            ids += [request.tokens[i] for i in span]
            positions += span
            sequences += [request.place] * count
        ends = np.cumsum([count for _, count in parts]) - 1
        rows = [end for end, (each, n) in zip(ends, parts, strict=True) if n == each.pending]
        batch, width = Batch(positions, sequences), self._rounded(len(ids))
        plan = self.cache.plan(batch, tokens=width)
        arguments = self._arguments(ids, positions, rows, width)
        self.cache.state, best = self._step(self.cache.state, plan, self._weights, *arguments)
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
