"""The sampler of the diffusion benchmark as one JAX program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from kvcache.backends import Array
from kvcache.backends.arrays import NativeArray
from kvcache.diffusion import BlockRange, Recipe, TracedCache

from .recipes import Sampler, Trial, Uncached

State: TypeAlias = Any
"""All that a step leaves to the next one: a pytree; an empty tuple without a cache."""


def program(sampler: Sampler, trial: Trial | None) -> Callable[[], tuple[NativeArray, float]]:
    """Return a sampler: each call draws the samples, and tells the share of steps skipped.

    trial: None for no cache.
    """
    times = jnp.asarray(sampler.times, jnp.float32)
    begin, resume = _cache(sampler, trial)
    scope = trial.scope if trial else None

    def denoise(
        carry: tuple[NativeArray, State], step: NativeArray
    ) -> tuple[tuple[NativeArray, State], None]:
        x, state = carry
        cache = resume(state)
        drift = sampler.velocity(cache, scope, step, times[step], x, times[step])
        return (x + (times[step + 1] - times[step]) * drift, cache.state), None

    @jax.jit
    def draw(noise: NativeArray, state: State) -> tuple[NativeArray, State]:
        carry, _ = jax.lax.scan(denoise, (noise, state), jnp.arange(sampler.steps))
        return carry

    def run() -> tuple[NativeArray, float]:
        x, state = jax.block_until_ready(draw(sampler.noise, begin()))
        return x, float(state.run.skipped) / sampler.steps if trial else 0.0

    return run


def _cache(
    sampler: Sampler, trial: Trial | None
) -> tuple[Callable[[], State], Callable[[State], TracedCache | _Computes]]:
    """Return two functions: one makes the first state, one makes a cache of a state."""
    if trial is None:
        return tuple, _Computes
    recipe: Recipe = trial.recipe
    outputs, signal = _examples(sampler, trial.scope)
    backend = sampler.backend
    return (
        lambda: TracedCache.start(recipe, backend, outputs, signal),
        lambda state: TracedCache(recipe, backend, state),
    )


class _Computes(Uncached):
    """Stand-in for a cache in a program, with a state: an empty one."""

    def __init__(self, state: tuple[()]) -> None:
        self.state = state


def _examples(sampler: Sampler, scope: BlockRange | None) -> tuple[object, Array | None]:
    """Return shapes of the outputs of `scope` and of the measured signal, without computing any."""

    def shapes(noise: NativeArray) -> tuple[object, Array | None]:
        both = jnp.concatenate([noise, noise])
        if scope is None:
            return sampler.network(both, jnp.float32(1)), None
        streams, _, modulated = sampler.front(both, jnp.float32(1))
        return streams, modulated

    return jax.eval_shape(shapes, sampler.noise)  # type: ignore[no-any-return]
