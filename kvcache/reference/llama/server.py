"""Continuous batching: many prompts decoded together, in one pool of cells.

Sequences join and leave while others go on. A pass holds the next token of each, and pieces of
the prompts that join. It is one program: compiled on JAX, once per padded length.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

from kvcache import CacheFullError, CausalCache, RoPEShift

from .model import Llama
from .pooled import Part, PooledPass

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

    def part(self, count: int) -> Part:
        """The next `count` of its tokens, for a pass."""
        ids = self.tokens[self.held : self.held + count]
        return Part(self.place, self.held, ids, count == self.pending)


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
        self._pass = PooledPass(model, self.cache, dtype)
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
        turns, found = self._forward()
        self.passes += 1
        for request, count in turns:
            request.held += count
        ready = [request for request, _ in turns if not request.pending]
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
            turns = self._compose()
            try:
                return turns, self._pass([each.part(count) for each, count in turns])
            except CacheFullError:
                if len(self._running) == 1:
                    raise
                self._push_back(self._running[-1])

    def _compose(self) -> list[tuple[Request, int]]:
        """Who is in the next pass, with how many tokens: those first that need just one."""
        left, turns = self._max_batch, []
        for request in sorted(self._running, key=lambda request: request.pending > 1):
            count = min(left, request.pending)
            if count:
                turns.append((request, count))
                left -= count
        return turns

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
