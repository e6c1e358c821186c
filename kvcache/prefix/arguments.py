"""Arguments of prefix caches, checked where they come in."""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterable
from typing import SupportsIndex, TypeAlias, cast

from kvcache._checks import as_indices
from kvcache.layers.base import LayerCache
from kvcache.layers.stack import LayerCaches
from kvcache.stores.outcomes import Deadline
from kvcache.stores.sealing import Seal


class Clock:
    """Seconds of a user's clock, which policies can rely on: finite, and never going backwards.

    Where the clock is set back, time stands still until it has caught up.

    Raises: TypeError for no function; when it is read, TypeError or ValueError for anything but a
        finite number.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        if not callable(clock):
            raise TypeError(
                "a clock is a function without arguments that returns seconds, as time.monotonic; "
                f"got {reprlib.repr(clock)}."
            )
        self._clock = clock
        self._latest = -math.inf

    def __call__(self) -> float:
        """Return the time in seconds."""
        self._latest = max(self._latest, as_finite(self._clock(), "a clock returns seconds"))
        return self._latest


def as_finite(value: float, rule: str) -> float:
    """Return a finite number as a float. rule: beginning of the error.

    Raises: TypeError for no number, ValueError for NaN, infinity or one too large for a float.
    """
    try:
        finite = math.isfinite(value)
    except OverflowError:
        finite = False
    except Exception as error:  # an array of a framework raises what it likes
        raise TypeError(f"{rule}, a finite number; got {reprlib.repr(value)}.") from error
    if not finite:
        raise ValueError(f"{rule}, a finite number; got {reprlib.repr(value)}.")
    return float(value)


def check_text(value: str, rule: str) -> None:
    """Raise TypeError unless `value` is a string. rule: beginning of the error."""
    if not isinstance(value, str):
        raise TypeError(f"{rule}, a str; got {reprlib.repr(value)}.")


def check_deadline(deadline: Deadline | None) -> None:
    """Raise TypeError for anything but a deadline of a store, or None."""
    if not isinstance(deadline, Deadline | None):
        raise TypeError(
            "a session waits until a kvcache.stores.Deadline; got "
            f"{reprlib.repr(deadline)}. Give Deadline.after(seconds)."
        )


SealOf: TypeAlias = Callable[[str], Seal | None]
"""Seal for the pages of a salt; None for none."""


def as_seals(seal: Seal | SealOf | None) -> SealOf:
    """Return the seal of each salt. Raises: TypeError, also later if a function returns no seal."""
    if seal is not None and not isinstance(seal, Seal) and not callable(seal):
        raise TypeError(
            "pages are sealed with a kvcache.stores.Seal, or with the one that a function returns "
            f"for a salt; got {reprlib.repr(seal)}."
        )

    def seal_of(salt: str) -> Seal | None:
        own = seal(salt) if callable(seal) else seal
        if not isinstance(own, Seal | None):
            raise TypeError(
                f"the seal of a salt is a kvcache.stores.Seal or None; got {reprlib.repr(own)}."
            )
        return own

    return seal_of


def as_positions(values: Iterable[SupportsIndex], name: str) -> list[int]:
    """Return positions as ints. Raises: TypeError for no integers, ValueError for negative ones."""
    positions = as_indices(values, name)
    if positions and min(positions) < 0:
        raise ValueError(f"{name} are positions >= 0; got {min(positions)}.")
    return positions


def as_layers(caches: object, rule: str) -> list[LayerCache]:
    """Return per-layer caches as a list. rule: beginning of the error. Raises: TypeError."""
    layers = as_list(caches)
    if not all(isinstance(cache, LayerCache) for cache in layers):
        raise TypeError(f"{rule}, one cache for each layer; got {reprlib.repr(caches)}.")
    if isinstance(caches, LayerCache):
        raise TypeError(f"{rule}, one cache for each layer; got {caches}. Put it in a list.")
    return cast("list[LayerCache]", layers)


def check_layers(caches: LayerCaches[LayerCache], own: LayerCaches[LayerCache]) -> None:
    """Raise TypeError, ValueError unless `caches` can be one request in place of its `own`."""
    if not isinstance(caches, LayerCaches):
        raise TypeError(f"a session adopts LayerCaches; got {reprlib.repr(caches)}.")
    got, wanted = ([(type(c).__name__, dict(c.options)) for c in stack] for stack in (caches, own))
    if got != wanted:
        raise ValueError(f"a session adopts caches like its own, {wanted}; got {got}.")
    if any(cache.rows not in (None, 1) or cache.padding is not None for cache in caches):
        raise ValueError(
            f"a session adopts caches of one row without padding; got {caches}. split() them."
        )


def as_list(values: object) -> list[object]:
    """Return the elements of `values`, or `values` as the only one if they have none."""
    try:
        return list(cast("Iterable[object]", values))
    except TypeError:
        return [values]
