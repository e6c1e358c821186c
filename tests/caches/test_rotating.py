"""The ring: what it holds and shows, whatever the chunks, and how a draft is taken back."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import pytest

from kvcache import Backend, KVCache, RotatingKVCache, TrimError

from .oracle import Oracle, Shape, check_columns, check_whole, fingerprint, host_rows, push

SIZES = [(1, 0), (2, 0), (2, 1), (5, 0), (5, 2), (5, 4), (8, 3)]
CHUNKS = {
    "tokens": [1] * 20,
    "prefill below the size": [4, 1, 1, 1, 1, 1, 1, 1],
    "prefill of the size": [5, 1, 1, 5, 1],
    "prefill beyond the size": [13, 1, 1],
    "prefill after rotation": [5, 1, 1, 1, 3, 1, 4, 1],
    "prefills only": [3, 4, 9, 2, 16, 5],
    "ends on the size": [3, 2, 5, 10, 1],
    "one window after the other": [5, 5, 5, 5],
    "much at once": [64, 1, 64, 1],
}


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize(("size", "keep"), SIZES)
def test_every_query_sees_its_window_and_the_sinks(
    backend: Backend, size: int, keep: int, chunks: Sequence[int]
) -> None:
    cache, oracle = RotatingKVCache(size, keep, backend, step=2), Oracle(size, keep)
    for tokens in chunks:
        push(cache, oracle, tokens)
        check_whole(cache, oracle)


@pytest.mark.parametrize(("size", "keep"), [(7, 0), (7, 3)])
def test_chunks_make_no_difference(backend: Backend, size: int, keep: int) -> None:
    """What a query sees, and in the end the cache, are the same in any division of 40 tokens."""
    ends = set()
    for chunk in (1, 5, 7, 8, 40):
        cache, oracle = RotatingKVCache(size, keep, backend), Oracle(size, keep)
        for start in range(0, 40, chunk):
            push(cache, oracle, min(chunk, 40 - start))
        ends.add(fingerprint_of_slots(cache))
    assert len(ends) == 1


def fingerprint_of_slots(cache: RotatingKVCache) -> tuple[object, ...]:
    twin = cache.copy()
    assert twin.backend is not None
    rows = host_rows(twin.backend, twin.state)
    order = [int(column) for column in np.argsort(twin.positions) if twin.positions[column] >= 0]
    return tuple((int(twin.positions[column]), rows[column]) for column in order)


def test_a_ring_that_never_fills_is_a_growing_cache(backend: Backend) -> None:
    ring, grown, oracle = RotatingKVCache(300, 4, backend), KVCache(backend), Oracle()
    for tokens in (3, 1, 8):
        columns = push(grown, oracle, tokens)
        update = [
            backend.from_host(make(tokens, oracle.offset - tokens))
            for make in (Shape().keys, Shape().values)
        ]
        same = host_rows(backend, ring.update(*update))
        live = slice(0, oracle.offset)
        assert same[live] == columns[live]
        assert ring.positions[live].tolist() == grown.positions[live].tolist()


def test_a_window_narrower_than_the_ring(backend: Backend) -> None:
    cache, oracle = RotatingKVCache(9, 2, backend), Oracle(9, 2)
    for tokens in (6, 1, 5, 1):
        columns = push(cache, oracle, tokens)
        for window in (1, 2, 6, 7, 8, 100):
            check_columns(cache, oracle, columns, tokens, window)


def test_mask_covers_the_last_update_only_once_tokens_are_gone(backend: Backend) -> None:
    """A query of the update before would miss tokens: asking for it is an error."""
    cache, oracle = RotatingKVCache(5, backend=backend), Oracle(5)
    push(cache, oracle, 5)
    push(cache, oracle, 3)
    cache.mask(3)
    with pytest.raises(ValueError, match="mask covers 1 to 3 latest tokens; got 4"):
        cache.mask(4)
    push(cache, oracle, 1)
    with pytest.raises(ValueError, match="mask covers 1 to 1 latest tokens; got 2"):
        cache.mask(2)
    assert cache.copy().mask(1) is None or backend.config.padding > 1


def test_sinks_stay_for_good(backend: Backend) -> None:
    cache, oracle = RotatingKVCache(6, 2, backend), Oracle(6, 2)
    for tokens in (1, 3, 11, 1, 1, 9):
        push(cache, oracle, tokens)
    held = {int(position) for position in cache.copy().positions if position >= 0}
    assert held == {0, 1, 22, 23, 24, 25}


# Speculative decoding: checkpoint, draft, rollback to what was accepted.


def check_rollback(
    backend: Backend, size: int, keep: int, before: Sequence[int], drafts: Sequence[int]
) -> None:
    """For every number of accepted tokens: as if only those had come, then and afterwards."""
    for accepted in range(sum(drafts) + 1):
        cache, oracle = RotatingKVCache(size, keep, backend, step=2), Oracle(size, keep)
        for tokens in before:
            push(cache, oracle, tokens)
        mark = oracle.offset
        cache.checkpoint()
        for tokens in drafts:
            push(cache, oracle, tokens, stamp=100 + oracle.offset)
        cache.rollback(accepted)
        oracle.cut(mark + accepted)
        check_whole(cache, oracle)
        with pytest.raises(TrimError, match="needs an open checkpoint"):
            cache.rollback()
        for tokens in (1, 3, 1):
            push(cache, oracle, tokens, stamp=200 + oracle.offset)
        check_whole(cache, oracle)


ROLLBACKS = {
    "inside the ring": (5, 0, [2], [2]),
    "up to the wrap": (5, 0, [2], [3]),
    "across the wrap": (5, 0, [3], [4]),
    "after the wrap": (5, 0, [9], [3]),
    "as long as the window": (4, 0, [6], [4]),
    "longer than the window": (4, 0, [6], [9]),
    "longer than the window, token by token": (3, 0, [4], [1] * 7),
    "sinks written before": (6, 2, [9], [5]),
    "sinks partially written": (6, 3, [2], [8]),
    "sinks in the draft": (6, 3, [], [9]),
    "a draft ends among the sinks": (6, 3, [1], [1, 1, 6]),
    "several updates": (5, 1, [7], [1, 3, 2]),
    "several updates, long ones": (4, 1, [3], [7, 1, 6]),
    "the first tokens ever": (4, 0, [], [3, 3]),
    "a window of one": (1, 0, [2], [2, 1]),
    "one slot besides the sinks": (3, 2, [4], [1, 3]),
}


@pytest.mark.parametrize("case", ROLLBACKS.values(), ids=ROLLBACKS)
def test_rollback(backend: Backend, case: tuple[int, int, list[int], list[int]]) -> None:
    check_rollback(backend, *case)


def test_checkpoint_after_checkpoint(backend: Backend) -> None:
    """Decoding by drafts from beginning to end: each one partly accepted, across many wraps."""
    cache, oracle = RotatingKVCache(7, 2, backend), Oracle(7, 2)
    push(cache, oracle, 3)
    for accepted in (0, 1, 4, 2, 0, 3, 4, 4, 1):
        cache.checkpoint()
        mark = oracle.offset
        push(cache, oracle, 4, stamp=300 + 10 * mark)
        cache.rollback(accepted)
        oracle.cut(mark + accepted)
        check_whole(cache, oracle)
        push(cache, oracle, 1, stamp=700 + mark)


def test_a_new_checkpoint_replaces_the_open_one(backend: Backend) -> None:
    cache, oracle = RotatingKVCache(5, 1, backend), Oracle(5, 1)
    push(cache, oracle, 6)
    cache.checkpoint()
    push(cache, oracle, 3, stamp=100)
    cache.checkpoint()
    push(cache, oracle, 2, stamp=200)
    cache.rollback(1)
    oracle.cut(10)
    check_whole(cache, oracle)


def test_rollback_of_nothing(backend: Backend) -> None:
    cache, oracle = RotatingKVCache(5, 1, backend), Oracle(5, 1)
    for tokens in (0, 8):
        if tokens:
            push(cache, oracle, tokens)
        cache.checkpoint()
        cache.rollback()
        check_whole(cache, oracle)


def test_trim_below_the_size_then_on(backend: Backend) -> None:
    cache, oracle = RotatingKVCache(5, 1, backend), Oracle(5, 1)
    push(cache, oracle, 5)
    cache.trim(4)
    oracle.cut(1)
    check_whole(cache, oracle)
    for tokens in (2, 4, 1):
        push(cache, oracle, tokens, stamp=100 + oracle.offset)
    assert not cache.can_trim(1)
    assert cache.can_trim(0)


def test_trim_of_nothing_is_always_possible(backend: Backend) -> None:
    cache, oracle = RotatingKVCache(3, backend=backend), Oracle(3)
    push(cache, oracle, 5)
    cache.trim(0)
    check_whole(cache, oracle)


def test_rollback_of_another_cache_changes_nothing_here(backend: Backend) -> None:
    cache, oracle = RotatingKVCache(4, 1, backend), Oracle(4, 1)
    push(cache, oracle, 7)
    twin, twins = cache.copy(), oracle.copy()
    twin.checkpoint()
    push(twin, twins, 5, stamp=100)
    push(cache, oracle, 2, stamp=200)
    before = fingerprint(cache)
    twin.rollback(2)
    twins.cut(9)
    check_whole(twin, twins)
    assert fingerprint(cache) == before


@pytest.mark.parametrize("reading", [lambda cache: cache.mask(1), lambda cache: cache.positions])
def test_looking_changes_nothing(backend: Backend, reading: Callable[[KVCache], object]) -> None:
    cache, oracle = RotatingKVCache(4, 1, backend), Oracle(4, 1)
    push(cache, oracle, 7)
    before = fingerprint(cache)
    reading(cache)
    assert fingerprint(cache) == before
