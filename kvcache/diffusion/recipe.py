"""Recipes: a policy, a predictor and limits; and the decision that they make together.

:meth:`Recipe.decide` is a pure function of scalars, the same one on the host and under a tracer.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from kvcache.errors import DiffusionCacheError, StepOrderError

from .policies import Facts, Memory, Policy
from .predictors import HoldResidual, Predictor


@dataclass(frozen=True)
class Limits:
    """What holds whatever a policy says.

    warmup: so many first steps are computed. tail: and so many last ones; needs `steps`.
    longest_run: at most so many steps in a row are skipped; None leaves it to the policy, which
        for those that measure is 3 or 4, and no limit for those that follow a schedule.
    budget: at most so many steps of a run are skipped in all; None: any number.
    steps: how many a run has.
    """

    warmup: int = 0
    tail: int = 0
    longest_run: int | None = None
    budget: int | None = None
    steps: int | None = None

    def __post_init__(self) -> None:
        for name in ("warmup", "tail", "longest_run", "budget"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise DiffusionCacheError(f"{name} must be >= 0 steps; got {value}.")
        if self.steps is not None and self.steps < 1:
            raise DiffusionCacheError(f"steps must be >= 1; got {self.steps}.")
        if self.tail and self.steps is None:
            raise DiffusionCacheError(
                f"a tail of {self.tail} steps ends where the run does: give steps, too."
            )


class Past(NamedTuple):
    """What decisions depend on: scalars, of NumPy on the host and arrays in a program."""

    step: Any
    """int32: the last step seen, -1 before the first."""
    computed: Any
    """int32: steps computed in this run."""
    skipped: Any
    """int32: steps skipped in this run."""
    skips: Any
    """int32: steps skipped since the last computed one."""
    memory: Memory
    """What the policy keeps."""


@dataclass(frozen=True)
class Recipe:
    """How to cache across denoising steps: when to compute, and what to give when not.

    With :class:`DiffusionCache` it runs eagerly on any framework, with :class:`TracedCache` inside
    a compiled program.
    """

    policy: Policy
    predictor: Predictor = field(default_factory=HoldResidual)
    limits: Limits = Limits()

    def start(self) -> Past:
        """The past of a run that has not begun."""
        zero = np.int32(0)
        return Past(np.int32(-1), zero, zero, zero, tuple(map(np.float32, self.policy.memory)))

    def decide(self, xp: Any, past: Past, step: Any, change: Any) -> tuple[Any, Past]:
        """Whether `step` is computed (bool scalar), and the past that the next one has.

        past: of this run; :meth:`start` where the steps go backwards.
        change: float32 scalar that the signal of the policy measured, or 0.
        """
        judged, memory = self.policy.judge(xp, Facts(step, change, past.skips), past.memory)
        # NaN is no measurement: whatever the policy makes of it, the step is computed.
        computes = judged | self._must(past, step) | ~xp.isfinite(change)
        one = past.computed * 0 + 1
        kept = zip(self.policy.memory, memory, strict=True)
        return computes, Past(
            step,
            past.computed + xp.where(computes, one, 0),
            past.skipped + xp.where(computes, 0, one),
            xp.where(computes, 0, past.skips + one),
            tuple(xp.where(computes, fresh, value) for fresh, value in kept),
        )

    def _must(self, past: Past, step: Any) -> Any:
        limits = self.limits
        run = self.policy.longest_run if limits.longest_run is None else limits.longest_run
        must = (past.computed == 0) | (step < limits.warmup)
        if limits.steps is not None:
            must = must | (step >= limits.steps - limits.tail)
        if run is not None:
            must = must | (past.skips >= run)
        if limits.budget is not None:
            must = must | (past.skipped >= limits.budget)
        return must


def check_step(step: int, last: int, who: str) -> None:
    """Raises DiffusionCacheError for a negative step, StepOrderError for the `last` one again."""
    if step < 0:
        raise DiffusionCacheError(f"steps count from 0; got {step}.")
    if step == last:
        raise StepOrderError(
            f"a step is passed once; {who} has passed step {step}. Number the calls of the "
            "network, also where a sampler calls it twice at one time, or begin another run."
        )
