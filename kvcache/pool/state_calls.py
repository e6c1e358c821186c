"""Calls of a recurrent layer to its cache, beside those of a layer with keys and values."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import NamedTuple, TypeAlias

from kvcache._checks import as_index, check_ids
from kvcache.backends import Array
from kvcache.errors import NotSupportedError

StatesAtCuts: TypeAlias = Mapping[tuple[int, int], Sequence[Array]]
"""States by sequence and position, each of arrays ``[1, ...]``."""


class Run(NamedTuple):
    """The tokens of one sequence in a pass, adjacent in its batch.

    start, stop: their batch indices, ``[start, stop)``.
    position: of the first of them. At 0 the sequence is fresh, and there is no state before it.
    cuts: positions inside of the run behind which a state is wanted, ascending.
    """

    sequence: int
    start: int
    stop: int
    position: int
    cuts: tuple[int, ...] = ()

    @property
    def end(self) -> int:
        """Position after the last token of the run."""
        return self.position + self.stop - self.start


class StateCalls:
    """The calls of a recurrent layer, which a cache without states refuses, and checkpoints."""

    @property
    @abstractmethod
    def max_sequences(self) -> int:
        """Number of sequences."""

    def checkpoint(self, sequence: int) -> None:
        """Mark where a draft begins, which the next pass over a sequence computes.

        ``remove`` goes back to any of its tokens then. Keys and values need nothing for it.
        Recurrent layers keep the states of the draft, ``run.cuts`` being all positions inside of
        it, as no resume points: no snapshot has them, they give way before those, and they are
        dropped when the sequence is changed, goes on behind the draft, or begins another one.

        Raises: ValueError for an id that is none of a sequence.
        """
        check_ids(self.max_sequences, as_index(sequence, "sequence"))

    @property
    def runs(self) -> tuple[Run, ...]:
        """Runs of the current pass, in the order of its batch.

        Raises: KVCacheError without a pass, NotSupportedError for a cache without states.
        """
        raise self._no_states()

    def get_states(self) -> tuple[Array, ...] | None:
        """Return the states that the runs of the pass begin with, ``[runs, ...]`` each.

        Zeros for a fresh sequence beside others; None if all are fresh. Copies, the caller's.

        Raises: KVCacheError without a pass, or for a layer that was never put;
            NotSupportedError for a cache without states.
        """
        raise self._no_states()

    def put_states(self, *arrays: Array, kept: StatesAtCuts | None = None) -> None:
        """Store the states behind the last token of each run of the pass.

        arrays: any number, ``[runs, ...]``, of any dtypes; the first put of a layer fixes number,
            shapes and dtypes. They are copied, and stay the caller's.
        kept: the states at cuts of the runs, all of them or some, by sequence and position; each a
            tuple of arrays.

        Raises: ShapeError, DTypeError, UnknownBackendError, TypeError for `kept` of another kind,
            StateError for a position that is no cut, KVCacheError without a pass, or for a layer
            put again once the pass is complete and a snapshot or another sequence has its states;
            NotSupportedError for a cache without states. Nothing is stored then.
        """
        raise self._no_states()

    def _no_states(self) -> NotSupportedError:
        return NotSupportedError(
            f"{type(self).__name__} holds keys and values; recurrent states are held by a "
            "RecurrentCache. Put it into a WrapperCache, and set_layer_type to it."
        )
