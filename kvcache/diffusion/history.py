"""Histories: what the last computed steps gave at one site, and the prediction made of it."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import lru_cache, partial, reduce
from typing import Any, NamedTuple, TypeAlias

from kvcache.backends import Array, Backend
from kvcache.errors import DTypeError, ShapeError

from .predictors import Predictor

Compute: TypeAlias = Callable[[Any], Any]
"""A network or a part of one: an array, or a tuple of them, to the same or something else."""
Bundle: TypeAlias = tuple[Array, ...]
"""What goes into a network or comes out of it: an array, or several (image and text tokens)."""

Shapes: TypeAlias = list[tuple[int, ...]]


class History(NamedTuple):
    """The computed steps that are kept of one site, the latest first."""

    kept: tuple[Bundle, ...]
    times: tuple[Any, ...]
    """float32 scalars"""
    count: Any
    """How many of them there are; the rest is room."""


EMPTY = History((), (), 0)


def bundle(value: Any) -> Bundle:
    """`value`, an array or a tuple or list of them, as a tuple."""
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)


def targets(predictor: Predictor, inputs: Bundle, outputs: Bundle) -> Bundle:
    """What of a computed step is to be kept: outputs, or what the network added to its inputs.

    Raises: ShapeError, DTypeError where nothing can be subtracted.
    """
    if not predictor.residual:
        return outputs
    for kind, error in (("shape", ShapeError), ("dtype", DTypeError)):
        came = [[getattr(array, kind) for array in arrays] for arrays in (inputs, outputs)]
        if came[0] != came[1]:
            raise error(
                f"a residual needs outputs with the {kind} of their inputs; got {came[1]} for "
                f"{came[0]}. Use a predictor of outputs, HoldOutput() or Taylor(order)."
            )
    return tuple(new - old for new, old in zip(outputs, inputs, strict=True))


def extended(predictor: Predictor, history: History, time: Any, target: Bundle) -> History:
    """`history` with one more computed step; what the predictor does not look at is let go."""
    keeps = predictor.keeps
    return History(
        (target, *history.kept)[:keeps],
        (time, *history.times)[:keeps],
        history.count + 1,
    )


def predicted(
    xp: Any,
    residual: bool,
    kept: Sequence[Bundle],
    weights: Sequence[Any],
    inputs: Bundle,
) -> Bundle:
    """The outputs that `weights` make of what was kept, added up in float32 at least."""
    found = tuple(_combined(xp, arrays, weights) for arrays in zip(*kept, strict=True))
    if not residual:
        return found
    return tuple(x + added for x, added in zip(inputs, found, strict=True))


@lru_cache(maxsize=64)
def predictions(backend: Backend, residual: bool) -> Callable[..., Bundle]:
    """:func:`predicted` as `backend` runs it fastest, from its third argument on."""
    return backend.compile(partial(predicted, backend.xp, residual))


def _combined(xp: Any, arrays: Sequence[Array], weights: Sequence[Any]) -> Array:
    narrow = arrays[0].dtype
    wide = xp.result_type(narrow, xp.float32)
    terms = (xp.astype(array, wide) * weight for array, weight in zip(arrays, weights, strict=True))
    combined: Array = xp.astype(reduce(operator.add, terms), narrow)
    return combined


def shapes(arrays: Sequence[Array]) -> Shapes:
    """The shape of each array."""
    return [tuple(array.shape) for array in arrays]


def check_unchanged(what: str, had: Shapes | None, got: Shapes) -> None:
    """Raises ShapeError where arrays are not shaped as those of the steps before, if any."""
    if had is not None and had != got:
        raise ShapeError(
            f"{what} must keep its shape within a run; had {had}, got {got}. "
            "Call reset() before another run, or give it a stream or site of its own."
        )
