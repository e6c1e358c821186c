"""Policies: whether a denoising step is computed, or predicted from earlier ones.

A policy sees one number per step, never an array, and keeps a few numbers of its own. It is written
over an array namespace: on the host that is NumPy, under ``jax.jit`` it is ``jax.numpy``.

Every comparison reads "stay below the threshold to be skipped": a threshold of 0 never skips, and
neither does a change that is NaN.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import ClassVar, NamedTuple, TypeAlias

import numpy as np

from kvcache.backends.arrays import DType, Namespace
from kvcache.errors import DiffusionCacheError

from .scalars import Scalar
from .signals import RelativeChange, Signal, TimestepChange

Memory: TypeAlias = tuple[Scalar, ...]
"""The numbers that a policy keeps from step to step: float32 scalars."""


class StepFacts(NamedTuple):
    """The facts about a step, as a policy is told them."""

    step: Scalar
    """int32 scalar"""
    change: Scalar
    """Change measured by its signal, float32 scalar; 0 without a signal, NaN in the first step."""
    skips: Scalar
    """int32 scalar: steps skipped since the last computed one."""


class SkipPolicy(ABC):
    """Judges steps. Derive from it, or from a policy below, to try a policy of your own."""

    memory: ClassVar[tuple[float, ...]] = ()
    """Numbers it begins with, and again after every computed step."""
    max_consecutive_skips: ClassVar[int | None] = None
    """Steps in a row that may be skipped unless :class:`Limits` say otherwise; None: any."""

    @property
    def signal(self) -> Signal | None:
        """The measurement it needs; None if the number of the step is enough."""
        return None

    @abstractmethod
    def should_compute(
        self, xp: Namespace, facts: StepFacts, memory: Memory
    ) -> tuple[Scalar, Memory]:
        """Return whether to compute the step (bool scalar), and the memory to keep if not."""


@dataclass(frozen=True)
class Interval(SkipPolicy):
    """Computes every `every`-th step (DeepCache; Ma et al., 2023)."""

    every: int = 3

    def __post_init__(self) -> None:
        if self.every < 1:
            raise DiffusionCacheError(f"an interval must be >= 1 step; got {self.every}.")

    def should_compute(
        self, xp: Namespace, facts: StepFacts, memory: Memory
    ) -> tuple[Scalar, Memory]:
        return facts.skips >= self.every - 1, memory


@dataclass(frozen=True)
class StepMask(SkipPolicy):
    """Computes the steps named by a mask, and all beyond its end.

    mask: one bool per step, True = compute. Such masks are searched for offline (cache-dit's SCM).
    """

    mask: Sequence[bool]

    def __post_init__(self) -> None:
        if not len(self.mask):
            raise DiffusionCacheError("a step mask must have an entry per step; got none.")
        # A tuple is hashable and nobody else's: recipes are constants of compiled programs.
        object.__setattr__(self, "mask", tuple(map(bool, self.mask)))

    def should_compute(
        self, xp: Namespace, facts: StepFacts, memory: Memory
    ) -> tuple[Scalar, Memory]:
        # True beyond the end: a mask of another number of steps must not skip unnoticed.
        return _entry(xp, self.mask, facts.step, beyond=True, dtype=xp.bool), memory


@dataclass(frozen=True)
class Threshold(SkipPolicy):
    """Computes once the change since the last computed step reaches a threshold.

    With the residual of the first block as signal this is the First Block Cache of ParaAttention.
    """

    threshold: float = 0.1
    measure: Signal = field(default_factory=partial(RelativeChange, "computed"))
    max_consecutive_skips: ClassVar[int | None] = 4

    def __post_init__(self) -> None:
        check_threshold(self.threshold)

    @property
    def signal(self) -> Signal:
        return self.measure

    def should_compute(
        self, xp: Namespace, facts: StepFacts, memory: Memory
    ) -> tuple[Scalar, Memory]:
        # Not ">=", which is false for NaN.
        return ~(facts.change < self.threshold), memory


@dataclass(frozen=True)
class Accumulated(SkipPolicy):
    """Computes once the changes since the last computed step add up to a threshold.

    With the modulated input of the first block as signal, and a polynomial fitted to the model,
    this is TeaCache (Liu et al., 2024); with the timestep as signal it needs no array at all.

    rescale: coefficients of a polynomial, the highest power first, that turns the change of the
        signal into that of the output; :class:`Recorder` fits them. Negative results count as 0.
    """

    threshold: float = 0.1
    rescale: Sequence[float] = (1.0, 0.0)
    measure: Signal = field(default_factory=RelativeChange)
    memory: ClassVar[tuple[float, ...]] = (0.0,)
    max_consecutive_skips: ClassVar[int | None] = 4

    def __post_init__(self) -> None:
        check_threshold(self.threshold)
        if not len(self.rescale) or not np.isfinite(self.rescale).all():
            raise DiffusionCacheError(f"rescale must be finite coefficients; got {self.rescale}.")
        object.__setattr__(self, "rescale", tuple(map(float, self.rescale)))

    @property
    def signal(self) -> Signal:
        return self.measure

    def should_compute(
        self, xp: Namespace, facts: StepFacts, memory: Memory
    ) -> tuple[Scalar, Memory]:
        (drift,) = memory
        drift = drift + self._rescaled(xp, facts.change)
        return ~(drift < self.threshold), (drift,)

    def _rescaled(self, xp: Namespace, change: Scalar) -> Scalar:
        """Return the polynomial at `change`, by Horner's rule; at least 0, infinite for NaN."""
        first, *rest = self.rescale
        value = change * 0 + first  # NaN stays NaN, also in a constant polynomial
        for coefficient in rest:
            value = value * change + coefficient
        # A negative one would let later changes hide behind it; so would -inf, an overflow.
        return xp.where(xp.isfinite(value), xp.where(value < 0, change * 0, value), math.inf)


@dataclass(frozen=True)
class Magnitude(SkipPolicy):
    """Computes once the expected error of the held residual reaches a threshold (MagCache).

    Ma et al., "MagCache: Fast Video Generation with Magnitude-Aware Cache" (2025). No array is
    looked at: how much the residual shrinks from step to step is known from a calibration.

    ratios: mean magnitude of a step's residual over that of the step before it, one per step;
        :class:`Recorder` measures them. Steps beyond the last one are computed.
    """

    ratios: Sequence[float]
    threshold: float = 0.06
    memory: ClassVar[tuple[float, ...]] = (1.0, 0.0)
    max_consecutive_skips: ClassVar[int | None] = 3

    def __post_init__(self) -> None:
        check_threshold(self.threshold)
        if not len(self.ratios):
            raise DiffusionCacheError("magnitude ratios must have an entry per step; got none.")
        object.__setattr__(self, "ratios", tuple(map(float, self.ratios)))

    def should_compute(
        self, xp: Namespace, facts: StepFacts, memory: Memory
    ) -> tuple[Scalar, Memory]:
        ratio, error = memory
        # NaN beyond the end: the error is unknown there, so the step is computed.
        step_ratio = _entry(xp, self.ratios, facts.step, beyond=math.nan, dtype=xp.float32)
        ratio = ratio * step_ratio
        error = error + abs(1 - ratio)
        return ~(error < self.threshold), (ratio, error)


TIMESTEP = TimestepChange()
"""For ``Accumulated(measure=TIMESTEP)``."""


def check_threshold(threshold: float) -> None:
    """Raise DiffusionCacheError unless `threshold` is finite and not negative."""
    if not (math.isfinite(threshold) and threshold >= 0):
        raise DiffusionCacheError(
            f"a threshold must be finite and >= 0 (0 skips nothing); got {threshold}."
        )


def _entry(
    xp: Namespace, table: Sequence[float], step: Scalar, beyond: float, dtype: DType
) -> Scalar:
    """Return ``table[step]``, or `beyond` behind its end, where a tracer cannot raise."""
    extended = xp.asarray((*table, beyond), dtype=dtype)
    return extended[xp.where(step < len(table), step, len(table))]
