"""Kinds of layers, and the states of all layers of a model without tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, SupportsIndex, TypeAlias

import jax
import jax.numpy as jnp

from kvcache import functional
from kvcache._checks import as_index, as_limit, as_room, as_sizes
from kvcache.backends import Array
from kvcache.errors import NotSupportedError
from kvcache.functional import LayerState, RecurrentState, RingState

State: TypeAlias = LayerState | RingState | RecurrentState
"""The state of one layer, or of several stacked, each array of which has one more axis in front."""
States: TypeAlias = State | tuple[State, ...]
"""The states of all layers: a tuple, or one stacked state."""


class Full(NamedTuple):
    """A layer with attention to all tokens."""


class Window(NamedTuple):
    """A layer with attention to a sliding window.

    size: latest tokens that a query sees, itself included. sinks: first tokens that every query
        sees besides.
    """

    size: SupportsIndex
    sinks: SupportsIndex = 0


class Recurrent(NamedTuple):
    """A recurrent layer.

    arrays: of its state, shape without the batch, and dtype of each.
    """

    arrays: Sequence[tuple[Sequence[SupportsIndex], str]]


Kind: TypeAlias = Full | Window | Recurrent


class _Sizes(NamedTuple):
    batch: int
    max_len: int
    kv_heads: int
    head_dims: tuple[int, int]
    dtype: str
    layout: str
    sharding: jax.sharding.NamedSharding | None
    padding: Sequence[SupportsIndex] | Array | None

    def shapes(self, slots: int) -> list[tuple[int, ...]]:
        """Return the shapes of keys and values."""
        heads = (self.kv_heads, slots) if self.layout == "bhtd" else (slots, self.kv_heads)
        return [(self.batch, *heads, head_dim) for head_dim in self.head_dims]


def init(
    layers: SupportsIndex | Sequence[Kind],
    batch: SupportsIndex,
    max_len: SupportsIndex,
    *,
    kv_heads: SupportsIndex,
    head_dim: SupportsIndex,
    dtype: str,
    value_dim: SupportsIndex | None = None,
    layout: str = "bhtd",
    sharding: jax.sharding.NamedSharding | None = None,
    padding: Sequence[SupportsIndex] | Array | None = None,
    stacked: bool = False,
) -> States:
    """Return the states of all layers of a model without tokens, in a program or outside.

    layers: the kind of each layer; an integer is so many layers of :class:`Full` attention.
    max_len: the most tokens that a layer of full attention takes. More are not written.
    value_dim: head_dim of the values, if it is another one.
    layout: axes of keys and values, ``"bhtd"``, or ``"bthd"``: ``[batch, tokens, kv_heads,
        head_dim]``, as ``jax.nn.dot_product_attention`` takes them.
    sharding: of keys and values in ``"bhtd"``, also for another layout; recurrent states are
        divided by batch and by their second axis. See the guide on several devices.
    padding: tokens that each row lacks on its left: a list, or an int32 array ``[batch]``, which
        may be traced.
    stacked: whether to return one state whose arrays have an axis of layers in front, for
        ``lax.scan`` over layers; :func:`update` then takes `layer`. All layers are of one kind.

    A window of no fewer tokens than `max_len` hides nothing, and is a full layer.

    Raises: TypeError, ValueError for sizes; ShapeError also for what the sharding cannot divide;
        DTypeError; NotSupportedError for kinds that cannot be stacked, recurrent layers with
        padding, and windows with sinks and padding.
    """
    count, length, heads, dim = as_sizes(
        batch=batch, max_len=max_len, kv_heads=kv_heads, head_dim=head_dim
    )
    dims = (dim, dim if value_dim is None else as_sizes(value_dim=value_dim)[0])
    sizes = _Sizes(count, length, heads, dims, dtype, layout, sharding, padding)
    kinds = _kinds(layers)
    if not stacked:
        return tuple(_empty(kind, sizes) for kind in kinds)
    if any(kind != kinds[0] for kind in kinds):
        raise NotSupportedError(
            f"stacked layers are of one kind; got {kinds}. Stack those of each kind, by an init "
            "for each, or leave stacked=False."
        )
    return _repeated(_empty(kinds[0], sizes), len(kinds))


def _kinds(layers: SupportsIndex | Sequence[Kind]) -> list[Kind]:
    kinds: list[Kind] = []
    if isinstance(layers, Sequence):
        kinds += layers
    else:
        kinds += [Full()] * as_index(layers, "layers")
    if not kinds:
        raise ValueError("layers must be one or more; got none.")
    return kinds


def _empty(kind: Kind, sizes: _Sizes) -> State:
    """Return the state of one layer without tokens."""
    if isinstance(kind, Recurrent):
        return _recurrent(kind, sizes)
    if not isinstance(kind, Full | Window):
        raise TypeError(f"a layer is Full(), Window(size) or Recurrent(arrays); got {kind!r}.")
    options = (sizes.dtype, sizes.sharding)
    if isinstance(kind, Window):
        size, sinks = as_limit(kind.size, "size"), as_room(kind.sinks, "sinks")
        if size is not None and size + sinks < sizes.max_len:
            return functional.empty_ring(
                sizes.shapes(size + sinks),
                *options,
                sinks=sinks,
                layout=sizes.layout,
                padding=sizes.padding,
            )
    return functional.empty(
        sizes.shapes(sizes.max_len), *options, layout=sizes.layout, padding=sizes.padding
    )


def _recurrent(kind: Recurrent, sizes: _Sizes) -> RecurrentState:
    if sizes.padding is not None:
        raise NotSupportedError(
            "a recurrent state goes on from every column, so a layer must skip padding itself; got "
            "padding with Recurrent. Make these states by an init without padding."
        )
    arrays = [((sizes.batch, *shape), dtype) for shape, dtype in kind.arrays]
    return functional.empty_recurrent(arrays, sizes.sharding)


def _repeated(state: State, layers: int) -> State:
    """Return the state of so many equal layers, stacked."""

    def repeated(array: jax.Array) -> jax.Array:
        return jnp.repeat(array[None], layers, axis=0)

    stacked: State = jax.tree.map(repeated, state)
    return stacked
