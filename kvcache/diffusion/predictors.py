"""Predictors: the outputs of a skipped step, made from earlier ones.

Each combines, linearly, what the last few computed steps gave. So a predictor is a rule for
weights, numbers that depend on times alone, and all else is done once, in
:mod:`~kvcache.diffusion.history`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from kvcache.backends.arrays import Namespace
from kvcache.errors import DiffusionCacheError

from .scalars import Scalar


class Predictor(ABC):
    """Weighs the last computed steps."""

    @property
    @abstractmethod
    def keeps(self) -> int:
        """Number of computed steps it looks at; so many arrays are held per site."""

    @property
    @abstractmethod
    def residual(self) -> bool:
        """Whether it predicts outputs less their inputs, to be added again, or outputs."""

    @abstractmethod
    def weights(
        self, xp: Namespace, times: tuple[Scalar, ...], count: Scalar | int, time: Scalar
    ) -> tuple[Scalar, ...]:
        """Return the weight of each kept step in the prediction at `time`.

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

    def weights(
        self, xp: Namespace, times: tuple[Scalar, ...], count: Scalar | int, time: Scalar
    ) -> tuple[Scalar, ...]:
        return tuple(_lagrange(xp, times, i, count, time) for i in range(len(times)))


class HoldOutput(Taylor):
    """Gives the output of the last computed step again."""

    def __init__(self) -> None:
        super().__init__(0, residual=False)


class HoldResidual(Taylor):
    """Adds the residual of the last computed step to the input (TeaCache, FBCache)."""

    def __init__(self) -> None:
        super().__init__(0, residual=True)


def _lagrange(
    xp: Namespace, times: tuple[Scalar, ...], i: int, count: Scalar | int, time: Scalar
) -> Scalar:
    """Evaluate at `time` the polynomial through 1 at ``times[i]`` and 0 at the other times.

    Only the first `count` times take part; a step beyond them has weight 0.
    """
    weight = time * 0 + 1  # of the dtype of `time`, whatever the framework promotes to
    for j, other in enumerate(times):
        if j != i:
            # A time that is not known yet must not divide by zero either.
            known = j < count
            gap = xp.where(known, times[i] - other, time * 0 + 1)
            weight = weight * xp.where(known, (time - other) / gap, time * 0 + 1)
    return xp.where(i < count, weight, time * 0)
