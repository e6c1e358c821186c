"""What a cache stands in for inside a transformer: a range of its blocks, or all of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, cast

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import Tensor
from torch.nn import Module

from kvcache.diffusion import BlockRange, Step
from kvcache.diffusion.signals import SignalInput
from kvcache.diffusion.streams import Stream
from kvcache.errors import NotSupportedError

from .blocks import Arguments, Block, States, aligned, find_blocks

Measure: TypeAlias = Callable[[Module, tuple[Any, ...], dict[str, Any]], Tensor]
"""Makes what a policy measures of the first block, and of what it is called with."""
Forward: TypeAlias = Callable[..., Any]


@dataclass
class Pass:
    """One call of a transformer, from its beginning to its end.

    begin: makes the step; given what the policy may measure.
    """

    stream: Stream
    begin: Callable[[SignalInput], Step]
    step: Step | None = None
    measured: SignalInput = None
    first: States = ()
    """What goes into the first block."""
    inputs: States = ()
    """What goes into the part that may be skipped."""

    def decide(self, measured: SignalInput) -> Step:
        """The step, decided about."""
        # A graph of what is measured would be of no use to anybody.
        with torch.no_grad():
            self.step = self.begin(measured)
        return self.step


class Site(ABC):
    """A place in a transformer. Hooks call it."""

    hooked: Sequence[tuple[int, Block]] = ()
    """The blocks to be hooked, each with its position."""

    @abstractmethod
    def whole(self, now: Pass, forward: Forward, args: Any, kwargs: Any) -> Any:
        """What the transformer gives; `forward` is its own."""

    @abstractmethod
    def block(self, now: Pass, position: int, forward: Forward, args: Any, kwargs: Any) -> Any:
        """What the block at `position` gives; `forward` is its own."""


class BlockSite(Site):
    """The blocks `scope` leaves between those that every step computes.

    Where a step is skipped they pass on what they are given, and the last of them gives the
    prediction: whatever else was added in between (ControlNet) is part of it already.
    """

    def __init__(
        self, transformer: Module, scope: BlockRange, signal: Measure | None, measures: bool
    ) -> None:
        self._blocks = find_blocks(transformer)
        self._first, self._end = scope.first, len(self._blocks) - scope.last
        if self._first >= self._end:
            raise ValueError(
                f"{scope.first} first and {scope.last} last of {len(self._blocks)} blocks leave "
                "none to skip. Make the scope smaller."
            )
        residual = signal is None and scope.first > 0
        self._signal = _signal(self._blocks[0], signal) if measures and not residual else None
        self._shapes: dict[Stream, list[torch.Size]] = {}
        positions = sorted({0, *range(self._first, self._end)})
        self.hooked = [(position, self._blocks[position]) for position in positions]

    def whole(self, now: Pass, forward: Forward, args: Any, kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    def block(self, now: Pass, position: int, forward: Forward, args: Any, kwargs: Any) -> Any:
        block = self._blocks[position]
        if position == 0:
            now.first = block.states(args, kwargs)
            now.measured = _made(self._signal, block, args, kwargs)
        if position == self._first:
            now.inputs = block.states(args, kwargs)
            now.decide(now.measured or (lambda: _added(now.first[0], now.inputs[0])))
        if now.step is None:
            return forward(*args, **kwargs)
        last = position == self._end - 1
        if now.step.computes_at():
            outputs = forward(*args, **kwargs)
            if last:
                self._record(now, now.step, block.given(outputs))
            return outputs
        if last:
            return block.outputs(self._predict(now, now.step))
        return block.outputs(block.states(args, kwargs))

    def _record(self, now: Pass, step: Step, given: States) -> None:
        self._shapes[now.stream] = [state.shape for state in given]
        inputs = aligned(now.inputs, self._shapes[now.stream])
        step.record(_detached(inputs), _detached(given))

    def _predict(self, now: Pass, step: Step) -> States:
        found = cast(States, step.predict(aligned(now.inputs, self._shapes[now.stream])))
        return found


class WholeSite(Site):
    """All of a transformer: what it returns is predicted.

    Where an array is measured, the part before the blocks runs in every step, to be measured.
    """

    def __init__(self, transformer: Module, signal: Measure | None, measures: bool) -> None:
        self._arguments = Arguments.of(transformer)
        self._kind: type[Any] = Transformer2DModelOutput
        self._measures = measures
        self._blocks = find_blocks(transformer) if measures else []
        self._signal = _signal(self._blocks[0], signal) if measures else None
        self.hooked = list(enumerate(self._blocks))

    def whole(self, now: Pass, forward: Forward, args: Any, kwargs: Any) -> Any:
        step = None if self._measures else now.decide(None)
        outputs = None
        if step is None or step.computes_at():
            outputs = forward(*args, **kwargs)
        step = now.step
        if step is None:  # it passed no block, which is for others to judge
            return outputs
        x = self._input(args, kwargs)
        if step.computes_at():
            step.record(x, _detached(self._arrays(outputs)))
            return outputs
        found = cast(States, step.predict(x))
        if self._arguments.get("return_dict", args, kwargs) is False:
            return found
        return self._kind(*found)

    def block(self, now: Pass, position: int, forward: Forward, args: Any, kwargs: Any) -> Any:
        block = self._blocks[position]
        if position == 0:
            now.decide(_made(self._signal, block, args, kwargs))
        if now.step is None or now.step.computes_at():
            return forward(*args, **kwargs)
        return block.outputs(block.states(args, kwargs))

    def _input(self, args: Any, kwargs: Any) -> Tensor:
        names = self._arguments.positions
        name = "hidden_states" if "hidden_states" in names else next(iter(names))
        x = self._arguments.get(name, args, kwargs)
        if not isinstance(x, Tensor):
            raise NotSupportedError(
                f"scope=None needs a transformer that is given a tensor as {name}; got "
                f"{type(x).__name__}. Use scope=BlockRange(1)."
            )
        return x.detach()

    def _arrays(self, outputs: Any) -> States:
        if not isinstance(outputs, tuple):
            self._kind = type(outputs)
            outputs = outputs.to_tuple()
        if not all(isinstance(output, Tensor) for output in outputs):
            raise NotSupportedError(
                "scope=None needs a transformer that returns tensors; got "
                f"{[type(output).__name__ for output in outputs]}. Use scope=BlockRange(1)."
            )
        return tuple(outputs)


def _signal(first: Block, signal: Measure | None) -> Measure:
    if signal is not None:
        return signal
    if not first.modulating:
        raise NotSupportedError(
            "without first blocks that are always computed, a policy measures the modulated "
            "input of the first block, from an AdaLayerNormZero named norm1 or norm; "
            f"{type(first.module).__name__} has none. Use scope=BlockRange(1), or give "
            "signal=lambda block, args, kwargs: ..."
        )
    return lambda _, args, kwargs: first.modulated(args, kwargs)


def _made(signal: Measure | None, block: Block, args: Any, kwargs: Any) -> SignalInput:
    """Computes `signal` if it is wanted."""
    return None if signal is None else lambda: signal(block.module, args, kwargs)


def _added(before: Tensor, after: Tensor) -> Tensor:
    if before.shape != after.shape:
        raise NotSupportedError(
            "the first blocks of a scope must keep the shape of the hidden states, for what they "
            f"add is measured; got {tuple(after.shape)} from {tuple(before.shape)}. Make `first` "
            "smaller, or give signal=lambda block, args, kwargs: ..."
        )
    return after - before


def _detached(states: States) -> States:
    return tuple(state.detach() for state in states)
