"""The ring: what it holds and shows, whatever the chunks, and how a draft is taken back."""

import pytest

from kvcache import KVCache, RotatingKVCache, TrimError

from .oracle import (
    Oracle,
    Shape,
    Token,
    check_columns,
    check_whole,
    fingerprint,
    held_columns,
    host_rows,
    push,
    rows,
)

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
def test_every_query_sees_its_window_and_the_sinks(backend, size, keep, chunks):
    cache, oracle = RotatingKVCache(size, keep, backend, step=2), Oracle(size, keep)
    for tokens in chunks:
        push(cache, oracle, tokens)
        check_whole(cache, oracle)


@pytest.mark.parametrize(("size", "keep"), [(7, 0), (7, 3)])
def test_chunks_make_no_difference(backend, size, keep):
    """What a query sees, and in the end the cache, are the same in any division of 40 tokens."""
    ends = set()
    for chunk in (1, 5, 7, 8, 40):
        cache, oracle = RotatingKVCache(size, keep, backend), Oracle(size, keep)
        for start in range(0, 40, chunk):
            push(cache, oracle, min(chunk, 40 - start))
        ends.add(fingerprint_of_slots(cache))
    assert len(ends) == 1


def fingerprint_of_slots(cache):
    twin = cache.copy()
    assert twin.backend is not None
    columns = zip(twin.positions.tolist(), held_columns(twin), strict=True)
    return tuple(sorted((position, token) for position, token in columns if position >= 0))


def test_a_ring_that_never_fills_is_a_growing_cache(backend):
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


def test_a_window_narrower_than_the_ring(backend):
    cache, oracle = RotatingKVCache(9, 2, backend), Oracle(9, 2)
    for tokens in (6, 1, 5, 1):
        columns = push(cache, oracle, tokens)
        for window in (1, 2, 6, 7, 8, 100):
            check_columns(cache, oracle, columns, tokens, window)


def test_mask_covers_the_last_update_only_once_tokens_are_gone(backend):
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


def test_sinks_stay_for_good(backend):
    cache, oracle = RotatingKVCache(6, 2, backend), Oracle(6, 2)
    for tokens in (1, 3, 11, 1, 1, 9):
        push(cache, oracle, tokens)
    held = {int(position) for position in cache.copy().positions if position >= 0}
    assert held == {0, 1, 22, 23, 24, 25}


# Speculative decoding: checkpoint, draft, rollback to what was accepted.


def check_rollback(backend, size, keep, before, drafts):
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
        if oracle.offset:  # positions and mask speak of what is held now, not of the draft
            check_columns(cache, oracle, held_columns(cache), 1)
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
def test_rollback(backend, case):
    check_rollback(backend, *case)


def test_checkpoint_after_checkpoint(backend):
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


def test_a_new_checkpoint_replaces_the_open_one(backend):
    cache, oracle = RotatingKVCache(5, 1, backend), Oracle(5, 1)
    push(cache, oracle, 6)
    cache.checkpoint()
    push(cache, oracle, 3, stamp=100)
    cache.checkpoint()
    push(cache, oracle, 2, stamp=200)
    cache.rollback(1)
    oracle.cut(10)
    check_whole(cache, oracle)


def test_rollback_of_nothing(backend):
    cache, oracle = RotatingKVCache(5, 1, backend), Oracle(5, 1)
    for tokens in (0, 8):
        if tokens:
            push(cache, oracle, tokens)
        cache.checkpoint()
        cache.rollback()
        check_whole(cache, oracle)


def test_a_checkpoint_keeps_no_view_of_the_draft():
    """Models write the next keys and values into the arrays of the last ones."""
    cache, oracle, shape = RotatingKVCache(4, 1, "numpy"), Oracle(4, 1), Shape()
    push(cache, oracle, 6)
    cache.checkpoint()
    keys, values = shape.keys(3, 100), shape.values(3, 100)
    cache.update(keys, values)
    oracle.tokens += map(Token, rows(keys), rows(values))
    keys[:] = values[:] = 1
    cache.rollback(2)
    oracle.cut(8)
    check_whole(cache, oracle)


def test_a_full_ring_does_not_grow(backend):
    """With the first token dropped it has two windows, and that is all."""
    cache, oracle = RotatingKVCache(8, 2, backend, step=4), Oracle(8, 2)
    for tokens in (3, 3, 2, 1):
        push(cache, oracle, tokens)
    growths, held = cache.growths, cache.nbytes
    for tokens in (1, 1, 9, 1, 3, 1, 20):
        push(cache, oracle, tokens)
        assert (cache.growths, cache.nbytes) == (growths, held)


@pytest.mark.parametrize("tokens", [1, 5, 8])
def test_as_long_as_nothing_is_displaced_no_copy_is_made(backend, tokens):
    """Up to the last token that fits, and after that for single tokens."""
    if backend.name not in ("numpy", "torch"):
        pytest.skip(f"memory of {backend.name} cannot be looked at")
    cache, shape = RotatingKVCache(8, backend=backend), Shape()
    for _ in range(2 if tokens == 1 else 1):
        cache.update(*map(backend.from_host, (shape.keys(tokens, 0), shape.values(tokens, 0))))
    rest = 8 - cache.offset
    for count in (rest, 1, 1) if rest else (1, 1):
        returned = cache.update(
            *map(backend.from_host, (shape.keys(count, 0), shape.values(count, 0)))
        )
        for part, held in zip(returned, cache.state, strict=True):
            part[...] = count
            assert (backend.to_host(held) == count).all(), "a copy"


def test_trim_below_the_size_then_on(backend):
    cache, oracle = RotatingKVCache(5, 1, backend), Oracle(5, 1)
    push(cache, oracle, 5)
    cache.trim(4)
    oracle.cut(1)
    check_whole(cache, oracle)
    for tokens in (2, 4, 1):
        push(cache, oracle, tokens, stamp=100 + oracle.offset)
    assert not cache.can_trim(1)
    assert cache.can_trim(0)


def test_trim_of_nothing_is_always_possible(backend):
    cache, oracle = RotatingKVCache(3, backend=backend), Oracle(3)
    push(cache, oracle, 5)
    cache.trim(0)
    check_whole(cache, oracle)


def test_rollback_of_another_cache_changes_nothing_here(backend):
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
def test_looking_changes_nothing(backend, reading):
    cache, oracle = RotatingKVCache(4, 1, backend), Oracle(4, 1)
    push(cache, oracle, 7)
    before = fingerprint(cache)
    reading(cache)
    assert fingerprint(cache) == before
