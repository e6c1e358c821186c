"""Trains the reference diffusion transformer on toy shapes, so that caches skip something real.

torch differentiates through the very code that every backend runs; nothing is written twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, TypeAlias

import numpy as np
import torch

from kvcache.backends import Backend, get_backend
from kvcache.backends.arrays import NativeArray
from kvcache.reference.dit.model import DiT, DiTConfig
from kvcache.reference.dit.toy_shapes import FAMILIES, prompt_tokens, shapes

Progress: TypeAlias = Callable[[int, int, str], None]

ITERATIONS = 600
BATCH = 16
LEARNING_RATE = 4e-3
WARMUP = 10
EMPTY_PROMPTS = 0.1


class Examples(NamedTuple):
    """What a model is asked, and what it should say."""

    x: NativeArray
    """Between data and noise, float32 [B, tokens, channels]."""
    t: NativeArray
    """How far towards noise, float32 [B]."""
    prompt: NativeArray
    """int32 [B, text_tokens]."""
    velocity: NativeArray
    """Like `x`."""


def train(
    config: DiTConfig | None = None,
    iterations: int = ITERATIONS,
    seed: int = 0,
    progress: Progress | None = None,
) -> DiT:
    """A model on torch's CPU that draws what its prompt says; the same one for the same seed.

    config: needs two channels and a vocabulary beyond the number of shapes; default: DiTConfig().
    progress: called with ``(iterations done, iterations in all, what the loss is)`` after each.

    Raises: ValueError.
    """
    config = config or DiTConfig()
    _check(config, iterations)
    backend, rng = get_backend("torch:cpu"), np.random.default_rng(seed)
    model = DiT.random(config, backend, seed)
    tensors: dict[str, NativeArray] = dict(model.weights)
    parameters = [weight.requires_grad_() for weight in tensors.values()]
    optimizer = torch.optim.AdamW(parameters, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    for done in range(iterations):
        optimizer.param_groups[0]["lr"] = _learning_rate(done, iterations)
        examples = draw_examples(rng, config, backend, BATCH)
        with _one_thread():
            loss = flow_loss(model, examples)
            loss.backward()
            optimizer.step()
        optimizer.zero_grad()
        if progress:
            progress(done + 1, iterations, f"loss {loss.item():.3f}")
    weights = {name: weight.detach() for name, weight in tensors.items()}
    return DiT(config, weights, backend)


def draw_examples(
    rng: np.random.Generator, config: DiTConfig, backend: Backend, count: int
) -> Examples:
    """Random samples at random times, one prompt in ten of them empty."""
    ids = rng.integers(1, len(FAMILIES) + 1, count)
    data = shapes(rng, ids, config.tokens)
    noise = rng.normal(size=data.shape)
    t = 1 / (1 + np.exp(-rng.normal(size=count)))  # most often in the middle, as SD3 is trained
    x = data + t[:, None, None] * (noise - data)
    read = np.where(rng.random(count) < EMPTY_PROMPTS, 0, ids)
    put = backend.from_host
    return Examples(
        x=put(x, "float32"),
        t=put(t, "float32"),
        prompt=put(prompt_tokens(read, config.text_tokens)),
        velocity=put(noise - data, "float32"),
    )


def flow_loss(model: DiT, examples: Examples) -> NativeArray:
    """Mean square of what the model's velocity is off by: a float32 scalar."""
    x, t, prompt, velocity = examples
    error = model(x, t, prompt) - velocity
    return model.backend.xp.mean(error * error)


@contextmanager
def _one_thread() -> Iterator[None]:
    """More gain so small a model little, cost it much on shared cores, and change its bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _learning_rate(done: int, iterations: int) -> float:
    """Rises for a few iterations, then falls to nothing along a cosine."""
    falling = 0.5 + 0.5 * math.cos(math.pi * done / iterations)
    return LEARNING_RATE * min(1.0, (done + 1) / WARMUP) * falling


def _check(config: DiTConfig, iterations: int) -> None:
    if iterations < 1:
        raise ValueError(f"training needs iterations >= 1; got {iterations}.")
    if config.channels != 2 or config.vocabulary <= len(FAMILIES):
        raise ValueError(
            f"shapes need channels=2 and vocabulary > {len(FAMILIES)}; "
            f"got {config.channels} and {config.vocabulary}."
        )
