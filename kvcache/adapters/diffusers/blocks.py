"""The blocks of a diffusers transformer: their places, inputs and outputs."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias, cast

import torch

# Private, but the only place where diffusers tells of the blocks of its models.
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
"""Tensors that run through blocks: hidden states, then the encoder's if blocks change them."""

_MODULATING = (AdaLayerNormZero, AdaLayerNormZeroSingle, SD35AdaLayerNormZeroX)


@dataclass(frozen=True)
class Arguments:
    """Finds arguments of a module's forward by name, however they are passed."""

    positions: Mapping[str, int]

    @classmethod
    def of(cls, module: Module) -> Arguments:
        """Return the arguments of the forward of `module`."""
        # By its class: a hook hides the signature of the instance.
        names = [*inspect.signature(type(uncompiled(module)).forward).parameters][1:]
        return cls({name: position for position, name in enumerate(names)})

    def get(self, name: str, args: Sequence[object], kwargs: Mapping[str, object]) -> object:
        """Return the argument `name`; None if it is not passed."""
        position = self.positions.get(name, len(args))
        return kwargs.get(name, args[position] if position < len(args) else None)


@dataclass(frozen=True)
class Block:
    """One block, and how the states stand among its arguments and outputs."""

    module: Module
    arguments: Arguments
    names: tuple[str, ...]
    """Names of the arguments that are states, hidden states first."""
    places: tuple[int, ...]
    """Place of each state in the tuple that the block returns; a single one may come bare."""

    def states_in(self, args: Sequence[object], kwargs: Mapping[str, object]) -> States:
        """Return the states among the arguments, leaving out None."""
        states = (self.arguments.get(name, args, kwargs) for name in self.names)
        return tuple(cast(Tensor, state) for state in states if state is not None)

    def states_out(self, outputs: object) -> States:
        """Return the states among `outputs` of the block, leaving out None."""
        if isinstance(outputs, Tensor):
            return (outputs,)
        # None comes from a last block: nobody after it reads that state.
        several = cast(Sequence[Tensor | None], outputs)
        states = (several[place] for place in self.places)
        return tuple(state for state in states if state is not None)

    def outputs(self, states: States) -> Tensor | tuple[Tensor | None, ...]:
        """Return the outputs of the block, had it made `states`."""
        if len(self.places) == 1:
            return states[0]
        by_place = dict(zip(self.places, states, strict=False))
        return tuple(by_place.get(place) for place in range(len(self.places)))

    @property
    def modulating(self) -> Module | None:
        """Its first layer if the timestep modulates it, a norm as TeaCache looks at; else None."""
        module = uncompiled(self.module)
        norm = getattr(module, "norm1", getattr(module, "norm", None))
        known = isinstance(norm, _MODULATING) and "temb" in self.arguments.positions
        return norm if known else None

    def modulated(self, args: Sequence[object], kwargs: Mapping[str, object]) -> Tensor:
        """Return the hidden states modulated by :attr:`modulating`: the signal of TeaCache."""
        assert self.modulating is not None  # noqa: S101 - asked for where a signal is chosen
        emb = self.arguments.get("temb", args, kwargs)
        normed: tuple[Tensor, ...] = self.modulating(self.states_in(args, kwargs)[0], emb=emb)
        return normed[0]


def uncompiled(module: Module) -> Module:
    """Return the module inside a wrapper of ``torch.compile``, or `module` itself."""
    inner: Module = getattr(module, "_orig_mod", module)
    return inner


def find_blocks(transformer: Module) -> list[Block]:
    """Return every block of `transformer`, in the order of their calls.

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
    """Return `block` with the places of its states, as diffusers describes its class.

    Raises: NotSupportedError for a class that diffusers does not describe.
    """
    kind = type(uncompiled(block))
    try:
        metadata = TransformerBlockRegistry.get(kind)
    except ValueError as error:
        raise NotSupportedError(
            f"diffusers must know what a block gives; it does not for {kind.__name__}. Tell it "
            "with TransformerBlockRegistry.register(), or attach to the whole network: scope=None, "
            "and a policy that measures no array."
        ) from error
    # None, whatever diffusers declares, for a state that the block does not return.
    states: tuple[tuple[str, int | None], ...] = (
        (metadata.hidden_states_argument_name, metadata.return_hidden_states_index),
        (metadata.encoder_hidden_states_argument_name, metadata.return_encoder_hidden_states_index),
    )
    arguments = Arguments.of(block)
    places = {_argument(name, arguments, kind): at for name, at in states if at is not None}
    return Block(block, arguments, tuple(places), tuple(places.values()))


def _argument(name: str, arguments: Arguments, kind: type[Module]) -> str:
    """Return the name that a block of `kind` really gives to its argument `name`.

    Raises: NotSupportedError for a name that diffusers tells and the block does not have.
    """
    if name in arguments.positions:
        return name
    # diffusers does not tell that the blocks of Z-Image name their hidden states otherwise.
    if name == "hidden_states" and "x" in arguments.positions:
        return "x"
    raise NotSupportedError(
        f"diffusers says that {kind.__name__} takes {name!r}, which is none of its arguments, "
        f"{', '.join(arguments.positions)}. Tell it the right name with "
        "TransformerBlockRegistry.register(), or attach to the whole network: scope=None, and a "
        "policy that measures no array."
    )


def aligned(states: States, shapes: Sequence[torch.Size]) -> States:
    """Return `states` at the first block as the last block gives them on, in these shapes.

    The last block of Stable Diffusion 3 drops the text. In the middle of FLUX.2 text and image
    tokens become one sequence, [text, image].
    """
    joins = len(states) == 2 and len(shapes) == 1 and states[0].shape != shapes[0]
    return (torch.cat(states[::-1], dim=1),) if joins else states[: len(shapes)]
