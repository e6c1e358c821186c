"""A layer as a tuple of named arrays: keys and values, keys alone, or others.

Snapshots, files, copies and pools know a layer only in this form. Scales of quantized storage,
index keys or recurrent states therefore need further names, but no further code.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from kvcache._types import Indices
from kvcache.backends import HOST_DTYPES, HostArray
from kvcache.errors import SnapshotMismatchError

Rows: TypeAlias = npt.NDArray[np.intp] | Indices | slice


class NamedArray(NamedTuple):
    """One array of a layer, in host memory.

    token_axis: such as -2 of ``[..., tokens, head_dim]``, or 0 where tokens come first and the
        number of the other axes varies; None for an array without one, shared by all tokens.
    """

    name: str
    data: HostArray
    token_axis: int | None = -2

    def take(self, tokens: Rows) -> NamedArray:
        """Return a copy of some tokens; an array without a token axis is shared, not copied."""
        if self.token_axis is None:
            return self
        # Contiguous, so that a few rows taken out of many do not keep all of them alive.
        return self._replace(data=np.array(self.data[self._at(tokens)], order="C"))

    def put(self, tokens: Rows, source: NamedArray, rows: Rows) -> None:
        """Overwrite `tokens` with `rows` of `source`, in place."""
        self.data[self._at(tokens)] = source.data[source._at(rows)]

    def zeros(self, tokens: int) -> NamedArray:
        """Return an array of zeros like this one, with `tokens` tokens."""
        if self.token_axis is None:
            return self
        shape = list(self.data.shape)
        shape[self.token_axis] = tokens
        return self._replace(data=np.zeros(shape, self.data.dtype))

    def pad(self, tokens: int) -> NamedArray:
        """Return the array padded to `tokens` tokens by repeating the last one."""
        if self.token_axis is None:
            return self
        widths = [(0, 0)] * self.data.ndim
        widths[self.token_axis] = (0, tokens - self.data.shape[self.token_axis])
        return self._replace(data=np.pad(self.data, widths, "edge"))

    def _at(self, tokens: Rows) -> tuple[Rows | slice, ...]:
        """Return an index of `tokens` on the token axis, and of everything on the others."""
        index: list[Rows | slice] = [slice(None)] * self.data.ndim
        if self.token_axis is not None:
            index[self.token_axis] = tokens
        return tuple(index)


LayerArrays: TypeAlias = tuple[NamedArray, ...]
"""The arrays of one layer, in the same order for all layers of a cache."""


def check_layer_form(
    layers: Iterable[LayerArrays],
    names: Sequence[str],
    axes: int,
    dtype: str | tuple[str, ...] | None = None,
    least: int = 1,
    mixed: bool = False,
) -> None:
    """Check that rows of one layer are such as the caches of a kind take out of themselves.

    layers: the arrays of some rows each. names: of all arrays, in order; rows have the first
        `least` of them or more.
    axes: their number, the tokens on the one before the last. dtype: of all, or of each; None for
        any.
    mixed: whether arrays may differ in dtype.

    Raises: SnapshotMismatchError, also if arrays differ in dtype, or in more than the tokens.
    """
    forms = {array_forms(arrays) for arrays in layers}
    for form in forms:
        given_dtypes = [own.dtype if mixed else form[0].dtype for own in form]
        dtypes = given_dtypes if dtype is None else _dtypes(dtype, len(names))
        wanted = tuple(
            ArrayForm(name, -2, axes, fixed, own.sizes)
            for name, own, fixed in zip(names, form, dtypes, strict=False)
        )
        if len(form) < least or len(forms) > 1 or form != wanted:
            given = sorted(map(_described, forms))
            raise SnapshotMismatchError(
                f"rows of such a layer are {', '.join(names)}, of {axes} axes with the tokens on "
                f"the one before the last, of {dtype or 'one dtype'}; got {', '.join(given)}."
            )


def _dtypes(dtype: str | tuple[str, ...], number: int) -> list[np.dtype[np.generic]]:
    names = (dtype,) * number if isinstance(dtype, str) else dtype
    return [HOST_DTYPES[name] for name in names]


class ArrayForm(NamedTuple):
    """Everything that all rows of an array have in common.

    axes: their number, the token axis included. sizes: of all axes but that one.
    """

    name: str
    token_axis: int | None
    axes: int
    dtype: np.dtype[np.generic]
    sizes: tuple[int, ...]


def array_forms(arrays: Iterable[NamedArray]) -> tuple[ArrayForm, ...]:
    """Return the form of each of the arrays of a layer."""
    return tuple(map(_form, arrays))


def _form(array: NamedArray) -> ArrayForm:
    data, axis = array.data, array.token_axis
    sizes = list(data.shape)
    if axis is not None and -len(sizes) <= axis < len(sizes):
        del sizes[axis]
    return ArrayForm(array.name, axis, data.ndim, data.dtype, tuple(sizes))


def _described(forms: tuple[ArrayForm, ...]) -> str:
    return str([tuple(form) for form in forms])


def concat_layers(layers: list[LayerArrays]) -> LayerArrays:
    """Concatenate several parts of one layer along the token axis.

    Raises: ValueError unless the arrays of all parts have the same names and, tokens aside, the
        same sizes, and those shared by all tokens are the same.
    """
    names = [[array.name for array in arrays] for arrays in layers]
    if any(other != names[0] for other in names):
        raise ValueError(f"a layer has the same arrays in all rows; got {names}.")
    return tuple(_concat([arrays[i] for arrays in layers]) for i in range(len(names[0])))


def _check_shared(name: str, arrays: list[HostArray]) -> None:
    """Raise ValueError unless arrays are equal, bit for bit."""
    first = arrays[0]
    for other in arrays[1:]:
        same = other is first or (other.shape == first.shape and other.tobytes() == first.tobytes())
        if not same:
            raise ValueError(f"{name} is shared by all tokens; got rows with another one.")


def _concat(parts: list[NamedArray]) -> NamedArray:
    axis, name = parts[0].token_axis, parts[0].name
    if axis is None:
        _check_shared(name, [part.data for part in parts])
        return parts[0]
    sizes = [tuple(np.delete(part.data.shape, axis).tolist()) for part in parts]
    if len({*sizes}) > 1:
        raise ValueError(f"{name} has the same sizes in all rows, tokens aside; got {sizes}.")
    return parts[0]._replace(data=np.concatenate([part.data for part in parts], axis=axis))
