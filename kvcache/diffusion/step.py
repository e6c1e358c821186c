"""One denoising step, eagerly: computed or predicted, site by site."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Self, TypeAlias

import numpy as np

from kvcache.backends import Array, backend_of
from kvcache.diffusion import history as histories
from kvcache.errors import DiffusionCacheError, StepOrderError

from .history import (
    EMPTY,
    Bundle,
    Compute,
    History,
    Shapes,
    bundle,
    check_unchanged,
    shapes,
)
from .predictors import Predictor


class Decision(NamedTuple):
    """What became of the question whether to compute a step."""

    computes: bool = True
    change: float = 0.0


class Site(NamedTuple):
    """One place in the network, of one stream."""

    history: History = EMPTY
    several: bool = False
    """Whether it gives a tuple of arrays."""
    inputs: Shapes | None = None


Place: TypeAlias = str | int
"""What a site is called."""
Sites: TypeAlias = Mapping[Place, Site]


class Step:
    """One denoising step of one stream, from :meth:`DiffusionCache.begin` to :meth:`commit`.

    A context manager: leaving it keeps what happened, an exception leaves the cache as it was.
    """

    def __init__(
        self,
        predictor: Predictor,
        decision: Decision,
        time: Any,
        sites: Sites,
        keep: Callable[[Sites, bool], None],
    ) -> None:
        """`sites`: what is known of them.

        keep: called with what is known after this step, and whether anything was computed in it.
        """
        self._predictor, self._time, self._before, self._keep = predictor, time, sites, keep
        self._after: dict[Place, Site] = {}
        self._ran = decision.computes
        self.computes = decision.computes
        """Whether this step is computed; if not, a site that has nothing to go by still is."""
        self.change = decision.change
        """What the signal of the policy measured; NaN in the first step, 0 without a signal."""

    def apply(self, x: Any, compute: Compute, *, site: Place = "network") -> Any:
        """``compute(x)``, or the prediction of it, which has the same shapes and dtypes.

        x: an array or a tuple of them, [B, ...]; `compute` must not write to it.
        site: names the place in the network. One decision may serve several of them.

        Raises: StepOrderError for a site that this step has been through; ShapeError for shapes
            that changed since the step before; DTypeError.
        """
        if not self.computes_at(site):
            return self.predict(x, site=site)
        self._known(site, x)  # raises before the network runs, not after
        outputs = compute(x)
        self.record(x, outputs, site=site)
        return outputs

    def computes_at(self, site: Place = "network") -> bool:
        """Whether `site` is to be computed: in a computed step, or with nothing to go by.

        Raises: StepOrderError.
        """
        self._check_new(site)
        return self.computes or site not in self._before

    def predict(self, x: Any, *, site: Place = "network") -> Any:
        """What `site` would have made of `x`. For callers that cannot pass a function to apply.

        Raises: as :meth:`apply`; StepOrderError where :meth:`computes_at` says to compute.
        """
        known = self._known(site, x)
        if not known.history.count:
            raise StepOrderError(f"{site!r} has not been computed yet, so record it first.")
        found = self._predicted(known.history, bundle(x))
        self._after[site] = known
        return found if known.several else found[0]

    def record(self, x: Any, outputs: Any, *, site: Place = "network") -> None:
        """Keep that `site` made `outputs` of `x`. For callers that cannot pass a function to apply.

        Raises: as :meth:`apply`.
        """
        known = self._known(site, x)
        history = self._extended(known.history, bundle(x), bundle(outputs))
        several = isinstance(outputs, (tuple, list))
        self._after[site] = Site(history, several, shapes(bundle(x)))
        self._ran = True

    def commit(self) -> None:
        """Keep what happened; leaving the context without an exception does it."""
        self._keep({**self._before, **self._after}, self._ran)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            self.commit()

    def _check_new(self, site: Place) -> None:
        if site in self._after:
            raise StepOrderError(
                f"a step passes a site once; it has passed {site!r} before. "
                "Give the places of a network different names."
            )

    def _known(self, site: Place, x: Any) -> Site:
        """What is known of `site`, which is to be passed with `x`."""
        self._check_new(site)
        known = self._before.get(site, Site())
        check_unchanged("what goes into a site", known.inputs, shapes(bundle(x)))
        return known

    def _extended(self, history: History, inputs: Bundle, outputs: Bundle) -> History:
        predictor = self._predictor
        target = histories.targets(predictor, inputs, outputs)
        if history.count:
            check_unchanged("what a site gives", shapes(history.kept[0]), shapes(target))
            _check_time(predictor, history, self._time)
        if predictor.residual:
            target = tuple(backend_of(array).detached(array) for array in target)
        else:
            # The caller has these arrays, too, and may write to them.
            target = tuple(map(copied, target))
        return histories.extended(predictor, history, self._time, target)

    def _predicted(self, history: History, inputs: Bundle) -> Bundle:
        predictor = self._predictor
        with np.errstate(all="ignore"):
            found = predictor.weights(np, history.times, history.count, self._time)
        weights = [float(weight) for weight in found]
        if weights == [1.0] and not predictor.residual:
            return tuple(map(copied, history.kept[0]))  # exact in every dtype
        program = histories.predictions(backend_of(history.kept[0][0]), predictor.residual)
        return program(history.kept, weights, inputs)


def _check_time(predictor: Predictor, history: History, time: Any) -> None:
    if time in history.times[: predictor.keeps - 1]:
        raise DiffusionCacheError(
            f"to extrapolate, computed steps need different times; got {time} twice. "
            "Leave time out, or hold what the last step gave."
        )


def copied(array: Array) -> Array:
    """An array that nobody else can write to."""
    return backend_of(array).concat([array], 0)
