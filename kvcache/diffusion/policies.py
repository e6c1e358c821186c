"""Policies: whether a denoising step is computed, or predicted from those before it.

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
from typing import Any, ClassVar, NamedTuple, TypeAlias

import numpy as np

from kvcache.errors import DiffusionCacheError

from .signals import RelativeChange, Signal, TimestepChange

Memory: TypeAlias = tuple[Any, ...]
"""The numbers that a policy keeps from step to step: float32 scalars."""


class Facts(NamedTuple):
    """What a policy is told about a step."""

    step: Any
    """int32 scalar"""
    change: Any
    """What its signal measured, float32 scalar; 0 without a signal, NaN in the first step."""
    skips: Any
    """int32 scalar: steps skipped since the last computed one."""


class Policy(ABC):
    """Judges steps. Derive from it, or from one of those below, to try a policy of your own."""

    memory: ClassVar[tuple[float, ...]] = ()
    """What it begins with, and again after every computed step."""
    longest_run: ClassVar[int | None] = None
    """How many steps in a row may be skipped unless :class:`Limits` say otherwise; None: any."""

    @property
    def signal(self) -> Signal | None:
        """What it has to be told; None if the number of the step is enough."""
        return None

    @abstractmethod
    def judge(self, xp: Any, facts: Facts, memory: Memory) -> tuple[Any, Memory]:
        """Whether the step should be computed (bool scalar), and what to keep if it is not."""


@dataclass(frozen=True)
class Interval(Policy):
    """Computes every `every`-th step (DeepCache; Ma et al., 2023)."""

    every: int = 3

    def __post_init__(self) -> None:
        if self.every < 1:
            raise DiffusionCacheError(f"an interval must be >= 1 step; got {self.every}.")

    def judge(self, xp: Any, facts: Facts, memory: Memory) -> tuple[Any, Memory]:
        return facts.skips >= self.every - 1, memory


@dataclass(frozen=True)
class StepMask(Policy):
    """Computes the steps that a mask names; those beyond its end, too.

    mask: one bool per step, True = compute. Such masks are searched for offline (cache-dit's SCM).
    """

    mask: Sequence[bool]

    def __post_init__(self) -> None:
        if not len(self.mask):
            raise DiffusionCacheError("a step mask must have an entry per step; got none.")
        object.__setattr__(self, "mask", tuple(map(bool, self.mask)))

    def judge(self, xp: Any, facts: Facts, memory: Memory) -> tuple[Any, Memory]:
        return _entry(xp, self.mask, facts.step, beyond=True, dtype=xp.bool), memory


@dataclass(frozen=True)
class Threshold(Policy):
    """Computes once the change since the last computed step reaches a threshold.

    With the residual of the first block as signal this is the First Block Cache of ParaAttention.
    """

    threshold: float = 0.1
    measure: Signal = field(default_factory=partial(RelativeChange, "computed"))
    longest_run: ClassVar[int | None] = 4

    def __post_init__(self) -> None:
        check_threshold(self.threshold)

    @property
    def signal(self) -> Signal:
        return self.measure

    def judge(self, xp: Any, facts: Facts, memory: Memory) -> tuple[Any, Memory]:
        return ~(facts.change < self.threshold), memory


@dataclass(frozen=True)
class Accumulated(Policy):
    """Computes once the changes since the last computed step add up to a threshold.

    With the modulated input of the first block as signal, and a polynomial fitted to the model,
    this is TeaCache (Liu et al., 2024); with the timestep as signal it needs no array at all.

    rescale: coefficients of a polynomial, the highest power first, that turns the change of the
        signal into that of the output; :class:`Recorder` fits them. What it makes negative is 0.
    """

    threshold: float = 0.1
    rescale: Sequence[float] = (1.0, 0.0)
    measure: Signal = field(default_factory=RelativeChange)
    memory: ClassVar[tuple[float, ...]] = (0.0,)
    longest_run: ClassVar[int | None] = 4

    def __post_init__(self) -> None:
        check_threshold(self.threshold)
        if not len(self.rescale) or not np.isfinite(self.rescale).all():
            raise DiffusionCacheError(f"rescale must be finite coefficients; got {self.rescale}.")
        object.__setattr__(self, "rescale", tuple(map(float, self.rescale)))

    @property
    def signal(self) -> Signal:
        return self.measure

    def judge(self, xp: Any, facts: Facts, memory: Memory) -> tuple[Any, Memory]:
        (drift,) = memory
        drift = drift + self._rescaled(xp, facts.change)
        return ~(drift < self.threshold), (drift,)

    def _rescaled(self, xp: Any, change: Any) -> Any:
        first, *rest = self.rescale
        value = change * 0 + first
        for coefficient in rest:
            value = value * change + coefficient
        # A negative one would let later changes hide behind it; so would -inf, an overflow.
        return xp.where(xp.isfinite(value), xp.where(value < 0, change * 0, value), math.inf)


@dataclass(frozen=True)
class Magnitude(Policy):
    """Computes once the expected error of the held residual reaches a threshold (MagCache).

    Ma et al., "MagCache: Fast Video Generation with Magnitude-Aware Cache" (2025). No array is
    looked at: how much the residual shrinks from step to step is known from a calibration.

    ratios: mean magnitude of a step's residual over that of the step before it, one per step;
        :class:`Recorder` measures them. Steps beyond the last one are computed.
    """

    ratios: Sequence[float]
    threshold: float = 0.06
    memory: ClassVar[tuple[float, ...]] = (1.0, 0.0)
    longest_run: ClassVar[int | None] = 3

    def __post_init__(self) -> None:
        check_threshold(self.threshold)
        if not len(self.ratios):
            raise DiffusionCacheError("magnitude ratios must have an entry per step; got none.")
        object.__setattr__(self, "ratios", tuple(map(float, self.ratios)))

    def judge(self, xp: Any, facts: Facts, memory: Memory) -> tuple[Any, Memory]:
        ratio, error = memory
        step_ratio = _entry(xp, self.ratios, facts.step, beyond=math.nan, dtype=xp.float32)
        ratio = ratio * step_ratio
        error = error + abs(1 - ratio)
        return ~(error < self.threshold), (ratio, error)


TIMESTEP = TimestepChange()
"""For ``Accumulated(measure=TIMESTEP)``."""


def check_threshold(threshold: float) -> None:
    """Raises DiffusionCacheError if it is none."""
    if not (math.isfinite(threshold) and threshold >= 0):
        raise DiffusionCacheError(
            f"a threshold must be finite and >= 0 (0 skips nothing); got {threshold}."
        )


def _entry(xp: Any, table: Sequence[Any], step: Any, beyond: Any, dtype: Any) -> Any:
    """``table[step]``, or `beyond` behind its end, where a tracer cannot raise."""
    whole = xp.asarray((*table, beyond), dtype=dtype)
    return whole[xp.where(step < len(table), step, len(table))]
