"""The rows of a batch of recurrent states: of unequal length, selected, split and joined."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Self, SupportsIndex

from kvcache._types import Int32s
from kvcache.backends import Array
from kvcache.backends.arrays import Arrays
from kvcache.errors import ShapeError
from kvcache.storage.states import StateForm

from .alike import check_alike
from .padding import as_padding, check_empty, check_padding, joined_padding
from .recurrent_copies import Coming, CopyableStates, States
from .rewind import Rewind
from .row_selection import SelectableRows


class BatchStates(SelectableRows, CopyableStates):
    """A cache of recurrent states of several rows, which are replaced and never written to."""

    @property
    def rows(self) -> int | None:
        """Rows of the batch; None before the first state, unless padding was declared."""
        form = self._form or self._coming.form
        if form is not None:
            return form.shapes[0][0]
        return None if self._padding is None else self._padding.size

    def pad(self, padding: Iterable[SupportsIndex]) -> None:
        self.check_not_exported()
        numbers = as_padding(padding)
        check_empty(self._offset)
        self._check_padded(numbers, self._form or self._coming.form)
        self._padding, self.rewound = numbers, Rewind(0, refilled=True)

    @staticmethod
    def _check_padded(padding: Int32s | None, form: StateForm | None) -> None:
        """Raise ShapeError unless states, if there are any, have as many rows as `padding`."""
        if form is not None:
            check_padding(padding, form.shapes[0][0])

    def _select(self, index: Int32s) -> None:
        padding = None if self._padding is None else as_padding(self._padding[index])
        form = self._form or self._coming.form
        if form is None:
            self._padding = padding
            return
        take = partial(_taken, form, lambda array: form.backend.gather(array, index, 0))
        state = take(self._state) if self._state else ()
        kept, coming = _each(self._kept, take), self._coming
        recorded = _each(coming.states, take)
        selected = form.with_batch(index.size)
        coming = Coming(coming.tokens, recorded, coming.form and selected)
        # One statement: no signal handler runs in between.
        (
            self._form,
            self._state,
            self._kept,
            self._coming,
            self._padding,
            self._shared,
            self.rewound,
        ) = (
            self._form and selected,
            state,
            kept,
            coming,
            padding,
            (),
            Rewind(0, refilled=True),
        )

    def _row(self, row: int) -> Self:
        clone = self.make(self._asked_backend, self.options)
        padding = 0 if self._padding is None else int(self._padding[row])
        form = self._form
        if form is not None and self._state and self._offset > padding:
            read = form.backend.read_slice
            take = partial(_taken, form, lambda array: read(array, row, row + 1, 0))
            states = {p - padding: take(s) for p, s in self._resumable().items() if p > padding}
            clone._fill(states, self._offset - padding, form.backend, None)
        return clone

    @classmethod
    def concat(cls, caches: Sequence[Self]) -> Self:
        caches = check_alike(cls, caches)
        first = caches[0]
        joined = cls.make(first._asked_backend, first.options)
        form = first._form
        if form is None or not first._offset:
            return joined
        for cache in caches:
            _check_form(form, cache._form)
        stop, padding = joined_padding(caches)
        states = {}
        for position in first._resumable_of_all(caches, stop):
            parts = [cache._held()[position - stop + cache._offset] for cache in caches]
            concat = form.backend.concat
            states[position] = tuple([concat(part, 0) for part in zip(*parts, strict=True)])
        joined._fill(states, stop, form.backend, as_padding(padding))
        return joined

    @staticmethod
    def _resumable_of_all(caches: Sequence[BatchStates], stop: int) -> list[int]:
        """Return the positions behind which all `caches` have a state, if they end at `stop`."""
        positions = [{p + stop - cache._offset for p in cache._resumable()} for cache in caches]
        return sorted(position for position in set.intersection(*positions) if position > 0)


def _taken(form: StateForm, take: Callable[[Array], Array], state: Arrays) -> Arrays:
    """Return some rows of a state, in arrays of their own."""
    rows = form.backend.owned(tuple(map(take, state)))
    form.backend.evaluate(*rows)
    return rows


def _each(states: States, take: Callable[[Arrays], Arrays]) -> States:
    return {position: take(state) for position, state in states.items()}


def _check_form(form: StateForm, other: StateForm | None) -> None:
    """Raise ShapeError unless states are alike but for their number of rows."""
    one, two = (
        None if f is None else (f.backend.spec, f.dtypes, [shape[1:] for shape in f.shapes])
        for f in (form, other)
    )
    if one != two:
        raise ShapeError(
            f"concat joins states of one backend, alike but for their rows; got {one} and {two}."
        )
