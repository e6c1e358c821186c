"""State of a recipe inside a compiled program: a pytree of arrays on the device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeAlias

import numpy as np

from kvcache.backends import Array, Backend
from kvcache.backends.arrays import Namespace
from kvcache.errors import DiffusionCacheError

from .history import Bundle, History, bundle
from .recipe import Recipe, RunState
from .scalars import Scalar
from .signals import Signal
from .step import SiteName

Histories: TypeAlias = Mapping[SiteName, History]


class TracedState(NamedTuple):
    """State between two steps, a pytree. Donate it to the program it is given to."""

    run: RunState
    reference: Array | tuple[()]
    """Compared with the next signal; an empty tuple where nothing is measured."""
    sites: Histories


def first_state(
    recipe: Recipe, backend: Backend, outputs: object, signal: Array | None
) -> TracedState:
    """Return the state before a run, in new arrays; see :meth:`TracedCache.start`."""
    sites = outputs if isinstance(outputs, Mapping) else {"network": outputs}
    return TracedState(
        _map_states(lambda scalar: backend.from_host(np.asarray(scalar)), recipe.start()),
        _first_reference(recipe.policy.signal, backend, signal),
        {
            site: _empty_history(backend, recipe.predictor.keeps, bundle(example))
            for site, example in sites.items()
        },
    )


def restarted(xp: Namespace, fresh: Scalar, recipe: Recipe, state: TracedState) -> TracedState:
    """Return `state`, or where `fresh` (bool scalar) holds, the state before a run.

    References and arrays stay: where nothing is computed they mean nothing.
    """
    # A number of Python takes the dtype of the present scalar: the pytree keeps its types.
    run = _map_states(
        lambda initial, present: xp.where(fresh, np.asarray(initial).item(), present),
        recipe.start(),
        state.run,
    )
    sites = {
        site: history._replace(computed=xp.where(fresh, 0, history.computed))
        for site, history in state.sites.items()
    }
    return TracedState(run, state.reference, sites)


def _map_states(function: Callable[..., Scalar], *states: RunState) -> RunState:
    """Return the state made by `function` of the scalars in each place of `states`."""
    memories = zip(*(state.memory for state in states), strict=True)
    return RunState(
        step=function(*(state.step for state in states)),
        computed=function(*(state.computed for state in states)),
        skipped=function(*(state.skipped for state in states)),
        skips=function(*(state.skips for state in states)),
        memory=tuple(function(*scalars) for scalars in memories),
    )


def _first_reference(
    measure: Signal | None, backend: Backend, signal: Array | None
) -> Array | tuple[()]:
    """Return zeros shaped as `measure` compares: like `signal`, or a time.

    Raises: DiffusionCacheError for a signal that is missing.
    """
    if measure is None:
        return ()
    if not measure.array:
        return backend.from_host(np.float32(0))
    if signal is None:
        raise DiffusionCacheError(
            f"{type(measure).__name__} measures an array: give one like it as signal=..."
        )
    return _zeros(backend, (signal,))[0]


def _empty_history(backend: Backend, keeps: int, examples: Bundle) -> History:
    """Return room for `keeps` computed steps; every array is new, for each may be donated."""
    return History(
        tuple(_zeros(backend, examples) for _ in range(keeps)),
        tuple(backend.from_host(np.float32(0)) for _ in range(keeps)),
        backend.from_host(np.int32(0)),
    )


def _zeros(backend: Backend, examples: Bundle) -> Bundle:
    return tuple(backend.alloc(array.shape, backend.dtype_name(array)) for array in examples)
