"""The cache of one recurrent layer: the state behind the tokens seen, and earlier ones kept."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable
from typing import ClassVar, SupportsIndex

import numpy as np

from kvcache._checks import NO_LIMIT, as_index, as_indices, as_room
from kvcache._interrupts import uninterrupted
from kvcache.backends import Array
from kvcache.backends.arrays import Arrays
from kvcache.errors import KVCacheError, StateError, TrimError
from kvcache.storage.states import StateForm, admitted, apart

from .checkpoint import checked_accepted
from .exports import Export, new_owner
from .held import pinned_states
from .recurrent_batch import BatchStates
from .recurrent_copies import NO_UPDATE, Coming, States
from .rewind import Rewind
from .state import RecurrentState


class StateCache(BatchStates):
    """The state of one recurrent layer: linear attention, a state space model, a convolution.

    ::

        cache = kvcache.StateCache()
        conv, matrix = cache.state or zeros
        for position in cache.cuts(L):           # in most updates there are none
            ...                                  # the layer, up to this position
            cache.record(position, conv, matrix)
        ...                                      # the layer, up to the end
        cache.advance(L, conv, matrix)

    A state is one array or more, of any shapes and dtypes, batch first. It stands behind one
    position and cannot be cut back, so the cache goes back, and snapshots resume, only where a
    state was kept: at resume points named by :meth:`schedule`, and wherever one was recorded since
    a :meth:`checkpoint`.

    Arrays that come in stay the caller's where frameworks write in place (NumPy, torch): they are
    copied. Elsewhere nothing is copied; on JAX, do not donate them to a program afterwards. Arrays
    that the cache has are never written to, only replaced.

    backend: name or :class:`~kvcache.Backend`; None takes that of the first array.
    """

    kind: ClassVar[str] = "state"

    # Writing.

    def advance(self, tokens: SupportsIndex, *arrays: Array) -> None:
        """Note that `tokens` tokens went by: `arrays` are the state behind them.

        arrays: any number, batch first; the first state fixes how many, their shapes and dtypes.
            Gradients do not flow through a state (torch).

        Raises: ValueError for less than one token; ShapeError, DTypeError, UnknownBackendError,
            TracedArrayError inside of a transform (use :mod:`kvcache.functional` there),
            ExportedError; the cache is unchanged then.
        """
        tokens = self._checked_tokens(tokens)
        form = self._admitted(arrays)
        backend = form.backend
        state = backend.owned(arrays)
        # It is not returned, so nobody else has it computed before the next update.
        backend.evaluate(*state)
        kept, stop, shared = self._kept, self._offset + tokens, self._shared
        if shared:  # arrays of the state before may go on unchanged
            known = {*map(id, shared)}
            shared = tuple([array for array in state if id(array) in known])
        if self._points or self._checkpoint is not None:
            kept = self._kept_after(tokens)
        # One statement: no signal handler runs in between.
        (
            self._form,
            self._state,
            self._offset,
            self._kept,
            self._coming,
            self._shared,
        ) = form, state, stop, kept, NO_UPDATE, shared

    def cuts(self, tokens: SupportsIndex) -> list[int]:
        """Return the positions inside the coming update behind which a state is wanted.

        Ascending, counted as :attr:`offset` is, its first and last position excluded. Resume
        points, and while a checkpoint is open every position. A layer that computes its update in
        pieces which end there can :meth:`record` the state of each. It need not: a cache then goes
        on, and just cannot go back there. A model that gives no state inside of an update makes
        each piece an update of its own.

        Announces an update of so many tokens, and drops what was recorded for another one that was
        given up: a layer that announces some of its updates announces all.

        Raises: ValueError for less than one token, ExportedError.
        """
        tokens = self._checked_tokens(tokens)
        wanted = self._wanted_inside(tokens)
        self._coming = Coming(tokens, {}, None)
        return wanted

    def record(self, position: SupportsIndex, *arrays: Array) -> None:
        """Keep `arrays` as the state behind `position`, one of the cuts of the coming update.

        It counts from the :meth:`advance` by the tokens announced on; ownership is the same.

        Raises: StateError for a position that is no cut; otherwise as :meth:`advance`.
        """
        self.check_not_exported()
        position, coming = as_index(position, "position"), self._coming
        if position not in self._wanted_inside(coming.tokens):
            wanted = reprlib.repr(self._wanted_inside(coming.tokens))
            raise StateError(
                f"record takes the state behind one of the cuts of the coming update, {wanted}; "
                f"got position {position}. Call cuts(tokens) first, and schedule() other positions."
            )
        form = self._admitted(arrays)
        state = form.backend.owned(arrays)
        form.backend.evaluate(*state)
        self._coming = Coming(coming.tokens, {**coming.states, position: state}, form)

    def _admitted(self, arrays: Arrays) -> StateForm:
        """Return the form of a state to come. Raises: as :meth:`advance`."""
        fixed = self._form or self._coming.form
        form = admitted(arrays, fixed, self._asked)
        if fixed is None:
            self._check_padded(self._padding, form)
        return form

    def _checked_tokens(self, tokens: SupportsIndex) -> int:
        """Return the size of an update as an int. Raises: ValueError, ExportedError."""
        self.check_not_exported()
        count = as_index(tokens, "tokens")
        if not 1 <= count <= NO_LIMIT - self._offset:
            raise ValueError(
                f"an update has 1 to {NO_LIMIT - self._offset} tokens, positions being int32; "
                f"got {count}."
            )
        return count

    def _wanted_inside(self, tokens: int) -> list[int]:
        inside = range(self._offset + 1, self._offset + tokens)
        if self._checkpoint is not None:
            return list(inside)
        return sorted(position for position in self._points if position in inside)

    def _kept_after(self, tokens: int) -> States:
        """Return the states to keep once `tokens` tokens went by."""
        kept, coming = dict(self._kept), self._coming
        if self._state and (self._checkpoint is not None or self._offset in self._points):
            kept[self._offset] = self._state
        if coming.tokens == tokens:  # otherwise the update announced was given up
            kept |= sorted(coming.states.items())
        return kept

    # Going back.

    def _holds(self, position: int) -> bool:
        """Return whether the cache can go back to a position; 0 needs no state."""
        return position in (0, self._offset) or position in self._kept

    def _back_to(self, position: int) -> None:
        """Be as after the first `position` tokens, where a state is held; end a checkpoint."""
        state, shared = self._state, self._shared
        if position < self._offset:
            state = shared = self._kept.get(position, ())  # a copy may have it, too
        rewound = Rewind.after(self.rewound, position, self._offset)
        kept = self._to_keep(position)
        # One statement: no signal handler runs in between.
        (
            self._offset,
            self._state,
            self._shared,
            self._kept,
            self._checkpoint,
            self._coming,
            self.rewound,
        ) = position, state, shared, kept, None, NO_UPDATE, rewound

    def can_trim(self, tokens: SupportsIndex) -> bool:
        tokens = as_index(tokens, "tokens")
        seen = self._export is None and 0 <= tokens <= self._offset
        return seen and self._holds(self._offset - tokens)

    def last_trimmable(self, limit: int) -> int:
        if self._export is not None:
            return 0
        return max((position for position in self.kept if position <= limit), default=0)

    def check_trim(self, tokens: SupportsIndex) -> None:
        self.check_not_exported()
        tokens = as_index(tokens, "tokens")
        if not 0 <= tokens <= self._offset:
            raise TrimError(
                f"trim takes back 0 to {self._offset} tokens, those seen; got {tokens}."
            )
        if not self.can_trim(tokens):
            raise TrimError(
                f"a recurrent layer goes back only to positions with a state, "
                f"{reprlib.repr([0, *self.kept])}; got {tokens} tokens, position "
                f"{self._offset - tokens}. "
                "schedule() it before its tokens come, or use checkpoint() and rollback()."
            )

    def trim(self, tokens: SupportsIndex) -> None:
        self.check_trim(tokens)
        self._back_to(self._offset - as_index(tokens, "tokens"))

    def checkpoint(self) -> None:
        self.check_not_exported()
        kept = self._to_keep(self._offset)
        self._checkpoint, self._kept = self._offset, kept

    def check_rollback(self, accepted: SupportsIndex) -> None:
        self._checked_rollback(accepted)

    def _checked_rollback(self, accepted: SupportsIndex) -> int:
        """Return the position to roll back to. Raise TrimError if that cannot be done."""
        self.check_not_exported()
        mark, count = checked_accepted(self._checkpoint, self._offset, accepted)
        if not self._holds(mark + count):
            possible = sorted(position - mark for position in {0, *self.kept} if position >= mark)
            raise TrimError(
                f"the state behind position {mark + count} was not recorded; accepted can be "
                f"{reprlib.repr(possible)}, got {count}. Record states at cuts(tokens), or accept "
                "fewer tokens and compute the others again."
            )
        return mark + count

    def rollback(self, accepted: SupportsIndex = 0) -> None:
        self._back_to(self._checked_rollback(accepted))

    def reserve(self, tokens: SupportsIndex) -> None:
        """Check `tokens` and do nothing: a state needs no room."""
        self.check_not_exported()
        as_room(tokens, "tokens")

    def reset(self) -> None:
        def forget() -> None:
            self._pins.spill()  # so that nothing of the cache is left
            self._start()

        self._atomic(forget)

    # Programs.

    def export_state(self, tokens: SupportsIndex = 0) -> RecurrentState:
        """Return the state for :func:`kvcache.functional.advance`, without a copy.

        It is the program's until :meth:`import_state`. Until then, calls that read or change
        states raise ExportedError, except :meth:`reset`, which gives the tokens up. An array that a
        resume point, a copy or a snapshot also has, or that occurs in the state twice, is copied,
        because a program may consume it.

        tokens: accepted as by other caches; a state needs no room.

        Raises: KVCacheError for a cache without a state; ExportedError for a second export.
        """
        self.check_not_exported()
        as_room(tokens, "tokens")
        if self._form is None or not self._state:
            raise KVCacheError("a program goes on from a state; got none. Prefill, then export.")
        backend, point = self._form.backend, self._offset in self._points
        undo = self.savepoint()
        try:
            kept = {**self._kept, self._offset: self._state} if point else self._kept
            pinned = [state for state, _ in pinned_states(self._pins)]
            arrays = apart(backend, self._state, [self._shared, *kept.values(), *pinned])
            owner = new_owner()
            numbers = [backend.from_host(np.asarray(n), "int32") for n in (self._offset, owner)]
            return self._given_away(RecurrentState(arrays, *numbers), owner, kept)
        except BaseException:
            undo()
            raise

    def _given_away(self, state: RecurrentState, owner: int, kept: States) -> RecurrentState:
        self._export = Export.of(owner, state, ["arrays"])
        # No reference is kept: frameworks copy an array that they cannot have for themselves.
        self._state, self._kept, self._coming = (), kept, NO_UPDATE
        return state

    def import_state(self, state: RecurrentState) -> None:
        """Take over `state`, derived by programs from that of the latest :meth:`export_state`.

        Consumes the arrays of `state`. Reads its offset, and so waits for the programs. If a
        program raised, import the last state whose arrays live. Resume points inside the tokens of
        a program have no state. Ends an open checkpoint.

        Raises: StateError for a state of another cache or export, one that was donated, or one
            from before the export; ShapeError, DTypeError; TracedArrayError. Nothing has changed
            then: another state can be imported.
        """
        export, form = self._export, self._form
        if export is None or form is None:
            raise StateError("a state goes back to the cache that exported it; this exported none.")
        export.check(form.backend, state)
        offset = int(form.backend.to_host(state.offset))
        if not self._offset <= offset <= NO_LIMIT:
            raise StateError(
                f"a recurrent state does not go back in a program: exported at {self._offset}, got "
                f"offset {offset}. Change it by functional.advance only."
            )
        arrays = tuple(map(form.backend.detached, state.arrays))
        kept = self._to_keep(offset)
        with uninterrupted():
            self._offset, self._state, self._shared, self._kept = offset, arrays, (), kept
            self._checkpoint, self._export = None, None

    # Resume points.

    def schedule(self, positions: Iterable[SupportsIndex]) -> None:
        self.check_not_exported()
        # States behind earlier positions are gone, or kept already.
        points = [p for p in as_indices(positions, "positions") if p >= max(1, self._offset)]
        self._points = self._points.union(points)
