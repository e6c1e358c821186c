"""A small FLUX with random weights, and the loop around it, for comparisons with diffusers.

Its weights are scaled so that the velocity depends on the input and on the time about as much as a
trained one's does: from step to step it changes by 2 to 10 %.
"""

from __future__ import annotations

import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel
from torch import Tensor

STEPS = 28
SIDE = 8
"""Image tokens are SIDE * SIDE; text tokens a few more."""
TEXT_TOKENS = 32
SHIFT = 3.0
"""Shift of the schedule towards noise, the one of FLUX and Stable Diffusion 3."""
GAIN = 1.3
"""Factor on all weight matrices."""
SLOWEST = 10.0
"""Frequencies of the time embedding, over the whole run, beyond which it is damped."""


class Denoiser:
    """A transformer, its inputs, and the loop of the sampler around it."""

    def __init__(self, seed: int = 0, side: int = SIDE, steps: int = STEPS) -> None:
        # Forked, so that random numbers of the caller stay as they are.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.model = _random_flux()
            self._noise = torch.randn(1, side * side, 16)
            self._inputs = {
                "encoder_hidden_states": torch.randn(1, TEXT_TOKENS, 64),
                "pooled_projections": torch.randn(1, 32),
            }
        rows = torch.arange(float(side))
        self._inputs["img_ids"] = torch.cartesian_prod(torch.zeros(1), rows, rows)
        self._inputs["txt_ids"] = torch.zeros(TEXT_TOKENS, 3)
        even = torch.linspace(1, 0, steps + 1)
        self.times = SHIFT * even / (1 + (SHIFT - 1) * even)

    def run(self) -> Tensor:
        """Run the sampler, Euler's method, to its end: [1, side * side, 16]."""
        x = self._noise
        with torch.no_grad():
            for now, then in zip(self.times[:-1], self.times[1:], strict=True):
                # The hooks of diffusers ask for the name of the pass; there is one per step.
                with self.model.cache_context("cond"):
                    outputs = self.model(x, timestep=now[None], return_dict=False, **self._inputs)
                x = x + (then - now) * outputs[0]
        self.model._reset_stateful_cache()  # as a pipeline does
        return x


def _random_flux() -> FluxTransformer2DModel:
    """Make the transformer, its weights scaled as the head of this module says."""
    model: FluxTransformer2DModel = FluxTransformer2DModel(
        in_channels=16,
        num_layers=3,
        num_single_layers=6,
        attention_head_dim=64,
        num_attention_heads=4,
        joint_attention_dim=64,
        pooled_projection_dim=32,
        axes_dims_rope=(16, 24, 24),
    )
    model.eval()
    embedding = model.time_text_embed.timestep_embedder.linear_1.weight
    half = embedding.shape[1] // 2
    frequencies = 1000 * torch.exp(-torch.arange(half) / half * torch.tensor(1e4).log())
    # Of random weights the fast frequencies would make every step as different as two noises.
    damping = 3 / (1 + (frequencies / SLOWEST) ** 2)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.mul_(GAIN)
        embedding.mul_(damping.repeat(2))
    return model
