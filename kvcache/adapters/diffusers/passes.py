"""Recognises the passes of a pipeline that sets no ``cache_context``."""

from __future__ import annotations

import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from kvcache.errors import NotSupportedError

PASSES = tuple(f"call {number}" for number in range(1, 9))
"""Streams of calls without a context. Three passes under a sampler of second order take six."""


class KnownPass(NamedTuple):
    """A pass, as its conditions tell it."""

    stream: str
    conditions: Conditions
    alike: str | None = None
    """Of a pass that is new: the first with the same conditions; it has been at this timestep."""
    surplus: bool = False
    """Whether no stream is left for it, unless a run begins; `stream` is `alike` or the first."""


class Passes:
    """Tells which pass a call without a context makes.

    It is the first pass with the same conditions that this timestep has not been through; if there
    is none, another pass begins. So passes stay apart whatever their order, and where guidance
    begins or ends in the middle of a run; those with the same conditions are told apart by their
    order. A sampler of second order, which comes to a timestep twice, has twice the passes. So has,
    for now, a run that was given up after one step and is made again.
    """

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Forget every pass."""
        self._conditions: list[Conditions] = []
        self._timestep: float | None = None
        self._passed: set[str] = set()
        self._refused = False

    def next(self, timestep: float | None, conditions: tuple[Tensor, ...]) -> KnownPass:
        """Return the pass of a call; nothing changes.

        timestep: None if the call has none. Then passes with the same conditions are one.
        """
        passed = self._passed if self._at(timestep) else ()
        passes = list(zip(PASSES, self._conditions, strict=False))
        for name, known in passes:
            if name not in passed and known.match(conditions):
                return KnownPass(name, known)
        been = (name for name, known in passes if name in passed and known.match(conditions))
        alike = next(been, None)
        new = Conditions(conditions)
        if len(self._conditions) == len(PASSES):
            return KnownPass(alike or PASSES[0], new, alike, surplus=True)
        return KnownPass(PASSES[len(self._conditions)], new, alike)

    def refuse(self) -> None:
        """Refuse a surplus pass that begins no run; not twice in a row, so that runs go on.

        Raises: NotSupportedError the first time.
        """
        if self._refused:
            return
        self._refused = True
        raise NotSupportedError(
            f"without a cache_context, at most {len(PASSES)} passes are told apart in a run, by "
            "their conditions and their order at a timestep; got another one. Call the "
            'transformer in "with transformer.cache_context(name):", a name for each pass. If this '
            "call began another run, make it again."
        )

    def advance(self, stream: str, conditions: Conditions, timestep: float | None) -> None:
        """Note that a pass has been through `timestep`; cannot fail."""
        if not self._at(timestep):
            self._timestep, self._passed = timestep, set()
        self._refused = False
        self._passed.add(stream)
        if PASSES.index(stream) == len(self._conditions):
            self._conditions.append(conditions)

    def _at(self, timestep: float | None) -> bool:
        """Whether `timestep` is that of the call before."""
        return timestep is not None and timestep == self._timestep


class Conditions:
    """The conditions of one pass: text, classes, whatever else tells it from others."""

    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        self._copies = tuple(tensor.detach().clone() for tensor in tensors)
        # No reference that keeps them alive: they are the pipeline's.
        self._seen = [(weakref.ref(tensor), _version(tensor)) for tensor in tensors]

    def match(self, tensors: tuple[Tensor, ...]) -> bool:
        """Whether `tensors` are those of this pass; where they are other objects, look at them."""
        if len(tensors) != len(self._copies):
            return False
        return all(map(self._same, range(len(tensors)), tensors))

    def _same(self, index: int, tensor: Tensor) -> bool:
        (seen, version), copy = self._seen[index], self._copies[index]
        # Most pipelines give the same tensor in every step: then nothing is waited for.
        if seen() is tensor and version is not None and version == _version(tensor):
            return True
        alike = (copy.shape, copy.dtype, copy.device) == (tensor.shape, tensor.dtype, tensor.device)
        if not (alike and torch.equal(copy, tensor)):
            return False
        self._seen[index] = weakref.ref(tensor), _version(tensor)
        return True


def _version(tensor: Tensor) -> int | None:
    """Return a number that every write to `tensor` raises; None where torch counts none."""
    return None if tensor.is_inference() else tensor._version
