"""Room for states: free slots, and what gives way where there are too few."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from kvcache.errors import CacheFullError

from .runs import Sequences
from .state_history import StateHistory
from .state_slots import StateSlots


def find_room(
    slots: StateSlots, known: StateHistory, least: int, wanted: int
) -> tuple[list[int], Sequences]:
    """Return up to `wanted` free slots, and the sequences of `known` without what gives way.

    Spills snapshots first. Then states of drafts give way, and kept states after them: each of the
    sequence idle longest first.

    Raises: CacheFullError if fewer than `least` can be had.
    """
    sequences, reserved = known.sequences, known.reserved()
    free = _free(slots, _held(sequences) | reserved)
    if len(free) >= wanted:  # as in nearly every decode step
        return free[:wanted], sequences
    _spill(slots, _held(sequences) | reserved, wanted)
    missing = wanted - len(_free(slots, _held(sequences) | reserved))
    if missing > 0:
        sequences = _with_fewer_kept(known, reserved, missing)
        _spill(slots, _held(sequences) | reserved, wanted)
    free = _free(slots, _held(sequences) | reserved)
    if len(free) < least:
        raise CacheFullError(
            f"there are not enough slots for states: {least} needed, {len(free)} of "
            f"{slots.count - 1} free. Remove sequences, or init the cache with a larger max_batch."
        )
    return free[:wanted], sequences


def _held(sequences: Sequences) -> set[int]:
    return {slot for held in sequences.values() for slot in held.values()}


def _free(slots: StateSlots, taken: AbstractSet[int]) -> list[int]:
    pinned = slots.pinned
    return [s for s in range(1, slots.count) if s not in taken and s not in pinned]


def _spill(slots: StateSlots, taken: AbstractSet[int], wanted: int) -> None:
    """Spill the oldest snapshots that alone hold slots, until so many are free or none is left."""
    while len(_free(slots, taken)) < wanted and slots.spill(slots.pinned - taken):
        pass


def _with_fewer_kept(
    known: StateHistory, reserved: AbstractSet[int], missing: int
) -> dict[int, dict[int, int]]:
    """Return the sequences without kept states in so many slots, as far as there are any."""
    sequences = known.sequences
    ends = {[*held.values()][-1] for held in sequences.values()}
    drafts: dict[int, None] = {}
    kept: dict[int, None] = {}
    for sequence, held in sequences.items():
        drafted = known.drafts(sequence, held)
        for position, slot in held.items():
            if slot not in ends and slot not in reserved:
                (drafts if position in drafted else kept)[slot] = None
    dropped = set([*(slot for slot in drafts if slot not in kept), *kept][:missing])
    return {
        sequence: {position: slot for position, slot in held.items() if slot not in dropped}
        for sequence, held in sequences.items()
    }
