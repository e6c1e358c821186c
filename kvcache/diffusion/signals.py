"""Signals: how much has changed, as one number that a policy can judge.

Written over an array namespace, so that the same lines run on the host (NumPy scalars), eagerly on
any framework, and under a tracer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias, get_args

from kvcache.backends import Array
from kvcache.errors import DiffusionCacheError

Since: TypeAlias = Literal["previous", "computed"]
Measured: TypeAlias = Array | Callable[[], Array] | None
"""What a caller offers to be measured: an array, or a function that computes it if need be."""


@dataclass(frozen=True)
class Signal(ABC):
    """What a policy looks at. Has to be hashable: a frozen dataclass, as those below.

    since: what a value is compared with: that of the step before ("previous"), for policies that
        add up what they see, or of the last step that was computed ("computed").
    """

    since: Since = "previous"
    array: ClassVar[bool] = True
    """Whether it measures an array that the caller gives; else it measures the time of the step."""

    def __post_init__(self) -> None:
        if self.since not in get_args(Since):
            raise DiffusionCacheError(f"since is one of {get_args(Since)}; got {self.since!r}.")

    def pick(self, signal: Measured, time: Any) -> Any:
        """What of a step it compares: what the caller gave as `signal`, or the time.

        Raises: DiffusionCacheError if there is none.
        """
        if not self.array:
            return time
        value = signal() if callable(signal) else signal
        if value is None:
            raise DiffusionCacheError(
                f"{type(self).__name__} measures an array, for example the modulated input of the "
                "first block; got none. Pass signal=..."
            )
        return value

    @abstractmethod
    def change(self, xp: Any, value: Any, reference: Any) -> Any:
        """How far `value` is from `reference`: float32 scalar; NaN or infinite means compute."""


@dataclass(frozen=True)
class TimestepChange(Signal):
    """Difference of timesteps, or of noise levels: known without looking at an array."""

    array: ClassVar[bool] = False

    def change(self, xp: Any, value: Any, reference: Any) -> Any:
        return abs(value - reference)


@dataclass(frozen=True)
class RelativeChange(Signal):
    """Mean of absolute differences over mean of absolute values, as TeaCache and FBCache have it.

    Liu et al., "Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model" (2024).
    """

    def change(self, xp: Any, value: Array, reference: Array) -> Any:
        new, old = (xp.astype(array, xp.float32) for array in (value, reference))
        return xp.mean(abs(new - old)) / xp.mean(abs(old))
