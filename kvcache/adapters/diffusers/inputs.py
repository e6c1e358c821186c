"""The arguments of a transformer that tell which pass of which run a call is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor
from torch.nn import Module

from .blocks import Arguments

TIMESTEPS = ("timestep", "timesteps", "t")
"""Names that the transformers of diffusers give to the timestep."""

CONDITIONS = (
    "encoder_hidden_states",
    "encoder_hidden_states_image",
    "encoder_hidden_states_llama3",
    "encoder_hidden_states_t5",
    "pooled_projections",
    "pooled_embeds",
    "cap_feats",
    "class_labels",
    "input_ids",
    "prior_token_id",
    "text_bth",
)
"""Names that they give to conditions. Within a run, the conditions of a pass stay what they are."""

Layout: TypeAlias = tuple[tuple[torch.Size, torch.dtype, torch.device], ...]
"""Shape, dtype and device of each tensor."""


@dataclass(frozen=True)
class CallInputs:
    """The arguments of one call by which it is recognised, however they are named."""

    timestep: Tensor | None
    """Scalar, on its device; None if the call has none."""
    latents: tuple[Tensor, ...]
    """Copies of the hidden states that the transformer is given: mostly one tensor."""
    conditions: tuple[Tensor, ...]

    @property
    def layout(self) -> Layout:
        """Layout of latents and conditions: within a run, it stays the same for a pass."""
        tensors = (*self.latents, *self.conditions)
        return tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in tensors)


class InputReader:
    """Finds the arguments of `transformer` that tell a call's pass and run."""

    def __init__(self, transformer: Module) -> None:
        self._arguments = Arguments.of(transformer)
        names = self._arguments.positions
        self.latents = "hidden_states" if "hidden_states" in names else next(iter(names))
        """Name of the argument that is denoised."""

    def read(self, args: Sequence[object], kwargs: Mapping[str, object]) -> CallInputs:
        """Return what a call with these arguments is recognised by, before it is made."""
        times = [self._arguments.get(name, args, kwargs) for name in TIMESTEPS]
        timestep = next((time for time in times if time is not None), None)
        conditions = [self._arguments.get(name, args, kwargs) for name in CONDITIONS]
        latents = _tensors(self._arguments.get(self.latents, args, kwargs))
        return CallInputs(
            None if timestep is None else _scalar(torch.as_tensor(timestep)),
            # The transformer may write to these, and so may the pipeline until the next step.
            tuple(tensor.clone() for tensor in latents),
            _tensors(conditions),
        )


def _scalar(timesteps: Tensor) -> Tensor:
    """Return one timestep for all of a batch."""
    if timesteps.ndim < 2:
        return timesteps.flatten()[0]
    # By token: those of a given image have a timestep that never changes. The mean moves.
    return timesteps.float().mean()


def _tensors(value: object) -> tuple[Tensor, ...]:
    """Return `value` if it is a tensor, or the tensors in it if it is a list, at any depth."""
    if isinstance(value, Tensor):
        return (value.detach(),) if value.requires_grad else (value,)
    if isinstance(value, (list, tuple)):
        return tuple(tensor for item in value for tensor in _tensors(item))
    return ()
