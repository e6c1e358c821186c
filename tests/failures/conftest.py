"""Backends of their own for failures: nobody else's calls are counted, and shapes stay small."""

from __future__ import annotations

import pytest

from kvcache import CacheConfig

from .scenario import Place


@pytest.fixture
def place(backend, tmp_path):
    """A place with two instances of one backend."""
    return Place(_small(backend), _small(backend), tmp_path)


def _small(backend):
    """Return a new backend like `backend`; where programs are compiled, for few short lengths."""
    fresh = type(backend).__new__(type(backend))
    vars(fresh).update(vars(backend))
    if not backend.slices_are_views:
        fresh.config = CacheConfig(padding=4)
    return fresh
