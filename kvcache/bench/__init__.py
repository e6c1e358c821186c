"""Benchmarks: what our caches cost beside the raw framework call and the caches of others.

Frameworks are imported when they are measured, rich and matplotlib when they are asked for.
"""

from .append import CAPACITIES, DTYPES, ROUNDS, installed_backends, run_append
from .report import AppendReport, Skipped, Timing
from .targets import Verdict

__all__ = [
    "CAPACITIES",
    "DTYPES",
    "ROUNDS",
    "AppendReport",
    "Skipped",
    "Timing",
    "Verdict",
    "installed_backends",
    "run_append",
]
