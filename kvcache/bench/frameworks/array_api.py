"""Libraries of the array API standard: an index needs a part for every axis."""

from __future__ import annotations

import array_api_compat

from kvcache.backends.arrays import NativeArray, NativeArrays
from kvcache.bench.harness.contest import Case, Loop, UnavailableError

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

    def raw_copies(self, layers: int, new: NativeArrays) -> Loop:
        held, copied = [new] * layers, array_api_compat.array_namespace(*new).asarray

        def run(steps: int) -> None:
            for _ in range(steps):
                for layer in range(layers):
                    held[layer] = tuple([copied(array, copy=True) for array in new])

        return run

    def raw_states(
        self, layers: list[NativeArrays], new: NativeArrays, read: list[int], written: list[int]
    ) -> Loop:
        raise UnavailableError("the standard has no assignment by an index array")

    def raw_step(self, case: Case, layers: list[tuple[NativeArray, NativeArray]]) -> Loop:
        k, v = case.token(), case.token()

        def step(p: int) -> None:
            for keys, values in layers:
                keys[:, :, p : p + 1, :] = k
                values[:, :, p : p + 1, :] = v
                _ = keys[:, :, : p + 1, :], values[:, :, : p + 1, :]

        return at_last_positions(case, step)


FRAMEWORK = ArrayApiFramework()
