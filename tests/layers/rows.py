"""Batches whose tokens are one number each: its key is that number, its value the negative."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from hypothesis import settings

from kvcache import RotatingKVCache

SHARES = {"numpy": 100, "torch": 30, "array_api": 12, "mlx": 20, "jax": 4}
"""Examples out of a hundred: what a backend's speed affords."""


def affordable(backend):
    """The settings for a state machine on a backend."""
    return settings(max_examples=max(1, settings().max_examples * SHARES[backend.name] // 100))


@dataclass
class Rows:
    """The tokens of each row, without padding, and the tokens before the first of each."""

    tokens: list[list[int]]
    padding: list[int]
    offset: int = 0

    def select(self, rows):
        return Rows([[*self.tokens[r]] for r in rows], [self.padding[r] for r in rows], self.offset)

    def cut(self, offset):
        self.offset = offset
        for row, padding in zip(self.tokens, self.padding, strict=True):
            del row[max(0, offset - padding) :]


def visible(cache, row, position):
    """Tokens that the token at `position` of a row sees, by position."""
    window = cache.max_size - cache.keep if isinstance(cache, RotatingKVCache) else position + 1
    keep = cache.keep if isinstance(cache, RotatingKVCache) else 0
    seen = [p for p in range(position + 1) if p < keep or p > position - window]
    return [(p, row[p]) for p in seen]


def host(cache, array):
    """Keys or values of one head and one channel, ``[B, tokens]``."""
    axis = 2 if cache.options.get("layout", "bhtd") == "bhtd" else 1
    moved = np.moveaxis(cache.backend.to_host(array).astype(np.float32), axis, 1)
    assert (moved == moved[:, :, :1, :1]).all(), "heads and channels were mixed"
    return moved[:, :, 0, 0]


def arrays(cache, numbers):
    """Keys and values of tokens ``[B, L]``."""
    backend, shape = cache.backend, np.asarray(numbers, np.float32).shape
    keys = np.broadcast_to(
        np.asarray(numbers, np.float32)[:, None, :, None], (shape[0], 2, shape[1], 3)
    )
    if cache.options.get("layout", "bhtd") == "bthd":
        keys = keys.swapaxes(1, 2)
    return backend.from_host(keys), backend.from_host(-keys[..., :2])


def mask_rows(cache, tokens, rows, ahead=False):
    """The mask as bools ``[B, tokens, n]``."""
    columns = cache.positions.shape[-1]
    mask = cache.mask(tokens, ahead=ahead)
    if mask is None:
        return np.ones((rows, tokens, 1 if ahead else columns), bool)
    found = cache.backend.to_host(mask)
    found = found if cache.backend.config.mask_dtype == "bool" else found == 0
    return np.broadcast_to(
        found if found.ndim == 2 else found[:, 0], (rows, tokens, found.shape[-1])
    )


def check_held(cache, rows):
    """Every row holds its tokens `rows`, as far as it needs them, where its padding says."""
    if not cache.offset:
        assert cache.state == ()
        return
    padding = [0] * len(rows) if cache.padding is None else cache.padding.tolist()
    columns = cache.state_positions
    assert (np.diff(columns) > 0).all()
    keys = host(cache, cache.state[0])
    for row, held, behind in zip(rows, keys, padding, strict=True):
        wanted = visible(cache, row, len(row) - 1)
        got = {c - behind: token for c, token in zip(columns.tolist(), held.tolist(), strict=True)}
        assert [(p, got.get(p)) for p, _ in wanted] == wanted


def content(snapshot):
    """Everything that a snapshot says."""
    return [
        (
            part.rows.positions.tolist(),
            [array.data.tobytes() for array in part.rows.host_copies()[0]],
        )
        for part in snapshot.parts
    ]
