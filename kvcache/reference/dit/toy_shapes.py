"""Toy data for the diffusion transformer: curves in the plane, and how far a sample is from one.

A sample is a list of points in the order of the curve, moved, turned and scaled a little. A model
has to find the one of seven curves, its location, and a place for every point.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from kvcache.backends import HostArray
from kvcache.errors import BoundsError, ShapeError

__all__ = ["FAMILIES", "clean_curves", "distance", "prompt_tokens", "shapes"]

Curve: TypeAlias = Callable[[HostArray], HostArray]
"""From the parameter in [0, 1), float64 [tokens], to points as complex numbers x + iy."""

NOISE = 0.02
"""Standard deviation of a coordinate of a sample around its curve."""
# Standard deviations of a sample's angle, in radians, of the logarithm of its size, and of the
# coordinates of its centre.
_TURN, _STRETCH, _SHIFT = 0.25, 0.15, 0.15
_MIN_TOKENS = 8


def _circle(u: HostArray) -> HostArray:
    return np.exp(2j * np.pi * u)


def _spiral(u: HostArray) -> HostArray:
    return u * np.exp(5j * np.pi * u)


def _moons(u: HostArray) -> HostArray:
    """Draw an arch, and under it another one upside down, half its width to the right."""
    first = np.exp(2j * np.pi * u)
    return np.where(u < 0.5, first, first + 1 + 0.5j)


def _wave(u: HostArray) -> HostArray:
    return 4 * u + 1j * np.sin(4 * np.pi * u)


def _through(*corners: complex) -> Curve:
    """Return the closed line through `corners`, at constant speed."""
    closed = np.array([*corners, corners[0]])
    lengths = np.abs(np.diff(closed))
    reached = np.append(0, np.cumsum(lengths)) / np.sum(lengths)
    return lambda u: np.interp(u, reached, closed)


def _around(turns: int, *radii: float) -> tuple[complex, ...]:
    """Return corners around the origin, evenly, with `radii` in turn."""
    steps = np.exp(1j * np.pi * (0.5 + 2 * np.arange(turns) / turns))
    return tuple(complex(radii[i % len(radii)] * step) for i, step in enumerate(steps))


_square = _through(1 + 1j, -1 + 1j, -1 - 1j, 1 - 1j)
_star = _through(*_around(10, 1.0, 0.4))
_cross = _through(*(arm for end in _around(4, 1.0) for arm in (end, 0j)))

FAMILIES: dict[str, Curve] = {
    "circle": _circle,
    "square": _square,
    "spiral": _spiral,
    "moons": _moons,
    "star": _star,
    "cross": _cross,
    "wave": _wave,
}
"""The curves by name, in the order of their prompt ids, the first of which is 1."""


def prompt_tokens(prompts: npt.ArrayLike, text_tokens: int) -> HostArray:
    """Repeat the id of each prompt in every place of its text: int32 [B, text_tokens]."""
    return np.repeat(np.asarray(prompts, np.int32)[:, None], text_tokens, axis=1)


def shapes(rng: np.random.Generator, prompts: npt.ArrayLike, tokens: int) -> HostArray:
    """Draw a new sample for each of `prompts`: float32 [B, tokens, 2].

    prompts: ids of :data:`FAMILIES`, integers [B], each in [1, 7]. Point i of a sample lies at
        i / tokens along its curve. Coordinates have a mean square of about one half.

    Raises: ShapeError, BoundsError.
    """
    curves = _chosen(prompts, tokens)
    turn, stretch, *shift = rng.normal(size=(4, len(curves), 1))
    size = np.exp(_STRETCH * stretch + 1j * _TURN * turn)
    points = size * curves + _SHIFT * (shift[0] + 1j * shift[1])
    noise = NOISE * rng.normal(size=(*points.shape, 2))
    return np.asarray(_as_pairs(points) + noise, np.float32)


def distance(points: npt.ArrayLike, prompts: npt.ArrayLike) -> HostArray:
    """Return the distance of each sample from the clean curve of its prompt: float64 [B], 0 to 1.

    It is the root mean square that remains when the curve is moved, turned and scaled (but not
    mirrored) to fit best, relative to that of the sample. 0 is the curve itself, of any size and
    direction; random points are at nearly 1, points without extent at 1.

    points: [B, tokens, 2]. prompts: integers [B], as for :func:`shapes`.

    Raises: ShapeError, BoundsError.
    """
    pairs = np.asarray(points, np.float64)
    if pairs.ndim != 3 or pairs.shape[2] != 2:
        raise ShapeError(f"samples are points in the plane, [B, tokens, 2]; got {pairs.shape}.")
    curves = _chosen(prompts, pairs.shape[1])
    if len(curves) != len(pairs):
        raise ShapeError(f"one prompt per sample; got {len(curves)} for {len(pairs)}.")
    centred = _as_complex(pairs - pairs.mean(1, keepdims=True))
    extent = np.sum(np.abs(centred) ** 2, axis=1)
    # A complex factor turns and scales at once, so that the best fit is a projection.
    fitted = np.abs(np.sum(curves.conj() * centred, axis=1)) ** 2 / curves.shape[1]
    # Points without extent give 0 / tiny here instead of 0 / 0, and so the distance 1.
    share: HostArray = fitted / np.maximum(extent, np.finfo(float).tiny)
    rest: HostArray = np.sqrt(np.clip(1 - share, 0, 1))
    return rest


def clean_curves(tokens: int) -> HostArray:
    """Return every family without noise, centre 0 and mean square 1: float64 [7, tokens, 2]."""
    return _as_pairs(_curves(tokens))


@lru_cache
def _curves(tokens: int) -> HostArray:
    """Return every clean curve: complex128 [7, tokens]. Cached, so not to be written to."""
    if tokens < _MIN_TOKENS:
        raise ShapeError(
            f"a curve needs at least {_MIN_TOKENS} points to be told apart; got {tokens}."
        )
    u = np.arange(tokens) / tokens
    return np.stack([_normalised(curve(u)) for curve in FAMILIES.values()])


def _normalised(points: HostArray) -> HostArray:
    centred = points - points.mean()
    normalised: HostArray = centred / np.sqrt(np.mean(np.abs(centred) ** 2))
    return normalised


def _chosen(prompts: npt.ArrayLike, tokens: int) -> HostArray:
    """Return the clean curve of each of `prompts`: complex128 [B, tokens]."""
    ids = np.asarray(prompts)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ShapeError(f"prompts are integers, [B]; got {ids.dtype} {ids.shape}.")
    if ids.size and not (ids.min() >= 1 and ids.max() <= len(FAMILIES)):
        raise BoundsError(
            f"a prompt is the id of a family, in [1, {len(FAMILIES)}]; "
            f"got {ids.min()} to {ids.max()}. 0, the empty prompt, has no shape."
        )
    chosen: HostArray = _curves(tokens)[ids - 1]
    return chosen


def _as_pairs(points: HostArray) -> HostArray:
    return np.stack([points.real, points.imag], axis=-1)


def _as_complex(pairs: HostArray) -> HostArray:
    parts: HostArray = pairs[..., 0] + 1j * pairs[..., 1]
    return parts
