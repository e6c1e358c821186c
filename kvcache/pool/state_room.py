"""Room for states: free slots, and what gives way where there are too few."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from kvcache.errors import CacheFullError

from .runs import Sequences
from .state_slots import StateSlots


def find_room(
    slots: StateSlots,
    sequences: Sequences,
    reserved: AbstractSet[int],
    least: int,
    wanted: int,
) -> tuple[list[int], Sequences]:
    """Return up to `wanted` free slots, and `sequences` without the kept states that give way.

    Spills snapshots first. Then kept states give way, of the sequence idle longest first.

    reserved: slots in use by a pass.

    Raises: CacheFullError if fewer than `least` can be had.
    """
    free = _free(slots, _held(sequences) | reserved)
    if len(free) >= wanted:  # as in nearly every decode step
        return free[:wanted], sequences
    _spill(slots, _held(sequences) | reserved, wanted)
    missing = wanted - len(_free(slots, _held(sequences) | reserved))
    if missing > 0:
        sequences = _with_fewer_kept(sequences, reserved, missing)
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
    sequences: Sequences, reserved: AbstractSet[int], missing: int
) -> dict[int, dict[int, int]]:
    """Return `sequences` without the kept states in so many slots, as far as there are any."""
    ends = {[*held.values()][-1] for held in sequences.values()}
    kept = dict.fromkeys(
        slot
        for held in sequences.values()
        for slot in held.values()
        if slot not in ends and slot not in reserved
    )
    dropped = set([*kept][:missing])
    return {
        sequence: {position: slot for position, slot in held.items() if slot not in dropped}
        for sequence, held in sequences.items()
    }
