"""TracedCache: a recipe at work inside a compiled program, with its state as a pytree.

It decides by the very function that :class:`DiffusionCache` decides by, on arrays instead of host
scalars, so nothing waits for the host: under ``jax.jit`` a skipped step is a branch not taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple, Self, TypeAlias

import numpy as np

from kvcache.backends import Backend
from kvcache.diffusion import history as histories
from kvcache.errors import DiffusionCacheError, StepOrderError

from .history import Bundle, Compute, History, bundle
from .recipe import Past, Recipe
from .signals import Measured, Signal

Sites: TypeAlias = Mapping[str | int, History]


class TracedState(NamedTuple):
    """All that a step leaves to the next one; a pytree. Donate it to the program it is given to."""

    past: Past
    reference: Any
    """What the signal compares with; an empty tuple where nothing is measured."""
    sites: Sites


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

    What differs from DiffusionCache: a program cannot raise for a value, so a step that comes a
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
        outputs: Any,
        signal: Any = None,
    ) -> TracedState:
        """The state before a run; every array in it is new.

        outputs: what the network will give, an array or a tuple of them; by site, in a dict, where
            a step passes several. Only shapes and dtypes are looked at: ``jax.eval_shape`` will do.
        signal: likewise what the policy will measure, if it measures an array.

        Raises: DiffusionCacheError for a signal that is missing.
        """
        sites = outputs if isinstance(outputs, Mapping) else {"network": outputs}
        keeps = recipe.predictor.keeps
        return TracedState(
            Past(*_on_device(backend, recipe.start())),
            _first_reference(recipe.policy.signal, backend, signal),
            {
                site: History(
                    tuple(_zeros(backend, bundle(example)) for _ in range(keeps)),
                    tuple(_on_device(backend, np.float32(0)) for _ in range(keeps)),
                    _on_device(backend, np.int32(0)),
                )
                for site, example in sites.items()
            },
        )

    def run(
        self,
        step: Any,
        x: Any,
        compute: Compute,
        *,
        signal: Measured = None,
        time: Any = None,
    ) -> Any:
        """``compute(x)`` or the prediction of it, as :meth:`DiffusionCache.run`."""
        with self.begin(step, signal=signal, time=time) as now:
            return now.apply(x, compute)

    def begin(self, step: Any, *, signal: Measured = None, time: Any = None) -> TracedStep:
        """Decide about a step, as :meth:`DiffusionCache.begin`.

        step: int32 scalar. time: float32 scalar; default: the number of the step.
        """
        xp = self.backend.xp
        number = xp.asarray(step, dtype=xp.int32)
        when = xp.asarray(number if time is None else time, dtype=xp.float32)
        fresh = number <= self.state.past.step
        start = self.recipe.start()
        past = Past(*_either(xp, fresh, start, self.state.past))
        sites = {
            site: history._replace(count=xp.where(fresh, 0, history.count))
            for site, history in self.state.sites.items()
        }
        measure = self.recipe.policy.signal
        if measure is None:
            computes, past = self.recipe.decide(xp, past, number, when * 0)
            return TracedStep(self, computes, when, TracedState(past, (), sites))
        value = measure.pick(signal, when)
        with np.errstate(all="ignore"):
            change = measure.change(xp, value, self.state.reference)
            change = xp.where(past.computed == 0, math.nan, change)
            computes, past = self.recipe.decide(xp, past, number, change)
        keeps = computes if measure.since == "computed" else xp.asarray(True)
        reference = xp.where(keeps, value, self.state.reference)
        return TracedStep(self, computes, when, TracedState(past, reference, sites))


class TracedStep:
    """One step of a :class:`TracedCache`, used as :class:`Step` is."""

    def __init__(self, cache: TracedCache, computes: Any, time: Any, state: TracedState) -> None:
        self._cache, self._time, self._state = cache, time, state
        self._after: dict[str | int, History] = {}
        self.computes = computes
        """bool scalar: whether this step is computed."""

    def apply(self, x: Any, compute: Compute, *, site: str | int = "network") -> Any:
        """``compute(x)`` or the prediction of it, as :meth:`Step.apply`.

        Raises, while it is traced: StepOrderError for a site a second time; KeyError for one that
        :meth:`TracedCache.start` was not told of; ShapeError, DTypeError.
        """
        if site in self._after:
            raise StepOrderError(f"a step passes a site once; it has passed {site!r} before.")
        backend, history = self._cache.backend, self._state.sites[site]
        # Where only one branch runs, the arrays that are kept have to tell.
        predictor, several = self._cache.recipe.predictor, len(history.kept[0]) > 1

        def computed(inputs: Bundle, history: History) -> tuple[Bundle, History]:
            nonlocal several
            outputs = compute(inputs if isinstance(x, (tuple, list)) else inputs[0])
            several = isinstance(outputs, (tuple, list))
            target = histories.targets(predictor, inputs, bundle(outputs))
            extended = histories.extended(predictor, history, self._time, target)
            return bundle(outputs), extended

        def predicted(inputs: Bundle, history: History) -> tuple[Bundle, History]:
            return self._predicted(backend.xp, inputs, history), history

        must = self.computes | (history.count == 0)
        outputs, self._after[site] = backend.traced_cond(
            must, computed, predicted, bundle(x), history
        )
        return outputs if several else outputs[0]

    def commit(self) -> None:
        """Make what happened the state of the cache."""
        sites = {**self._state.sites, **self._after}
        self._cache.state = self._state._replace(sites=sites)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is None:
            self.commit()

    def _predicted(self, xp: Any, inputs: Bundle, history: History) -> Bundle:
        predictor, count = self._cache.recipe.predictor, history.count
        with np.errstate(all="ignore"):
            weights = predictor.weights(xp, history.times, count, self._time)
        # A weight of 0 would not hide what an earlier run has left, if that is not finite.
        kept = tuple(
            tuple(xp.where(i < count, array, xp.zeros_like(array)) for array in arrays)
            for i, arrays in enumerate(history.kept)
        )
        return histories.predicted(xp, predictor.residual, kept, weights, inputs)


def _either(xp: Any, condition: Any, a: Any, b: Any) -> Any:
    """`a`, host scalars, where the condition holds, else `b`; or tuples of them."""
    if isinstance(a, tuple):
        return tuple(_either(xp, condition, *pair) for pair in zip(a, b, strict=True))
    return xp.where(condition, a.item(), b)


def _first_reference(measure: Signal | None, backend: Backend, signal: Any) -> Any:
    if measure is None:
        return ()
    if not measure.array:
        return _on_device(backend, np.float32(0))
    if signal is None:
        raise DiffusionCacheError(
            f"{type(measure).__name__} measures an array: give one like it as signal=..."
        )
    return _zeros(backend, (signal,))[0]


def _zeros(backend: Backend, examples: Bundle) -> Bundle:
    return tuple(backend.alloc(array.shape, backend.dtype_name(array)) for array in examples)


def _on_device(backend: Backend, value: Any) -> Any:
    """Host scalars as arrays, each of its own."""
    if isinstance(value, tuple):
        return tuple(_on_device(backend, item) for item in value)
    return backend.from_host(value)
