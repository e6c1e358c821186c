"""Predictors: what a skipped step gives instead.

Each combines, linearly, what the last few computed steps gave. So a predictor is a rule for
weights, numbers that depend on times alone, and all else is done once, in :mod:`histories`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from kvcache.errors import DiffusionCacheError


class Predictor(ABC):
    """Weighs the computed steps that are kept."""

    @property
    @abstractmethod
    def keeps(self) -> int:
        """How many computed steps it looks at; so many arrays are held per site."""

    @property
    @abstractmethod
    def residual(self) -> bool:
        """Whether it predicts outputs less their inputs, which are added again, or outputs."""

    @abstractmethod
    def weights(self, xp: Any, times: tuple[Any, ...], count: Any, time: Any) -> tuple[Any, ...]:
        """The weight of each kept step in the prediction at `time`.

        times: float32 scalars, the latest first; only the first `count` of them mean something.
        """


@dataclass(frozen=True)
class Taylor(Predictor):
    """Extrapolates with the polynomial through the last ``order + 1`` computed steps.

    This is the forecast of TaylorSeer (Liu et al., "From Reusing to Forecasting", 2025) with
    divided differences in place of equal ones: exact for trajectories that are polynomials of
    that order, whatever the gaps between the computed steps were. Until there are enough of
    them, the order is lower. Times must differ from step to step.

    order: 0 holds what the last computed step gave.
    residual: extrapolates the output less the input instead of the output.
    """

    order: int = 1
    residual: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.order <= 4:
            raise DiffusionCacheError(
                f"order must be 0 to 4, higher ones amplify noise; got {self.order}."
            )

    @property
    def keeps(self) -> int:
        return self.order + 1

    def weights(self, xp: Any, times: tuple[Any, ...], count: Any, time: Any) -> tuple[Any, ...]:
        return tuple(_lagrange(xp, times, i, count, time) for i in range(len(times)))


class HoldOutput(Taylor):
    """Gives the output of the last computed step again."""

    def __init__(self) -> None:
        super().__init__(0, residual=False)


class HoldResidual(Taylor):
    """Adds to the input what the last computed step added to its own (TeaCache, FBCache)."""

    def __init__(self) -> None:
        super().__init__(0, residual=True)


def _lagrange(xp: Any, times: tuple[Any, ...], i: int, count: Any, time: Any) -> Any:
    """The polynomial that is 1 at ``times[i]`` and 0 at the others, at `time`."""
    weight = time * 0 + 1
    for j, other in enumerate(times):
        if j != i:
            # What is not known yet must not divide by zero either.
            known = j < count
            gap = xp.where(known, times[i] - other, time * 0 + 1)
            weight = weight * xp.where(known, (time - other) / gap, time * 0 + 1)
    return xp.where(i < count, weight, time * 0)
