"""Recurrent states: their form, checks before a cache takes one, and their form on the host.

A state is one or more arrays of any shape and dtype, batch first, behind one position. On the host
it is the row of the last token that went by: the state behind position p is the row of p - 1.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from kvcache.backends import HOST_DTYPES, Backend, backend_of, nbytes
from kvcache.backends.arguments import refuse_traced
from kvcache.backends.arrays import Arrays
from kvcache.backends.base import FastKey
from kvcache.errors import DTypeError, ShapeError, SnapshotMismatchError

from .admission import check_owner
from .arrays import ArrayForm, LayerArrays, NamedArray, array_forms

STATE_AXES = "bc"
"""The first axes of a state, by the letters of :meth:`Backend.alloc_axes`: batch, channels."""
TOKEN_AXIS = 0
"""Token axis of states on the host: in front, because the numbers of the other axes vary."""


class StateForm(NamedTuple):
    """Backend, shapes and dtypes of the states of one cache, fixed by the first of them.

    keys: of the arrays checked last, None before; arrays with equal keys need no other check.
    """

    backend: Backend
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]
    keys: tuple[FastKey, ...] | None

    @property
    def nbytes(self) -> int:
        """Bytes of one state."""
        return sum(map(nbytes, self.shapes, self.dtypes))

    def with_batch(self, batch: int) -> StateForm:
        """Return the form of states of another number of rows."""
        return self._replace(shapes=tuple((batch, *shape[1:]) for shape in self.shapes), keys=None)


def admitted(arrays: Arrays, form: StateForm | None, asked: Backend | None) -> StateForm:
    """Return the form of a state, checked against `form`, that of earlier ones.

    asked: the backend that the cache names; None takes that of the first array.

    Raises: ShapeError, DTypeError, UnknownBackendError, TracedArrayError.
    """
    if form is not None:
        fast_key = form.backend.fast_key
        try:
            if tuple([fast_key(array) for array in arrays]) == form.keys:
                return form
        except AttributeError:  # not an array: the full check below says so
            pass
    return _admitted_in_full(arrays, form, asked)


def _admitted_in_full(arrays: Arrays, form: StateForm | None, asked: Backend | None) -> StateForm:
    if not arrays:
        raise ShapeError(
            "a state is one array or more; got none. A layer without a state needs no StateCache."
        )
    backend = form.backend if form is not None else asked or backend_of(arrays[0])
    for number, array in enumerate(arrays):
        check_owner(backend, f"array {number} of a state", array)
        if backend.is_traced(array):
            refuse_traced(array)
    shapes = tuple(tuple(array.shape) for array in arrays)
    _check_shapes(shapes)
    dtypes = tuple(map(backend.dtype_name, arrays))
    if form is not None and (shapes, dtypes) != (form.shapes, form.dtypes):
        _refuse_change(form, shapes, dtypes)
    return StateForm(backend, shapes, dtypes, tuple(map(backend.fast_key, arrays)))


def _check_shapes(shapes: Sequence[tuple[int, ...]]) -> None:
    """Raise ShapeError unless every array has a batch axis, of one size, and no axis is empty."""
    if not all(shape and all(shape) for shape in shapes) or len({s[0] for s in shapes}) > 1:
        raise ShapeError(
            "arrays of a state begin with the batch axis, of one size for all, and have no empty "
            f"axis; got {', '.join(map(str, shapes))}."
        )


def _refuse_change(
    form: StateForm, shapes: tuple[tuple[int, ...], ...], dtypes: tuple[str, ...]
) -> None:
    """Raise ShapeError, or DTypeError if only dtypes differ."""
    if len(shapes) != len(form.shapes):
        raise ShapeError(
            f"every state of a cache has as many arrays as the first, {len(form.shapes)}; got "
            f"{len(shapes)}."
        )
    kind = DTypeError if shapes == form.shapes else ShapeError
    fixed, given = ([*zip(*pair, strict=True)] for pair in (form[1:3], (shapes, dtypes)))
    changes = ", ".join(
        f"array {number} is {new[1]}{list(new[0])}, not {old[1]}{list(old[0])}"
        for number, (old, new) in enumerate(zip(fixed, given, strict=True))
        if old != new
    )
    raise kind(f"every state of a cache has the form of the first: {changes}. reset() starts anew.")


def apart(backend: Backend, state: Arrays, others: Iterable[Arrays]) -> Arrays:
    """Return `state` with copies of the arrays that it has twice, or that `others` have as well."""
    known = {id(array) for other in others for array in other}
    arrays = []
    for array in state:
        arrays.append(backend.concat([array], 0) if id(array) in known else array)
        known.add(id(array))
    return tuple(arrays)


# On the host.


def to_rows(backend: Backend, states: Sequence[Arrays]) -> LayerArrays:
    """Return host copies of several states, a row for each."""
    columns = zip(*states, strict=True)
    return tuple(
        NamedArray(
            f"state{number}", np.stack([backend.to_host(array) for array in column]), TOKEN_AXIS
        )
        for number, column in enumerate(columns)
    )


def from_row(backend: Backend, arrays: LayerArrays, row: int) -> Arrays:
    """Return one state as arrays of `backend`. Raises: DTypeError where it lacks a dtype."""
    return tuple(backend.from_host_axes(array.data[row], STATE_AXES) for array in arrays)


def check_state_rows(layers: Iterable[LayerArrays]) -> None:
    """Raise SnapshotMismatchError unless rows are states of one form, as :func:`to_rows` has them.

    layers: the arrays of some rows each.
    """
    forms = {array_forms(arrays) for arrays in layers}
    if len(forms) > 1 or not all(map(_is_state, forms)):
        given = sorted(str([tuple(form) for form in layer]) for layer in forms)
        raise SnapshotMismatchError(
            "rows of a recurrent layer are arrays state0, state1, ..., with the tokens and then "
            f"the batch on the first axes, of one form; got {', '.join(given)}."
        )


def check_state_layers(given: Set[int], layers: Set[int], *, extend: bool) -> None:
    """Raise SnapshotMismatchError unless states of the layers `given` fit a pool of `layers`.

    extend: whether the pool may take layers that it lacks.
    """
    if layers - given or (given - layers and not extend):
        raise SnapshotMismatchError(
            f"a snapshot goes back to the layers that it is of; this cache holds states of layers "
            f"{sorted(layers)}, got {sorted(given)}. Restore it to a cache of the same model."
        )


def _is_state(forms: Sequence[ArrayForm]) -> bool:
    named = all(
        form.name == f"state{number}" and form.token_axis == TOKEN_AXIS
        for number, form in enumerate(forms)
    )
    sizes = [form.sizes for form in forms]
    batched = all(own and all(own) for own in sizes) and len({own[0] for own in sizes}) == 1
    return named and batched and all(form.dtype.name in HOST_DTYPES for form in forms)


def kept_positions(arrays: LayerArrays, offset: int) -> list[int]:
    """Return the positions in the first of `arrays`, behind which the others hold states.

    Raises: SnapshotMismatchError unless they ascend to `offset`, with one row of states for each.
    """
    check_state_rows([arrays[1:]])
    first, *states = arrays
    if array_forms([first]) != (ArrayForm("positions", TOKEN_AXIS, 1, np.dtype(np.int32), ()),):
        raise SnapshotMismatchError(
            "a recurrent layer is positions, one axis of int32, and its states; got "
            f"{', '.join(array.name for array in arrays)}."
        )
    positions: list[int] = first.data.tolist()
    rows = {array.data.shape[TOKEN_AXIS] for array in states}
    ascending = all(low < high for low, high in pairwise([0, *positions]))
    if not ascending or positions[-1:] != [offset] or rows != {len(positions)}:
        raise SnapshotMismatchError(
            f"states are behind ascending positions from 1 to the offset, {offset}, one for each; "
            f"got {positions} and {sorted(rows)} rows."
        )
    return positions
