"""Training of the reference diffusion transformer on toy shapes: caches then skip real work.

torch differentiates through the very code that every backend runs; nothing is written twice.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch

from kvcache.backends import Backend, get_backend
from kvcache.backends.arrays import NativeArray
from kvcache.bench.harness.timing import Progress
from kvcache.reference.dit.model import DiT, DiTConfig
from kvcache.reference.dit.toy_shapes import FAMILIES, prompt_tokens, shapes

ITERATIONS = 600
BATCH = 16
LEARNING_RATE = 4e-3
WARMUP = 10
EMPTY_PROMPTS = 0.1


class Examples(NamedTuple):
    """Inputs of a model, and the output it should learn."""

    x: NativeArray
    """Between data and noise, float32 [B, tokens, channels]."""
    t: NativeArray
    """Share of noise, float32 [B]."""
    prompt: NativeArray
    """int32 [B, text_tokens]."""
    velocity: NativeArray
    """Noise less data, like `x`."""


def train(
    config: DiTConfig | None = None,
    iterations: int = ITERATIONS,
    seed: int = 0,
    progress: Progress | None = None,
) -> DiT:
    """Train a model on torch's CPU to draw the shape of its prompt; the same for the same seed.

    config: needs two channels and a vocabulary beyond the number of shapes; default: DiTConfig().
    progress: called with ``(iterations done, iterations in all, the loss in words)`` after each.

    Raises: ValueError.
    """
    config = config or DiTConfig()
    _check(config, iterations)
    backend, rng = get_backend("torch:cpu"), np.random.default_rng(seed)
    model = DiT.random(config, backend, seed)
    tensors: dict[str, NativeArray] = dict(model.weights)
    # The model's own tensors: it sees every change that the optimizer makes to them.
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
    """Draw random samples at random times, one prompt in ten of them empty.

    Guidance needs a model that knows the empty prompt, too.
    """
    ids = rng.integers(1, len(FAMILIES) + 1, count)
    data = shapes(rng, ids, config.tokens)
    noise = rng.normal(size=data.shape)
    t = 1 / (1 + np.exp(-rng.normal(size=count)))  # most often in the middle, as SD3 is trained
    x = data + t[:, None, None] * (noise - data)
    prompt_ids = np.where(rng.random(count) < EMPTY_PROMPTS, 0, ids)
    put = backend.from_host
    return Examples(
        x=put(x, "float32"),
        t=put(t, "float32"),
        prompt=put(prompt_tokens(prompt_ids, config.text_tokens)),
        velocity=put(noise - data, "float32"),
    )


def flow_loss(model: DiT, examples: Examples) -> NativeArray:
    """Return the mean square error of the velocity: a float32 scalar."""
    x, t, prompt, velocity = examples
    error = model(x, t, prompt) - velocity
    return model.backend.xp.mean(error * error)


@contextmanager
def _one_thread() -> Iterator[None]:
    """Run torch on one thread: more gain little here, cost much on shared cores, change bits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _learning_rate(done: int, iterations: int) -> float:
    """Return the rate of an iteration: it rises for a few, then falls to nothing along a cosine."""
    # Warmed up, because AdamW's estimates are poor in the first iterations.
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
