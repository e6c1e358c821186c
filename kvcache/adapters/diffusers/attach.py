"""Puts a recipe into a transformer of diffusers, and takes it out again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Literal, Self, TypeAlias, cast, get_args

from kvcache.diffusion import BlockRange, DiffusionCache, Recipe, Step
from kvcache.diffusion.signals import SignalInput
from kvcache.diffusion.streams import Stream
from kvcache.errors import BackendNotAvailableError, NotSupportedError

try:
    import torch
    from torch import Tensor
    from torch.nn import Module

    from kvcache.adapters.diffusers import hooks as _hooks

    from .blocks import Arguments
    from .call import Measure, TransformerCall
    from .counter import StepCounter
    from .hooks import Args, Forward, Kwargs
    from .scopes import BlockScopeHook, ScopeHook, WholeScopeHook
except ImportError as error:
    raise BackendNotAvailableError(
        f"this needs diffusers and torch, of which one is missing or too old ({error}). "
        "Try: pip install 'kvcache[diffusers]'"
    ) from error

__all__ = ["STREAMS", "Attached", "Measure", "attach"]

FIRST_BLOCK = BlockRange(1)
Time: TypeAlias = Literal["step", "timestep"]

STREAMS = ("cond", "uncond", "cond_uncond", "uncond_stg", "uncond_modality")
"""Names that the pipelines of diffusers give to their passes."""


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
    """Let `recipe` skip steps of `transformer` until :meth:`Attached.detach`.

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
        self._measures = measure is not None and measure.array
        self._counter = StepCounter(shared=shared, steps=recipe.limits.steps)
        self._transformer, self._arguments = transformer, Arguments.of(transformer)
        self._call: TransformerCall | None = None
        self._number = 0
        self._scope: ScopeHook
        if scope is None:
            self._scope = WholeScopeHook(transformer, signal, self._measures)
        else:
            self._scope = BlockScopeHook(transformer, scope, signal, self._measures)
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
        self._counter.reset()

    def detach(self) -> None:
        """Give the transformer its own forwards back, and reset. Again: no effect."""
        _hooks.remove(self._hooked)
        self._hooked = []
        self.reset()

    def _hook(self) -> None:
        """Put a hook on the transformer, and on every block named by the scope."""
        root = _hooks.RootHook(self._run_whole, self.reset)
        self._context = root.context
        hooks: list[tuple[Module, _hooks.Hook]] = [(self._transformer, root)]
        for position, block in self._scope.hooked:
            hooks.append((block.module, _hooks.Hook(partial(self._run_block, position))))
        for module, hook in hooks:
            _hooks.register(module, hook)
        self._hooked = [module for module, _ in hooks]

    def _run_whole(self, forward: Forward, args: Args, kwargs: Kwargs) -> object:
        """Run in place of the forward of the transformer."""
        _hooks.check_no_other(self._transformer)  # one may have been enabled since
        context = self._context
        timestep = self._timestep(context.step is not None, args, kwargs)
        stream = self.cache.streams[0] if context.name is None else context.name
        begin = partial(self._begin, stream, context.step, timestep)
        self._call = call = TransformerCall(stream, begin)
        try:
            outputs = self._scope.whole(call, forward, args, kwargs)
        finally:
            # A block that somebody calls by itself later is no part of this call.
            self._call = None
        # Only now: a forward that raises leaves the cache as it was.
        if call.step is not None:
            call.step.commit()
            self._counter.advance(stream, self._number, timestep)
        return outputs

    def _run_block(self, position: int, forward: Forward, args: Args, kwargs: Kwargs) -> object:
        """Run in place of the forward of the block at `position`."""
        if self._call is None:  # somebody calls it by itself
            return forward(*args, **kwargs)
        return self._scope.block(self._call, position, forward, args, kwargs)

    def _begin(
        self,
        stream: Stream,
        told: int | None,
        timestep: float | Tensor | None,
        signal: SignalInput,
    ) -> Step:
        """Begin the step of a call for `stream`; where timesteps rise, the first of another run.

        told: its number, if a pipeline tells it. timestep: a number, or a tensor on the device.
        """
        number, restarts = self._counter.next(stream, told, timestep)
        time = timestep if self._reads_time and isinstance(timestep, float) else None
        if isinstance(restarts, Tensor):
            signal = cast(Tensor, signal() if callable(signal) else signal)
            step = self._step(number, stream, time, _nan_where(restarts, signal))
            # NaN may also come of the signal itself: only then does this wait for the device.
            if not (math.isnan(step.change) and restarts):
                return step
        elif not restarts:
            return self._step(number, stream, time, signal)
        self.reset()
        return self._step(0, stream, time, signal)

    def _step(self, number: int, stream: Stream, time: float | None, signal: SignalInput) -> Step:
        self._number = number
        return self.cache.begin(number, signal=signal, time=time, stream=stream)

    def _timestep(self, told: bool, args: Args, kwargs: Kwargs) -> float | Tensor | None:
        """Return the first timestep among the arguments of the transformer; None without.

        A number where decisions need it on the host, a tensor on its device where not.

        Raises: NotSupportedError if the recipe goes by the timestep, and there is none.
        """
        timesteps = self._arguments.get("timestep", args, kwargs)
        if timesteps is not None:
            first = torch.as_tensor(timesteps).flatten()[0]
            needed = self._reads_time or not (self._measures or told)
            return float(first) if needed else first
        if self._reads_time:
            raise NotSupportedError(
                "this recipe goes by the timestep, which the transformer is to be given as "
                "timestep=...; it got none. Use a recipe and time that go by the step."
            )
        return None


def _nan_where(condition: Tensor, signal: Tensor) -> Tensor:
    """Return `signal`, all of it NaN where `condition` (bool scalar) holds.

    The change measured of it is NaN then, so that the one scalar that a decision waits for tells
    of the condition, too, without another wait for the device.
    """
    return signal + torch.where(condition, torch.nan, 0.0).to(signal)
