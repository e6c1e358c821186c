"""Whole sessions, without a model, whose events nobody hears, a function hears, or ZeroMQ sends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from itertools import cycle, islice

import numpy as np

from kvcache import KVCache
from kvcache.bench.harness.contest import Contestant
from kvcache.prefix import Event, PrefixCache, ZmqEventPublisher
from kvcache.prefix.radix import Tokens

from .report import PUBLISHED, SESSION, TOLD

LAYERS, HEADS, HEAD_DIM = 30, 3, 64
"""The caches of a small model, SmolLM2-135M."""
_KEPT = 4_096
"""Tokens within the budget: every session in the steady state evicts what another one stored."""


class Sessions:
    """Sessions for `queries` in turn, each of which puts zeros into the caches of all layers."""

    def __init__(self, queries: Sequence[Tokens]) -> None:
        token = 2 * LAYERS * HEADS * HEAD_DIM * np.dtype(np.float32).itemsize
        layers = [KVCache("numpy") for _ in range(LAYERS)]
        self.prefix = PrefixCache(layers, budget=_KEPT * token)
        longest = max(query.size for query in queries)
        self._rows = np.zeros((1, HEADS, longest, HEAD_DIM), np.float32)
        self._queries = cycle(queries)

    def run(self, steps: int) -> None:
        """Serve as many."""
        for tokens in islice(self._queries, steps):
            with self.prefix.session(tokens) as session:
                rows = self._rows[:, :, : session.remaining.size]
                for layer in session.caches:
                    layer.update(rows, rows)


@contextmanager
def session_contestants(queries: Sequence[Tokens]) -> Iterator[list[Contestant]]:
    """Make the contestants; the last one only where what it sends with is installed."""
    alone, told, published = (Sessions(queries) for _ in range(3))
    told.prefix.events.subscribe(_ignore)
    contestants = [Contestant(SESSION, alone.run), Contestant(TOLD, told.run)]
    with ExitStack() as stack:
        if find_spec("zmq") and find_spec("msgspec"):
            events = published.prefix.events
            stack.enter_context(ZmqEventPublisher(events, "tcp://127.0.0.1:*"))
            contestants.append(Contestant(PUBLISHED, published.run))
        yield contestants


def _ignore(_: Event) -> None:
    """Hear of an event."""
