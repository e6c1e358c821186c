"""TeaCache over timesteps: decisions for a loop with its own calls of the network."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Self

import numpy as np

from kvcache.backends import Array

from .policies import TIMESTEP, Accumulated
from .recipe import Limits, Recipe, RunState, check_step
from .scalars import HOST, Scalar, host_scalar
from .stats import HitStats
from .streams import Stream, Streams, bytes_of, distinct


class TeaCache:
    """Skips steps until the timesteps have moved far enough (after TeaCache; Liu et al., 2024).

    ::

        with TeaCache(threshold=0.1, streams=("cond", "uncond")) as cache:
            for step, timestep in enumerate(timesteps):
                if cache.should_compute(step, timestep):
                    cache.update(network(x, timestep, prompt), "cond")
                    cache.update(network(x, timestep, empty), "uncond")
                velocity = guided(cache.get("cond"), cache.get("uncond"))

    threshold: the network is called once the differences of timesteps, rescaled, add up to it;
        in the units of the timesteps. 0 skips nothing.
    rescale: a factor, or the coefficients of a polynomial, the highest power first.
    skip_early_steps: so many first steps are computed.
    streams: how many outputs a step has, or their names; one decision serves them all.
    max_consecutive_skips: at most so many steps in a row are skipped.

    It holds references and never deletes an array, as :class:`StepCache`. A policy that looks at
    the model's activations, or another prediction than the last output: :class:`DiffusionCache`.

    Raises: DiffusionCacheError for a threshold below 0 or not finite, rescale that is not finite, a
    negative number of steps, or streams that are none or of the same name; TypeError for a string
    as streams.
    """

    def __init__(
        self,
        threshold: float = 0.1,
        rescale: float | Sequence[float] = 1.0,
        skip_early_steps: int = 0,
        *,
        streams: int | Sequence[str] = 1,
        max_consecutive_skips: int = 4,
    ) -> None:
        # A factor is a line through 0.
        polynomial = tuple(np.atleast_1d(rescale)) if np.ndim(rescale) else (rescale, 0.0)
        limits = Limits(warmup=skip_early_steps, max_consecutive_skips=max_consecutive_skips)
        self._recipe = Recipe(Accumulated(threshold, polynomial, TIMESTEP), limits=limits)
        self._streams = Streams(streams)
        self._hits = self._misses = 0
        self._run: RunState
        self._time: Scalar
        self.free()

    def __repr__(self) -> str:
        return f"<TeaCache streams={self.streams} holds {len(self.arrays())} arrays>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.free()

    @property
    def streams(self) -> tuple[int, ...] | tuple[str, ...]:
        """Names of the streams, or their numbers where they have none."""
        return self._streams.names

    @property
    def stats(self) -> HitStats:
        """Steps skipped (hits) and computed (misses); :meth:`free` does not reset them."""
        return HitStats(self._hits, self._misses)

    @property
    def drift(self) -> float:
        """Sum of changes since the last computed step."""
        return float(self._run.memory[0])

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays held, each counted once."""
        return sum(map(bytes_of, self.arrays()))

    def arrays(self) -> list[Array]:
        """Return every array held, each once, in the order of streams."""
        return distinct(self._outputs)

    def should_compute(self, step: int, timestep: float) -> bool:
        """Whether to call the network in `step`, and to :meth:`update` with its output.

        A step below the one before begins a new run, of which the first step is computed. So is
        one with a timestep that is not a finite number, and every one as long as nothing is held.

        Raises: DiffusionCacheError for a negative step; StepOrderError for the same step again.
        """
        number = operator.index(step)
        check_step(number, int(self._run.step), "This cache")
        # With nothing held there is nothing to skip with.
        fresh = number < self._run.step or not self.arrays()
        run = self._recipe.start() if fresh else self._run
        with np.errstate(all="ignore"):
            time = host_scalar(np.float32(timestep))
            change = TIMESTEP.change(HOST, time, self._time)
            scalar_step = host_scalar(np.int32(number))
            computes, self._run = self._recipe.decide(HOST, run, scalar_step, change)
        self._time = time
        self._misses += bool(computes)
        self._hits += not computes
        return bool(computes)

    def update(self, output: Array, stream: Stream = 0) -> None:
        """Hold `output` of the network for `stream`, and let go of the one before.

        Raises: UnknownStreamError.
        """
        self._outputs[self._streams.number(stream)] = output

    def get(self, stream: Stream = 0) -> Array | None:
        """Return the latest output of `stream`, the array itself; None if there is none.

        Raises: UnknownStreamError.
        """
        return self._outputs[self._streams.number(stream)]

    def free(self) -> None:
        """Let go of every array; the next step is the first of a run."""
        self._run = self._recipe.start()
        self._time = host_scalar(np.float32(np.nan))  # NaN: no time before, so compute
        self._outputs: list[Array | None] = [None] * len(self._streams)
