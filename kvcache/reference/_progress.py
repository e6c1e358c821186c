"""Callables passed to the loaders of weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from kvcache.backends import Array, HostArray

Put: TypeAlias = Callable[[HostArray], Array]
"""Move a host array to a backend, for example ``backend.from_host``."""

Progress: TypeAlias = Callable[[int, int], None]
"""Report that so many units of so many are done: ``progress(done, total)``."""
