"""The arrays of per-layer caches as pytrees, for :mod:`kvcache.functional`."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

from kvcache.backends import Array


class LayerState(NamedTuple):
    """A growing cache as a pytree, made by :meth:`KVCache.export_state`."""

    keys: Array
    """[B, kv_heads, slots, head_dim], or as the layout of the cache says."""
    values: Array
    offset: Array
    """int32 []: tokens seen; the position of the next one."""
    positions: Array
    """int32 [slots]: position of the token in each slot, present or to come."""
    likes: tuple[Array, Array]
    """Arrays without slots, in the dtypes of keys and values, which the buffers may carry as bits.

    The axis of length 0 is that of the tokens."""
    owner: Array
    """int32 []: number of the export, by which :meth:`KVCache.import_state` knows its states."""
    written: Array
    """int32 []: slots below this one may have been written to, also by tokens taken back."""
    padding: Array
    """int32 [B]: tokens that each row lacks on its left; [0] if no row lacks any."""


class RingState(NamedTuple):
    """A rotating cache as a pytree, made by :meth:`RotatingKVCache.export_state`."""

    keys: Array
    """[B, kv_heads, slots, head_dim], or as the layout of the cache says."""
    values: Array
    offset: Array
    """int32 []: tokens seen; the position of the next one."""
    positions: Array
    """int32 [slots]: position of the token in each slot, -1 for an empty slot."""
    likes: tuple[Array, Array]
    """Arrays without slots, in the dtypes of keys and values, which the buffers may carry as bits.

    The axis of length 0 is that of the tokens."""
    owner: Array
    """int32 []: number of the export, by which :meth:`KVCache.import_state` knows its states."""
    slot: Array
    """int32 []: slot of the next token."""
    sinks: Array
    """int32 []: number of first slots that keep their token, or padding."""
    keep: Array
    """int32 []: number of first tokens of each row that every query sees."""
    window: Array
    """int32 []: number of latest tokens that a query sees, itself included."""
    size: Array
    """int32 []: slots of the ring, sinks included; later slots of the buffer stay unused.

    Larger than any slot if the buffer is shorter than the ring: tokens beyond it are not written.
    """
    padding: Array
    """int32 [B]: tokens that each row lacks on its left; [0] if no row lacks any."""


class RecurrentState(NamedTuple):
    """A recurrent layer as a pytree, made by :meth:`StateCache.export_state`."""

    arrays: tuple[Array, ...]
    """The state behind the tokens seen: any number of arrays, batch first."""
    offset: Array
    """int32 []: tokens seen; the position of the next one."""
    owner: Array
    """int32 []: number of the export, by which :meth:`StateCache.import_state` knows its states."""


BatchState = TypeVar("BatchState", bound=LayerState | RingState | RecurrentState)


def with_fields(state: BatchState, **fields: Array | tuple[Array, ...]) -> BatchState:
    """Return `state` with `fields` in place of its own; in programs, too.

    For ``_replace``, of which torch 2.11 compiles an empty tuple.
    """
    make: Callable[..., BatchState] = type(state)
    own = zip(state._fields, state, strict=True)
    return make(*[fields.get(name, value) for name, value in own])
