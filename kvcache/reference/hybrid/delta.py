"""The gated delta rule (Yang et al., 2024), token by token and many tokens at once.

A state is a matrix [key dim, value dim] that maps keys to values. A token makes it decay, reads the
value that it has for the token's key, and corrects it by ``beta`` times the difference from the
token's own value. The output is the value of the new state for the query.

Shapes: B batch, H key heads, R value heads for each of them, L tokens, K and V dimensions of keys
and values.

::

    state            [B, H, R, K, V]
    queries, keys    [B, H, 1, L, K]    of length 1, queries scaled
    values, output   [B, H, R, L, V]
    log_decay, beta  [B, H, R, L, 1]    log_decay <= 0
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from kvcache.backends import Array, Backend
from kvcache.backends.arrays import Namespace


class Tokens(NamedTuple):
    """The inputs of the rule for some tokens: see the module."""

    queries: Array
    keys: Array
    values: Array
    log_decay: Array
    beta: Array

    def between(self, start: int, stop: int) -> Tokens:
        """Return the tokens from `start` to `stop`."""
        return Tokens(*(array[:, :, :, start:stop, :] for array in self))


class Triangles(NamedTuple):
    """Constants for L tokens at once: float32 [L, L] of 0 and 1."""

    causal: Array
    """1 where the column's token is the row's, or one before it."""
    before: Array
    """1 where the column's token comes before the row's."""
    joints: tuple[Array, ...]
    """For blocks of 1, 2, 4, ... tokens: 1 at the lower left block of each pair of blocks."""


def triangles(backend: Backend, tokens: int) -> Triangles:
    """Make the constants for so many tokens."""
    row, column = np.ogrid[:tokens, :tokens]

    def put(mask: np.ndarray[tuple[int, ...], np.dtype[np.bool_]]) -> Array:
        return backend.from_host(mask, "float32")

    sizes = [1 << level for level in range((tokens - 1).bit_length())]
    joints = [(row // size == column // size + 1) & (row // size % 2 == 1) for size in sizes]
    return Triangles(put(row >= column), put(row > column), tuple(map(put, joints)))


def delta_step(xp: Namespace, state: Array, token: Tokens) -> tuple[Array, Array]:
    """Apply the rule to one token: its output, and the state behind it."""
    q, k, v, log_decay, beta = token
    state = state * xp.exp(log_decay)
    correction = beta * (v - xp.matmul(k, state))
    state = state + xp.matmul(_transposed(xp, k), correction)
    return xp.matmul(q, state), state


def delta_chunk(
    xp: Namespace, ones: Triangles, state: Array, tokens: Tokens
) -> tuple[Array, Array]:
    """Apply the rule to L tokens at once: their outputs, and the state behind the last.

    ones: as of :func:`triangles` for L tokens.

    The corrections of the tokens depend on one another, linearly: a triangular system of L
    equations, solved for all of them.
    """
    q, k, v, log_decay, beta = tokens
    # Log of the decay from the end of one token (column) to that of another (row). Every span is
    # summed by itself: differences of running sums would lose digits where tokens decay fast.
    spans = xp.matmul(ones.causal, log_decay * ones.before)
    decay = xp.exp(spans) * ones.causal
    from_start = xp.exp(xp.matmul(ones.causal, log_decay))
    to_end = _transposed(xp, xp.exp(spans[:, :, :, -1:, :]))
    system = beta * xp.matmul(k, _transposed(xp, k)) * decay * ones.before
    known = beta * (v - from_start * xp.matmul(k, state))
    corrections = xp.matmul(_unit_inverse(xp, ones, system), known)
    within = xp.matmul(xp.matmul(q, _transposed(xp, k)) * decay, corrections)
    outputs = from_start * xp.matmul(q, state) + within
    added = xp.matmul(_transposed(xp, k), to_end * corrections)
    return outputs, state * from_start[:, :, :, -1:, :] + added


def _unit_inverse(xp: Namespace, ones: Triangles, lower: Array) -> Array:
    """Invert ``1 + lower``, for `lower` [..., L, L] with zeros on and above the diagonal.

    Diagonal blocks of 1, 2, 4, ... rows, each inverse made of two of half the size::

        [A 0]      inverse   [    A'    0 ]
        [C D]                [ -D' C A' D']

    As exact as forward substitution, in few large products.
    """
    inverse = ones.causal - ones.before
    for joint in ones.joints:
        inverse = inverse - xp.matmul(xp.matmul(inverse, lower * joint), inverse)
    return inverse


def _transposed(xp: Namespace, x: Array) -> Array:
    return xp.permute_dims(x, (0, 1, 2, 4, 3))
