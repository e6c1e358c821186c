"""Logits to compare with: cold runs over fresh caches, and passes without any cache."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from kvcache.backends import HostArray

from .compare import difference, tails
from .operations import Ids
from .play import joined, pieces
from .target import Ability, Chunks, Target

_MARGIN = 16
"""Times the noise that was measured: how much of it is still taken for noise."""
_CHUNKING_MARGIN = 8
_MOST_ROUNDINGS = 256
"""Roundings of the largest logit, to which cold runs may differ by chunking without suspicion."""
_PROBES = 3


class ColdRuns:
    """Cold runs of one target, each computed once."""

    def __init__(self, target: Target) -> None:
        self._target = target
        self._runs: dict[Chunks, HostArray] = {}
        self._references: dict[Ids, HostArray] = {}

    def prepare(self, histories: Sequence[Chunks]) -> None:
        """Compute all of `histories`; one that goes on from another serves both."""
        for chunks in sorted(histories, key=len, reverse=True):
            self.logits(chunks)
        if Ability.REFERENCE in self._target.abilities:
            for ids in sorted(map(joined, histories), key=len, reverse=True):
                self.reference(ids)

    def logits(self, chunks: Chunks) -> HostArray:
        """Return the logits of the last of `chunks`."""
        if chunks not in self._runs:
            for number, output in enumerate(self._target.cold(chunks), 1):
                self._runs.setdefault(chunks[:number], output)
        return self._runs[chunks]

    def reference(self, ids: Ids) -> HostArray:
        """Return the logits behind each of `ids`, computed without a cache."""
        for longer, logits in self._references.items():
            if longer[: len(ids)] == ids:
                return logits[: len(ids)]
        self._references[ids] = self._target.reference(ids)
        return self._references[ids]

    def clear(self) -> None:
        """Forget all runs."""
        self._runs.clear()
        self._references.clear()


class Noise:
    """The differences that equal tokens may show, because a kernel rounds by its shapes.

    kernel: the largest difference between logits of equal tokens, computed without a cache in
        passes of several lengths. None for a target that cannot compute without one.
    chunking: the same of cold runs in passes of several sizes.
    scale: largest logit.
    """

    def __init__(self, kernel: float | None, chunking: float, scale: float, epsilon: float) -> None:
        self.kernel, self.chunking, self.scale = kernel, chunking, scale
        # Where the kernel can be asked without a cache, cold runs count up to some roundings only:
        # a cache that is wrong in some chunkings would hide itself in the noise that it makes.
        shown = _CHUNKING_MARGIN * chunking
        if kernel is not None:
            shown = max(_MARGIN * kernel, min(shown, _MOST_ROUNDINGS * epsilon * scale))
        self.bound = max(shown, _MARGIN * epsilon * scale)
        """Largest difference of logits that counts as noise."""


def measure_noise(target: Target, seed: int) -> Noise:
    """Compare cold runs of `target` with one another, on random tokens."""
    rng = np.random.default_rng([seed, 0])
    kernel, chunking, scale, epsilon = 0.0, 0.0, 0.0, 0.0
    has_reference = Ability.REFERENCE in target.abilities
    for _ in range(_PROBES):
        length = min(target.max_tokens, max((3 * edge for edge in target.edges), default=40))
        ids = tuple(map(int, rng.integers(0, target.vocab_size, length)))
        rows = [_rows(target, pieces(ids, sizes)) for sizes in ((), (1,), (5,), (7, 2))]
        chunking = max(
            chunking, *(difference(*tails(run, rows[0]), target.partial) for run in rows[1:])
        )
        scale = max(scale, float(np.nanmax(np.abs(rows[0]))))
        epsilon = max(epsilon, float(np.finfo(_float_dtype(rows[0])).eps))
        if has_reference:
            whole = target.reference(ids)
            for stop in (1, 2, 5, length // 3, length // 2, length - 1):
                part = target.reference(ids[:stop])
                kernel = max(kernel, difference(part, whole[:stop], target.partial))
    return Noise(kernel if has_reference else None, chunking, scale, epsilon)


def _rows(target: Target, chunks: Sequence[Ids]) -> HostArray:
    """Return the logits of a cold run that all chunkings show: behind the last token at least."""
    outputs = target.cold(tuple(chunks))
    if all(len(output) == len(chunk) for output, chunk in zip(outputs, chunks, strict=True)):
        return np.concatenate(outputs)
    return outputs[-1][-1:]


def _float_dtype(array: HostArray) -> np.dtype[np.floating]:
    return array.dtype if array.dtype.kind == "f" else np.dtype(np.float32)
