"""TracedCache: a recipe at work inside a compiled program, with its state as a pytree.

It decides by the very function that :class:`DiffusionCache` decides by, on arrays instead of host
scalars, so nothing waits for the host: under ``jax.jit`` a skipped step is a branch not taken.
"""

from __future__ import annotations

import math
from typing import Self, cast

import numpy as np

from kvcache.backends import Array, Backend
from kvcache.backends.arrays import Namespace
from kvcache.errors import StepOrderError

from .history import (
    Bundle,
    Compute,
    History,
    Inputs,
    Outputs,
    bundle,
    entering_part,
    extended,
    kept_part,
)
from .history import predicted as combined
from .recipe import Recipe
from .scalars import Scalar
from .signals import SignalInput
from .step import SiteName
from .traced_state import TracedState, first_state, restarted


class TracedCache:
    """Computes some steps of a compiled denoising loop and predicts the others.

    ::

        state = TracedCache.start(recipe, backend, outputs=noise, signal=noise)

        def denoise(carry, step):
            x, state = carry
            cache = TracedCache(recipe, backend, state)
            velocity = cache.run(step, x, network, signal=x, time=times[step])
            return (x + (times[step + 1] - times[step]) * velocity, cache.state), None

        (x, state), _ = jax.lax.scan(denoise, (noise, state), jax.numpy.arange(steps))

    Differences from DiffusionCache: a program cannot raise for a value, so a step that comes a
    second time begins a new run, as one that goes backwards does, and times that are equal give
    no finite prediction where a predictor extrapolates. Shapes are checked while it is traced, by
    the framework. Passes that decide together are sites of one step, others have a state each. Off
    JAX the arrays that it returns may be those that it keeps: do not write to them.
    """

    def __init__(self, recipe: Recipe, backend: Backend, state: TracedState) -> None:
        """`state` is not changed; :attr:`state` becomes the one after the step."""
        self.recipe, self.backend, self.state = recipe, backend, state

    @staticmethod
    def start(
        recipe: Recipe,
        backend: Backend,
        outputs: object,
        signal: Array | None = None,
    ) -> TracedState:
        """Return the state before a run; every array in it is new.

        outputs: what the network will give, an array or a tuple of them; by site, in a dict, where
            a step passes several. Only shapes and dtypes are looked at: ``jax.eval_shape`` will do.
        signal: likewise what the policy will measure, if it measures an array.

        Raises: DiffusionCacheError for a signal that is missing.
        """
        return first_state(recipe, backend, outputs, signal)

    def run(
        self,
        step: int | Array,
        x: Inputs,
        compute: Compute[Inputs, Outputs],
        *,
        signal: SignalInput = None,
        time: float | Array | None = None,
    ) -> Outputs:
        """Return ``compute(x)`` or the prediction of it, as :meth:`DiffusionCache.run`."""
        with self.begin(step, signal=signal, time=time) as now:
            return now.apply(x, compute)

    def begin(
        self, step: int | Array, *, signal: SignalInput = None, time: float | Array | None = None
    ) -> TracedStep:
        """Decide about a step, as :meth:`DiffusionCache.begin`.

        step: int32 scalar. time: float32 scalar; default: the number of the step.
        """
        xp = self.backend.xp
        number = xp.asarray(step, dtype=xp.int32)
        scalar_time = xp.asarray(number if time is None else time, dtype=xp.float32)
        # The same step again begins a run as well: a program cannot raise for a value.
        fresh = number <= self.state.run.step
        run, reference, sites = restarted(xp, fresh, self.recipe, self.state)
        measure = self.recipe.policy.signal
        if measure is None:
            computes, run = self.recipe.decide(xp, run, number, scalar_time * 0)
            return TracedStep(self, computes, scalar_time, TracedState(run, (), sites))
        value = measure.pick(signal, scalar_time)
        reference = cast(Array, reference)  # an empty tuple only where nothing is measured
        with np.errstate(all="ignore"):
            change = measure.change(xp, value, reference)
            # The reference is of no meaning before the first computed step.
            change = xp.where(run.computed < 1, math.nan, change)
            computes, run = self.recipe.decide(xp, run, number, change)
        replaces = computes if measure.since == "computed" else xp.asarray(True)
        reference = xp.where(replaces, value, reference)
        return TracedStep(self, computes, scalar_time, TracedState(run, reference, sites))


class TracedStep:
    """One step of a :class:`TracedCache`, used as :class:`Step` is."""

    def __init__(
        self, cache: TracedCache, computes: Scalar, time: Scalar, state: TracedState
    ) -> None:
        self._cache, self._time, self._state = cache, time, state
        self._after: dict[SiteName, History] = {}
        self.computes = computes
        """bool scalar: whether this step is computed."""

    def apply(
        self, x: Inputs, compute: Compute[Inputs, Outputs], *, site: SiteName = "network"
    ) -> Outputs:
        """Return ``compute(x)`` or the prediction of it, as :meth:`Step.apply`.

        Raises, while it is traced: StepOrderError for a site a second time; KeyError for one that
        :meth:`TracedCache.start` was not told of; ShapeError, DTypeError.
        """
        if site in self._after:
            raise StepOrderError(f"a step passes a site once; it has passed {site!r} before.")
        backend, history = self._cache.backend, self._state.sites[site]
        # Where only one branch runs, the arrays that are kept have to tell.
        predictor, gives_tuple = self._cache.recipe.predictor, len(history.kept[0]) > 1

        def computed(inputs: Bundle, history: History) -> tuple[Bundle, History]:
            nonlocal gives_tuple
            given = inputs if isinstance(x, (tuple, list)) else inputs[0]
            entering = entering_part(predictor, inputs)
            outputs = compute(cast(Inputs, given))
            gives_tuple = isinstance(outputs, (tuple, list))
            kept = kept_part(predictor, entering, bundle(outputs))
            return bundle(outputs), extended(predictor, history, self._time, kept)

        def predicted(inputs: Bundle, history: History) -> tuple[Bundle, History]:
            return self._predicted(backend.xp, inputs, history), history

        must = self.computes | (history.computed == 0)
        outputs, self._after[site] = backend.traced_cond(
            must, computed, predicted, bundle(x), history
        )
        return cast(Outputs, outputs if gives_tuple else outputs[0])

    def commit(self) -> None:
        """Make this step's result the state of the cache."""
        sites = {**self._state.sites, **self._after}
        self._cache.state = self._state._replace(sites=sites)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            self.commit()

    def _predicted(self, xp: Namespace, inputs: Bundle, history: History) -> Bundle:
        """Predict the outputs from `history`."""
        predictor, count = self._cache.recipe.predictor, history.computed
        with np.errstate(all="ignore"):
            weights = predictor.weights(xp, history.times, count, self._time)
        # A weight of 0 would not hide what an earlier run has left, if that is not finite.
        kept = tuple(
            tuple(xp.where(i < count, array, xp.zeros_like(array)) for array in arrays)
            for i, arrays in enumerate(history.kept)
        )
        return combined(xp, predictor.residual, kept, weights, inputs)
