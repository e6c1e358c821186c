"""JAX: the cached, donated call. JAX itself has no cache of this kind, so there is no peer."""

from __future__ import annotations

from functools import cache
from typing import Any, ClassVar

import jax
import numpy as np
from jax import lax

from kvcache.backends.arrays import NativeArray
from kvcache.bench.harness.contest import (
    RAW,
    Cell,
    Contestant,
    Factory,
    Framework,
    UnavailableError,
    stepping,
)
from kvcache.bench.step.case import Decoding

PLAIN = "raw (plain jit)"
# On CPU, XLA would convert a whole buffer of these dtypes to float32 to write one token.
_NORMALIZED = ("bfloat16", "float8_e4m3fn", "float8_e5m2")
_COPY_ONLY = {
    "xla_disable_hlo_passes": ",".join(
        f"float-normalization-{dtype}" for dtype in ("bf16", "f8e4m3fn", "f8e5m2")
    )
}


class JaxFramework(Framework):
    """A step is over when its arrays are ready, as when attention comes next."""

    lazy: ClassVar[bool] = True

    def finish(self, arrays: tuple[NativeArray, ...]) -> None:
        jax.block_until_ready(arrays)

    def factories(self) -> dict[str, Factory]:
        return {**super().factories(), PLAIN: self.plain}

    def raw(self, cell: Cell) -> Contestant:
        return Contestant(RAW, self._writing(cell, _writer_for(cell)))

    def raw_step(self, scene: Decoding) -> Contestant:
        """Whole buffers are attended to: no views."""
        write, finish = _writer_for(scene), self.finish
        layers = scene.history()
        k, v = scene.token(), scene.token()

        def step(p: int) -> None:
            at = np.int32(p)
            for i, (keys, values) in enumerate(layers):
                layers[i] = write(keys, k, at), write(values, v, at)
            finish(tuple(layers))

        return stepping(scene, step)

    def raw_views(self, cell: Cell) -> Contestant:
        raise UnavailableError("a slice is a copy in JAX; what raw returns is attended to whole")

    def plain(self, cell: Cell) -> Contestant:
        """The same without the compiler option that makes it O(1): what one finds in most code."""
        if not _converts(cell):
            raise UnavailableError(f"the same as raw for {cell.dtype} on {cell.backend.device}")
        return Contestant(PLAIN, self._writing(cell, _writer()))

    def _writing(self, cell: Cell, write: Any) -> Any:
        finish = self.finish
        keys, values = cell.history()
        k, v = cell.token(), cell.token()

        def run(steps: int) -> None:
            nonlocal keys, values
            for p in range(cell.capacity - steps, cell.capacity):
                keys = write(keys, k, np.int32(p))
                values = write(values, v, np.int32(p))
                finish((keys, values))

        return run


def _converts(cell: Cell | Decoding) -> bool:
    return cell.backend.device.startswith("cpu") and cell.dtype in _NORMALIZED


def _writer_for(cell: Cell | Decoding) -> Any:
    """The writer that costs what it writes, whatever the dtype."""
    return _writer(tuple(_COPY_ONLY.items())) if _converts(cell) else _writer()


@cache
def _writer(options: tuple[tuple[str, str], ...] = ()) -> Any:
    def write(buffer: NativeArray, update: NativeArray, position: NativeArray) -> NativeArray:
        return lax.dynamic_update_slice(buffer, update, (0, 0, position, 0))

    return jax.jit(write, donate_argnums=0, compiler_options=dict(options) or None)


FRAMEWORK = JaxFramework()
