"""Histories: the results of the last computed steps at one site, and predictions from them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import lru_cache, partial, reduce
from typing import NamedTuple, TypeAlias, TypeVar, cast

from kvcache.backends import Array, Backend, backend_of
from kvcache.backends.arrays import Namespace
from kvcache.errors import DTypeError, ShapeError

from .predictors import Predictor
from .scalars import Scalar

Inputs = TypeVar("Inputs")
Outputs = TypeVar("Outputs")

Compute: TypeAlias = Callable[[Inputs], Outputs]
"""A network or a part of one: an array, or a tuple of them, to the same or something else."""
Bundle: TypeAlias = tuple[Array, ...]
"""Inputs or outputs of a network: an array, or several (image and text tokens)."""

Shapes: TypeAlias = list[tuple[int, ...]]


class History(NamedTuple):
    """The last computed steps of one site, the latest first."""

    kept: tuple[Bundle, ...]
    times: tuple[Scalar, ...]
    """float32 scalars"""
    computed: Scalar | int
    """Steps computed in this run; where these are fewer than kept, the rest is room."""


EMPTY = History((), (), 0)


def bundle(value: object) -> Bundle:
    """Return `value`, an array or a tuple or list of them, as a tuple."""
    # Not any sequence: arrays may be iterable, too.
    return tuple(value) if isinstance(value, (tuple, list)) else (cast(Array, value),)


def owned_copy(array: Array) -> Array:
    """Return a copy of `array` for the cache alone: nobody else can write to it."""
    return backend_of(array).concat([array], 0)


def copied(array: Array) -> Array:
    """Return a copy of `array` that a network which is given `array` does not write to."""
    # Not owned_copy, which refuses tracers. A compiler leaves this product out.
    return array * 1


def entering_part(predictor: Predictor, inputs: Bundle) -> Bundle:
    """Return `inputs` to be given to :func:`kept_part` once the network has run.

    Copies where the predictor subtracts them: the network may write to its inputs.
    """
    return tuple(map(copied, inputs)) if predictor.residual else inputs


def kept_part(predictor: Predictor, inputs: Bundle, outputs: Bundle) -> Bundle:
    """Return the part of a computed step to keep: outputs, or outputs less inputs.

    Raises: ShapeError, DTypeError where nothing can be subtracted.
    """
    if not predictor.residual:
        return outputs
    for kind, error in (("shape", ShapeError), ("dtype", DTypeError)):
        expected, got = ([getattr(array, kind) for array in arrays] for arrays in (inputs, outputs))
        if expected != got:
            raise error(
                f"a residual needs outputs with the {kind} of their inputs; got {got} for "
                f"{expected}. Use a predictor of outputs, HoldOutput() or Taylor(order)."
            )
    return tuple(new - old for new, old in zip(outputs, inputs, strict=True))


def extended(predictor: Predictor, history: History, time: Scalar, kept: Bundle) -> History:
    """Return `history` with one more computed step, cut to ``predictor.keeps`` steps."""
    keeps = predictor.keeps
    return History(
        (kept, *history.kept)[:keeps],
        (time, *history.times)[:keeps],
        history.computed + 1,
    )


def predicted(
    xp: Namespace,
    residual: bool,
    kept: Sequence[Bundle],
    weights: Sequence[Scalar | float],
    inputs: Bundle,
) -> Bundle:
    """Return the sum of `kept`, weighted and in float32 at least; plus `inputs` if `residual`."""
    combined = tuple(_combined(xp, arrays, weights) for arrays in zip(*kept, strict=True))
    if not residual:
        return combined
    return tuple(x + added for x, added in zip(inputs, combined, strict=True))


# Cached, because frameworks compile per function object, and every cache needs the same one.
@lru_cache(maxsize=64)
def prediction_program(backend: Backend, residual: bool) -> Callable[..., Bundle]:
    """Return :func:`predicted` as `backend` runs it fastest, from its third argument on."""
    return backend.compile(partial(predicted, backend.xp, residual))


def _combined(xp: Namespace, arrays: Sequence[Array], weights: Sequence[Scalar | float]) -> Array:
    """Return the weighted sum of `arrays`, in their dtype."""
    narrow = arrays[0].dtype
    # The terms of an extrapolation cancel: in half precision little would be left of them.
    wide = xp.result_type(narrow, xp.float32)
    terms = (xp.astype(array, wide) * weight for array, weight in zip(arrays, weights, strict=True))
    return xp.astype(reduce(operator.add, terms), narrow)


def shapes(arrays: Sequence[Array]) -> Shapes:
    """Return the shape of each array."""
    return [tuple(array.shape) for array in arrays]


def check_unchanged(subject: str, had: Shapes | None, got: Shapes) -> None:
    """Raise ShapeError if arrays have other shapes than in the step before; None: no step before.

    subject: names the arrays in the error.
    """
    if had is not None and had != got:
        raise ShapeError(
            f"{subject} must keep its shape within a run; had {had}, got {got}. "
            "Call reset() before another run, or give it a stream or site of its own."
        )
