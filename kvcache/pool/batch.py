"""The tokens of a forward pass, as given to a multi-sequence cache."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from kvcache._types import Int32s


class Batch:
    """The tokens of one forward pass, of one or many sequences in any order.

    positions: position of each token in its sequence, >= 0; int32 [tokens].
    sequences: id of each token's sequence; int32 [tokens].
    multimodal: indices into the batch of the tokens that bring encoder output.

    Positions and sequences are copied, so later changes to the arguments do no harm.

    Raises: ValueError for an empty batch, unequal lengths, or anything but int32 numbers.
    """

    __slots__ = ("multimodal", "positions", "sequences")

    def __init__(
        self,
        positions: npt.ArrayLike,
        sequences: npt.ArrayLike,
        multimodal: Sequence[int] = (),
    ) -> None:
        self.positions = _int32s(positions)
        self.sequences = _int32s(sequences)
        self.multimodal = tuple(operator.index(index) for index in multimodal)
        tokens = self.positions.size
        if tokens == 0 or tokens != self.sequences.size:
            raise ValueError(
                "a batch has one position and one sequence id per token, and at least one token; "
                f"got {tokens} positions and {self.sequences.size} sequence ids."
            )
        if any(not 0 <= index < tokens for index in self.multimodal):
            raise ValueError(
                f"multimodal holds batch indices, 0 to {tokens - 1}; got {self.multimodal}."
            )

    def __len__(self) -> int:
        return int(self.positions.size)


def _int32s(numbers: npt.ArrayLike) -> Int32s:
    array = np.asarray(numbers)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
        raise ValueError(
            f"positions and sequences are lists of integers; got {array.dtype} {array.shape}."
        )
    narrow = array.astype(np.int32)  # a copy: the pass keeps it, and plans read it later
    if (narrow != array).any():  # astype wraps numbers beyond int32 without a word
        raise ValueError(f"positions and sequences are int32; got {array.min()} to {array.max()}.")
    return narrow
