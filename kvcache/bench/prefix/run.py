"""Measures what it costs to find the prefix of a request, to add to it, and to evict.

All on the host, with token ids alone: payloads are empty. Lookups are timed by the clock, one
eviction at a time by what the thread has computed, so that nobody else is blamed on a policy.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import cycle, islice
from statistics import median
from time import thread_time
from typing import TypeAlias

import numpy as np

from kvcache._checks import check_sizes
from kvcache.bench.harness.contest import Contestant
from kvcache.bench.harness.report import library_versions, this_machine
from kvcache.bench.harness.timing import Progress, interleave, no_collection
from kvcache.prefix.index import Span, SpanIndex
from kvcache.prefix.policies import POLICIES, make_policy
from kvcache.prefix.radix import RadixTree, Tokens
from kvcache.prefix.simulation.replay import BlockPayload

from .report import EXTEND, FOLLOW, INSERT, LONG, MATCH, SHORT, PrefixReport, PrefixTiming

ROUNDS = 101
PROMPTS, USERS = 20, 100
PROMPT, SEQUENCE = 1024, 2048
"""Tokens that the users of a prompt have in common, and tokens of each."""
SPANS = 100_000
"""Spans of which half are evicted."""
EVICTION_ROUNDS = 3
_LEAVES, _QUERIES = 100, (4_000, 40_000)  # where queries leave the tree, and how long they are
_MAX_STEPS = 64
Insert: TypeAlias = Callable[[Tokens], object]


def run_prefix(
    prompts: int = PROMPTS,
    users: int = USERS,
    spans: int = SPANS,
    rounds: int = ROUNDS,
    progress: Progress | None = None,
) -> PrefixReport:
    """Measure lookups among `prompts` x `users` sequences, and evictions of half of all `spans`.

    Raises: ValueError; nothing was measured then.
    """
    check_sizes(prompts=prompts, users=users, spans=spans, rounds=rounds)
    repeats = min(rounds, EVICTION_ROUNDS)
    tick = _ticks(progress, rounds + 1 + repeats * len(POLICIES))
    timings = [*_looked_up(make_sequences(prompts, users), rounds, tick)]
    timings += [_evicted(name, spans, repeats, tick) for name in POLICIES]
    return PrefixReport(
        prompts * users, spans, rounds, this_machine(), library_versions(), tuple(timings)
    )


def _ticks(progress: Progress | None, total: int) -> Callable[[str], None]:
    """What is called with a label whenever another part of `total` is done."""
    done = 0

    def tick(label: str) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total, label)

    return tick


def make_sequences(prompts: int, users: int) -> list[Tokens]:
    """Sequences of int32 ids, those of a prompt's users alike in their first half; shuffled."""
    ids = np.random.default_rng(0)
    heads = ids.integers(0, 50_000, (prompts, PROMPT), np.int32)
    tails = ids.integers(0, 50_000, (prompts * users, SEQUENCE - PROMPT), np.int32)
    sequences = [np.concatenate([heads[at % prompts], tail]) for at, tail in enumerate(tails)]
    random.Random(0).shuffle(sequences)  # noqa: S311 - an order, no secret
    return sequences


def _looked_up(
    sequences: Sequence[Tokens], rounds: int, tick: Callable[[str], None]
) -> Iterator[PrefixTiming]:
    readers = Readers(sequences, sequences)
    short, long = (Readers(query_of(sequences[0], size), sequences[:1]) for size in _QUERIES)
    contestants = [
        (Contestant(MATCH, readers.match), SEQUENCE),
        (Contestant(FOLLOW, readers.follow_and_use), SEQUENCE),
        (Writers(INSERT, sequences, empty_tree).contestant(), SEQUENCE),
        (Writers(EXTEND, sequences, empty_index).contestant(), SEQUENCE),
        (Contestant(SHORT, short.match), _QUERIES[0]),
        (Contestant(LONG, long.match), _QUERIES[1]),
    ]
    limit = min(_MAX_STEPS, max(1, len(sequences) * 2 // 3))  # a block is led up to by half of it
    found = interleave(
        [(contestant, limit) for contestant, _ in contestants],
        rounds,
        lambda: None,
        lambda: tick("lookups"),
    )
    for (contestant, tokens), blocks in zip(contestants, found, strict=True):
        yield PrefixTiming(contestant.name, tokens, blocks.steps, blocks.rounds_us)


def query_of(tokens: Tokens, length: int) -> list[Tokens]:
    """A query of that length that is like `tokens` at first, and then like nothing."""
    return [np.concatenate([tokens[:_LEAVES], np.full(length - _LEAVES, -1, np.int32)])]


class Readers:
    """Queries in turn, of a tree and of an index in which all of `known` is kept."""

    def __init__(self, queries: Sequence[Tokens], known: Sequence[Tokens]) -> None:
        self.tree: RadixTree[None] = RadixTree()
        self.index: SpanIndex[BlockPayload] = SpanIndex(make_policy("lru"))
        self.spans: RadixTree[Span[BlockPayload]] = RadixTree()
        self.now = 0.0
        self._queries = cycle(queries)
        for tokens in known:
            self.tree.insert(tokens)
            keep(self.index, self.spans, tokens, self.now)

    def match(self, steps: int) -> None:
        """Find so many queries in the tree."""
        match = self.tree.match
        for tokens in islice(self._queries, steps):
            match(tokens)

    def follow_and_use(self, steps: int) -> None:
        """Find so many in the index, which takes note of it."""
        index, spans, now = self.index, self.spans, self.now
        for tokens in islice(self._queries, steps):
            index.use(index.follow(spans, tokens), now)
        self.now = now + 0.01


def keep(
    index: SpanIndex[BlockPayload], tree: RadixTree[Span[BlockPayload]], tokens: Tokens, now: float
) -> None:
    """Ask for `tokens`, and keep what was not there."""
    spans = index.extend(tree, tokens)
    index.use(spans, now)
    for span in spans:
        if span.payload is None:
            index.fill(span, BlockPayload(span.stop - span.start))


class Writers:
    """Sequences, one after the other, into what is empty at first and whenever all are in it."""

    def __init__(self, name: str, sequences: Sequence[Tokens], empty: Callable[[], Insert]) -> None:
        self.name, self._sequences, self._empty = name, sequences, empty
        self._at, self._insert = 0, empty()

    def contestant(self) -> Contestant:
        """As a contest wants it."""
        return Contestant(self.name, self.insert, self.rewind)

    def insert(self, steps: int) -> None:
        """Put in so many."""
        insert = self._insert
        for tokens in self._sequences[self._at : self._at + steps]:
            insert(tokens)
        self._at += steps

    def rewind(self, steps: int) -> None:
        """Begin anew where fewer are left than are to follow."""
        if self._at + steps > len(self._sequences):
            self._at, self._insert = 0, self._empty()


def empty_tree() -> Insert:
    """What inserts into a new tree."""
    tree: RadixTree[None] = RadixTree()
    return tree.insert


def empty_index() -> Insert:
    """What inserts into a new tree of a new index."""
    index: SpanIndex[BlockPayload] = SpanIndex(make_policy("lru"))
    return partial(index.extend, RadixTree())


def _evicted(name: str, spans: int, repeats: int, tick: Callable[[str], None]) -> PrefixTiming:
    """Evict half of so many spans, all leaves, a hundred of which were asked for each second."""
    means, longest = [], []
    for _ in range(repeats):
        index = full_index(name, spans)
        with no_collection():
            times = [_eviction(index, spans / 100) for _ in range(max(1, spans // 2))]
        means.append(float(f"{sum(times) / len(times):.4g}"))
        longest.append(max(times))
        tick(f"evictions, {name}")
    return PrefixTiming(name, 0, len(times), tuple(means), float(f"{median(longest):.4g}"))


def full_index(name: str, spans: int) -> SpanIndex[BlockPayload]:
    """An index of sequences of two tokens that have nothing in common."""
    index: SpanIndex[BlockPayload] = SpanIndex(make_policy(name))
    tree: RadixTree[Span[BlockPayload]] = RadixTree()
    for at in range(spans):
        keep(index, tree, np.array([at, at], np.int32), at / 100)
    return index


def _eviction(index: SpanIndex[BlockPayload], now: float) -> float:
    """Microseconds that it took."""
    start = thread_time()
    span = index.victim(now)
    if span is not None:
        index.evict(span, now)
    return (thread_time() - start) * 1e6
