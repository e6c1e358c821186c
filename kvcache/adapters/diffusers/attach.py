"""Puts a recipe into a transformer of diffusers, and takes it out again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, Self, TypeAlias, cast, get_args

from kvcache._interrupts import uninterrupted
from kvcache.diffusion import BlockRange, DiffusionCache, Recipe, Step
from kvcache.diffusion.signals import SignalInput
from kvcache.errors import BackendNotAvailableError, NotSupportedError

try:
    import torch
    from torch import Tensor
    from torch.nn import Module

    from kvcache.adapters.diffusers import hooks as _hooks

    from .call import Measure, TransformerCall
    from .counter import FIRST, NextStep, StepCounter
    from .hooks import Args, Forward, Kwargs
    from .inputs import TIMESTEPS, CallInputs, InputReader
    from .passes import PASSES, KnownPass, Passes
    from .scopes import BlockScopeHook, ScopeHook, WholeScopeHook
except ImportError as error:
    raise BackendNotAvailableError(
        f"this needs diffusers and torch, of which one is missing or too old ({error}). "
        "Try: pip install 'kvcache[diffusers]'"
    ) from error

__all__ = ["STREAMS", "Attached", "Measure", "attach"]

FIRST_BLOCK = BlockRange(1)
Time: TypeAlias = Literal["step", "timestep"]

STREAMS = (
    "cond",
    "uncond",
    "cond_uncond",
    "uncond_stg",
    "uncond_modality",
    "pred_cond",
    "pred_uncond",
    "pred_cond_skip",
    "pred_cond_seg",
    "pred_cond_stg",
    "pred_cond_modality",
)
"""Names that the pipelines and guiders of diffusers give to their passes."""


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
    streams: what ``cache_context`` is called with. Calls without a context are told apart by their
        conditions, and by their order at a timestep; their streams are "call 1", "call 2", ...
    shared: whether the first stream that comes to a step decides it for the others, too.
    signal: ``signal(block, args, kwargs)``, with the first block and what it is called with, gives
        the tensor that the policy measures. Default: what the first blocks of `scope` add to the
        hidden states, as FBCache; where it has none, their modulated input, as TeaCache.
    time: what predictions go by, the number of the step or the `timestep` that the transformer is
        given, which has to be brought to the host. Policies of the timestep see it either way.

    Raises: NotSupportedError for a transformer that has a cache already, blocks that diffusers
        does not describe or describes wrongly, or without a signal to measure; ValueError for a
        scope without blocks; DiffusionCacheError for a stream named as those without a context.
    """
    if time not in get_args(Time):
        raise ValueError(f"time is one of {get_args(Time)}; got {time!r}.")
    return Attached(transformer, recipe, scope, streams, shared, signal, time)


class Attached:
    """A recipe at work in a transformer, made by :func:`attach`.

    A run is over when a pipeline says so at its end, after ``Limits.steps`` steps, at
    :meth:`reset`, and where the shapes, dtypes or device of latents or conditions change. If the
    pipeline tells its ``step_index``, also where that goes back; if not, where the `timestep` that
    the transformer is given moves against the direction of the run, or the latents jump: to
    those that the run began with, further than they measure, as other noise is, or far aside of
    where they went, as the same noise mixed with an image is. Where it is mixed with little of it,
    or after a single step, that cannot be told: call :meth:`reset` before such a run. The
    direction is down, until two steps in a row move up; the first of these begins a run anew.

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
        self.cache = DiffusionCache(recipe, (*streams, *PASSES), shared=shared)
        """For its stats, nbytes and arrays."""
        measure = recipe.policy.signal
        self._reads_time = time == "timestep" or (measure is not None and not measure.array)
        self._measures = measure is not None and measure.array
        self._counter = StepCounter(shared=shared, steps=recipe.limits.steps)
        self._passes = Passes()
        self._transformer, self._inputs = transformer, InputReader(transformer)
        self._call: TransformerCall | None = None
        self._scope: ScopeHook
        residual = recipe.predictor.residual
        if scope is None:
            self._scope = WholeScopeHook(transformer, signal, self._measures, residual)
        else:
            self._scope = BlockScopeHook(transformer, scope, signal, self._measures, residual)
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
        self._passes.reset()

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
        inputs = self._inputs.read(args, kwargs)
        pass_ = self._pass(inputs)
        self._call = call = TransformerCall(pass_.stream, partial(self._begin, pass_))
        try:
            outputs = self._scope.whole(call, forward, args, kwargs)
        finally:
            # A block that somebody calls by itself later is no part of this call.
            self._call = None
        # Only now: a forward that raises leaves the cache as it was.
        if call.step is not None:
            with uninterrupted():
                call.step.commit()
                self._advance(pass_)
        return outputs

    def _run_block(self, position: int, forward: Forward, args: Args, kwargs: Kwargs) -> object:
        """Run in place of the forward of the block at `position`."""
        if self._call is None:  # somebody calls it by itself
            return forward(*args, **kwargs)
        return self._scope.block(self._call, position, forward, args, kwargs)

    def _pass(self, inputs: CallInputs) -> _Pass:
        """Return the pass that a call with these inputs makes.

        Raises: NotSupportedError if the recipe goes by the timestep, and there is none.
        """
        context, timestep = self._context, inputs.timestep
        if self._reads_time and timestep is None:
            raise NotSupportedError(
                "this recipe goes by the timestep, which the transformer is to be given as "
                f"{' or '.join(TIMESTEPS)}; it got none, as timestep=... or otherwise. Use a "
                "recipe and time that go by the step."
            )
        if context.name is not None:
            # On its device: it comes to the host with a decision, unless that goes by it.
            time = float(timestep) if self._reads_time and timestep is not None else timestep
            return _Pass(context.name, context.step, time, inputs)
        number = None if timestep is None else float(timestep)
        known = self._passes.next(number, inputs.conditions)
        return _Pass(known.stream, None, number, inputs, known)

    def _begin(self, pass_: _Pass, signal: SignalInput) -> Step:
        """Begin the step of a call, once its signal can be measured.

        Raises: NotSupportedError for a pass without a context that cannot be told from others.
        """
        known = pass_.known
        alike = known.alike if known else None
        step = self._counter.next(pass_.stream, pass_.told, pass_.timestep, pass_.inputs, alike)
        if known and known.surplus:
            step = step.settled()
            if not step.restarts:
                self._passes.refuse()
                step = NextStep(0, restarts=True)
        doubtful = step.doubtful
        if self._measures and isinstance(doubtful, Tensor):
            signal = cast(Tensor, signal() if callable(signal) else signal)
            begun = self._step(pass_, step, _nan_where(doubtful, signal))
            # NaN may also come of the signal itself: only then does this wait for the device.
            if not (math.isnan(begun.change) and doubtful):
                return begun
        return self._step(pass_, step.settled() if doubtful else step, signal)

    def _step(self, pass_: _Pass, step: NextStep, signal: SignalInput) -> Step:
        if step.restarts and pass_.known:
            pass_.stream = PASSES[0]
        pass_.step = step
        time = pass_.timestep if self._reads_time and isinstance(pass_.timestep, float) else None
        return self.cache.begin(
            step.number, signal=signal, time=time, stream=pass_.stream, restart=step.restarts
        )

    def _advance(self, pass_: _Pass) -> None:
        """Note that a pass has been made; its step is committed."""
        stream, step, inputs = pass_.stream, pass_.step, pass_.inputs
        if step.restarts:
            self._passes.reset()
        self._counter.advance(stream, step, pass_.timestep, inputs)
        if pass_.known and not isinstance(pass_.timestep, Tensor):
            self._passes.advance(stream, pass_.known.conditions, pass_.timestep)


@dataclass
class _Pass:
    """One pass through the transformer, as a call makes it."""

    stream: str
    told: int | None
    """Number of its step, if a pipeline tells it."""
    timestep: float | Tensor | None
    """A number where decisions need it on the host, a scalar on its device where not."""
    inputs: CallInputs
    known: KnownPass | None = None
    """Of a call without a context: the pass that it was recognised as."""
    step: NextStep = FIRST
    """Its step, once it has begun."""


def _nan_where(condition: Tensor, signal: Tensor) -> Tensor:
    """Return `signal`, all of it NaN where `condition` (bool scalar) holds.

    The change measured of it is NaN then, so that the one scalar that a decision waits for tells
    of the condition, too, without another wait for the device.
    """
    return signal + torch.where(condition, torch.nan, 0.0).to(signal)
