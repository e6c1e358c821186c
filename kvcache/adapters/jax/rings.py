"""Several tokens at once in a ring."""

from __future__ import annotations

from typing import TypeAlias, TypeVar

import jax
import jax.numpy as jnp

from kvcache import functional
from kvcache.backends import backend_type
from kvcache.backends.arrays import NativeArray
from kvcache.errors import ShapeError
from kvcache.functional import LayerState, RingState

Attended = TypeVar("Attended", LayerState, RingState)
Pair: TypeAlias = tuple[NativeArray, NativeArray]
"""A buffer of a ring, and what is appended to it."""


def extend(
    state: RingState, keys: NativeArray, values: NativeArray, window: int | None, axis: int
) -> tuple[RingState, NativeArray, NativeArray, NativeArray]:
    """Return `state` with L more tokens; keys, values and mask of those before, and of the L.

    The first of the tokens see some that the last ones displace. So the columns are all slots as
    they were, and then the new tokens.
    """
    tokens = keys.shape[axis]
    pairs: tuple[Pair, ...] = ((state.keys, keys), (state.values, values))
    _check(state, keys, values, axis)
    backend = backend_type(keys)
    columns = [_joined(pair, axis) for pair in pairs]
    slots = _slots(state, tokens)
    buffers = [backend.traced_write(buffer, rows, slots, axis) for buffer, rows in pairs]
    after = moved_on(state, tokens)._replace(keys=buffers[0], values=buffers[1])
    return after, columns[0], columns[1], _mask(state, tokens, window)


def moved_on(state: Attended, tokens: int) -> Attended:
    """Return `state` with its counters behind so many more tokens, which are to be written."""
    offset = state.offset + tokens
    if isinstance(state, LayerState):
        return state._replace(offset=offset, written=state.written + tokens)
    positions = jnp.asarray(state.positions).at[_slots(state, tokens)]
    return state._replace(
        offset=offset,
        positions=positions.set(_positions(state, tokens), mode="drop"),
        slot=_turned(state, state.slot + tokens),
    )


def _positions(state: RingState, tokens: int) -> NativeArray:
    """Return the positions of the next tokens."""
    return jnp.arange(tokens, dtype=jnp.int32) + jnp.asarray(state.offset)


def _check(state: RingState, keys: NativeArray, values: NativeArray, axis: int) -> None:
    """Raise what an append of the first token raises; nothing is computed."""
    first, others = (jax.lax.slice_in_dim(rows, 0, 1, axis=axis) for rows in (keys, values))
    jax.eval_shape(functional.append, state, first, others)
    if keys.shape[axis] != values.shape[axis]:
        raise ShapeError(
            f"keys and values are of as many tokens; got {keys.shape[axis]} and "
            f"{values.shape[axis]}."
        )


def _joined(pair: Pair, axis: int) -> NativeArray:
    """Return the tokens of a buffer, and those to append behind them."""
    buffer, rows = pair
    tokens: NativeArray = backend_type(rows).traced_read(
        buffer, 0, buffer.shape[axis], axis, rows.dtype
    )
    return jnp.concatenate((tokens, rows), axis)


def _slots(state: RingState, tokens: int) -> NativeArray:
    """Return the slot of each of the next tokens, one beyond the end if a later one takes it."""
    steps = jnp.arange(tokens, dtype=jnp.int32)
    places, beyond = steps + state.slot, state.positions.shape[0]
    written: NativeArray = (steps >= tokens - (state.size - state.sinks)) | (places < state.sinks)
    return jnp.where(written, _turned(state, places), beyond)


def _turned(state: RingState, places: NativeArray) -> NativeArray:
    """Return the slots of `places`, which count on beyond the last slot of the ring."""
    behind = state.sinks + (places - state.size) % (state.size - state.sinks)
    whole: NativeArray = places < state.size
    return jnp.where(whole, places, behind)


def _mask(state: RingState, tokens: int, window: int | None) -> NativeArray:
    """Return the mask of the next tokens over the slots of `state`, and over those tokens."""
    positions = _positions(state, tokens)
    columns = jnp.concatenate((jnp.asarray(state.positions), positions))

    def of_token(position: NativeArray) -> NativeArray:
        held = state._replace(positions=columns, offset=position + 1)
        visible = functional.mask(held, 1, window)
        if state.padding.shape[0]:
            return visible
        # The mask of one token need not tell what its ring has dropped by then.
        return visible & ((columns < state.keep) | (columns > position - state.window))

    return jnp.moveaxis(jax.vmap(of_token)(positions)[..., 0, :], 0, -2)
