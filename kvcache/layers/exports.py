"""Exports of per-layer caches: how a state is known to be that of the cache it comes back to."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TypeAlias

from kvcache.backends import Array, Backend, backend_type
from kvcache.backends.arguments import refuse_traced
from kvcache.backends.arrays import DType
from kvcache.errors import BoundsError, DTypeError, ShapeError, StateError

from .state import LayerState, RecurrentState, RingState

State: TypeAlias = LayerState | RingState
AnyState: TypeAlias = State | RecurrentState

_owners: Iterator[int] = count()


def new_owner() -> int:
    """Return a number for an export, unlike those of all others in this process."""
    return next(_owners) % 2**31  # int32 on the device


@dataclass(frozen=True)
class Export:
    """One export of a cache.

    owner: number in all states derived from the exported one. kind: their type.
    names: of all their arrays. forms: shape and dtype of those that hold tokens, by name.
    """

    owner: int
    kind: type[AnyState]
    names: tuple[str, ...]
    forms: Mapping[str, tuple[tuple[int, ...], DType]]

    @classmethod
    def of(cls, owner: int, state: AnyState, fields: Sequence[str]) -> Export:
        """Return the record of the export of `state`, whose `fields` hold its tokens."""
        arrays = _named_arrays(state, fields)
        forms = {name: (tuple(array.shape), array.dtype) for name, array in arrays.items()}
        return cls(owner, type(state), (*_named_arrays(state, state._fields),), forms)

    def check(self, backend: Backend, state: AnyState) -> None:
        """Raise StateError, ShapeError or DTypeError unless `state` comes from this export.

        Waits for the program that computes it, and consumes nothing.
        """
        if not isinstance(state, self.kind):
            raise StateError(
                f"this cache exported a {self.kind.__name__}; got {type(state).__name__}."
            )
        arrays = _named_arrays(state, state._fields)
        if (*arrays,) != self.names:
            raise ShapeError(
                f"a state to import has the arrays of the exported one, {', '.join(self.names)}; "
                f"got {', '.join(arrays)}."
            )
        for name, array in arrays.items():
            _check_alive(backend, name, array)
        owner = int(backend.to_host(state.owner))
        if owner != self.owner:
            raise StateError(
                f"a state goes back to the export that it comes from, number {self.owner} here; "
                f"got one of number {owner}: of another cache, or of an earlier export."
            )
        for name, form in self.forms.items():
            _check_form(name, *form, arrays[name])


def _named_arrays(state: AnyState, fields: Sequence[str]) -> dict[str, Array]:
    """Return the arrays in some fields of a state; those of a tuple are numbered."""
    named: dict[str, Array] = {}
    for field in fields:
        value = getattr(state, field)
        # Some frameworks return a list for a tuple.
        several = isinstance(value, tuple | list)
        named |= {f"{field}[{i}]": a for i, a in enumerate(value)} if several else {field: value}
    return named


def _check_alive(backend: Backend, name: str, array: Array) -> None:
    """Raise unless `array` is of `backend`, with values that can be read."""
    kind = backend_type(array)
    if kind.is_traced(array):
        refuse_traced(array)
    if kind.is_deleted(array):
        raise StateError(
            f"a program consumed this state: {name} is deleted. Import the state that the program "
            "returned; if it returned none, reset() gives the tokens up."
        )
    if not backend.owns(array):
        raise StateError(
            f"the arrays of a state stay on {backend.spec}; {name} is {type(array).__name__}."
        )


def _check_form(name: str, shape: tuple[int, ...], dtype: DType, array: Array) -> None:
    if tuple(array.shape) != shape:
        raise ShapeError(
            f"a state to import has the shape of the exported one; got {name} of "
            f"{tuple(array.shape)} for {shape}."
        )
    if array.dtype != dtype:
        raise DTypeError(
            f"a state to import has the dtype of the exported one; got {name} of {array.dtype} "
            f"for {dtype}."
        )


def check_room(offset: int, slots: int, capacity: int) -> None:
    """Raise unless the `slots` in use after `offset` tokens lie within the `capacity`."""
    if offset < 0:
        raise StateError(f"a program goes back to position 0 at most; got offset {offset}.")
    if slots > capacity:
        raise BoundsError(
            f"a program appends as many tokens as the exported state has room for; {offset} "
            f"came, {capacity} fit, the others were not written. Export more room, or import "
            "the state after functional.trim."
        )
