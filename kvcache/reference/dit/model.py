"""A small diffusion transformer, written once over the array API.

Two streams, the sample and the prompt, attend to each other in every block and are modulated by the
time and the pooled prompt, as in MMDiT (Esser et al., 2024) after DiT (Peebles and Xie, 2022). The
caches of :mod:`kvcache.diffusion` are tested and measured on it: every part that a cache may skip
is a method of its own, and a pure function.

Times run from 1, noise, to 0, data; the model predicts the velocity ``noise - data``, as rectified
flows do (Liu et al., 2022).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import TypeAlias

import numpy as np

from kvcache.backends import Array, Backend, HostArray
from kvcache.errors import ShapeError
from kvcache.reference.errors import ModelFileError
from kvcache.storage.reading import read_regular
from kvcache.storage.tensors import decode_tensors, encode_tensors
from kvcache.storage.writing import replace_file

from .blocks import DiTBlocks, DiTConfig, Streams, weight_shapes

__all__ = ["DiT", "DiTConfig", "Streams", "euler", "guided", "schedule"]

Velocity: TypeAlias = Callable[[int, float, Array], Array]
"""``velocity(step, time, x)``: the direction from data to noise at `x`, of its shape."""

_KEY = "kvcache.dit"  # in the metadata of a model file
# Radians that the fastest wave runs through while time goes from 0 to 1: few, so that the output
# of the model changes little from one step to the next, as that of large models does.
_FASTEST = 16.0


class DiT:
    """A model on one backend, computing in float32.

    A block takes and returns both streams. The text stream of the last one is not used.
    """

    def __init__(self, config: DiTConfig, weights: Mapping[str, Array], backend: Backend) -> None:
        """Take `weights`, arrays of `backend` by the names of :meth:`random`'s, without a copy.

        Raises: ShapeError if one is missing, superfluous or misshapen.
        """
        _check_shapes(config, {name: tuple(array.shape) for name, array in weights.items()})
        self.config = config
        self.weights = dict(weights)
        self.backend = backend
        self._blocks = DiTBlocks(backend.xp, config.heads, self.weights)
        speeds = np.geomspace(1, _FASTEST, config.width // 2)
        self._speeds = backend.from_host(speeds.astype(np.float32))

    @classmethod
    def random(cls, config: DiTConfig, backend: Backend, seed: int = 0) -> DiT:
        """Make a model with random weights, the same bits on every backend.

        Gates are random as well, not zero: every block matters, trained or not.
        """
        rng = np.random.default_rng(seed)
        weights = {name: _draw(rng, name, shape) for name, shape in weight_shapes(config).items()}
        return cls(config, {name: backend.from_host(w) for name, w in weights.items()}, backend)

    def to_backend(self, backend: Backend) -> DiT:
        """Copy this model to `backend`, bit for bit."""
        moved = {name: backend.from_host(array) for name, array in self._on_host().items()}
        return DiT(self.config, moved, backend)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the model to `path`, a safetensors file with the sizes in its metadata.

        Whole or not at all; an existing file keeps its permissions.
        """
        metadata = {_KEY: json.dumps(asdict(self.config))}
        replace_file(path, encode_tensors(self._on_host(), metadata))

    @classmethod
    def load(cls, path: str | os.PathLike[str], backend: Backend) -> DiT:
        """Load a model written by :meth:`save` onto `backend`.

        Raises: ModelFileError if there is none at `path`.
        """
        config, weights = _read(path)
        try:
            _check_shapes(config, {name: array.shape for name, array in weights.items()})
        except ShapeError as error:
            raise ModelFileError(f"{path} does not hold what its metadata says: {error}") from error
        return cls(config, {name: backend.from_host(w) for name, w in weights.items()}, backend)

    def _on_host(self) -> dict[str, HostArray]:
        return {name: self.backend.to_host(array) for name, array in self.weights.items()}

    def __call__(self, x: Array, t: Array | float, prompt: Array) -> Array:
        """Return the velocity at `x`: float32 [B, tokens, channels].

        x: float32 [B, tokens, channels]. t, prompt: as for :meth:`condition`.
        """
        condition = self.condition(t, prompt)
        streams = self.embed(x, prompt)
        for index in range(self.config.blocks):
            streams = self.block(index, streams, condition)
        return self.finish(streams[0], condition)

    def condition(self, t: Array | float, prompt: Array) -> Array:
        """Return the condition of every block: float32 [B, width].

        t: time in [0, 1], float32 [B] or one for all.
        prompt: ids below ``config.vocabulary``, int32 [B, text_tokens]; their range is not checked,
            because they may be on a device.
        """
        self._check("a prompt", prompt, self.config.text_tokens)
        # A float64 of NumPy passes for a float, and would turn everything to float64.
        time = float(t) if isinstance(t, float) else t
        return self._blocks.condition(time, self._speeds, prompt)

    def embed(self, x: Array, prompt: Array) -> Streams:
        """Return both streams before the first block; arguments as for a call."""
        self._check("a sample", x, self.config.tokens, self.config.channels)
        self._check("a prompt", prompt, self.config.text_tokens)
        hidden = self._blocks.linear("input", x) + self.weights["positions"]
        return hidden, self._blocks.words(prompt) + self.weights["text_positions"]

    def block(self, index: int, streams: Streams, condition: Array) -> Streams:
        """Return both streams after block `index`, in [0, ``config.blocks``)."""
        return self._blocks.block(f"blocks.{index}", streams, condition)

    def modulated_input(self, streams: Streams, condition: Array) -> Array:
        """Return the hidden stream as the first block's attention gets it: [B, tokens, width].

        streams: of :meth:`embed`. The signal of TeaCache (Liu et al., 2024): cheap, and changes
            from step to step about as the output does.
        """
        shift, scale, *_ = self._blocks.modulations(
            "blocks.0.hidden.modulation", condition, parts=6
        )
        return self._blocks.modulated(streams[0], shift, scale)

    def finish(self, hidden: Array, condition: Array) -> Array:
        """Return the velocity, [B, tokens, channels], from the hidden stream of the last block."""
        shift, scale = self._blocks.modulations("final.modulation", condition, parts=2)
        return self._blocks.linear("final.output", self._blocks.modulated(hidden, shift, scale))

    def _check(self, what: str, array: Array, *sizes: int) -> None:
        if tuple(array.shape[1:]) != sizes:
            wanted = ", ".join(map(str, sizes))
            raise ShapeError(f"{what} of this model is [B, {wanted}]; got {tuple(array.shape)}.")


def schedule(steps: int, shift: float = 1.0) -> list[float]:
    """Return the times of a sampler of `steps` steps: `steps` + 1 of them, from 1 down to 0.

    shift: above 1 spends more steps near the noise, as SD3 does for large images.

    Raises: ValueError.
    """
    if steps < 1:
        raise ValueError(f"a schedule needs steps >= 1; got {steps}.")
    if not (shift > 0 and math.isfinite(shift)):
        raise ValueError(f"shift must be positive and finite; got {shift}. 1 is an even schedule.")
    even = [1 - i / steps for i in range(steps + 1)]
    return [shift * t / (shift * t + (1 - t)) for t in even]


def euler(noise: Array, times: Sequence[float], velocity: Velocity) -> Array:
    """Follow `velocity` from `noise` at ``times[0]`` to ``times[-1]`` in straight steps.

    noise: float32 [B, tokens, channels]. times: strictly decreasing, as of :func:`schedule`.
    velocity: called as ``velocity(step, time, x)``, once at the start of each step.
    Returns: the point at the last time, of the shape and dtype of `noise`.

    Raises: ValueError.
    """
    floats = [float(time) for time in times]
    # "not <" rather than ">=": a time of NaN is refused, too.
    if len(floats) < 2 or any(not after < time for time, after in pairwise(floats)):
        raise ValueError(
            f"times must be two or more and strictly decreasing; got {floats}. "
            "schedule(steps) makes such."
        )
    x = noise
    for step, (time, after) in enumerate(pairwise(floats)):
        x = x + (after - time) * velocity(step, time, x)
    return x


def guided(cond: Array, uncond: Array, scale: float) -> Array:
    """Return `uncond` at scale 0, `cond` at 1, and the point beyond `cond` above 1.

    cond, uncond: velocities with and without the prompt, of one shape. Classifier-free guidance
    (Ho and Salimans, 2022).
    """
    return uncond + float(scale) * (cond - uncond)


def _draw(rng: np.random.Generator, name: str, shape: tuple[int, ...]) -> HostArray:
    """Draw a weight from a normal distribution. Matrices keep the size of their input."""
    scale = {"weight": shape[0] ** -0.5, "bias": 0.1}.get(name.rpartition(".")[2], 1.0)
    drawn: HostArray = (scale * rng.normal(size=shape)).astype(np.float32)
    return drawn


def _check_shapes(config: DiTConfig, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise ShapeError unless `shapes` are the shapes of all weights of a model, by name."""
    wanted = weight_shapes(config)
    wrong = sorted(
        name for name in wanted.keys() | shapes.keys() if wanted.get(name) != shapes.get(name)
    )
    if wrong:
        name = wrong[0]
        raise ShapeError(
            f"{len(wrong)} weights do not fit {config}: {name!r} must be {wanted.get(name)}; "
            f"got {shapes.get(name)}. Pass the sizes that the model was made with."
        )


def _read(path: str | os.PathLike[str]) -> tuple[DiTConfig, dict[str, HostArray]]:
    """Read sizes and weights from a model file. Raise ModelFileError if it holds none."""
    try:
        metadata, tensors = decode_tensors(read_regular(path))
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path} is not a whole safetensors file: {error}.") from error
    if _KEY not in metadata:
        raise ModelFileError(
            f"a model file has {_KEY!r} in its metadata; {path} has {sorted(metadata)}. "
            "Load files that DiT.save wrote."
        )
    for name, tensor in tensors.items():
        if tensor.dtype != "float32":
            raise ModelFileError(f"weights are float32; in {path} {name!r} is {tensor.dtype}.")
    try:
        config = DiTConfig(**json.loads(metadata[_KEY]))
        weights = {name: tensor.to_array("float32") for name, tensor in tensors.items()}
    except (TypeError, ValueError, RecursionError) as error:
        raise ModelFileError(f"{path} says nothing of the model's sizes: {error}") from error
    # Before the shapes of all blocks are made, of which the metadata may name any number.
    if config.blocks > len(weights):
        raise ModelFileError(
            f"{path} does not hold what its metadata says: {config.blocks} blocks, in "
            f"{len(weights)} weights."
        )
    return config, weights
