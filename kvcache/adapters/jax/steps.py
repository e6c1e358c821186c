"""Steps of a program with the states of a model."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import jax
from jax import lax

from kvcache import functional
from kvcache.backends.arrays import NativeArray
from kvcache.errors import ShapeError, TrimError
from kvcache.functional import LayerState, RecurrentState, RingState

from .kinds import State, States
from .rings import extend

AnyState = TypeVar("AnyState", LayerState, RingState, RecurrentState)
Attended = TypeVar("Attended", LayerState, RingState)
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
    before = layer_of(state, layer)
    after, columns, more, mask = _update(before, keys, values, window)
    return _written(state, layer, before, after, keys.shape), columns, more, mask


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
    states: Attended,
    layer: int | NativeArray,
    before: Attended,
    after: Attended,
    shape: tuple[int, ...],
) -> Attended:
    """Return stacked states with what one layer has become, by a write of its new tokens."""
    axis = _token_axis(before)
    tokens = shape[axis]
    if _displaces(before, tokens):
        return _replaced(states, layer, after)
    buffers = [
        _copied(stacked, buffer, layer, _next_slot(before), min(tokens, buffer.shape[axis]), axis)
        for stacked, buffer in ((states.keys, after.keys), (states.values, after.values))
    ]
    # All other arrays are small, and written whole.
    small = states._replace(keys=states.offset, values=states.offset)
    replaced = _replaced(small, layer, after._replace(keys=after.offset, values=after.offset))
    return replaced._replace(keys=buffers[0], values=buffers[1])


def _copied(
    stacked: NativeArray,
    buffer: NativeArray,
    layer: int | NativeArray,
    start: NativeArray,
    tokens: int,
    axis: int,
) -> NativeArray:
    """Return `stacked` with `tokens` slots of a layer from `start` on taken from its `buffer`."""
    # Slices that reach beyond the end are moved, here and there alike, so that no token is lost.
    rows = lax.dynamic_slice_in_dim(buffer, start, tokens, axis)[None]
    place = [layer, *[0] * buffer.ndim]
    place[axis + 1] = start
    return lax.dynamic_update_slice(stacked, rows, place)


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


def _replaced(states: AnyState, layer: int | NativeArray, state: AnyState) -> AnyState:
    """Return stacked states with all arrays of one layer replaced."""
    replaced: AnyState = jax.tree.map(
        lambda stacked, array: lax.dynamic_update_index_in_dim(stacked, array, layer, 0),
        states,
        state,
    )
    return replaced


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
