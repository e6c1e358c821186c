"""Measure the time saved by caches across denoising steps, and the error of their samples.

On a small diffusion transformer trained on toy shapes, so that an error can be judged: samples are
compared with those without a cache, and with the shapes that their prompts ask for.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from kvcache._checks import check_sizes
from kvcache.backends import Array, HostArray, get_backend
from kvcache.bench.harness.report import Skipped, library_versions, this_machine
from kvcache.bench.harness.timing import Progress, four_digits, no_collection, ticks
from kvcache.diffusion import Calibration, DiffusionCache, Recorder
from kvcache.reference.dit.model import DiT
from kvcache.reference.dit.toy_shapes import FAMILIES, distance

from .recipes import WHOLE, R, Sampler, T, Trial, Uncached, trials
from .report import UNCACHED, DiffusionReport, DiffusionTiming

STEPS, SAMPLES, ROUNDS = 28, 7, 5
FEWEST_STEPS = 6
ONE_PROGRAM = ("interval, Taylor 2", "TeaCache", "first block")
"""Families that run as one program of JAX, too: each of their settings is compiled."""


@dataclass
class Entry:
    """One recipe that takes part. run: draws samples, and returns them and the share skipped."""

    place: str
    family: str
    setting: str
    run: Callable[[], tuple[HostArray, float]]
    us: list[float] = field(default_factory=list)

    def turn(self) -> None:
        """Take part in a round: run once, and record the time."""
        start = perf_counter()
        self.run()
        self.us.append((perf_counter() - start) * 1e6)


def run_diffusion(
    model: DiT,
    backends: Sequence[str],
    steps: int = STEPS,
    samples: int = SAMPLES,
    rounds: int = ROUNDS,
    *,
    peers: bool = True,
    progress: Progress | None = None,
) -> DiffusionReport:
    """Measure every recipe with `model` on each of `backends`.

    samples: drawn together; their prompts go round the toy shapes. peers: also compare with the
        caches of diffusers, if it is there, in a FLUX with random weights.

    Raises: ValueError; nothing was measured then.
    """
    check_sizes(steps=steps, samples=samples, rounds=rounds)
    if steps < FEWEST_STEPS:
        raise ValueError(
            f"some recipes need steps >= {FEWEST_STEPS} to be calibrated and to skip; got {steps}."
        )
    prompts = 1 + np.arange(samples) % len(FAMILIES)
    timings: list[DiffusionTiming] = []
    for number, spec in enumerate(backends):
        sampler = Sampler(model, get_backend(spec), prompts, steps)
        entries = list(_entries(sampler))
        # A tick per entry while it compiles, then one per round: `ticks` adds one to the rounds.
        tick = ticks(progress, number, len(backends), len(entries) + rounds - 1, spec)
        timings += _measured(entries, prompts, rounds, tick)
    skipped: tuple[Skipped, ...] = ()
    if peers and find_spec("diffusers") is None:
        skipped = (Skipped("torch", "", "diffusers", "it needs pip install 'kvcache[diffusers]'"),)
    elif peers:
        from .peers import compare  # late, because it imports diffusers

        timings += compare(rounds, steps=steps, progress=progress)
    return DiffusionReport(
        steps, samples, rounds, this_machine(), library_versions(), tuple(timings), skipped
    )


def toy_model(path: Path | None = None, progress: Progress | None = None) -> DiT:
    """Read the model in `path`; where there is none, train it now, with torch, and keep it there.

    Raises: ModelFileError if `path` holds something else.
    """
    if path is not None and path.exists():
        return DiT.load(path, get_backend("numpy"))
    from .training import train  # late, because it imports torch

    model = train(progress=progress)
    if path is not None:
        model.save(path)
    return model


def calibrated(sampler: Sampler) -> Calibration:
    """Calibrate policies for the model of `sampler`, in one run without a cache."""
    recorder = Recorder()
    sampler.run(_Recording(recorder), WHOLE)
    return recorder.calibrate(model="toy shapes", sampler="euler", steps=sampler.steps)


class _Recording(Uncached):
    """Stand-in for a cache: computes every step, and lets a recorder see it."""

    def __init__(self, recorder: Recorder) -> None:
        self.recorder = recorder

    def run(self, step: int, x: T, compute: Callable[[T], R], **options: Any) -> R:
        outputs: R = self.recorder.run(step, x, compute, **options)
        return outputs


def _entries(sampler: Sampler) -> Iterator[Entry]:
    """Yield all entries on the backend of `sampler`, the uncached run first."""
    compared = trials(sampler.steps, calibrated(sampler))
    name = sampler.backend.name
    yield Entry(name, UNCACHED, "", lambda: (_host(sampler, sampler.run(Uncached(), None)), 0.0))
    for trial in compared:
        yield Entry(name, trial.family, trial.setting, _eager(sampler, trial))
    # Other backends compile no loop over steps: that would be the eager run again.
    if name == "jax":
        yield from _programs(sampler, [trial for trial in compared if trial.family in ONE_PROGRAM])


def _eager(sampler: Sampler, trial: Trial) -> Callable[[], tuple[HostArray, float]]:
    def run() -> tuple[HostArray, float]:
        with DiffusionCache(trial.recipe) as cache:
            x = sampler.run(cache, trial.scope)
            skipped = cache.stats.skip_rate
        return _host(sampler, x), skipped * _share(sampler, trial)

    return run


def _share(sampler: Sampler, trial: Trial) -> float:
    """Return the share of the blocks that `trial` may skip."""
    if trial.scope is None:
        return 1.0
    blocks = sampler.model.config.blocks
    return (blocks - trial.scope.first - trial.scope.last) / blocks


def _programs(sampler: Sampler, compared: Sequence[Trial]) -> Iterator[Entry]:
    """Yield the uncached run and these trials, each as one program of JAX."""
    from .program import program  # late, because it imports JAX

    place = f"{sampler.backend.name}, one program"
    for trial in (None, *compared):
        draw = program(sampler, trial)
        share = _share(sampler, trial) if trial else 0.0
        family, setting = (trial.family, trial.setting) if trial else (UNCACHED, "")
        yield Entry(place, family, setting, partial(_drawn, sampler, draw, share))


def _drawn(
    sampler: Sampler, draw: Callable[[], tuple[Array, float]], share: float
) -> tuple[HostArray, float]:
    x, skipped = draw()
    return _host(sampler, x), skipped * share


def _host(sampler: Sampler, x: Array) -> HostArray:
    return sampler.backend.to_host(x)


def _measured(
    entries: Sequence[Entry], prompts: HostArray, rounds: int, tick: Callable[[], None]
) -> Iterator[DiffusionTiming]:
    """Run all entries once untimed, for their samples, then in turns, in a new order each round."""
    results = []
    for entry in entries:
        results.append(entry.run())  # compiles, too
        tick()
    order = list(entries)
    shuffle = random.Random(0).shuffle  # noqa: S311 - an order of turns, no secret
    with no_collection():
        for _ in range(rounds):
            shuffle(order)
            for entry in order:
                entry.turn()
            tick()
    exact = {e.place: x for e, (x, _) in zip(entries, results, strict=True) if e.family == UNCACHED}
    for entry, (x, skipped) in zip(entries, results, strict=True):
        yield DiffusionTiming(
            entry.place,
            entry.family,
            entry.setting,
            skipped,
            error=relative_error(x, exact[entry.place]),
            quality=float(np.mean(distance(x, prompts))),
            rounds_us=four_digits(entry.us),
        )


def relative_error(samples: HostArray, exact: HostArray) -> float:
    """Return the length of the difference over the length of the exact samples."""
    return float(np.linalg.norm(samples - exact) / np.linalg.norm(exact))
