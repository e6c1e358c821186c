"""Features of layers, kept from one denoising step to the next."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from itertools import chain
from typing import Self

from kvcache.backends import Array
from kvcache.errors import BoundsError, DiffusionCacheError

from .stats import HitStats
from .streams import Stream, Streams, bytes_of, distinct


class StepCache:
    """Store of features between steps, as in DeepCache (Ma et al., 2023).

    ::

        with StepCache(num_layers, streams=("cond", "uncond")) as cache:
            for step in range(steps):
                for layer in deep:
                    if cache.should_refresh(step, interval=3):
                        cache.set(layer, compute(layer, x), "cond")
                    features = cache.get(layer, "cond")

    Shallow layers are always computed, and need no slot.

    num_layers: layers are 0 .. num_layers - 1, each with one slot per stream.
    streams: how many slots a layer has, or their names. The two passes of classifier-free guidance
        are two streams.

    Arrays are of any framework and shape; the cache looks at them only for :attr:`nbytes`. It holds
    a reference to each and never deletes one: what it lets go of is freed at once, unless somebody
    else holds it too, or another slot does.

    Raises: DiffusionCacheError for a negative num_layers, no stream, or two of one name; TypeError
    for a string as streams.
    """

    _constant: Array | None
    _slots: list[list[Array | None]]
    """By stream, then by layer."""

    def __init__(self, num_layers: int, streams: int | Sequence[str] = 2) -> None:
        self._num_layers = operator.index(num_layers)
        if self._num_layers < 0:
            raise DiffusionCacheError(f"num_layers must be >= 0; got {num_layers}.")
        self._streams = Streams(streams)
        self._hits = self._misses = 0
        self.free()

    def __repr__(self) -> str:
        return (
            f"<StepCache num_layers={self.num_layers} streams={self.streams} "
            f"holds {len(self.arrays())} arrays>"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.free()

    @property
    def num_layers(self) -> int:
        """Number of layers, each with a slot per stream."""
        return self._num_layers

    @property
    def streams(self) -> tuple[int, ...] | tuple[str, ...]:
        """Names of the streams, or their numbers where they have none, in the order of slots."""
        return self._streams.names

    @property
    def stats(self) -> HitStats:
        """Reads of an array (hits) and of an empty slot (misses); :meth:`free` resets neither."""
        return HitStats(self._hits, self._misses)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays held, each counted once. Views count their own elements.

        Raises: UnknownBackendError, DTypeError for an array that neither has ``nbytes`` nor is of a
        framework and dtype that kvcache knows.
        """
        return sum(map(bytes_of, self.arrays()))

    def arrays(self) -> list[Array]:
        """Return every array held, each once: :attr:`constant`, then by stream, layers in order.

        A lazy framework should compute these at the end of a step, for example with
        ``mlx.core.eval(cache.arrays())``: until then they hold whatever they are computed from.
        """
        return distinct([self._constant, *chain(*self._slots)])

    # Reading and writing.

    @staticmethod
    def should_refresh(step: int, interval: int) -> bool:
        """Whether `step`, counted from 0, computes every layer: the first of each `interval` does.

        Raises: DiffusionCacheError for a negative step, or an interval below 1.
        """
        number, length = operator.index(step), operator.index(interval)
        if number < 0 or length < 1:
            raise DiffusionCacheError(
                "steps count from 0, and an interval is at least 1 (all layers at each step); "
                f"got step {number} and interval {length}."
            )
        return number % length == 0

    def get(self, layer: int, stream: Stream = 0) -> Array | None:
        """Return the array last set for `layer` and `stream`, not a copy; None if none was.

        Raises: BoundsError, UnknownStreamError.
        """
        array = self._slots[self._streams.number(stream)][self._layer(layer)]
        if array is None:
            self._misses += 1
        else:
            self._hits += 1
        return array

    def set(self, layer: int, array: Array | None, stream: Stream = 0) -> None:
        """Hold `array` for `layer` and `stream`, and let go of the one before; None empties it.

        Raises: BoundsError, UnknownStreamError; the cache is unchanged then.
        """
        self._slots[self._streams.number(stream)][self._layer(layer)] = array

    @property
    def constant(self) -> Array | None:
        """An array for the whole run, for example text embeddings; None if there is none.

        Setting it lets go of the one before. Reading it does not count in :attr:`stats`.
        """
        return self._constant

    @constant.setter
    def constant(self, array: Array | None) -> None:
        self._constant = array

    def free(self) -> None:
        """Let go of every array, :attr:`constant` too. The cache can be used again afterwards."""
        self._constant = None
        self._slots = [[None] * self._num_layers for _ in self._streams.names]

    # Addresses.

    def _layer(self, layer: int) -> int:
        number = operator.index(layer)
        if not 0 <= number < self._num_layers:
            raise BoundsError(
                f"a layer must satisfy 0 <= layer < num_layers; got {number} with "
                f"{self._num_layers} layers. Count layers from 0, or make the cache for more: "
                f"StepCache({max(number, 0) + 1}). Nothing was changed."
            )
        return number
