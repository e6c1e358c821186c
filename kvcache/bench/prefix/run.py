"""Measure the cost of finding the prefix of a request, of adding to it, and of evicting.

All on the host. Sessions put zeros into small caches; everything else has token ids alone, and
payloads are empty. Lookups and sessions are timed by the clock; single
evictions by the CPU time of the thread, so that no policy is blamed for another process.
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
from kvcache.prefix.index import SpanIndex
from kvcache.prefix.policies import POLICIES, make_policy
from kvcache.prefix.radix import RadixTree, Tokens
from kvcache.prefix.simulation.replay import BlockPayload
from kvcache.prefix.spans import Span

from .report import EXTEND, FOLLOW, INSERT, LONG, MATCH, SHORT, PrefixReport, PrefixTiming
from .sessions import session_contestants

ROUNDS = 101
PROMPTS, USERS = 20, 100
PROMPT, SEQUENCE = 1024, 2048
"""Tokens of a prompt, common to all its users, and of a whole sequence."""
SPANS = 100_000
"""Spans of an index, half of which are evicted."""
EVICTION_ROUNDS = 3
"""Rounds of evictions at most: filling an index takes seconds."""
_LEAVES, _QUERIES = 100, (4_000, 40_000)
"""Position at which queries leave the tree, and their lengths."""
_MAX_STEPS = 64
Insert: TypeAlias = Callable[[Tokens], object]
"""Puts one sequence into a tree or an index."""


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
    tick = _ticks(progress, 2 * (rounds + 1) + repeats * len(POLICIES))
    sequences = make_sequences(prompts, users)
    timings = [*_looked_up(sequences, rounds, tick), *_of_sessions(sequences, rounds, tick)]
    timings += [_evicted(name, spans, repeats, tick) for name in POLICIES]
    return PrefixReport(
        prompts * users, spans, rounds, this_machine(), library_versions(), tuple(timings)
    )


def _ticks(progress: Progress | None, total: int) -> Callable[[str], None]:
    """Return a function to call with a label whenever another part of `total` is done."""
    done = 0

    def tick(label: str) -> None:
        nonlocal done
        done += 1
        if progress is not None:
            progress(done, total, label)

    return tick


def make_sequences(prompts: int, users: int) -> list[Tokens]:
    """Make int32 sequences, shuffled; the users of one prompt have their first half in common."""
    ids = np.random.default_rng(0)
    heads = ids.integers(0, 50_000, (prompts, PROMPT), np.int32)
    tails = ids.integers(0, 50_000, (prompts * users, SEQUENCE - PROMPT), np.int32)
    sequences = [np.concatenate([heads[at % prompts], tail]) for at, tail in enumerate(tails)]
    random.Random(0).shuffle(sequences)  # noqa: S311 - an order, no secret
    return sequences


def _looked_up(
    sequences: Sequence[Tokens], rounds: int, tick: Callable[[str], None]
) -> Iterator[PrefixTiming]:
    """Time lookups and insertions against each other."""
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
    # An untimed lead of half a block comes first: writers must have sequences left for both.
    limit = min(_MAX_STEPS, max(1, len(sequences) * 2 // 3))
    yield from _interleaved(contestants, limit, rounds, lambda: tick("lookups"))


def _of_sessions(
    sequences: Sequence[Tokens], rounds: int, tick: Callable[[str], None]
) -> Iterator[PrefixTiming]:
    """Time sessions apart from lookups, which they would drive out of the processor's caches."""
    with session_contestants(sequences) as sessions:
        contestants = [(session, SEQUENCE) for session in sessions]
        yield from _interleaved(contestants, _MAX_STEPS, rounds, lambda: tick("sessions"))


def _interleaved(
    contestants: Sequence[tuple[Contestant, int]],
    limit: int,
    rounds: int,
    tick: Callable[[], None],
) -> Iterator[PrefixTiming]:
    """Time contestants, each with the tokens of a step, in blocks of `limit` steps at most."""
    timed = interleave(
        [(contestant, limit) for contestant, _ in contestants],
        rounds,
        lambda: None,  # no device to wait for
        tick,
    )
    for (contestant, tokens), blocks in zip(contestants, timed, strict=True):
        yield PrefixTiming(contestant.name, tokens, blocks.steps, blocks.rounds_us)


def query_of(tokens: Tokens, length: int) -> list[Tokens]:
    """Make a query: `tokens` at first, and then an id unknown to all sequences."""
    return [np.concatenate([tokens[:_LEAVES], np.full(length - _LEAVES, -1, np.int32)])]


class Readers:
    """Lookups of `queries` in turn, in a tree and in an index of all of `known`."""

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
        """Look up as many queries in the tree."""
        match = self.tree.match
        for tokens in islice(self._queries, steps):
            match(tokens)

    def follow_and_use(self, steps: int) -> None:
        """Look up as many in the index, and mark the spans found as used."""
        index, spans, now = self.index, self.spans, self.now
        for tokens in islice(self._queries, steps):
            index.use(index.follow(spans, tokens).spans, now)
        # Policies order spans by the time of use: uses of one block count as one moment.
        self.now = now + 0.01


def keep(
    index: SpanIndex[BlockPayload], tree: RadixTree[Span[BlockPayload]], tokens: Tokens, now: float
) -> None:
    """Look up `tokens`, and fill the spans not there yet."""
    spans = index.extend(tree, tokens)
    index.use(spans, now)
    for span in spans:
        if span.payload is None:
            index.fill(span, BlockPayload(span.stop - span.start))


class Writers:
    """Insertions of `sequences` one by one; starts anew from `empty` when too few are left."""

    def __init__(self, name: str, sequences: Sequence[Tokens], empty: Callable[[], Insert]) -> None:
        self.name, self._sequences, self._empty = name, sequences, empty
        self._at, self._insert = 0, empty()

    def contestant(self) -> Contestant:
        """Return these insertions as a contestant."""
        return Contestant(self.name, self.insert, self.rewind)

    def insert(self, steps: int) -> None:
        """Insert as many."""
        insert = self._insert
        for tokens in self._sequences[self._at : self._at + steps]:
            insert(tokens)
        self._at += steps

    def rewind(self, steps: int) -> None:
        """Start anew if fewer are left than `steps`; otherwise go on: nothing is taken out."""
        if self._at + steps > len(self._sequences):
            self._at, self._insert = 0, self._empty()


def empty_tree() -> Insert:
    """Return the insertion into a new tree."""
    tree: RadixTree[None] = RadixTree()
    return tree.insert


def empty_index() -> Insert:
    """Return the insertion into a new tree of a new index."""
    index: SpanIndex[BlockPayload] = SpanIndex(make_policy("lru"))
    return partial(index.extend, RadixTree())


def _evicted(name: str, spans: int, repeats: int, tick: Callable[[str], None]) -> PrefixTiming:
    """Time the eviction of half of `spans`, all leaves, used a hundred per second of model time."""
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
    """Make an index of two-token sequences with nothing in common: every span may be evicted."""
    index: SpanIndex[BlockPayload] = SpanIndex(make_policy(name))
    tree: RadixTree[Span[BlockPayload]] = RadixTree()
    for at in range(spans):
        keep(index, tree, np.array([at, at], np.int32), at / 100)
    return index


def _eviction(index: SpanIndex[BlockPayload], now: float) -> float:
    """Evict the victim of the policy; return the microseconds of CPU time."""
    start = thread_time()
    span = index.policy.victim(now)
    if isinstance(span, Span):
        index.evict(span, now)
    return (thread_time() - start) * 1e6
