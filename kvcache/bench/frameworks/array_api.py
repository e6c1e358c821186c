"""Any array-API library: its standard wants an index for every axis."""

from __future__ import annotations

from kvcache.bench.harness.contest import RAW, RAW_VIEWS, Cell, Contestant, Framework, stepping
from kvcache.bench.step.case import Decoding


class ArrayApiFramework(Framework):
    """Writes in place by assigning to a slice, as the standard has it."""

    def raw(self, cell: Cell) -> Contestant:
        keys, values = cell.history()
        k, v = cell.token(), cell.token()

        def run(steps: int) -> None:
            for p in range(cell.capacity - steps, cell.capacity):
                keys[:, :, p : p + 1, :] = k
                values[:, :, p : p + 1, :] = v

        return Contestant(RAW, run)

    def raw_views(self, cell: Cell) -> Contestant:
        keys, values = cell.history()
        k, v = cell.token(), cell.token()

        def run(steps: int) -> None:
            for p in range(cell.capacity - steps, cell.capacity):
                keys[:, :, p : p + 1, :] = k
                values[:, :, p : p + 1, :] = v
                _ = keys[:, :, : p + 1, :], values[:, :, : p + 1, :]

        return Contestant(RAW_VIEWS, run)

    def raw_step(self, scene: Decoding) -> Contestant:
        layers = scene.history()
        k, v = scene.token(), scene.token()

        def step(p: int) -> None:
            for keys, values in layers:
                keys[:, :, p : p + 1, :] = k
                values[:, :, p : p + 1, :] = v
                _ = keys[:, :, : p + 1, :], values[:, :, : p + 1, :]

        return stepping(scene, step)


FRAMEWORK = ArrayApiFramework()
