"""The suite without pytest: run every check, report every outcome."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from kvcache.backends import Backend
from kvcache.testing import (  # noqa: F401 - importing them adds their checks, in this order
    attention_checks,
    backend_checks,
    batch_checks,
    cache_checks,
    pool_layer_checks,
    pool_state_checks,
    state_checks,
)

from .checks import Check, all_checks


@dataclass(frozen=True)
class Result:
    """Outcome of one check. `missing`: the backend does not declare the dtype."""

    check: Check
    outcome: Literal["passed", "failed", "missing"]
    reason: str = ""


def suite() -> list[Check]:
    """Return every check of backends and of caches, for every dtype."""
    return list(all_checks())


def run_suite(backend: Backend) -> Iterator[Result]:
    """Run every check on `backend`; yield one result at a time."""
    for check in suite():
        if check.dtype not in backend.dtypes:
            yield Result(check, "missing", f"{backend.name} has no {check.dtype}")
            continue
        try:
            check.run(backend, check.dtype)
        except Exception as error:  # noqa: BLE001 - a report goes on whatever a backend raises
            yield Result(check, "failed", f"{type(error).__name__}: {error}")
        else:
            yield Result(check, "passed")
