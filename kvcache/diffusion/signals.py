"""Signals: how much has changed between two steps, as one number for a policy to judge.

Written over an array namespace, so that the same lines run on the host (NumPy scalars), eagerly on
any framework, and under a tracer.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias, get_args

from kvcache.backends import Array
from kvcache.backends.arrays import Namespace
from kvcache.errors import DiffusionCacheError

from .scalars import Scalar

Since: TypeAlias = Literal["previous", "computed"]
SignalInput: TypeAlias = Array | Callable[[], Array] | None
"""The array that a caller offers to be measured, or a function to compute it if need be."""


@dataclass(frozen=True)
class Signal(ABC):
    """Measures how much has changed. Has to be hashable: a frozen dataclass.

    since: what a value is compared with: that of the step before ("previous"), for policies that
        add up what they see, or of the last step that was computed ("computed").
    """

    since: Since = "previous"
    array: ClassVar[bool] = True
    """Whether it measures an array given by the caller; if not, the time of the step."""

    def __post_init__(self) -> None:
        if self.since not in get_args(Since):
            raise DiffusionCacheError(f"since is one of {get_args(Since)}; got {self.since!r}.")

    def pick(self, signal: SignalInput, time: Scalar) -> Array:
        """Return the value of a step to compare: `signal`, computed now if need be, or `time`.

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
    def change(self, xp: Namespace, value: Array, reference: Array) -> Scalar:
        """Return how far `value` is from `reference`: float32 scalar.

        NaN or infinite means to compute the step.
        """


@dataclass(frozen=True)
class TimestepChange(Signal):
    """Difference of timesteps, or of noise levels: known without looking at an array."""

    array: ClassVar[bool] = False

    def change(self, xp: Namespace, value: Array, reference: Array) -> Scalar:
        return abs(value - reference)


@dataclass(frozen=True)
class RelativeChange(Signal):
    """Mean of absolute differences over mean of absolute values, as TeaCache and FBCache have it.

    Liu et al., "Timestep Embedding Tells: It's Time to Cache for Video Diffusion Model" (2024).
    """

    def change(self, xp: Namespace, value: Array, reference: Array) -> Scalar:
        # Half precision overflows in the sums, and in differences of numbers of either sign.
        new, old = (xp.astype(array, xp.float32) for array in (value, reference))
        return xp.mean(abs(new - old)) / xp.mean(abs(old))
