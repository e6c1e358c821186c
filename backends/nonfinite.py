"""Replacement of NaN and infinity by finite numbers, which the weight 0 of attention makes vanish.

0 x NaN is NaN, and so is 0 x infinity: a token that a query may not see would change its output all
the same. A pool therefore stores finite numbers only. Where a key or a value is not finite, the
key becomes 0, so that its score stays finite under any mask, and the value becomes a number so
large that the outputs of the sequence itself still show that something is wrong.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, reduce
from operator import and_

import numpy as np

from .arrays import Array, Arrays, DType, Namespace, NativeArray, NativeArrays
from .dtypes import HOST_DTYPES
from .indexing import Axes, axes_of

_LAYOUTS = ("thd", "htd", "hdt")
"""The layout of an array of a pool by the axis of its tokens."""


LARGEST_BITS = {
    "float32": 0x7F7FFFFF,
    "float16": 0x7BFF,
    "bfloat16": 0x7F7F,
    "float8_e4m3fn": 0x7E,
    "float8_e5m2": 0x7B,
}
"""Bits of the largest finite number by name of float dtype; larger ones are infinity and NaN."""


def largest_power(dtype: str) -> float:
    """Return the largest power of two of a float dtype.

    Not the largest number: rounded to bfloat16 or TF32, as accelerators multiply, it is infinite.
    """
    kind = HOST_DTYPES[dtype]
    largest = np.array(LARGEST_BITS[dtype], f"u{kind.itemsize}").view(kind)
    return math.ldexp(0.5, math.frexp(float(largest))[1])  # frexp: mantissa in [0.5, 1)


def dtype_label(dtype: DType) -> str:
    """Return the name of a dtype of any framework: float32 of torch.float32."""
    return str(dtype).rpartition(".")[2]


@cache
def substitutes(dtype: str, arrays: int) -> tuple[float, ...]:
    """Return what replaces a number that is not finite, in each array of a layer.

    dtype: its name. Empty for dtypes that have no such numbers: integers.

    Keys alone serve as values, too (latent attention), so they become large as well. They become
    the root of the largest power, because scores, products of keys, have to be finite.
    """
    if dtype not in LARGEST_BITS:
        return ()
    power = largest_power(dtype)
    if arrays == 1:
        return (2.0 ** (math.frexp(power)[1] // 2),)
    return (0.0, *[power] * (arrays - 1))


def replace_floats(
    xp: Namespace,
    arrays: NativeArrays,
    axis: Axes,
    is_finite: Callable[[NativeArray], NativeArray],
) -> NativeArrays:
    """Do :func:`replaced` with the :func:`substitutes` of the dtype; integers stay as they are."""
    numbers = substitutes(dtype_label(arrays[0].dtype), len(arrays))
    return replaced(xp, arrays, axis, numbers, is_finite) if numbers else arrays


def replaced(
    xp: Namespace,
    arrays: NativeArrays,
    axis: Axes,
    numbers: Sequence[float],
    is_finite: Callable[[NativeArray], NativeArray],
) -> NativeArrays:
    """Return `arrays` of a layer with `numbers` in place of what is not finite; never looks at any.

    Keys and values of one shape are replaced in pairs: both, where either is not finite. Else the
    whole token is, in all heads.

    axis: that of the tokens. is_finite: element-wise. `arrays` may hold the bits of floats, see
        :func:`finite_bits`.
    """
    finite = tuple(map(is_finite, arrays))
    if len(arrays) > 1:
        axes = axes_of(arrays, axis)
        shape = tuple(arrays[0].shape)
        # Compared, not put into a set: that would compile a program for each number of tokens.
        alike = all(tuple(array.shape) == shape for array in arrays[1:])
        same = len(set(axes)) == 1 and alike
        finite = _pairs(finite) if same else _tokens(xp, finite, axes)
    return tuple(
        xp.where(flags, array, number)
        for flags, array, number in zip(finite, arrays, numbers, strict=True)
    )


@cache
def finite_bits(
    dtype: str, arrays: int
) -> tuple[Callable[[NativeArray], NativeArray], tuple[int, ...]]:
    """Return `is_finite` and `numbers` of :func:`replaced` for arrays of the bits of a float dtype.

    The bits are unsigned integers. Without the sign they are in the order of the numbers, infinity
    and NaN behind the largest.
    """
    kind, bits = HOST_DTYPES[dtype], f"u{HOST_DTYPES[dtype].itemsize}"
    numbers = np.array(substitutes(dtype, arrays), kind).view(bits)
    largest = LARGEST_BITS[dtype]
    unsigned = (1 << 8 * kind.itemsize - 1) - 1
    return lambda array: array & unsigned <= largest, tuple(numbers.tolist())


def _pairs(finite: Arrays) -> Arrays:
    return (reduce(and_, finite),) * len(finite)


def _tokens(xp: Namespace, finite: Arrays, axes: Sequence[int]) -> Arrays:
    """Return for every token whether all its arrays are finite, in all heads.

    Arrays may differ in heads as well, so no head of one belongs to a head of the other.
    """
    layouts = [_LAYOUTS[axis] for axis in axes]
    by_token = [
        xp.all(flags, axis=tuple({0, 1, 2} - {axis}), keepdims=True)
        for flags, axis in zip(finite, axes, strict=True)
    ]
    first = layouts[0]
    pairs = zip(by_token, layouts, strict=True)
    whole = reduce(and_, (_permuted(xp, flags, layout, first) for flags, layout in pairs))
    return tuple(_permuted(xp, whole, first, layout) for layout in layouts)


def _permuted(xp: Namespace, array: Array, old: str, new: str) -> Array:
    return array if old == new else xp.permute_dims(array, tuple(old.index(axis) for axis in new))
