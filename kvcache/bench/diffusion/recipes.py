"""The recipes of ``kvcache bench diffusion``, and the sampler to run them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np

from kvcache.backends import Array, Backend, HostArray
from kvcache.diffusion import (
    TIMESTEP,
    Accumulated,
    BlockRange,
    Calibration,
    DiffusionCache,
    HoldOutput,
    HoldResidual,
    Interval,
    Limits,
    Magnitude,
    Predictor,
    Recipe,
    SkipPolicy,
    StepMask,
    Taylor,
    Threshold,
)
from kvcache.reference.dit.blocks import Streams
from kvcache.reference.dit.model import DiT, euler, guided, schedule
from kvcache.reference.dit.toy_shapes import prompt_tokens

T = TypeVar("T")
R = TypeVar("R")

GUIDANCE = 2.0
"""Scale of classifier-free guidance."""
WHOLE = BlockRange(0)
"""All blocks; embedding and projection, before and after them, are computed in every step."""


@dataclass(frozen=True)
class Trial:
    """One recipe. family: recipes alike but for one parameter; setting: its value here.

    scope: the blocks that it may skip; None: the whole network at once.
    """

    family: str
    setting: str
    recipe: Recipe
    scope: BlockRange | None = None


def trials(steps: int, calibration: Calibration) -> list[Trial]:
    """Return all trials, family by family, from careful to careless."""
    limits = Limits(warmup=3, tail=1, steps=steps, max_consecutive_skips=8)

    def family(
        name: str,
        settings: Sequence[float],
        policy: Callable[[Any], SkipPolicy],
        predictor: Predictor,
        scope: BlockRange | None = None,
    ) -> list[Trial]:
        return [
            Trial(name, f"{setting:g}", Recipe(policy(setting), predictor, limits), scope)
            for setting in settings
        ]

    intervals, ratios, polynomial = (2, 3, 4, 6), calibration.ratios, calibration.polynomial
    thresholds = (0.1, 0.2, 0.3, 0.4, 0.6)
    return [
        *family("interval, output held", intervals, Interval, HoldOutput()),
        *family("interval, Taylor 1", intervals, Interval, Taylor(1)),
        *family("interval, Taylor 2", intervals, Interval, Taylor(2)),
        *family("step mask, Taylor 2", (14, 10, 8, 7), lambda n: _thinned(steps, n), Taylor(2)),
        *family(
            "timestep",
            (0.05, 0.1, 0.15, 0.2),
            lambda threshold: Accumulated(threshold, measure=TIMESTEP),
            HoldOutput(),
        ),
        *family(
            "TeaCache",
            thresholds,
            lambda threshold: Accumulated(threshold, polynomial),
            HoldResidual(),
            WHOLE,
        ),
        *family("first block", thresholds, Threshold, HoldResidual(), BlockRange(1)),
        *family(
            "F1B1, Taylor 1", thresholds, Threshold, Taylor(1, residual=True), BlockRange(1, 1)
        ),
        *family(
            "magnitude",
            thresholds,
            lambda threshold: Magnitude(ratios, threshold),
            HoldResidual(),
            WHOLE,
        ),
    ]


class Uncached:
    """Stand-in for a cache: computes every step."""

    def run(self, step: int, x: T, compute: Callable[[T], R], **options: Any) -> R:
        """Return ``compute(x)``."""
        return compute(x)

    def arrays(self) -> list[Array]:
        """Return no arrays: nothing is kept."""
        return []


def _thinned(steps: int, computed: int) -> StepMask:
    """Compute as many steps, ever closer together: the velocity turns most towards the end."""
    rank = np.linspace(0, 1, computed) ** 0.8 * (steps - 1)
    chosen = set(np.round(rank).astype(int).tolist())
    return StepMask([step in chosen for step in range(steps)])


class Sampler:
    """Sampler on one backend: both passes of classifier-free guidance are one batch."""

    def __init__(
        self, model: DiT, backend: Backend, prompts: HostArray, steps: int, seed: int = 0
    ) -> None:
        """`prompts`: ids of toy shapes, [B]."""
        self.backend, self.steps = backend, steps
        self.model = model.to_backend(backend)
        self.times = schedule(steps)
        size = model.config.text_tokens
        both = np.concatenate([prompts, np.zeros_like(prompts)])
        self._prompt = backend.from_host(prompt_tokens(both, size))
        self._batch = len(prompts)
        shape = (self._batch, model.config.tokens, model.config.channels)
        noise = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
        self.noise = backend.from_host(noise)
        # Parts, not the whole: a cache decides on the host which of them run.
        compiled = backend.compile
        self._front, self._back = compiled(self.front), compiled(self.model.finish)
        self._network, self._guide = compiled(self.network), compiled(self.guide)
        self._blocks = [compiled(partial(self.model.block, i)) for i in range(model.config.blocks)]

    def front(self, x: Array, time: Array) -> tuple[Streams, Array, Array]:
        """Return both streams before the first block, the modulation, and TeaCache's signal."""
        condition = self.model.condition(time, self._prompt)
        streams = self.model.embed(x, self._prompt)
        return streams, condition, self.model.modulated_input(streams, condition)

    def network(self, x: Array, time: Array) -> Array:
        """Return the velocity of both passes, [2 B, tokens, channels]."""
        return self.model(x, time, self._prompt)

    def guide(self, both: Array) -> Array:
        """Combine the velocities of both passes, [2 B, ...], to the guided one, [B, ...]."""
        return guided(both[: self._batch], both[self._batch :], GUIDANCE)

    def run(self, cache: DiffusionCache | Uncached, scope: BlockRange | None) -> Array:
        """Draw samples, [B, tokens, channels], step by step from the host."""

        def velocity(step: int, time: float, x: Array) -> Array:
            when = self.backend.from_host(np.float32(time))
            drift = self.velocity(cache, scope, step, when, x, time)
            # Arrays kept, too: a lazy framework would compute them in a later, skipped step.
            self.backend.sync(drift, *cache.arrays())
            return drift

        return euler(self.noise, self.times, velocity)

    def velocity(
        self,
        cache: Any,
        scope: BlockRange | None,
        step: int | Array,
        when: Array,
        x: Array,
        time: float | Array,
    ) -> Array:
        """Return the guided velocity at `x`, computed or predicted by `cache`.

        cache: eager, traced or `Uncached`. when: the time, as an array. time: the time as `cache`
        takes it.
        """
        both = self.backend.xp.concat([x, x], axis=0)
        if scope is None:
            passes = cache.run(step, both, lambda x: self._network(x, when), time=time)
            return self._guide(passes)
        streams, condition, modulated = self._front(both, when)
        streams = scope.run(
            cache,
            step,
            streams,
            [partial(_swapped, block, condition) for block in self._blocks],
            signal=modulated if scope.first == 0 else None,
            time=time,
        )
        return self._guide(self._back(streams[0], condition))


def _swapped(
    block: Callable[[Streams, Array], Streams], condition: Array, streams: Streams
) -> Streams:
    return block(streams, condition)
