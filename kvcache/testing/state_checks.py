"""Checks of the cache of a recurrent layer on a backend; a state is named after its position."""

from __future__ import annotations

from kvcache.backends import Backend, HostArray
from kvcache.layers.recurrent import StateCache

from .checks import check
from .coded import coded, same

CHUNKS = (1, 6, 1, 9, 2, 6)
"""Tokens per update. Resume points lie at their ends, and inside of them."""
POINTS = (1, 4, 8, 12, 13, 25)


def _state(backend: Backend, dtype: str, position: int) -> tuple[HostArray, ...]:
    """Return the state behind a position: ``[2, 3, 4]``, and ``[2, 5]`` of another dtype if any."""
    other = "float32" if "float32" in backend.dtypes else dtype
    return (
        coded((2, 3, 1, 4), dtype, position)[:, :, 0],
        coded((2, 1, 1, 5), other, position)[:, 0, 0],
    )


def _advance(cache: StateCache, backend: Backend, dtype: str, tokens: int) -> None:
    """Go on by an update, and record every state that the cache wants."""
    stop = cache.offset + tokens
    for position in cache.cuts(tokens):
        cache.record(position, *map(backend.from_host, _state(backend, dtype, position)))
    cache.advance(tokens, *map(backend.from_host, _state(backend, dtype, stop)))


def _check_state(cache: StateCache, backend: Backend, dtype: str, position: int) -> None:
    if cache.offset != position:
        raise AssertionError(f"expected offset {position}, got {cache.offset}")
    for array, expected in zip(cache.state, _state(backend, dtype, position), strict=True):
        same(backend.to_host(array), expected)


def _filled(backend: Backend, dtype: str) -> StateCache:
    cache = StateCache(backend)
    cache.schedule(POINTS)
    for tokens in CHUNKS:
        _advance(cache, backend, dtype, tokens)
    return cache


@check
def recurrent_cache_returns_the_state_of_its_position(backend: Backend, dtype: str) -> None:
    """Carry a recurrent state, forth and back: a cache hands out none of another position."""
    for accepted in (0, 2, 5, 6):
        cache = StateCache(backend)
        for tokens in CHUNKS:
            _advance(cache, backend, dtype, tokens)
            _check_state(cache, backend, dtype, cache.offset)
        mark = cache.offset
        cache.checkpoint()
        _advance(cache, backend, dtype, 5)
        _advance(cache, backend, dtype, 1)
        cache.rollback(accepted)
        _check_state(cache, backend, dtype, mark + accepted)
        _advance(cache, backend, dtype, 3)
        _check_state(cache, backend, dtype, mark + accepted + 3)
    cache = _filled(backend, dtype)
    for position in reversed(POINTS[:-1]):
        cache.trim(cache.offset - position)
        _check_state(cache, backend, dtype, position)


@check
def recurrent_cache_resumes_at_resume_points(backend: Backend, dtype: str) -> None:
    """Carry a recurrent state through snapshots, copies and the host, to every resume point."""
    cache = _filled(backend, dtype)
    for position in POINTS[:-1]:
        with cache.snapshot(0, position) as snapshot:
            resumed = StateCache(backend)
            resumed.restore(snapshot)
            _check_state(resumed, backend, dtype, position)
    twin = cache.copy().to_backend("numpy").to_backend(backend)
    for each in (cache, twin):
        _check_state(each, backend, dtype, sum(CHUNKS))
        each.trim(sum(CHUNKS) - POINTS[2])
        _check_state(each, backend, dtype, POINTS[2])
