"""The axes of keys and values."""

from __future__ import annotations

LAYER_AXES = "bhtd"
"""Axes of a per-layer cache, by the letters of :meth:`Backend.alloc_axes`."""
TOKENS = 2
"""Token axis of a per-layer cache: ``[batch, kv_heads, tokens, head_dim]``."""
TOKEN_AXIS = {"htd": 1, "thd": 0, "hdt": 2}
"""Token axis of a pool's keys or values, by layout."""
