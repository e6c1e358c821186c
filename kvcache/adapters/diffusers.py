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

from collections.abc import Sequence
from functools import partial
from typing import Any, Literal, Self, TypeAlias, get_args

from kvcache.diffusion import BlockRange, DiffusionCache, Recipe, Step
from kvcache.diffusion.signals import Measured
from kvcache.diffusion.streams import Stream
from kvcache.errors import BackendNotAvailableError, NotSupportedError

try:
    import torch
    from torch.nn import Module

    from . import _hooks
    from ._blocks import Arguments
    from ._clock import Clock
    from ._sites import BlockSite, Forward, Measure, Pass, Site, WholeSite
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
    :meth:`reset`, and where a ``step_index`` that the pipeline tells goes backwards. Loops of your
    own that have none of these, or were interrupted, call :meth:`reset`. So do users of
    transformers that are no ``CacheMixin``, Stable Diffusion 3 for one: no pipeline tells them.

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
        measures = measure is not None and measure.array
        self._site: Site
        if scope is None:
            self._site = WholeSite(transformer, signal, measures)
        else:
            self._site = BlockSite(transformer, scope, signal, measures)
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
        stream, number = self._place()
        time = self._time(args, kwargs)
        begin = partial(self._begin, number, stream, time)
        self._now = now = Pass(stream, begin)
        try:
            outputs = self._site.whole(now, forward, args, kwargs)
        finally:
            self._now = None
        if now.step is not None:
            now.step.commit()
            self._clock.tick(stream, number)
        return outputs

    def _block(self, position: int, forward: Forward, args: Any, kwargs: Any) -> Any:
        """In place of the forward of a block."""
        if self._now is None:  # somebody calls it by itself
            return forward(*args, **kwargs)
        return self._site.block(self._now, position, forward, args, kwargs)

    def _begin(self, number: int, stream: Stream, time: float | None, signal: Measured) -> Step:
        return self.cache.begin(number, signal=signal, time=time, stream=stream)

    def _place(self) -> tuple[Stream, int]:
        """The stream and number of the step that a call is part of."""
        stream = self.cache.streams[0] if self._context.name is None else self._context.name
        told = self._context.step
        return stream, self._clock.next(stream) if told is None else told

    def _time(self, args: Any, kwargs: Any) -> float | None:
        if not self._reads_time:
            return None
        timestep = self._arguments.get("timestep", args, kwargs)
        if timestep is None:
            raise NotSupportedError(
                "this recipe goes by the timestep, which the transformer is to be given as "
                "timestep=...; it got none. Use a recipe and time that go by the step."
            )
        return float(torch.as_tensor(timestep).flatten()[0])
