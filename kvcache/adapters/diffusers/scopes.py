"""The part of a transformer to be skipped: a range of its blocks, or all of it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import cast

import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils.outputs import BaseOutput
from torch import Tensor

from kvcache.diffusion import BlockRange, Step
from kvcache.diffusion.streams import Stream
from kvcache.errors import NotSupportedError

from .blocks import Arguments, Block, States, aligned, find_blocks
from .call import Measure, TransformerCall
from .hooks import Args, Forward, Kwargs


class ScopeHook(ABC):
    """Runs in place of the forwards of a transformer and of its blocks."""

    hooked: Sequence[tuple[int, Block]] = ()
    """The blocks to be hooked, each with its position."""

    @abstractmethod
    def whole(self, call: TransformerCall, forward: Forward, args: Args, kwargs: Kwargs) -> object:
        """Return the outputs of the transformer. forward: its own."""

    @abstractmethod
    def block(
        self, call: TransformerCall, position: int, forward: Forward, args: Args, kwargs: Kwargs
    ) -> object:
        """Return the outputs of the block at `position`. forward: its own."""


class BlockScopeHook(ScopeHook):
    """The blocks in the range of `scope`, between blocks computed in every step.

    Where a step is skipped they pass on what they are given, and the last of them gives the
    prediction: whatever else was added in between (ControlNet) is part of it already.
    """

    def __init__(
        self,
        transformer: torch.nn.Module,
        scope: BlockRange,
        signal: Measure | None,
        measures: bool,
        residual: bool,
    ) -> None:
        self._blocks = find_blocks(transformer)
        self._first, self._end = scope.first, len(self._blocks) - scope.last
        if self._first >= self._end:
            raise ValueError(
                f"{scope.first} first and {scope.last} last of {len(self._blocks)} blocks leave "
                "none to skip. Make the scope smaller."
            )
        self._keeps_inputs = residual
        adds = signal is None and scope.first > 0
        self._measures_added = measures and adds
        self._signal = _signal(self._blocks[0], signal) if measures and not adds else None
        self._shapes: dict[Stream, list[torch.Size]] = {}
        """Shapes of the states that the last block gave, by stream."""
        # Block 0 is hooked even if every step computes it: its inputs are part of the signal.
        positions = sorted({0, *range(self._first, self._end)})
        self.hooked = [(position, self._blocks[position]) for position in positions]

    def whole(self, call: TransformerCall, forward: Forward, args: Args, kwargs: Kwargs) -> object:
        outputs = forward(*args, **kwargs)
        if call.step is not None and not call.left:
            raise NotSupportedError(
                "the last block of a scope gives the prediction; this call left it out, as a "
                "guidance that skips layers does. Make `last` of the scope larger."
            )
        return outputs

    def block(
        self, call: TransformerCall, position: int, forward: Forward, args: Args, kwargs: Kwargs
    ) -> object:
        block = self._blocks[position]
        if position == 0:
            states = block.states_in(args, kwargs)
            call.entering = _copied(states[:1]) if self._measures_added else states
            call.signal = _deferred(self._signal, block, args, kwargs)
        if position == self._first:
            states = block.states_in(args, kwargs)
            call.inputs = _copied(states) if self._keeps_inputs else states
            call.decide(call.signal or (lambda: _added(call.entering[0], call.inputs[0])))
        if call.step is None:
            return forward(*args, **kwargs)
        # The last one records or predicts; the others pass their states on where it predicts.
        last = position == self._end - 1
        call.left = call.left or last
        if call.step.computes_at():
            outputs = forward(*args, **kwargs)
            if last:
                self._record(call, call.step, block.states_out(outputs))
            return outputs
        if last:
            return block.outputs(self._predict(call, call.step))
        return block.outputs(block.states_in(args, kwargs))

    def _record(self, call: TransformerCall, step: Step, given: States) -> None:
        self._shapes[call.stream] = [state.shape for state in given]
        inputs = aligned(call.inputs, self._shapes[call.stream])
        step.record(_detached(inputs), _detached(given))

    def _predict(self, call: TransformerCall, step: Step) -> States:
        return cast(States, step.predict(aligned(call.inputs, self._shapes[call.stream])))


class WholeScopeHook(ScopeHook):
    """All of a transformer: its outputs are predicted.

    Where an array is measured, the part before the blocks runs in every step, to be measured.
    """

    def __init__(
        self,
        transformer: torch.nn.Module,
        signal: Measure | None,
        measures: bool,
        residual: bool,
    ) -> None:
        self._arguments, self._keeps_inputs = Arguments.of(transformer), residual
        # The class of outputs, until a computed step shows another one.
        self._kind: Callable[..., object] = Transformer2DModelOutput
        self._measures = measures
        self._blocks = find_blocks(transformer) if measures else []
        self._signal = _signal(self._blocks[0], signal) if measures else None
        self.hooked = list(enumerate(self._blocks))

    def whole(self, call: TransformerCall, forward: Forward, args: Args, kwargs: Kwargs) -> object:
        x = self._input(args, kwargs)
        step = None if self._measures else call.decide(None)
        outputs = None
        if step is None or step.computes_at():
            outputs = forward(*args, **kwargs)
        step = call.step
        if step is None:  # it passed no block, which is for others to judge
            return outputs
        if step.computes_at():
            step.record(x, _detached(self._arrays(outputs)))
            return outputs
        prediction = cast(States, step.predict(x))
        # Not passed means True, as everywhere in diffusers.
        if self._arguments.get("return_dict", args, kwargs) is False:
            return prediction
        return self._kind(*prediction)

    def block(
        self, call: TransformerCall, position: int, forward: Forward, args: Args, kwargs: Kwargs
    ) -> object:
        block = self._blocks[position]
        if position == 0:
            call.decide(_deferred(self._signal, block, args, kwargs))
        if call.step is None or call.step.computes_at():
            return forward(*args, **kwargs)
        return block.outputs(block.states_in(args, kwargs))

    def _input(self, args: Args, kwargs: Kwargs) -> Tensor:
        """Return the hidden states among the arguments of the transformer.

        Raises: NotSupportedError if they are no tensor.
        """
        names = self._arguments.positions
        name = "hidden_states" if "hidden_states" in names else next(iter(names))
        x = self._arguments.get(name, args, kwargs)
        if not isinstance(x, Tensor):
            raise NotSupportedError(
                f"scope=None needs a transformer that is given a tensor as {name}; got "
                f"{type(x).__name__}. Use scope=BlockRange(1)."
            )
        return _copied((x.detach(),))[0] if self._keeps_inputs else x.detach()

    def _arrays(self, outputs: object) -> States:
        """Return the tensors in `outputs`, and remember the class they came in.

        Raises: NotSupportedError for anything but tensors.
        """
        if not isinstance(outputs, tuple):
            self._kind = type(outputs)
            outputs = cast(BaseOutput, outputs).to_tuple()
        if not all(isinstance(output, Tensor) for output in outputs):
            raise NotSupportedError(
                "scope=None needs a transformer that returns tensors; got "
                f"{[type(output).__name__ for output in outputs]}. Use scope=BlockRange(1)."
            )
        return tuple(outputs)


def _signal(first: Block, signal: Measure | None) -> Measure:
    """Return `signal`, or the measurement of the modulated input of the `first` block.

    Raises: NotSupportedError if that block modulates nothing.
    """
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


def _deferred(
    signal: Measure | None, block: Block, args: Args, kwargs: Kwargs
) -> Callable[[], Tensor] | None:
    """Return a function to compute `signal` once it is wanted; None if there is none."""
    return None if signal is None else lambda: signal(block.module, args, kwargs)


def _added(before: Tensor, after: Tensor) -> Tensor:
    """Return the change of the hidden states in the first blocks.

    Raises: NotSupportedError if they changed their shape.
    """
    if before.shape != after.shape:
        raise NotSupportedError(
            "the first blocks of a scope must keep the shape of the hidden states, for what they "
            f"add is measured; got {tuple(after.shape)} from {tuple(before.shape)}. Make `first` "
            "smaller, or give signal=lambda block, args, kwargs: ..."
        )
    return after - before


def _copied(states: States) -> States:
    """Return copies of `states`: blocks may write to what they are given."""
    return tuple(state.clone() for state in states)


def _detached(states: States) -> States:
    return tuple(state.detach() for state in states)
