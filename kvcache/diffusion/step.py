"""One denoising step, eagerly: computed or predicted, site by site."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, Self, TypeAlias, cast

import numpy as np

from kvcache.backends import Array, backend_of
from kvcache.errors import DiffusionCacheError, StepOrderError

from .history import (
    EMPTY,
    Bundle,
    Compute,
    History,
    Inputs,
    Outputs,
    Shapes,
    bundle,
    check_unchanged,
    entering_part,
    extended,
    kept_part,
    owned_copy,
    prediction_program,
    shapes,
)
from .predictors import Predictor
from .scalars import HOST, Scalar


class Decision(NamedTuple):
    """Whether a step is computed, and the change behind the decision."""

    computes: bool = True
    change: float = 0.0


class Site(NamedTuple):
    """State of one place in the network, for one stream."""

    history: History = EMPTY
    gives_tuple: bool = False
    """Whether its output is a tuple of arrays, not a bare one."""
    inputs: Shapes | None = None


SiteName: TypeAlias = str | int
"""The name or number of a site."""
Sites: TypeAlias = Mapping[SiteName, Site]


class Step:
    """One denoising step of one stream, from :meth:`DiffusionCache.begin` to :meth:`commit`.

    A context manager: leaving it commits, an exception leaves the cache as it was.
    """

    def __init__(
        self,
        predictor: Predictor,
        decision: Decision,
        time: Scalar,
        sites: Sites,
        on_commit: Callable[[Sites, bool], None],
    ) -> None:
        """`sites`: their states before the step.

        on_commit: called with their states after it, and whether anything was computed in it.
        """
        self._predictor, self._time, self._before = predictor, time, sites
        self._on_commit = on_commit
        self._after: dict[SiteName, Site] = {}
        self._computed_any = decision.computes
        self.computes = decision.computes
        """Whether this step is computed; if not, a site that has nothing to go by still is."""
        self.change = decision.change
        """Change that the policy's signal measured; NaN in the first step, 0 without a signal."""

    def apply(
        self, x: Inputs, compute: Compute[Inputs, Outputs], *, site: SiteName = "network"
    ) -> Outputs:
        """Return ``compute(x)``, or the prediction of it, of the same shapes and dtypes.

        x: an array or a tuple of them, [B, ...]; `compute` may write to it.
        site: names the place in the network. One decision may serve several of them.

        Raises: StepOrderError for a site that this step has been through; ShapeError for shapes
            that changed since the step before; DTypeError.
        """
        if not self.computes_at(site):
            return cast(Outputs, self.predict(x, site=site))
        self._site(site, x)  # raises before the network runs, not after
        entering = entering_part(self._predictor, bundle(x))
        outputs = compute(x)
        self.record(entering, outputs, site=site)
        return outputs

    def computes_at(self, site: SiteName = "network") -> bool:
        """Whether `site` is to be computed: in a computed step, or with nothing to go by.

        Raises: StepOrderError.
        """
        self._check_new(site)
        return self.computes or site not in self._before

    def predict(self, x: object, *, site: SiteName = "network") -> Array | Bundle:
        """Predict the output of `site` for `x`: :meth:`apply` without a function to pass.

        x: an array or a tuple of them, [B, ...].

        Raises: as :meth:`apply`; StepOrderError where :meth:`computes_at` says to compute.
        """
        state = self._site(site, x)
        if not state.history.computed:
            raise StepOrderError(f"{site!r} has not been computed yet, so record it first.")
        outputs = self._predicted(state.history, bundle(x))
        self._after[site] = state
        return outputs if state.gives_tuple else outputs[0]

    def record(self, x: object, outputs: object, *, site: SiteName = "network") -> None:
        """Keep `outputs` of `site` for `x`: :meth:`apply` without a function to pass.

        x: as it was before it was computed. Where the network may write to its input, and the
            predictor keeps residuals, this has to be a copy.

        Raises: as :meth:`apply`.
        """
        state = self._site(site, x)
        history = self._extended(state.history, bundle(x), bundle(outputs))
        gives_tuple = isinstance(outputs, (tuple, list))
        self._after[site] = Site(history, gives_tuple, shapes(bundle(x)))
        self._computed_any = True

    def commit(self) -> None:
        """Make this step part of the cache; leaving the context without an exception does it."""
        self._on_commit({**self._before, **self._after}, self._computed_any)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            self.commit()

    def _check_new(self, site: SiteName) -> None:
        if site in self._after:
            raise StepOrderError(
                f"a step passes a site once; it has passed {site!r} before. "
                "Give the places of a network different names."
            )

    def _site(self, site: SiteName, x: object) -> Site:
        """Return the state of `site` before this step passes it with `x`.

        Raises: StepOrderError if the step has passed it; ShapeError for another shape of `x`.
        """
        self._check_new(site)
        state = self._before.get(site, Site())
        check_unchanged("what goes into a site", state.inputs, shapes(bundle(x)))
        return state

    def _extended(self, history: History, inputs: Bundle, outputs: Bundle) -> History:
        """Return `history` with this step, kept as copies or as new results.

        Raises: ShapeError, DTypeError; DiffusionCacheError for a time that occurs twice.
        """
        predictor = self._predictor
        kept = kept_part(predictor, inputs, outputs)
        if history.computed:
            check_unchanged("what a site gives", shapes(history.kept[0]), shapes(kept))
            _check_time(predictor, history, self._time)
        if predictor.residual:
            # A difference is new memory already, but may carry an autograd graph.
            kept = tuple(backend_of(array).detached(array) for array in kept)
        else:
            # The caller has these arrays, too, and may write to them.
            kept = tuple(map(owned_copy, kept))
        return extended(predictor, history, self._time, kept)

    def _predicted(self, history: History, inputs: Bundle) -> Bundle:
        """Predict the outputs from `history`, in new arrays."""
        predictor = self._predictor
        with np.errstate(all="ignore"):
            scalars = predictor.weights(HOST, history.times, history.computed, self._time)
        # Numbers of Python do not promote half-precision arrays; scalars of NumPy may.
        weights = [float(weight) for weight in scalars]
        if weights == [1.0] and not predictor.residual:
            return tuple(map(owned_copy, history.kept[0]))  # exact in every dtype
        program = prediction_program(backend_of(history.kept[0][0]), predictor.residual)
        return program(history.kept, weights, inputs)


def _check_time(predictor: Predictor, history: History, time: Scalar) -> None:
    # The oldest step slides out as this one is added, so its time may occur again.
    if time in history.times[: predictor.keeps - 1]:
        raise DiffusionCacheError(
            f"to extrapolate, computed steps need different times; got {time} twice. "
            "Leave time out, or hold what the last step gave."
        )
