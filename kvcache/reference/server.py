"""Continuous batching: many prompts decoded together, in one pool of cells.

Sequences join and leave while others go on (Orca: Yu et al., OSDI 2022). A pass holds the next
token of each, and pieces of the prompts that join (chunked prefill, Sarathi: Agrawal et al., 2023).
On llama models it is one program: compiled on JAX, once per padded length.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from kvcache import CacheFullError

from .decoder import Decoder, PassPart

__all__ = ["Request", "Server"]

EndReason: TypeAlias = Literal["end token", "max tokens", "capacity"]


@dataclass
class Request:
    """A prompt, its progress and its result."""

    number: int
    """Counted from 1, in the order of submission."""
    max_tokens: int
    tokens: list[int]
    """Tokens of its sequence: the prompt and the generated ones, without dropped ones."""
    generated: list[int] = field(default_factory=list)
    finish: EndReason | Literal[""] = ""
    """Reason why it is over; empty until then."""
    sequence: int | None = None
    """Its sequence in the pool; None while it waits and when it is over."""
    held: int = 0
    """Number of `tokens` in the cache."""

    @property
    def active_sequence(self) -> int:
        """Its sequence in the pool. Raises ValueError while it has none."""
        if self.sequence is None:
            raise ValueError(f"request {self.number} has no sequence: it waits or is over.")
        return self.sequence

    @property
    def pending(self) -> int:
        """Number of tokens to be fed before the next one comes out."""
        return len(self.tokens) - self.held

    def part(self, count: int) -> PassPart:
        """Return the next `count` of its tokens, for a pass."""
        ids = self.tokens[self.held : self.held + count]
        return PassPart(self.active_sequence, self.held, ids, count == self.pending)


class Server:
    """A greedy decoder of many requests at once, as many as there is room for.

    max_sequences: requests decoded at once. capacity: tokens of one sequence. cells: tokens of all
        sequences together, `max_sequences * capacity` by default; when they are used up, the newest
        request is preempted: it waits until others have left, and is computed again.
    max_batch: tokens of one pass.
    window: sliding window; the pool is then sized by it. dtype: of keys and values in the cache.
    context_shift: True lets a sequence that reaches its capacity drop its middle, but for the first
        `keep` tokens, and go on, as in llama.cpp; else the sequence ends.
    eos_id: token that ends a request; it is not returned. None goes on past it.
    note: called with one line of text for each event of a request: waiting, preemption, a shift.

    Raises: ValueError for sizes below 1, and for `cells` or `context_shift` with a window;
        UnsupportedModelError for `context_shift` where the model cannot drop tokens.
    """

    def __init__(
        self,
        model: Decoder,
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
        per_sequence = capacity if cells is None else math.ceil(cells / max_sequences)
        self.forward = model.make_pass(
            max_sequences,
            per_sequence,
            max_batch,
            dtype=dtype,
            window=window,
            context_shift=context_shift,
        )
        self.cache = self.forward.cache
        self.capacity = min(capacity, max_sequences * per_sequence)
        self.cells = self.forward.cells
        self.passes = 0
        # Within a window a sequence never fills its capacity, however long it grows.
        self._bounded = window is not None and window < per_sequence
        self._max_batch, self._keep, self._eos = max_batch, keep, eos_id
        self._context_shift, self._note = context_shift, note or (lambda _: None)
        self._free_sequences = list(range(max_sequences))
        self._running: list[Request] = []
        self._waiting: deque[Request] = deque()
        # After a preemption nobody is admitted until cells are freed: the newest would otherwise
        # take them back at once and be preempted again.
        self._full = False
        self._count = 0

    def submit(self, prompt_ids: Sequence[int], max_tokens: int = 64) -> Request:
        """Queue a prompt; it joins as soon as there is room.

        Raises: ValueError for an empty prompt, one longer than the capacity, max_tokens < 1.
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
        if len(self._waiting) > len(self._free_sequences):
            total = len(self._free_sequences) + len(self._running)
            self._note(f"Prompt {request.number} waits: all of {total} sequences are in use.")
        return request

    def run(self) -> Iterator[tuple[Request, int]]:
        """Yield each token with its request until all requests are over."""
        while self._running or self._waiting:
            yield from self.step()

    def step(self) -> list[tuple[Request, int]]:
        """Run one pass; return the next token of every sequence with a complete prompt.

        Raises: CacheFullError if a request does not fit even alone.
        """
        self._admit()
        for request in list(self._running):  # a copy: a request at its capacity may leave
            self._enforce_capacity(request)
        if not self._running:
            return []
        scheduled, tokens = self._forward()
        self.passes += 1
        for request, count in scheduled:
            request.held += count
        ready = [request for request, _ in scheduled if not request.pending]
        return [pair for pair in zip(ready, tokens, strict=True) if self._accept(*pair)]

    def _admit(self) -> None:
        while self._waiting and self._free_sequences and not self._full:
            request = self._waiting.popleft()
            request.sequence = self._free_sequences.pop(0)
            self._running.append(request)

    def _enforce_capacity(self, request: Request) -> None:
        """End a sequence longer than its capacity, or drop its middle."""
        if self._bounded or len(request.tokens) <= self.capacity:
            return
        if not self._context_shift:
            self._finish(request, "capacity")
            return
        # Half of what may go, so that a shift, which moves all keys behind it, is rare.
        start = min(self._keep, self.capacity // 2)
        stop = start + (self.capacity - start + 1) // 2
        if request.held:
            self.cache.remove(request.active_sequence, start, stop)
            request.held -= stop - start
        del request.tokens[start:stop]
        self._full = False
        self._note(
            f"Prompt {request.number} reached its capacity of {self.capacity} tokens: "
            f"positions {start} to {stop - 1} were dropped, those behind them moved up."
        )

    def _forward(self) -> tuple[list[tuple[Request, int]], list[int]]:
        """Run a pass, preempting the newest requests until it fits into the pool.

        Returns: the scheduled requests with their tokens in the pass, and the tokens that came out.
        """
        while True:
            scheduled = self._schedule()
            try:
                return scheduled, self.forward(
                    [request.part(count) for request, count in scheduled]
                )
            except CacheFullError:
                if len(self._running) == 1:
                    raise
                self._preempt(self._running[-1])

    def _schedule(self) -> list[tuple[Request, int]]:
        """Choose the requests of the next pass and their number of tokens in it.

        Decode steps come first: a long prompt then takes only the rest of a pass, and delays none.
        """
        left, scheduled = self._max_batch, []
        decoding = [request for request in self._running if request.pending <= 1]
        prefilling = [request for request in self._running if request.pending > 1]
        for request in decoding + prefilling:
            count = min(left, request.pending)
            if count:
                scheduled.append((request, count))
                left -= count
        return scheduled

    def _preempt(self, request: Request) -> None:
        """Free the cells of a request and put it in front of the queue, to be computed again."""
        self._release(request)
        self._waiting.appendleft(request)
        self._full = True
        self._note(
            f"The pool is full: prompt {request.number}, the newest, waits. Its "
            f"{len(request.tokens)} tokens will be computed again, nothing is lost."
        )

    def _accept(self, request: Request, token: int) -> bool:
        """Record a token of a request. Return False for the end token, not to be yielded."""
        if token == self._eos:
            self._finish(request, "end token")
            return False
        request.tokens.append(token)
        request.generated.append(token)
        if len(request.generated) == request.max_tokens:
            self._finish(request, "max tokens")
        return True

    def _finish(self, request: Request, reason: EndReason) -> None:
        self._release(request)
        request.finish = reason
        self._full = False

    def _release(self, request: Request) -> None:
        """Free the cells and the sequence of a running request."""
        sequence = request.active_sequence
        self.cache.remove(sequence, 0)
        self._running.remove(request)
        self._free_sequences.append(sequence)
        request.sequence, request.held = None, 0
