"""Per-layer caches whose buffers can be given to compiled programs, and taken back."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from kvcache._checks import as_room
from kvcache._interrupts import uninterrupted
from kvcache.backends import Array
from kvcache.errors import KVCacheError, StateError

from .batch import BatchCache
from .buffers import NAMES, Arrays, GrowingBuffers
from .exports import Export, State, check_room, new_owner
from .rewind import Rewind


class ExportableCache(BatchCache):
    """A cache that is locked while a program has its state."""

    _export: Export | None
    """The export under way, None while the cache has its state itself."""

    def check_not_exported(self) -> None:
        self._admission.check_not_exported()

    def export_state(self, tokens: int) -> State:
        """Return the buffers with room for `tokens` more, for :func:`kvcache.functional.append`.

        They are the program's until :meth:`import_state`. Until then, calls that read or change
        tokens raise ExportedError, except :meth:`reset`, which gives the tokens up. Counters,
        sizes and options can be read; they are those of the export. Rows that snapshots have in
        the buffers are copied to the host first, because a program may overwrite any slot.

        Raises: KVCacheError for a cache that never held a token: it has no shape yet;
            ExportedError for a second export; ValueError for less room than none.
        """
        self.check_not_exported()
        tokens = as_room(tokens, "tokens")
        if self._admission.geometry is None:
            raise KVCacheError("a cache has the shape of its first update. Prefill, then export.")
        undo = self.savepoint()
        try:
            return self._exported(tokens)
        except BaseException:
            undo()
            raise

    def _exported(self, tokens: int) -> State:
        """Lock the cache; return its buffers as a state. If it raises, they are as before."""
        buffers = self._with_room(self._offset + tokens)
        self._before_export()
        buffers.clean(self._offset)
        owner = new_owner()
        make_state = self._state_maker(buffers.capacity, owner, buffers.likes())
        arrays: Arrays = ()
        try:
            buffers.arrays = arrays = buffers.to_traced()
            return self._given_away(buffers, make_state(*arrays), owner)
        except BaseException:
            if arrays:
                buffers.arrays = buffers.from_traced(arrays)
            raise

    def _given_away(self, buffers: GrowingBuffers, state: State, owner: int) -> State:
        self._export = Export.of(owner, state, NAMES)
        self._admission.suspend()
        # No reference is kept: frameworks copy a buffer that they cannot have for themselves.
        buffers.arrays = ()
        return state

    def import_state(self, state: State) -> None:
        """Take over `state`, derived by programs from that of the latest :meth:`export_state`.

        Consumes the arrays of `state`. Reads its offset, and so waits for the programs. A program
        may go back, even below the offset of the export; a ring may not. If a program raised,
        import the last state whose arrays live: the exported one, unless it was donated, brings
        back a growing cache as it was. Ends an open checkpoint.

        Raises: StateError for a state of another cache or export, one that was donated, or a ring
            that went back; BoundsError if more tokens were appended than it had room for;
            ShapeError, DTypeError; TracedArrayError. Nothing has changed then: another state can
            be imported.
        """
        export, buffers = self._export, self._buffers
        if export is None or buffers is None:
            raise StateError("a state goes back to the cache that exported it; this exported none.")
        export.check(buffers.backend, state)
        offset = int(buffers.backend.to_host(state.offset))
        self._take_over(buffers, state, offset)

    def _take_over(self, buffers: GrowingBuffers, state: State, offset: int) -> None:
        """Do :meth:`import_state` of a state that comes from the export."""
        check_room(offset, offset, buffers.capacity)
        buffers.take_back(self._check_written(buffers, state, offset))
        # A program that goes back and appends as many tokens again cannot be told from one that
        # does neither.
        rewind = Rewind.after(self.rewound, offset, self._offset)
        with uninterrupted():  # the arrays of the state are consumed
            buffers.arrays = buffers.from_traced((state.keys, state.values))
            self._offset, self._checkpoint, self._export = offset, None, None
            self._admission.exported, self.rewound = False, rewind

    def _before_export(self) -> None:
        """Copy rows in slots that programs may overwrite to the host."""
        if self._pins is not None:
            self._pins.spill()

    @abstractmethod
    def _state_maker(
        self, capacity: int, owner: int, likes: tuple[Array, Array]
    ) -> Callable[[Array, Array], State]:
        """Return a constructor of states from keys and values; all other arrays are made here."""

    @abstractmethod
    def _check_written(self, buffers: GrowingBuffers, state: State, offset: int) -> int:
        """Return how many first slots programs may have written to.

        Raises: StateError unless `state` has all tokens before `offset`.
        """

    def _on_device(self, *numbers: npt.ArrayLike) -> list[Array]:
        """Return int32 arrays on the backend."""
        backend, _ = self._admission.bound()
        return [backend.from_host(np.asarray(number), "int32") for number in numbers]
