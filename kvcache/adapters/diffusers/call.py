"""One call of a transformer, while it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import Module

from kvcache.diffusion import Step
from kvcache.diffusion.signals import SignalInput
from kvcache.diffusion.streams import Stream

from .blocks import States

# Any, so that a caller's function may use its arguments as what they are.
Measure: TypeAlias = Callable[[Module, tuple[Any, ...], dict[str, Any]], Tensor]
"""Makes the tensor that a policy measures, of the first block and its arguments."""


@dataclass
class TransformerCall:
    """One call of a transformer, from its beginning to its end.

    begin: makes the step; takes the signal of the policy.
    """

    stream: Stream
    begin: Callable[[SignalInput], Step]
    step: Step | None = None
    signal: Callable[[], Tensor] | None = None
    entering: States = ()
    """States that enter the first block."""
    inputs: States = ()
    """States that enter the part that may be skipped."""
    left: bool = False
    """Whether the last block of that part was called."""

    def decide(self, signal: SignalInput) -> Step:
        """Decide about the step, and return it."""
        # A graph of what is measured would be of no use to anybody.
        with torch.no_grad():
            self.step = self.begin(signal)
        return self.step
