"""The tokens of a forward pass, as given to a multi-sequence cache."""

from __future__ import annotations

from collections.abc import Sequence

import numpy.typing as npt

from kvcache._checks import as_batch_indices, as_int32s

_BOTH = "positions and sequences"


class Batch:
    """The tokens of one forward pass, of one or many sequences in any order.

    positions: position of each token in its sequence, >= 0; int32 [tokens].
    sequences: id of each token's sequence; int32 [tokens].
    multimodal: indices into the batch of the tokens that bring encoder output, or one bool per
        token.

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
        self.positions = as_int32s(positions, _BOTH)
        self.sequences = as_int32s(sequences, _BOTH)
        tokens = self.positions.size
        if tokens == 0 or tokens != self.sequences.size:
            raise ValueError(
                "a batch has one position and one sequence id per token, and at least one token; "
                f"got {tokens} positions and {self.sequences.size} sequence ids."
            )
        self.multimodal = as_batch_indices(multimodal, tokens, "multimodal")

    def __len__(self) -> int:
        return int(self.positions.size)
