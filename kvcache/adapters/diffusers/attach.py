"""Recipes inside the transformers of Hugging Face diffusers.

::

    pipeline = FluxPipeline.from_pretrained(...)
    recipe = Recipe(Threshold(0.1), limits=Limits(warmup=4))
    with attach(pipeline.transformer, recipe) as caching:
        image = pipeline(prompt).images[0]

It goes by the hooks that diffusers has for its own caches, so that pipelines tell it, too, which
pass they make (``transformer.cache_context("cond")``) and when they are done.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, Self, TypeAlias, get_args

from kvcache.diffusion import BlockRange, DiffusionCache, Recipe, Step
from kvcache.diffusion.signals import SignalInput
from kvcache.diffusion.streams import Stream
from kvcache.errors import BackendNotAvailableError, NotSupportedError

try:
    import torch
    from torch.nn import Module

    from kvcache.adapters.diffusers import hooks as _hooks

    from .blocks import Arguments
    from .counter import Clock
    from .scopes import BlockSite, Forward, Measure, Pass, Site, WholeSite
except ImportError as error:
    raise BackendNotAvailableError(
        f"this needs diffusers and torch, of which one is missing or too old ({error}). "
        "Try: pip install 'kvcache[diffusers]'"
    ) from error

__all__ = ["STREAMS", "Attached", "Measure", "attach"]

FIRST_BLOCK = BlockRange(1)
Time: TypeAlias = Literal["step", "timestep"]

STREAMS = ("cond", "uncond", "cond_uncond", "uncond_stg", "uncond_modality")
"""The passes that diffusers' pipelines make, by the names they give them."""


def attach(
    transformer: Module,
    recipe: Recipe,
    *,
    scope: BlockRange | None = FIRST_BLOCK,
    streams: Sequence[str] = STREAMS,
    shared: bool = False,
    signal: Measure | None = None,
    time: Time = "step",
) -> Attached:
    """Let `recipe` decide which steps `transformer` computes, until :meth:`Attached.detach`.

    transformer: of a pipeline, ``pipeline.transformer``. Its forward, and those of its blocks, are
        wrapped by hooks; weights are not touched.
    scope: the blocks that a skipped step leaves out, counted through all lists of blocks in the
        order in which they run. None: the whole network; it is predicted what it would return.
    streams: what ``cache_context`` is called with. A call without a context is of the first.
    shared: whether the first stream that comes to a step decides it for the others, too.
    signal: ``signal(block, args, kwargs)``, with the first block and what it is called with, gives
        the tensor that the policy measures. Default: what the first blocks of `scope` add to the
        hidden states, as FBCache; where it has none, their modulated input, as TeaCache.
    time: what predictions go by, the number of the step or the `timestep` that the transformer is
        given, which has to be brought to the host. Policies of the timestep see it either way.

    Raises: NotSupportedError for a transformer that has a cache already, blocks that diffusers
        does not describe, or without a signal to measure; ValueError for a scope without blocks.
    """
    if time not in get_args(Time):
        raise ValueError(f"time is one of {get_args(Time)}; got {time!r}.")
    return Attached(transformer, recipe, scope, streams, shared, signal, time)


class Attached:
    """A recipe at work in a transformer, made by :func:`attach`.

    A run is over when a pipeline says so at its end, after ``Limits.steps`` steps, at
    :meth:`reset`, where a ``step_index`` that the pipeline tells goes backwards, and, if it tells
    none, where the `timestep` that the transformer is given rises.

    A forward that raises leaves the cache as it was. No autograd graph is kept. Not for several
    threads at once.
    """

    def __init__(
        self,
        transformer: Module,
        recipe: Recipe,
        scope: BlockRange | None,
        streams: Sequence[str],
        shared: bool,
        signal: Measure | None,
        time: Time,
    ) -> None:
        _hooks.check_free(transformer)
        self.cache = DiffusionCache(recipe, streams, shared=shared)
        """For its stats, nbytes and arrays."""
        measure = recipe.policy.signal
        self._reads_time = time == "timestep" or (measure is not None and not measure.array)
        self._clock = Clock(shared=shared, steps=recipe.limits.steps)
        self._transformer, self._arguments = transformer, Arguments.of(transformer)
        self._now: Pass | None = None
        self._measures = measure is not None and measure.array
        self._number = 0
        self._site: Site
        if scope is None:
            self._site = WholeSite(transformer, signal, self._measures)
        else:
            self._site = BlockSite(transformer, scope, signal, self._measures)
        self._hooked: list[Module] = []
        self._hook()

    def __repr__(self) -> str:
        kind = type(self._transformer).__name__
        return f"<Attached to {kind if self._hooked else 'nothing'}: {self.cache!r}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def reset(self) -> None:
        """Let go of everything kept; the next step is the first of a run."""
        self.cache.reset()
        self._clock.reset()

    def detach(self) -> None:
        """Give the transformer its own forwards back; what is kept is let go. Again: no effect."""
        _hooks.remove(self._hooked)
        self._hooked = []
        self.reset()

    def _hook(self) -> None:
        root = _hooks.RootHook(self._whole, self.reset)
        self._context = root.context
        hooks: list[tuple[Module, _hooks.Hook]] = [(self._transformer, root)]
        for position, block in self._site.hooked:
            hooks.append((block.module, _hooks.Hook(partial(self._block, position))))
        for module, hook in hooks:
            _hooks.register(module, hook)
        self._hooked = [module for module, _ in hooks]

    def _whole(self, forward: Forward, args: Any, kwargs: Any) -> Any:
        """In place of the forward of the transformer."""
        _hooks.check_no_other(self._transformer)
        context = self._context
        timestep = self._timestep(context.step is not None, args, kwargs)
        stream = self.cache.streams[0] if context.name is None else context.name
        begin = partial(self._begin, stream, context.step, timestep)
        self._now = now = Pass(stream, begin)
        try:
            outputs = self._site.whole(now, forward, args, kwargs)
        finally:
            self._now = None
        if now.step is not None:
            now.step.commit()
            self._clock.tick(stream, self._number, timestep)
        return outputs

    def _block(self, position: int, forward: Forward, args: Any, kwargs: Any) -> Any:
        """In place of the forward of a block."""
        if self._now is None:  # somebody calls it by itself
            return forward(*args, **kwargs)
        return self._site.block(self._now, position, forward, args, kwargs)

    def _begin(self, stream: Stream, told: int | None, timestep: Any, signal: SignalInput) -> Step:
        """The step that a call for `stream` is part of.

        told: its number, if a pipeline tells it. timestep: a number, or a tensor on the device.
        """
        number = self._clock.next(stream) if told is None else told
        before = self._clock.timestep(stream) if told is None and number else None
        time = timestep if self._reads_time else None
        if before is None or timestep is None:
            return self._step(number, stream, time, signal)
        if isinstance(timestep, float):
            return self._step(self._unless_over(number, timestep, before), stream, time, signal)
        value: Any = signal() if callable(signal) else signal
        # Comparing on the device makes the one scalar that a decision waits for tell this, too.
        marked = value + torch.where(timestep > before, torch.nan, 0.0).to(value)
        step = self._step(number, stream, time, marked)
        if not math.isnan(step.change) or self._unless_over(number, timestep, before):
            return step
        return self._step(0, stream, time, value)

    def _unless_over(self, number: int, timestep: Any, before: Any) -> int:
        """`number`, or 0 where timesteps rise: another run has begun."""
        if timestep > before:
            self.reset()
            return 0
        return number

    def _step(self, number: int, stream: Stream, time: float | None, signal: SignalInput) -> Step:
        self._number = number
        return self.cache.begin(number, signal=signal, time=time, stream=stream)

    def _timestep(self, told: bool, args: Any, kwargs: Any) -> Any:
        """The first of the timesteps that the transformer is given; None without.

        A number, which has to come to the host, where nothing else of the decision does.
        """
        given = self._arguments.get("timestep", args, kwargs)
        if given is not None:
            first = torch.as_tensor(given).flatten()[0]
            needed = self._reads_time or not (self._measures or told)
            return float(first) if needed else first
        if self._reads_time:
            raise NotSupportedError(
                "this recipe goes by the timestep, which the transformer is to be given as "
                "timestep=...; it got none. Use a recipe and time that go by the step."
            )
        return None
