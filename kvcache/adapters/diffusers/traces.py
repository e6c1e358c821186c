"""Whether the latents of a call follow from those before, or begin another run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from .inputs import CallInputs, Layout

Truth: TypeAlias = bool | Tensor
"""A bool, or a bool scalar on the device that is not waited for."""

FIRST_MOVE = 2 / 3
"""Of what latents measure: the furthest that they move after the first step of a run."""
TURN = 1 / 5
"""Of what latents measure: they turn aside by less, from step to step."""
TURN_OF_MOVES = 2
"""Where they turn aside by more, it is by less than so many times their furthest move."""


@dataclass(frozen=True)
class Trace:
    """Latents of one stream in the present run, and the layout of its inputs."""

    layout: Layout
    first: tuple[Tensor, ...]
    latest: tuple[Tensor, ...]
    jumped: bool = False
    """Whether they jumped where the run began: their sampler may draw new noise in every step."""
    before: tuple[Tensor, ...] = ()
    """Those before the latest."""
    furthest: Tensor | None = None
    """The furthest move, a scalar on the device; None before the first."""

    @classmethod
    def begin(cls, inputs: CallInputs, *, jumped: bool) -> Trace:
        """Return the trace of a stream after its first step; cannot fail."""
        return cls(inputs.layout, inputs.latents, inputs.latents, jumped)

    def then(self, latents: tuple[Tensor, ...], furthest: Tensor | None) -> Trace:
        """Return the trace after another step, of which :meth:`follow` told; cannot fail."""
        return replace(self, before=self.latest, latest=latents, furthest=furthest)

    def follow(self, latents: tuple[Tensor, ...], *, again: bool) -> tuple[Truth, Tensor | None]:
        """Return whether `latents` begin another run, and the furthest move if they do not.

        Other noise is further away than latents measure. Within that, a sampler that solves an
        equation goes on in the plane of its latest latents and its latest move, but for a little;
        noise mixed anew with an image leaves that plane. After one step there is only the length
        of the move to go by. The noise that this run began with, and left, begins it again.

        again: whether the noise that this run began with begins it again though it was not left.
        """
        if not latents or not latents[0].is_floating_point():
            return False, None
        new, latest = latents[0].float(), self.latest[0].float()
        move = new - latest
        moved, size = _size(move), torch.maximum(_size(new), _size(latest))
        # Every comparison is False for NaN: numbers that are broken are no other run.
        if self.furthest is None:
            far = moved > (size if self.jumped else FIRST_MOVE * size)
            furthest = moved
        else:
            turned = _size(_aside(move, latest, latest - self.before[0].float()))
            bound = torch.maximum(TURN * size, TURN_OF_MOVES * self.furthest)
            far = (moved > size) | (turned > bound)
            furthest = torch.fmax(self.furthest, moved)
        returned = (latents[0] == self.first[0]).all()
        return far | (returned if again else returned & (moved > 0)), furthest


def _size(tensor: Tensor) -> Tensor:
    return tensor.abs().mean()


def _aside(move: Tensor, latest: Tensor, before: Tensor) -> Tensor:
    """Return the part of `move` that is no combination of `latest` and the move `before`."""
    across = before - _along(before, latest)
    return move - _along(move, latest) - _along(move, across)


def _along(move: Tensor, way: Tensor) -> Tensor:
    """Return the part of `move` along `way`; nothing along 0."""
    tiny = torch.finfo(way.dtype).tiny
    return way * ((move * way).sum() / (way * way).sum().clamp_min(tiny))
