"""Libraries of the array API standard: an index needs a part for every axis."""

from __future__ import annotations

from kvcache.backends.arrays import NativeArray
from kvcache.bench.harness.contest import Case, Loop

from .base import Framework, at_last_positions


class ArrayApiFramework(Framework):
    """Writes in place by assigning to a slice, as the standard has it."""

    def raw(self, case: Case) -> Loop:
        keys, values = case.history()
        k, v = case.token(), case.token()

        def run(steps: int) -> None:
            for p in range(case.tokens - steps, case.tokens):
                keys[:, :, p : p + 1, :] = k
                values[:, :, p : p + 1, :] = v

        return run

    def raw_views(self, case: Case) -> Loop:
        keys, values = case.history()
        k, v = case.token(), case.token()

        def run(steps: int) -> None:
            for p in range(case.tokens - steps, case.tokens):
                keys[:, :, p : p + 1, :] = k
                values[:, :, p : p + 1, :] = v
                _ = keys[:, :, : p + 1, :], values[:, :, : p + 1, :]

        return run

    def raw_step(self, case: Case, layers: list[tuple[NativeArray, NativeArray]]) -> Loop:
        k, v = case.token(), case.token()

        def step(p: int) -> None:
            for keys, values in layers:
                keys[:, :, p : p + 1, :] = k
                values[:, :, p : p + 1, :] = v
                _ = keys[:, :, : p + 1, :], values[:, :, : p + 1, :]

        return at_last_positions(case, step)


FRAMEWORK = ArrayApiFramework()
