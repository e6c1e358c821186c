"""The blocks of a diffusers transformer: where they are, what goes in, and what comes out."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from diffusers.hooks._common import _ALL_TRANSFORMER_BLOCK_IDENTIFIERS as LISTS
from diffusers.hooks._helpers import TransformerBlockRegistry
from diffusers.models.normalization import (
    AdaLayerNormZero,
    AdaLayerNormZeroSingle,
    SD35AdaLayerNormZeroX,
)
from torch import Tensor
from torch.nn import Module, ModuleList

from kvcache.errors import NotSupportedError

States: TypeAlias = tuple[Tensor, ...]
"""What runs through the blocks: hidden states, then those of the encoder if blocks change them."""

_MODULATING = (AdaLayerNormZero, AdaLayerNormZeroSingle, SD35AdaLayerNormZeroX)


@dataclass(frozen=True)
class Arguments:
    """Finds arguments of a module's forward by name, however they are passed."""

    positions: Mapping[str, int]

    @classmethod
    def of(cls, module: Module) -> Arguments:
        """Those of `module`, by its class: a hook hides them."""
        names = [*inspect.signature(type(uncompiled(module)).forward).parameters][1:]
        return cls({name: position for position, name in enumerate(names)})

    def get(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The argument `name`; None if it is not passed."""
        position = self.positions.get(name, len(args))
        return kwargs.get(name, args[position] if position < len(args) else None)


@dataclass(frozen=True)
class Block:
    """One block, and how the states stand among its arguments and outputs."""

    module: Module
    arguments: Arguments
    names: tuple[str, ...]
    """The arguments that are states, hidden states first."""
    places: tuple[int, ...]
    """Where each stands in the tuple that the block gives; a single one may come bare."""

    def states(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> States:
        """What goes in. One that is None is left out."""
        found = (self.arguments.get(name, args, kwargs) for name in self.names)
        return tuple(state for state in found if state is not None)

    def given(self, outputs: Any) -> States:
        """What came out. One that is None is left out: nobody after the last block reads it."""
        if isinstance(outputs, Tensor):
            return (outputs,)
        return tuple(outputs[place] for place in self.places if outputs[place] is not None)

    def outputs(self, states: States) -> Any:
        """What the block would give, had it made these states."""
        if len(self.places) == 1:
            return states[0]
        given = dict(zip(self.places, states, strict=False))
        return tuple(given.get(place) for place in range(len(self.places)))

    @property
    def modulating(self) -> Module | None:
        """Its first layer if that is a norm that the timestep modulates, as TeaCache looks at."""
        module = uncompiled(self.module)
        norm = getattr(module, "norm1", getattr(module, "norm", None))
        known = isinstance(norm, _MODULATING) and "temb" in self.arguments.positions
        return norm if known else None

    def modulated(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor:
        """What :attr:`modulating` makes of the hidden states: the signal of TeaCache."""
        assert self.modulating is not None  # noqa: S101 - asked for where a signal is chosen
        emb = self.arguments.get("temb", args, kwargs)
        normed: tuple[Tensor, ...] = self.modulating(self.states(args, kwargs)[0], emb=emb)
        return normed[0]


def uncompiled(module: Module) -> Module:
    """What ``torch.compile`` has wrapped, or `module` itself."""
    inner: Module = getattr(module, "_orig_mod", module)
    return inner


def find_blocks(transformer: Module) -> list[Block]:
    """Every block of `transformer`, in the order in which they run.

    Raises: NotSupportedError if there is none, or one that diffusers does not describe.
    """
    lists = [
        child
        for name, child in transformer.named_children()
        if name in LISTS and isinstance(child, ModuleList)
    ]
    blocks = [_described(block) for child in lists for block in child]
    if not blocks:
        raise NotSupportedError(
            f"a transformer has its blocks in a ModuleList named {', '.join(sorted(LISTS))}; "
            f"{type(transformer).__name__} has none. Attach to the transformer of a pipeline, "
            "pipeline.transformer."
        )
    return blocks


def _described(block: Module) -> Block:
    kind = type(uncompiled(block))
    try:
        facts: Any = TransformerBlockRegistry.get(kind)
    except ValueError as error:
        raise NotSupportedError(
            f"diffusers must know what a block gives; it does not for {kind.__name__}. Tell it "
            "with TransformerBlockRegistry.register(), or attach to the whole network: scope=None, "
            "and a policy that measures no array."
        ) from error
    places = (facts.return_hidden_states_index, facts.return_encoder_hidden_states_index)
    names = (facts.hidden_states_argument_name, facts.encoder_hidden_states_argument_name)
    known = [(name, place) for name, place in zip(names, places, strict=True) if place is not None]
    return Block(
        block,
        Arguments.of(block),
        tuple(name for name, _ in known),
        tuple(place for _, place in known),
    )


def aligned(states: States, shapes: Sequence[torch.Size]) -> States:
    """Of the `states` at the first block those that the last one gives on, in these shapes.

    The last block of Stable Diffusion 3 drops the text. In the middle of FLUX.2 text and image
    tokens become one sequence, [text, image].
    """
    joins = len(states) == 2 and len(shapes) == 1 and states[0].shape != shapes[0]
    return (torch.cat(states[::-1], dim=1),) if joins else states[: len(shapes)]
