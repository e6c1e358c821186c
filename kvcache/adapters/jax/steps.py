"""Steps of a program with the states of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from kvcache import functional
from kvcache.backends import backend_type
from kvcache.backends.arrays import NativeArray
from kvcache.errors import ShapeError, TrimError
from kvcache.functional import LayerState, RecurrentState, RingState

from .kinds import State, States
from .rings import Attended, extend, moved_on

AnyState = TypeVar("AnyState", LayerState, RingState, RecurrentState)
AllStates = TypeVar("AllStates", bound=States)


def update(
    state: Attended,
    keys: NativeArray,
    values: NativeArray,
    *,
    window: int | None = None,
    layer: int | NativeArray | None = None,
) -> tuple[Attended, NativeArray, NativeArray, NativeArray]:
    """Return `state` with L more tokens, then keys, values and the mask that attention needs.

    keys, values: ``[B, kv_heads, L, head_dim]``, or in the layout of the state. Those returned have
        n columns in no certain order; the mask, bool ``[L, n]`` or ``[B, 1, L, n]`` with padding,
        shows each query its own. n is the slots of the state; in a ring that takes several tokens
        at once, L more.
    window: latest tokens that a query sees, itself included; a ring has its window without.
    layer: number of the layer, which may be traced, if `state` is stacked. Only the new tokens of
        that layer are written.

    Consumes the buffers of `state`.

    Raises: while it is traced, ShapeError, DTypeError; ValueError for a window below 1.
    """
    if layer is None:
        _check_stacked(state, stacked=False)
        return _update(state, keys, values, window)
    # The buffers of a layer are sliced only once they are written: XLA then copies nothing for it.
    one = layer_of(_without_buffers(state), layer)
    axis = _token_axis(one)
    tokens = keys.shape[axis]
    if _displaces(one, tokens):
        extended, *columns = _update(layer_of(state, layer), keys, values, window)
        return _replaced(state, layer, extended), columns[0], columns[1], columns[2]
    buffers = [
        _written(stacked, layer, one, rows, number)
        for number, (stacked, rows) in enumerate(((state.keys, keys), (state.values, values)))
    ]
    after = moved_on(one, tokens)
    replaced = _replaced(state, layer, after, one)
    whole = replaced._replace(keys=buffers[0], values=buffers[1])
    columns = [
        _columns(buffer, layer, rows, axis)
        for buffer, rows in zip(buffers, (keys, values), strict=True)
    ]
    return whole, columns[0], columns[1], functional.mask(after, tokens, window)


def _without_buffers(state: Attended) -> Attended:
    """Return a stacked state with its small arrays alone."""
    return state._replace(keys=state.offset, values=state.offset)


def _update(
    state: Attended, keys: NativeArray, values: NativeArray, window: int | None
) -> tuple[Attended, NativeArray, NativeArray, NativeArray]:
    axis = _token_axis(state)
    tokens = keys.shape[axis] if keys.ndim > axis else 1  # append refuses other ranks
    if _displaces(state, tokens):
        of_ring: NativeArray = extend
        extended: tuple[Attended, NativeArray, NativeArray, NativeArray]
        extended = of_ring(state, keys, values, window, axis)
        return extended
    state, columns, more = functional.append(state, keys, values)
    return state, columns, more, functional.mask(state, tokens, window)


def _displaces(state: LayerState | RingState, tokens: int) -> bool:
    """Return whether the last of the tokens may displace what the first of them see."""
    return isinstance(state, RingState) and tokens > 1


def _next_slot(state: LayerState | RingState) -> NativeArray:
    return state.slot if isinstance(state, RingState) else state.offset


def _token_axis(state: LayerState | RingState) -> int:
    """Return the token axis of one layer's keys."""
    return int(state.likes[0].shape[-4:].index(0))


def _written(
    stacked: NativeArray,
    layer: int | NativeArray,
    one: LayerState | RingState,
    rows: NativeArray,
    number: int,
) -> NativeArray:
    """Return stacked keys (number 0) or values (1) with the new tokens of a layer."""
    axis = _token_axis(one)
    tokens, slots = rows.shape[axis], stacked.shape[axis + 1]
    count, start = min(tokens, slots), _next_slot(one)
    first = jnp.clip(start, 0, slots - count)
    place = [layer, *[0] * (stacked.ndim - 1)]
    place[axis + 1] = first
    sizes = [1, *stacked.shape[1:]]
    sizes[axis + 1] = count
    slice_of = lax.dynamic_slice(stacked, place, sizes)[0]
    # An append to the slots in question: it checks, and writes nothing beyond the end.
    likes = (one.likes[number], one.likes[number])
    piece = LayerState(
        slice_of, slice_of, start - first, one.positions, likes, one.owner, one.owner, one.padding
    )
    appended = functional.append(piece, rows, rows)[0]
    return lax.dynamic_update_slice(stacked, jnp.asarray(appended.keys)[None], place)


def _columns(
    stacked: NativeArray, layer: int | NativeArray, rows: NativeArray, axis: int
) -> NativeArray:
    """Return all slots of a layer in the dtype of `rows`."""
    buffer = lax.dynamic_index_in_dim(stacked, layer, keepdims=False)
    return backend_type(rows).traced_read(buffer, 0, buffer.shape[axis], axis, rows.dtype)


def advance(
    state: RecurrentState, tokens: int, *arrays: NativeArray, layer: int | NativeArray | None = None
) -> RecurrentState:
    """Return `state` of a recurrent layer after `tokens` more tokens, with `arrays` behind them.

    As :func:`kvcache.functional.advance`. layer: as for :func:`update`.
    """
    if layer is None:
        _check_stacked(state, stacked=False)
        return functional.advance(state, tokens, *arrays)
    return _replaced(state, layer, functional.advance(layer_of(state, layer), tokens, *arrays))


def layer_of(state: AnyState, layer: int | NativeArray) -> AnyState:
    """Return the state of one layer of a stacked one. layer: may be traced.

    Raises: ShapeError for a state that is not stacked.
    """
    _check_stacked(state, stacked=True)
    one: AnyState = jax.tree.map(
        lambda array: lax.dynamic_index_in_dim(array, layer, keepdims=False), state
    )
    return one


def _replaced(
    states: AnyState, layer: int | NativeArray, state: AnyState, before: AnyState | None = None
) -> AnyState:
    """Return stacked states with the arrays of one layer replaced, but for those of `before`."""

    def replaced(stacked: NativeArray, array: NativeArray, old: NativeArray) -> NativeArray:
        if array is old:
            return stacked
        return lax.dynamic_update_index_in_dim(stacked, array, layer, 0)

    every: AnyState = jax.tree.map(replaced, states, state, states if before is None else before)
    return every


def select(states: AllStates, rows: NativeArray) -> AllStates:
    """Return the states with the rows of the batch at `rows`: the beams that go on.

    rows: int32 ``[new B]``, may be traced; see :func:`kvcache.functional.select`. Copies the rows.
    """
    return _each(states, lambda state: functional.select(state, rows))


def trim(states: AllStates, tokens: int | NativeArray) -> AllStates:
    """Return the states without their last `tokens` tokens; see :func:`kvcache.functional.trim`.

    Raises: TrimError for a ring or a recurrent layer, which cannot go back.
    """

    def trimmed(state: State) -> State:
        if isinstance(state, LayerState):
            return functional.trim(state, tokens)
        kind = "a ring" if isinstance(state, RingState) else "a recurrent layer"
        raise TrimError(
            f"{kind} cannot go back in a program. Go on from an earlier state that was not "
            "donated, or make the layer Full() and give its window to update."
        )

    return _each(states, trimmed)


def _each(states: AllStates, change: Callable[[State], State]) -> AllStates:
    """Return the states with each layer changed, stacked or not."""

    def changed(state: State) -> State:
        return jax.vmap(change)(state) if state.offset.shape else change(state)

    every: AllStates = jax.tree.map(changed, states, is_leaf=_is_state)
    return every


def _is_state(node: object) -> bool:
    return isinstance(node, LayerState | RingState | RecurrentState)


def _check_stacked(state: State, *, stacked: bool) -> None:
    if bool(state.offset.shape) != stacked:
        raise ShapeError(
            "a stacked state has an axis of layers in front, and is updated by layer=; got "
            f"{'one of a single layer' if stacked else 'a stacked one without layer='}."
        )
