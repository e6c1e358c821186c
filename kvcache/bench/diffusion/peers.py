"""Our recipes against diffusers' own caches, in one of diffusers' transformers.

Every run starts from the same noise; its error is its distance from the end of the uncached run.
"""

from __future__ import annotations

import ast
import io
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from dataclasses import dataclass, field
from time import perf_counter
from typing import TypeAlias

import torch
from diffusers.hooks.first_block_cache import FirstBlockCacheConfig
from diffusers.hooks.mag_cache import MagCacheConfig
from diffusers.hooks.taylorseer_cache import TaylorSeerCacheConfig
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from kvcache.adapters.diffusers.attach import attach
from kvcache.bench.harness.timing import Progress, four_digits, no_collection
from kvcache.diffusion import (
    Accumulated,
    BlockRange,
    HoldResidual,
    Interval,
    Limits,
    Magnitude,
    Predictor,
    Recipe,
    Taylor,
    Threshold,
)

from .flux import SIDE, STEPS, Denoiser
from .report import UNCACHED, DiffusionTiming

PLACE = "FLUX of diffusers"

Enter: TypeAlias = Callable[[FluxTransformer2DModel], AbstractContextManager[object]]
Config: TypeAlias = FirstBlockCacheConfig | MagCacheConfig | TaylorSeerCacheConfig


@dataclass
class Contender:
    """A way of caching and its outcome. enter: returns a context in which it is on."""

    family: str
    setting: float | None
    ours: bool
    enter: Enter
    saved: float = 0.0
    error: float = 0.0
    seconds: list[float] = field(default_factory=list)

    def timing(self, place: str) -> DiffusionTiming:
        """Return the outcome."""
        setting = "" if self.setting is None else f"{self.setting:g}"
        us = four_digits([1e6 * seconds for seconds in self.seconds])
        # No quality: a model of random weights draws nothing that one could judge.
        return DiffusionTiming(
            place, self.family, setting, self.saved, self.error, None, us, self.ours
        )


def compare(
    rounds: int = 3,
    seed: int = 0,
    side: int = SIDE,
    steps: int = STEPS,
    progress: Progress | None = None,
) -> list[DiffusionTiming]:
    """Run every contender `rounds` times, in turns; of the timings the uncached run is the first.

    Work is counted by the multiplications that were really done, not by the blocks that ran:
    TaylorSeer leaves out parts of them.

    side: image tokens are side * side.
    """
    denoiser = Denoiser(seed, side, steps)
    everyone = contenders(mag_ratios(denoiser))
    total, done = len(everyone) * (rounds + 1), 0
    shuffle = random.Random(0).shuffle  # noqa: S311 - an order of turns, no secret
    expected, work = _counted(denoiser)
    with no_collection():
        for turn in range(rounds + 1):
            order = list(everyone)
            shuffle(order)
            for contender in order:
                with contender.enter(denoiser.model):
                    # Counting operations takes time: the first turn counts, the others are timed.
                    if turn == 0:
                        x, spent = _counted(denoiser)
                        contender.saved = 1 - spent / work
                        contender.error = float((x - expected).norm() / expected.norm())
                    else:
                        contender.seconds.append(_timed(denoiser))
                done += 1
                if progress:
                    progress(done, total, contender.family)
    return [contender.timing(PLACE) for contender in everyone]


def _counted(denoiser: Denoiser) -> tuple[Tensor, int]:
    """Return the sample of a run, and the operations of its matrix products."""
    with FlopCounterMode(display=False) as counter:
        x = denoiser.run()
    return x, int(counter.get_total_flops())


def _timed(denoiser: Denoiser) -> float:
    start = perf_counter()
    denoiser.run()
    return perf_counter() - start


def mag_ratios(denoiser: Denoiser) -> list[float]:
    """Return the ratios of MagCache's own calibration, read from the output: it only prints."""
    steps = len(denoiser.times) - 1
    printed = io.StringIO()
    config = MagCacheConfig(calibrate=True, num_inference_steps=steps)
    with redirect_stdout(printed), _enabled(denoiser.model, config):
        denoiser.run()
    # Only the list of ratios begins like this: the ratio of the first step is 1.
    lines = [line for line in printed.getvalue().splitlines() if line.startswith("[1")]
    ratios: list[float] = ast.literal_eval(lines[0])
    return ratios


@contextmanager
def _enabled(model: FluxTransformer2DModel, config: Config) -> Iterator[None]:
    model.enable_cache(config)
    try:
        yield
    finally:
        model.disable_cache()


def contenders(ratios: Sequence[float]) -> list[Contender]:
    """Return the uncached run, diffusers' caches, recipes with the same rules, recommended ones.

    ratios: as :func:`mag_ratios` finds them. Bn in a name: the first n blocks are computed in
    every step; without it a recipe stands in for the whole network.
    """
    none = Contender(UNCACHED, None, True, lambda _: nullcontext())
    return [none, *_theirs(ratios), *_same_rules(ratios), *_recommended()]


def _theirs(ratios: Sequence[float]) -> Iterator[Contender]:
    """Yield the caches of diffusers, each with a few settings."""

    def contender(family: str, setting: float, config: Config) -> Contender:
        return Contender(family, setting, False, lambda model: _enabled(model, config))

    for threshold in (0.05, 0.1, 0.2, 0.4):
        config = FirstBlockCacheConfig(threshold=threshold)
        yield contender("FirstBlockCache", threshold, config)
    for threshold in (0.06, 0.12, 0.24):
        values = torch.tensor(ratios)
        mag = MagCacheConfig(threshold, num_inference_steps=len(ratios), mag_ratios=values)
        yield contender("MagCache", threshold, mag)
    for every in (2, 3, 5):
        for order in (1, 2):
            for lite in (False, True):
                taylor = TaylorSeerCacheConfig(
                    cache_interval=every,
                    max_order=order,
                    taylor_factors_dtype=torch.float32,
                    use_lite_mode=lite,
                )
                mode = "lite" if lite else "attention"
                yield contender(f"TaylorSeer {order}, {mode}", every, taylor)


def _ours(family: str, setting: float, recipe: Recipe, scope: BlockRange | None) -> Contender:
    return Contender(family, setting, True, lambda model: attach(model, recipe, scope=scope))


def _same_rules(ratios: Sequence[float]) -> Iterator[Contender]:
    """Yield recipes of ours with the rules of the caches of diffusers."""
    free = Limits(max_consecutive_skips=len(ratios))
    for threshold in (0.05, 0.1, 0.2, 0.4):
        recipe = Recipe(Threshold(threshold), HoldResidual(), free)
        yield _ours("Threshold B1, hold", threshold, recipe, BlockRange(1))
    warm = Limits(warmup=int(0.2 * len(ratios) + 0.5), max_consecutive_skips=3)
    for threshold in (0.06, 0.12, 0.24):
        recipe = Recipe(Magnitude(ratios, threshold), HoldResidual(), warm)
        yield _ours("Magnitude B0, hold", threshold, recipe, BlockRange(0))
    for every in (2, 3, 5):
        for order in (1, 2):
            recipe = Recipe(Interval(every), Taylor(order), Limits(warmup=3))
            yield _ours(f"Interval, Taylor {order}", every, recipe, None)


def _recommended() -> Iterator[Contender]:
    """Yield recommended recipes of ours."""
    line: Predictor = Taylor(1, residual=True)
    for threshold in (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4):
        recipe = Recipe(Threshold(threshold), line, Limits(max_consecutive_skips=8))
        yield _ours("Threshold B1, Taylor 1", threshold, recipe, BlockRange(1))
    limits = Limits(warmup=3, max_consecutive_skips=8)
    for threshold in (0.015, 0.03, 0.06, 0.09, 0.12, 0.16, 0.2, 0.25, 0.3):
        recipe = Recipe(Accumulated(threshold), Taylor(1), limits)
        yield _ours("Accumulated, Taylor 1", threshold, recipe, None)
        recipe = Recipe(Accumulated(threshold), line, limits)
        yield _ours("Accumulated B0, Taylor 1", threshold, recipe, BlockRange(0))
