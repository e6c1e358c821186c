"""A cache in the place of the attention function of a module."""

from __future__ import annotations

import jax.numpy as jnp
from flax import nnx
from jax import lax

from kvcache.adapters.jax import update
from kvcache.backends.arrays import NativeArray
from kvcache.errors import NotSupportedError, ShapeError
from kvcache.functional import LayerState, RingState

LAYOUT = "bthd"
"""Axes of keys and values in flax."""
TOKENS = 1


class KVState(nnx.Cache[NativeArray]):
    """The variable of a module's state: a :class:`LayerState` or a :class:`RingState`.

    It is an ``nnx.Cache``: ``nnx.split(model, nnx.Cache, ...)`` tells states from weights.
    """


class CachedAttention(nnx.Module):
    """Attention of a module's new tokens to those before, by the function that the module had.

    attend: that function. state: tokens before, in the layout ``"bthd"``. decode: the module's own
        setting, for when it gets its function back.
    """

    def __init__(
        self,
        attend: NativeArray,
        state: LayerState | RingState,
        decode: bool | None,
    ) -> None:
        self.attend = attend
        self.decode = decode
        self.state = KVState(state)

    def __call__(
        self,
        query: NativeArray,
        key: NativeArray,
        value: NativeArray,
        *,
        mask: NativeArray | None = None,
        is_causal: bool = False,
        **options: object,
    ) -> NativeArray:
        """Return what the queries of new tokens find, ``[B, L, heads, head_dim]``.

        mask: of the module's caller, over the L new tokens or over all `max_len` columns. The
            causal mask is made here, so `is_causal` has nothing to add.

        Raises: ShapeError for a mask of other columns; NotSupportedError for keys of other tokens
            than the queries.
        """
        tokens = query.shape[-3]
        if query.ndim != 4 or key.shape[TOKENS] != tokens:
            raise NotSupportedError(
                "a cache serves self-attention of queries [B, L, heads, head_dim]; got queries "
                f"{list(query.shape)} and keys {list(key.shape)}. Leave a module of "
                "cross-attention out by attach(..., only=...), and call none with decode=True."
            )
        before: NativeArray = self.state.get_value()
        dtype = before.likes[0].dtype
        given = (key.astype(dtype), value.astype(dtype))
        after, keys, values, visible = update(before, *given)
        visible = visible if visible.ndim == 4 else visible[None, None]
        if mask is not None:
            visible = visible & _widened(mask, before, tokens, visible.shape[-1])
        self.state.set_value(after)
        return self.attend(query, keys, values, mask=visible, is_causal=False, **options)


def _widened(
    mask: NativeArray, state: LayerState | RingState, tokens: int, columns: int
) -> NativeArray:
    """Return a mask over new tokens as one over all columns, with the earlier ones visible."""
    mask = mask.astype(jnp.bool_)
    given = mask.shape[-1]
    if given == columns and isinstance(state, LayerState):
        return mask
    if given != tokens:
        raise ShapeError(
            f"a mask is over the {tokens} new tokens, or over all {columns} columns of a module "
            f"without a window; got {list(mask.shape)}."
        )
    whole = jnp.ones((*mask.shape[:-1], columns), jnp.bool_)
    return lax.dynamic_update_slice_in_dim(whole, mask, _first(state, tokens), -1)


def _first(state: LayerState | RingState, tokens: int) -> NativeArray:
    """Return the column of the first new token."""
    if isinstance(state, LayerState):
        return state.offset
    return state.slot if tokens == 1 else state.positions.shape[0]
