"""Attention of a planned pass, in a compiled program: the checks, and the call of the backend."""

from __future__ import annotations

from kvcache.backends import Array, backend_of, backend_type
from kvcache.backends.blocks import token_axis
from kvcache.backends.products import Scoring
from kvcache.errors import DTypeError, KVCacheError, ShapeError

from .checks import as_factors, check_query_sizes, check_sink_shape
from .layouts import Arrays
from .plan import ForwardPlan

_FLOATS = ("float32", "float16", "bfloat16")
"""Dtypes of queries over keys of float8, and of sinks."""


def attend_traced(
    buffers: Arrays,
    plan: ForwardPlan,
    q: Array,
    scale: float | None,
    softcap: float | None,
    sinks: Array | None,
) -> Array:
    """Do :func:`kvcache.functional.attend` over the arrays of a layer."""
    if plan.reads is None:
        raise KVCacheError(
            "attend follows the cells that the tokens see, and this plan has a mask instead. "
            "Plan with cache.plan(batch, reads=True)."
        )
    axis = token_axis(plan.key_like)
    _check_queries(buffers, plan, q, axis)
    scoring = _scoring(*_sizes(q, axis), scale, softcap, sinks)
    # Arrays may be traced, so the backend is known by the type only.
    return backend_type(q).traced_attention(q, buffers, plan.prototypes, scoring, plan.reads)


def _check_queries(buffers: Arrays, plan: ForwardPlan, q: Array, axis: int) -> None:
    """Raise DTypeError or ShapeError unless `q` can attend to a layer. axis: of tokens."""
    if not hasattr(q, "shape"):
        backend_of(q)  # raises, and names the frameworks whose arrays are accepted
    dtype = plan.key_like.dtype
    if _is_float8(dtype) and _is_float(q.dtype):
        dtype = q.dtype
    if q.dtype != dtype:
        raise DTypeError(f"this cache holds {dtype}; got queries of {q.dtype}. Cast the queries.")
    if not (_is_float(dtype) or _is_float8(dtype)):
        raise DTypeError(f"attention is computed on floats; this cache holds {dtype}. Call get.")
    shape, tokens = list(q.shape), plan.cells.shape[0]
    if len(shape) != 3 or shape[axis] != tokens:
        raise ShapeError(
            f"queries have three axes, with the {tokens} tokens of the plan on axis {axis}; "
            f"got {shape}."
        )
    of_keys, (value_heads, _) = (
        _sizes(buffers[i], token_axis(plan.prototypes[i])) for i in (0, len(buffers) - 1)
    )
    check_query_sizes(_sizes(q, axis), of_keys, value_heads)


def _scoring(
    q_heads: int,
    head_dim: int,
    scale: float | None,
    softcap: float | None,
    sinks: Array | None,
) -> Scoring:
    """Return checked arguments."""
    factors = as_factors(head_dim, scale, softcap)
    if sinks is not None:
        _check_sinks(sinks, q_heads)
    return Scoring(*factors, sinks)


def _check_sinks(sinks: Array, q_heads: int) -> None:
    if not hasattr(sinks, "shape"):
        backend_of(sinks)
    if not _is_float(sinks.dtype):
        raise DTypeError(f"sinks are float arrays; got {sinks.dtype}.")
    check_sink_shape(sinks.shape, q_heads)


def _sizes(array: Array, axis: int) -> tuple[int, int]:
    """Return heads and dimensions of an array with its tokens on `axis`."""
    heads, dim = (size for i, size in enumerate(array.shape) if i != axis)
    return heads, dim


def _is_float(dtype: object) -> bool:
    return str(dtype).rpartition(".")[2] in _FLOATS


def _is_float8(dtype: object) -> bool:
    return str(dtype).rpartition(".")[2].startswith("float8")
