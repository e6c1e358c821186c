"""The axes of keys and values."""

from __future__ import annotations

LAYER_AXES = "bhtd"
"""Axes of snapshots, and of most per-layer caches, by the letters of `Backend.alloc_axes`."""
TOKENS = 2
"""Token axis of ``[batch, kv_heads, tokens, head_dim]``, the form of files and snapshots."""
LAYER_AXIS = {"bhtd": TOKENS, "bthd": 1}
"""Token axis of a per-layer cache, by layout; the other of the two axes counts kv_heads."""
TOKEN_AXIS = {"htd": 1, "thd": 0, "hdt": 2}
"""Token axis of a pool's keys or values, by layout."""
