"""Caches as pure functions, for ``jax.jit``, ``lax.scan``, ``torch.compile``, ``mx.compile``.

The host plans a pass, a compiled program applies it. Functions here never look at the values of
arrays, so they cannot check any: the contents of a plan were checked when it was made.

For a pool of cells::

    cache.allocate(range(layers), kv_heads, head_dim)
    plan, state = cache.plan(batch), cache.program_state
    state = functional.put(state, plan, layer, k, v)        # in the program
    k, v, mask = functional.get(state, plan, layer)
    cache.program_state = state                             # back on the host

For attention that follows the tokens of a pass and not the size of the pool::

    plan, state = cache.plan(batch, reads=True), cache.program_state
    state = functional.put(state, plan, layer, k, v)        # in the program
    out = functional.attend(state, plan, layer, q)

For recurrent layers in a pool::

    plan, state = cache.plan(batch), cache.program_state
    states = functional.get_states(state, plan, layer)      # in the program
    ...                                                     # the layer
    state = functional.put_states(state, plan, layer, *states)
    cache.program_state = state                             # back on the host

For a per-layer cache::

    state = cache.export_state(tokens)                      # room for so many more
    state, K, V = functional.append(state, k, v)            # in the program
    mask = functional.mask(state, L)
    cache.import_state(state)                               # until then, the cache is locked

For a recurrent layer::

    state = cache.export_state()
    ...                                                     # the layer: state.arrays to new ones
    state = functional.advance(state, L, *arrays)           # in the program
    cache.import_state(state)

Donate the state to the program (``jax.jit(step, donate_argnums=...)``), and it is written in
place. A state that is not donated is copied by every program that writes to it.
"""

from __future__ import annotations

from typing import TypeVar

from kvcache._checks import as_limit, as_sizes
from kvcache.backends import Array, backend_of, backend_type
from kvcache.backends.blocks import token_axis
from kvcache.errors import DTypeError, KVCacheError, ShapeError, TrimError
from kvcache.layers.new_states import empty, empty_recurrent, empty_ring, select
from kvcache.layers.state import LayerState, RecurrentState, RingState, with_fields
from kvcache.pool.layouts import paged
from kvcache.pool.plan import ForwardPlan, PoolState, StatePlan
from kvcache.pool.traced_attention import attend_traced
from kvcache.snapshots.visibility import Visibility

__all__ = [
    "ForwardPlan",
    "LayerState",
    "PoolState",
    "RecurrentState",
    "RingState",
    "StatePlan",
    "advance",
    "append",
    "attend",
    "empty",
    "empty_recurrent",
    "empty_ring",
    "get",
    "get_states",
    "mask",
    "pages",
    "put",
    "put_states",
    "select",
    "trim",
]


AnyState = TypeVar("AnyState", LayerState, RingState)


def put(
    state: PoolState, plan: ForwardPlan, layer: int, keys: Array, values: Array | None = None
) -> PoolState:
    """Return `state` with keys and values of the pass's tokens, as :meth:`Cache.put` takes them.

    keys, values: in the layout of the cache, by default ``[kv_heads, tokens, head_dim]``. NaN and
        infinity are replaced, as there.

    Consumes the buffers of `state`.

    Raises: while it is traced, KVCacheError for a layer without buffers, ShapeError for a wrong
        number of tokens, heads or dimensions, DTypeError.
    """
    update = (keys,) if values is None else (keys, values)
    buffers = _layer(state, layer)
    if len(buffers) != len(update):
        raise ShapeError(f"layer {layer} has values in every pass or in none.")
    prototypes = plan.prototypes[: len(update)]
    for buffer, rows, like in zip(buffers, update, prototypes, strict=True):
        _check_tokens(buffer, rows, plan.cells, like)
    axes = tuple(token_axis(like) for like in prototypes)
    backend = backend_type(keys)
    finite = backend.traced_replace_nonfinite(update, axes)
    written = tuple(
        backend.traced_write(buffer, rows, plan.cells, axis)
        for buffer, rows, axis in zip(buffers, finite, axes, strict=True)
    )
    return {**state, layer: written}


def get(state: PoolState, plan: ForwardPlan, layer: int) -> tuple[Array, Array | None, Array]:
    """Return keys, values and mask of the pass's history, as :meth:`Cache.get` does.

    Values are None for a layer of keys only. Raises: KVCacheError for a layer without buffers, and
    for a plan with reads.
    """
    if plan.reads is not None:
        raise KVCacheError(
            "get returns a range and its mask, and this plan has reads instead. Call attend, or "
            "plan with cache.plan(batch)."
        )
    length, read = plan.mask.shape[-1], backend_type(plan.mask).traced_read
    history = [
        read(buffer, plan.start, length, token_axis(like), like.dtype)
        for buffer, like in zip(_layer(state, layer), plan.prototypes, strict=False)
    ]
    return history[0], history[1] if len(history) > 1 else None, plan.mask


def attend(
    state: PoolState,
    plan: ForwardPlan,
    layer: int,
    q: Array,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Array | None = None,
) -> Array:
    """Return attention of the pass's queries over what each may see, as :meth:`Cache.attend` does.

    plan: made with ``reads=True``. q, scale, softcap, sinks: as there; the numbers are constants of
        the program.

    Scores and sums are float32. Compiled once for each power of two of blocks of 256 cells, of
    which the passes of a program meet as many as their tokens see.

    Raises: while it is traced, KVCacheError for a layer without buffers or a plan without reads,
        ShapeError, DTypeError, ValueError; NotSupportedError for queries of torch that ask for
        gradients.
    """
    return attend_traced(_layer(state, layer), plan, q, scale, softcap, sinks)


def pages(state: PoolState, plan: ForwardPlan, layer: int, page: int) -> tuple[Array, Array | None]:
    """Return keys and values of a layer in pages of `page` cells, those of the cache.

    ``[pages, page, kv_heads, head_dim]`` of a cache in layout ``"thd"``, ``[pages, kv_heads, page,
    head_dim]`` of one in ``"htd"``. Which pages to read, :meth:`CausalCache.block_table` tells.
    Values are None for a layer of keys only.

    Raises: while it is traced, KVCacheError for a layer without buffers, NotSupportedError for
        another layout, ShapeError for a page that does not divide the pool.
    """
    backend, split = backend_type(plan.mask), []
    for buffer, like in zip(_layer(state, layer), plan.prototypes, strict=False):
        axis = token_axis(like)
        whole = backend.traced_read(buffer, 0, buffer.shape[axis], axis, like.dtype)
        split.append(paged(backend.xp, whole, axis, page))
    return split[0], split[1] if len(split) > 1 else None


def get_states(state: PoolState, plan: StatePlan, layer: int) -> tuple[Array, ...]:
    """Return copies of the states that the runs of the pass begin with, ``[runs, ...]`` each.

    As :meth:`RecurrentCache.get_states`, but always zeros for a fresh sequence.

    Raises: KVCacheError for a layer without buffers.
    """
    read, likes = backend_type(plan.before).traced_read_rows, plan.likes.get(layer, {})
    return tuple(
        read(buffer, plan.before, 0, likes.get(number, buffer).dtype)
        for number, buffer in enumerate(_layer(state, layer))
    )


def put_states(state: PoolState, plan: StatePlan, layer: int, *arrays: Array) -> PoolState:
    """Return `state` with `arrays`, ``[runs, ...]``, as the states behind the runs of the pass.

    arrays: as many as the layer has, of its shapes and dtypes.

    Consumes the buffers of `state`.

    Raises: while it is traced, KVCacheError for a layer without buffers, ShapeError, DTypeError.
    """
    buffers, likes = _layer(state, layer), plan.likes.get(layer, {})
    runs = plan.behind.shape[0]
    held = [(runs, *buffer.shape[1:]) for buffer in buffers]
    given = [tuple(array.shape) for array in arrays]
    if given != held:
        raise ShapeError(f"states of layer {layer} have the shapes {held}; got {given}.")
    expected = [likes.get(number, buffer).dtype for number, buffer in enumerate(buffers)]
    dtypes = [array.dtype for array in arrays]
    if dtypes != expected:
        raise DTypeError(f"states of layer {layer} are {expected}; got {dtypes}. Cast the arrays.")
    write = backend_type(plan.behind).traced_write
    written = tuple(
        write(buffer, rows, plan.behind, 0) for buffer, rows in zip(buffers, arrays, strict=True)
    )
    return {**state, layer: written}


def append(state: AnyState, keys: Array, values: Array) -> tuple[AnyState, Array, Array]:
    """Return `state` with L more tokens, and then the keys and values of all its slots.

    keys, values: ``[B, kv_heads, L, head_dim]``, or in the layout of the cache. Those returned have
        as many columns as there are slots; :func:`mask` hides the empty ones. The columns of a
        ring are in no order.

    Consumes the buffers of `state`. Appending to a full growing cache overwrites nothing, but
    still advances its offset, by which :meth:`KVCache.import_state` refuses the state.

    Raises: while it is traced, ShapeError for several tokens at once on a ring, or for other
        heads or dimensions; DTypeError.
    """
    axis = token_axis(state.likes[0])
    for buffer, update, like in zip(
        (state.keys, state.values), (keys, values), state.likes, strict=True
    ):
        _check(buffer, update, like, axis)
    start, tokens = state.offset, keys.shape[axis]
    if isinstance(state, RingState):
        if tokens != 1:
            raise ShapeError(
                f"in a program a ring takes one token at a time; got {tokens}. "
                "Prefill with update, then export."
            )
        start = state.slot
    write = backend_type(keys).traced_append
    appended = with_fields(
        state,
        keys=write(state.keys, keys, start, axis),
        values=write(state.values, values, start, axis),
        offset=state.offset + tokens,
    )
    if isinstance(appended, RingState):
        appended = _turned(appended)
    else:
        appended = with_fields(appended, written=appended.written + tokens)
    return appended, _whole(appended.keys, keys, axis), _whole(appended.values, values, axis)


def _turned(state: RingState) -> RingState:
    """Return a ring with one token just written, moved on to its next slot."""
    latest = (state.offset - 1)[None]
    write = backend_type(state.positions).traced_append
    next_slot = state.slot + 1
    # From the last slot the ring continues at the first one without a sink. Arithmetic, because a
    # traced value cannot be compared in an `if`: `wraps` is 0, or 1 after the last slot.
    wraps = next_slot // state.size
    return with_fields(
        state,
        positions=write(state.positions, latest, state.slot, 0),
        slot=next_slot - wraps * (state.size - state.sinks),
    )


def trim(state: LayerState, tokens: int | Array) -> LayerState:
    """Return `state` without its last `tokens` tokens, as :meth:`KVCache.trim` does.

    tokens: at most as many as there are, which is not checked in a program; may be traced. Also
        more than were appended in the program: those of the cache are then overwritten in turn.

    Raises: TrimError for a ring, which has overwritten what it would have to go back to.
    """
    if not isinstance(state, LayerState):
        raise TrimError("a ring cannot go back in a program. Use checkpoint() before the export.")
    return with_fields(state, offset=state.offset - tokens)


def advance(state: RecurrentState, tokens: int, *arrays: Array) -> RecurrentState:
    """Return `state` after `tokens` more tokens: `arrays` are the state behind them.

    arrays: as many as in `state`, of the same shapes and dtypes; they become those of the result.

    Raises: while it is traced, ShapeError, DTypeError; ValueError for less than one token.
    """
    [count] = as_sizes(tokens=tokens)
    given, held = ([tuple(array.shape) for array in each] for each in (arrays, state.arrays))
    if given != held:
        raise ShapeError(f"a state keeps its shapes, {held}; got {given}.")
    dtypes, kept = ([array.dtype for array in each] for each in (arrays, state.arrays))
    if dtypes != kept:
        raise DTypeError(f"a state keeps its dtypes, {kept}; got {dtypes}. Cast the arrays.")
    return with_fields(state, arrays=arrays, offset=state.offset + count)


def mask(state: AnyState, tokens: int, window: int | None = None, *, ahead: bool = False) -> Array:
    """Return the mask of the last `tokens` queries: bool ``[tokens, slots]``, True = attend.

    Like :meth:`KVCache.mask`, but never None: a program cannot test whether every column is
    visible. `window` W lets a token see itself and the W - 1 tokens before it. If rows of the
    batch are padded, ``[B, 1, tokens, slots]``, and a query of padding sees itself alone.

    ahead: return the mask of the next `tokens` queries instead, which the next :func:`append`
        will bring.

    Raises: while it is traced, ValueError for more tokens than slots, for more than one of a ring,
        and for a window below 1.
    """
    [tokens] = as_sizes(tokens=tokens)
    most = state.positions.shape[0]
    if isinstance(state, RingState):
        most = 1
    if tokens > most:
        raise ValueError(f"mask covers 1 to {most} tokens, of a ring 1; got {tokens}.")
    limit = as_limit(window, "window")
    rule = Visibility(None if limit is None else limit - 1)
    first = (state.offset if ahead else state.offset - tokens)[None]
    if isinstance(state, RingState):
        columns, sinks = _next_positions(state) if ahead else state.positions, state.keep
        queries = first
    else:
        # Position p of a growing cache is in slot p, so its first positions count up from 0: an
        # arange that needs no framework to make it.
        columns, sinks = state.positions, None
        queries = columns[:tokens] + first
    if not state.padding.shape[0]:
        return rule.sees(queries[:, None], columns[None, :], sinks)
    return _mask_of_rows(rule, queries, columns, state)


def _mask_of_rows(rule: Visibility, queries: Array, columns: Array, state: AnyState) -> Array:
    """Return the mask of each row of a batch, ``[B, 1, queries, columns]``."""
    rows = state.padding[:, None, None, None]
    own, held = queries[None, None, :, None] - rows, columns[None, None, None, :] - rows
    # A column of padding, and an empty slot, are before position 0 of the row.
    if isinstance(state, RingState):
        visible = rule.sees(own, held, state.keep)
        # The first slots hold the sinks of every row: in most rows, tokens behind the sinks, too.
        visible = visible & ((held < state.keep) | (held > own - state.window))
    else:
        visible = rule.sees(own, held)
    # A query of padding sees itself alone: softmax over nothing is NaN.
    ahead = queries[None, None, :, None] - columns[None, None, None, :]
    return visible | ((own < 0) & (ahead <= 0) & (ahead >= 0))


def _next_positions(state: RingState) -> Array:
    """Return the position in each slot of a ring after the next token."""
    write = backend_type(state.positions).traced_append
    # The sum is a copy: the write consumes its buffer, and the state needs its own.
    return write(state.positions + 0, state.offset[None], state.slot, 0)


def _layer(state: PoolState, layer: int) -> tuple[Array, ...]:
    if layer not in state:
        raise KVCacheError(
            f"layer {layer} has no buffers; there are {sorted(state)}. Call cache.allocate."
        )
    return state[layer]


def _check_tokens(buffer: Array, rows: Array, cells: Array, like: Array) -> None:
    """Raise ShapeError or DTypeError unless `rows` can be written to `cells` of `buffer`."""
    axis = token_axis(like)
    _check(buffer, rows, like, axis)
    if rows.shape[axis] != cells.shape[0]:
        raise ShapeError(
            f"a pass puts as many tokens as it has, {cells.shape[0]}; got {rows.shape[axis]}."
        )


def _check(buffer: Array, rows: Array, like: Array, axis: int) -> None:
    """Raise ShapeError or DTypeError unless `rows` can be written along `axis` of `buffer`."""
    if not hasattr(rows, "shape"):
        backend_of(rows)  # raises, and names the frameworks whose arrays are accepted
    backend_type(rows)  # raises for arrays of which a process has a part only
    expected, given = list(buffer.shape), list(rows.shape)
    expected[axis] = given[axis] if len(given) > axis else 0
    if given != expected:
        raise ShapeError(
            f"keys and values match their buffer on every axis but {axis}; got {given} for "
            f"{list(buffer.shape)}."
        )
    if rows.dtype != like.dtype:  # not that of the buffer, which may carry bits
        raise DTypeError(f"this cache holds {like.dtype}; got {rows.dtype}. Cast keys and values.")


def _whole(buffer: Array, like: Array, axis: int) -> Array:
    """Return all slots of `buffer` in the dtype of `like`."""
    return backend_type(like).traced_read(buffer, 0, buffer.shape[axis], axis, like.dtype)
