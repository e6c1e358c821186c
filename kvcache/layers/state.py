"""The buffers of per-layer caches as pytrees, for :mod:`kvcache.functional`."""

from __future__ import annotations

from typing import NamedTuple

from kvcache.backends import Array


class LayerState(NamedTuple):
    """A growing cache as a pytree; :meth:`KVCache.export_state` makes it."""

    keys: Array
    """[B, kv_heads, slots, head_dim]"""
    values: Array
    offset: Array
    """int32 []: tokens seen, which is the position of the next one."""
    positions: Array
    """int32 [slots]: position of the token that a slot holds, or will hold."""
    like: Array
    """No keys at all, in the dtype of the cache, which the buffers may carry as bits."""


class RingState(NamedTuple):
    """A rotating cache as a pytree; :meth:`RotatingKVCache.export_state` makes it."""

    keys: Array
    """[B, kv_heads, slots, head_dim]"""
    values: Array
    offset: Array
    """int32 []: tokens seen, which is the position of the next one."""
    positions: Array
    """int32 [slots]: position of the token that a slot holds, -1 where there is none yet."""
    like: Array
    """No keys at all, in the dtype of the cache, which the buffers may carry as bits."""
    slot: Array
    """int32 []: where the next token goes."""
    sinks: Array
    """int32 []: how many of the first slots keep their token."""
    size: Array
    """int32 []: slots in the ring, sinks included; those behind it are never used."""
