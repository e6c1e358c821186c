"""Recipes: a policy, a predictor and limits, and the decision they make together.

:meth:`Recipe.decide` is a pure function of scalars, the same one on the host and under a tracer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from kvcache.backends.arrays import Namespace
from kvcache.errors import DiffusionCacheError, StepOrderError

from .policies import Memory, SkipPolicy, StepFacts
from .predictors import HoldResidual, Predictor
from .scalars import Scalar, host_scalar


@dataclass(frozen=True)
class Limits:
    """Bounds on skipping, whatever a policy says.

    warmup: so many first steps are computed. tail: and so many last ones; needs `steps`.
    max_consecutive_skips: at most so many steps in a row are skipped; None leaves it to the
        policy, which for those that measure is 3 or 4, and no limit for those that follow a
        schedule.
    max_skips: at most so many steps of a run are skipped in all; None: any number.
    steps: how many a run has.
    """

    warmup: int = 0
    tail: int = 0
    max_consecutive_skips: int | None = None
    max_skips: int | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        for name in ("warmup", "tail", "max_consecutive_skips", "max_skips"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise DiffusionCacheError(f"{name} must be >= 0 steps; got {value}.")
        if self.steps is not None and self.steps < 1:
            raise DiffusionCacheError(f"steps must be >= 1; got {self.steps}.")
        if self.tail and self.steps is None:
            raise DiffusionCacheError(
                f"a tail of {self.tail} steps ends where the run does: give steps, too."
            )


class RunState(NamedTuple):
    """State behind the decisions of a run: NumPy scalars on the host, arrays in a program."""

    step: Scalar
    """int32: the last step seen, -1 before the first."""
    computed: Scalar
    """int32: steps computed in this run."""
    skipped: Scalar
    """int32: steps skipped in this run."""
    skips: Scalar
    """int32: steps skipped since the last computed one."""
    memory: Memory
    """Numbers that the policy keeps."""


@dataclass(frozen=True)
class Recipe:
    """A way to cache across denoising steps: when to compute, and how to predict.

    With :class:`DiffusionCache` it runs eagerly on any framework, with :class:`TracedCache` inside
    a compiled program.
    """

    policy: SkipPolicy
    predictor: Predictor = field(default_factory=HoldResidual)
    limits: Limits = Limits()

    def start(self) -> RunState:
        """Return the state of a run before its first step, in NumPy scalars."""
        zero = host_scalar(np.int32(0))
        memory = tuple(host_scalar(np.float32(number)) for number in self.policy.memory)
        return RunState(host_scalar(np.int32(-1)), zero, zero, zero, memory)

    def decide(
        self, xp: Namespace, run: RunState, step: Scalar, change: Scalar
    ) -> tuple[Scalar, RunState]:
        """Return whether to compute `step` (bool scalar), and the state of the run after it.

        run: before the step; :meth:`start` where the steps go backwards.
        change: float32 scalar that the signal of the policy measured, or 0.
        """
        facts = StepFacts(step, change, run.skips)
        wanted, memory = self.policy.should_compute(xp, facts, run.memory)
        # NaN is no measurement: whatever the policy makes of it, the step is computed.
        computes = wanted | self._must_compute(run, step) | ~xp.isfinite(change)
        one = run.computed * 0 + 1  # of the dtype of the counters, on their device
        # A computed step begins the policy's memory anew, whoever demanded it.
        initial_and_next = zip(self.policy.memory, memory, strict=True)
        return computes, RunState(
            step,
            run.computed + xp.where(computes, one, 0),
            run.skipped + xp.where(computes, 0, one),
            xp.where(computes, 0, run.skips + one),
            tuple(xp.where(computes, initial, value) for initial, value in initial_and_next),
        )

    def _must_compute(self, run: RunState, step: Scalar) -> Scalar:
        """Whether the limits demand to compute `step`: bool scalar."""
        limits = self.limits
        consecutive = limits.max_consecutive_skips
        if consecutive is None:
            consecutive = self.policy.max_consecutive_skips
        # A run that has computed nothing has nothing to predict from.
        must = (run.computed < 1) | (step < limits.warmup)
        if limits.steps is not None:
            must = must | (step >= limits.steps - limits.tail)
        if consecutive is not None:
            must = must | (run.skips >= consecutive)
        if limits.max_skips is not None:
            must = must | (run.skipped >= limits.max_skips)
        return must


def check_step(step: int, last: int, owner: str) -> None:
    """Raise DiffusionCacheError for a negative step, StepOrderError for the `last` one again.

    owner: names the stream or cache in the error.
    """
    if step < 0:
        raise DiffusionCacheError(f"steps count from 0; got {step}.")
    if step == last:
        raise StepOrderError(
            f"a step is passed once; {owner} has passed step {step}. Number the calls of the "
            "network, also where a sampler calls it twice at one time, or begin another run."
        )
